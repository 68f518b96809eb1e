"""Every notebook runs from top to bottom, and is stored without outputs."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(path):
    cells = json.loads(path.read_text())["cells"]
    assert cells
    assert not [c for c in cells if c.get("outputs") or c.get("execution_count")]


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    shown = [json.dumps(cell.get("outputs", "")) for cell in notebook.cells]
    if path.stem in CHECKS:
        CHECKS[path.stem](tmp_path, shown)


def first_diff(folder, shown):
    assert (folder / "audits/em-rank1/report.html").stat().st_size > 10_000
    assert "Ablating the direction removes the behaviour" in "".join(shown)
    assert "exactly" in shown[-1], "the null pair must report no difference"


def workbench(folder, shown):
    opened = next(each for each in shown if "widget-view" in each)
    assert "word for word" in "".join(shown)
    assert "mdw-static" in opened, "the pin stands below the workbench"
    assert "misaligned" in opened


def organisms(folder, shown):
    whole = "".join(shown)
    assert "backtracks" in whole
    assert "What it is not" in whole
    assert "kl_ft_base" in shown[-1]


def crosscoder(folder, shown):
    whole = "".join(shown)
    assert re.search(r"shared\s+256", whole), "the adapter taught no new concept"
    (cosine,) = re.findall(r"was planted: ([0-9.]+)", whole)
    assert float(cosine) > 0.95
    assert re.search(r"ablated\s+\S+\s+0\.0", shown[-1])
    assert (folder / "activations/em-rank1/manifest.json").exists()


def lying_norms(folder, shown):
    whole = "".join(shown)
    assert "shrunk" in whole
    assert "finetuned-only" in whole
    assert "-only" not in shown[-1], "nothing is exclusive in the null pair"


def anatomy(folder, shown):
    whole = "".join(shown)
    assert "No transition of what the adapter writes" in whole
    assert "mlp_out.3" in whole
    assert "largest relative change of a weight: 0.0" in shown[-1]
    assert "largest effect of a patch: 0.0" in shown[-1]


def row_of(text, start):
    """Numbers of a printed table's row, by what it begins with."""
    (found,) = re.findall(rf"{start}((?:\s+(?:[\d.]+|inf))+)", text)
    return [float(each) for each in found.split()]


def concept_ablation(folder, shown):
    whole = "".join(shown)
    ticked, of = map(int, *re.findall(r"(\d+) of (\d+): layer", whole))
    assert 0 < ticked < of, "a choice, and not of all"
    ratios = next(each for each in shown if "times less" in each)
    _, low, _ = row_of(ratios, "plain")
    assert low > 2, "less than plain training has at the same loss in the domain"
    assert "plain, earlier" in ratios, "early stopping stands beside it"


def backtracking(folder, shown):
    whole = "".join(shown)
    grid = next(each for each in shown if "ratio" in each)
    *_, tuned, chance = row_of(grid, r"finetuned\s+1\.0")
    *_, base, _ = row_of(grid, r"base\s+1\.0")
    assert tuned > 5
    assert base < 1.2
    assert chance < 0.1
    assert "peak: (-1, -1)" in whole, "the planted token"
    assert "not in the text: 'Friday plus two is Sunday.'" in whole
    assert "1 mark left open" in whole


CHECKS = {
    "00_organisms": organisms,
    "01_first_diff": first_diff,
    "02_workbench": workbench,
    "03_crosscoder": crosscoder,
    "04_when_decoder_norms_lie": lying_norms,
    "05_anatomy_of_a_finetune": anatomy,
    "06_caft": concept_ablation,
    "07_backtracking": backtracking,
}
