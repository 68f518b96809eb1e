"""README is true: its papers, its files, its Python."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCES = [path.read_text(encoding="utf-8") for path in (ROOT / "modeldiff").rglob("*.py")]


def test_every_paper_that_the_code_cites_is_in_the_table():
    cited = {found for text in SOURCES for found in re.findall(r"\b2\d{3}\.\d{5}\b", text)}
    assert len(cited) >= 4
    assert cited <= set(re.findall(r"\b2\d{3}\.\d{5}\b", README))


def test_every_module_that_the_table_names_exists():
    rows = [row.split("|")[3] for row in README.split("## Papers and modules")[1].split("\n")[4:]
            if row.startswith("|")]  # fmt: skip
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert len(named) >= 4
    missing = [name for name in named if not (ROOT / "modeldiff" / f"{name}.py").exists()
               and not (ROOT / "modeldiff" / name).is_dir()]  # fmt: skip
    assert not missing


def test_links_and_pictures_exist_and_are_small():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link
    for image in (ROOT / "notebooks" / "images").glob("*"):
        assert image.stat().st_size <= 300_000


def test_a_stranger_finds_the_start_first_and_every_jump_lands():
    headings = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    places = {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}
    jumps = re.findall(r"\]\(#([^)]+)\)", README)
    assert len(jumps) >= 5
    assert set(jumps) <= places
    lines = README.splitlines()
    for start in ("## Two commands", "## Your own models", "```python", "**Limits.**"):
        assert any(line.startswith(start) for line in lines[:150]), start


def test_the_facade_lists_what_it_offers_and_nothing_else():
    import modeldiff

    public = [name for name in dir(modeldiff) if not name.startswith("_")]
    assert "ModelPair" in public
    assert "import_module" not in public
    assert [name for name in public if not (getattr(modeldiff, name).__doc__ or "").strip()] == []


def test_the_two_commands_are_one_line_each():
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert "modeldiff audit organism:em-rank1" in commands[0]
    assert commands[1].endswith("-m pytest -q")


@pytest.mark.slow
def test_the_python_runs_as_it_stands(tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(block, "README.md", "exec"), scope)
    assert (tmp_path / "audits/mine/report.html").exists()
    assert scope["report"].complete
