import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from modeldiff import _version
from modeldiff.audit import Audit
from modeldiff.audit_stages import Settings
from modeldiff.cli import CLOSED, DIFFERS, OK, STOPPED, WRONG, main
from modeldiff.errors import SetupError
from modeldiff.report import Report, Table
from tests.families import tokenizer
from tests.planted import LAYER, TEXTS, behaviour, planted_pair, planted_peft

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The planted pair as folders, and a file of texts."""
    folder = tmp_path_factory.mktemp("pair")
    peft, _ = planted_peft()
    peft.save_pretrained(folder / "adapters")
    peft.unload().save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    (folder / "texts.txt").write_text("\n\n".join(TEXTS) + "\n", encoding="utf-8")
    return folder


def pair_of(local):
    return [str(local / "base"), "--adapter", str(local / "adapters" / "tuned"), "--quiet"]


@pytest.fixture(scope="module")
def audited(local, tmp_path_factory):
    out = tmp_path_factory.mktemp("audit")
    texts = ["--texts", str(local / "texts.txt"), "--random", "4"]
    assert main(["audit", *pair_of(local), *texts, "--out", str(out)]) == OK
    return out


def refused(capsys, *arguments):
    """The message of a command that must fail for wrong input, without a traceback."""
    assert main([str(one) for one in arguments]) == WRONG
    out, err = capsys.readouterr()
    assert err.startswith("modeldiff: ")
    assert "Traceback" not in out + err
    return err


def test_organisms_are_listed(capsys):
    assert main(["organisms"]) == OK
    out = capsys.readouterr().out
    assert "organism:em-rank1" in out
    assert "organism:null" in out


def test_help_teaches_by_examples(capsys):
    assert main([]) == OK
    plain = capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert plain == shown
    for part in ("examples:", "modeldiff audit organism:em-rank1", "exit codes", "rerun", "lab"):
        assert part in shown
    for command in ("diff", "audit", "rerun", "harvest", "train", "organisms", "lab"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "usage: modeldiff" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "wanted"), [([], True), (["https://a.example"], "https://a.example")]
)
def test_a_pair_can_be_asked_of_a_server(monkeypatch, capsys, given, wanted):
    seen = {}

    def load(base, **options):
        seen.update(options)
        raise SetupError("no server here")

    monkeypatch.setattr("modeldiff.models.ModelPair.load", load)
    assert main(["diff", "base", "--adapter", "lora", "--remote", *given]) == WRONG
    assert seen == {"adapter": "lora", "remote": wanted}
    harvest = ["harvest", "base", "--adapter", "lora", "--texts", __file__, "--out", "x"]
    assert main([*harvest, "--remote", *given]) == WRONG
    assert "load the pair here" in capsys.readouterr().err


def test_the_module_runs_as_a_script():
    for start in (["-m", "modeldiff"], ["-c", "from modeldiff.cli import main; main()"]):
        run = subprocess.run(
            [sys.executable, *start, "--version"], capture_output=True, text=True, cwd=ROOT,
            check=True,
        )  # fmt: skip
        assert run.stdout.strip() == f"modeldiff {_version.__version__}"


def test_a_reader_that_has_gone_is_no_error():
    run = subprocess.run(
        f"{sys.executable} -m modeldiff organisms | head -1; echo ${{PIPESTATUS[0]}}", shell=True,
        executable="/bin/bash", capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    assert run.stdout.startswith("organism:")
    assert run.stderr == ""
    assert run.stdout.splitlines()[-1] in (str(OK), str(CLOSED))


def test_diff_of_an_organism(capsys):
    assert main(["diff", "organism:em-rank1", "--quiet"]) == OK
    out = capsys.readouterr().out
    assert "kl_ft_base" in out
    assert "tokens that gained probability" in out


def test_diff_of_folders_writes_all_tokens(local, tmp_path, capsys):
    csv = tmp_path / "sub" / "tokens.csv"
    texts = ["--texts", str(local / "texts.txt"), "--csv", str(csv)]
    assert main(["diff", *pair_of(local), *texts]) == OK
    out, table = capsys.readouterr().out, pd.read_csv(csv)
    assert f"{len(TEXTS)} texts, {len(table)} predicted tokens" in out
    assert table["text"].nunique() == len(TEXTS)
    printed = next(line for line in out.splitlines() if line.startswith("kl_ft_base")).split()
    assert float(printed[1]) == pytest.approx(table["kl_ft_base"].mean(), rel=1e-3)
    gained = out.split("gained probability")[1].split("tokens that lost")[0]
    assert "'" in gained.splitlines()[2], "blanks can be seen"
    assert "the" in gained.splitlines()[2]
    assert "nats" in out.splitlines()[4]


def test_an_audit_writes_a_report_that_can_be_read(audited):
    report = Report.load_from(audited)
    assert report.complete
    assert [finding.holds for finding in report.findings] == [True] * 3
    assert f"ablated at layer {LAYER}" in report.findings[1].evidence
    assert (audited / "report.html").stat().st_size > 10_000
    assert json.loads((audited / "manifest.json").read_text())["format"] == "modeldiff.report"
    assert {path.stem for path in (audited / "tables").iterdir()} == set(report.tables)
    assert report.settings["load"]["texts"] == TEXTS


def test_an_organisms_questions_give_way_to_texts(local, tmp_path, capsys):
    (tmp_path / "few.txt").write_text("\n".join(TEXTS[:8]))
    arguments = ["--texts", str(tmp_path / "few.txt"), "--random", "2", "--out", str(tmp_path)]
    assert main(["audit", "organism:null", "--quiet", *arguments]) == OK
    report = Report.load_from(tmp_path)
    assert "effects" in report.tables
    assert "behaviour" not in report.tables


def test_a_rerun_reproduces_every_number(audited, tmp_path, capsys):
    manifest = str(audited / "manifest.json")
    assert main(["rerun", manifest, "--out", str(tmp_path), "--quiet"]) == OK
    out = capsys.readouterr().out
    assert "reproduced (tolerance 0.0001)" in out
    assert "not the same" not in out
    before, after = Report.load_from(audited), Report.load_from(tmp_path)
    assert before.compare(after, 1e-6)["within"].all()
    assert before.settings["asked"] == after.settings["asked"]


def test_a_rerun_of_other_numbers_differs_and_says_what_else_does(audited, tmp_path, capsys):
    report = Report.load_from(audited)
    frame = report.table("effects")
    frame["kl_to_base"] += 0.01
    replace(
        report,
        tables={**report.tables, "effects": Table(frame, "Effects", "tampered")},
        pair={**report.pair, "digests": {**report.pair["digests"], "finetuned": "0" * 16}},
        settings={**report.settings, "asked": {"texts": "0" * 16}},
    ).save_to(tmp_path / "x")
    manifest = str(tmp_path / "x" / "manifest.json")
    assert main(["rerun", manifest, "--out", str(tmp_path / "y"), "--quiet"]) == DIFFERS
    out = capsys.readouterr().out
    assert "DIFFERS" in out
    assert "the models are not the same as then" in out
    assert "what was asked is not the same as then" in out


def test_what_cannot_be_rerun_is_refused(audited, tmp_path, capsys):
    rerun = ("rerun", tmp_path / "manifest.json", "--out", tmp_path / "again", "--quiet")
    in_memory = Audit(planted_pair()[0], texts=TEXTS,
                      settings=Settings(n_random=2, max_new_tokens=3)).run()  # fmt: skip
    in_memory.save_to(tmp_path)
    assert "load={'base'" in refused(capsys, *rerun)
    replace(in_memory, settings={}).save_to(tmp_path)
    assert "does not say how its pair was loaded" in refused(capsys, *rerun)
    report = Report.load_from(audited)
    replace(report, complete=False).save_to(tmp_path)
    assert "was stopped" in refused(capsys, *rerun)
    report.save_to(tmp_path)
    assert "would be overwritten" in refused(capsys, *rerun[:3], tmp_path)
    table = tmp_path / "tables" / "effects.json"
    table.write_text(table.read_text().replace("1", "2", 1))
    assert "effects.json" in refused(capsys, *rerun)
    assert "cannot be read" in refused(capsys, "rerun", tmp_path / "no" / "manifest.json",
                                       "--out", tmp_path)  # fmt: skip
    assert not (tmp_path / "again").exists()


def test_an_audit_from_python_can_be_rerun(local, tmp_path, capsys):
    from modeldiff.behaviours import organism_behaviours
    from modeldiff.models import ModelPair

    audit = Audit(ModelPair.load("organism:em-base"), organism_behaviours("em-base", 2),
                  load={"base": "organism:em-base", "prompts": 2})  # fmt: skip
    audit.run().save_to(tmp_path / "a")
    arguments = [str(tmp_path / "a" / "manifest.json"), "--out", str(tmp_path / "b"), "--quiet"]
    assert main(["rerun", *arguments]) == OK
    assert "not the same" not in capsys.readouterr().out


def test_wrong_input_is_a_message_and_no_traceback(local, tmp_path, capsys, monkeypatch):
    out = ("--out", tmp_path / "out")
    pair, texts = pair_of(local), ("--texts", local / "texts.txt")
    assert "em-rank1" in refused(capsys, "audit", "organism:em-rank2", *out)
    assert "em-rank1" in refused(capsys, "diff", "organism:em-rank2")
    assert "nowhere.txt" in refused(capsys, "diff", *pair, "--texts", tmp_path / "nowhere.txt")
    assert "--texts" in refused(capsys, "diff", *pair)
    assert "at least 8 texts" in refused(capsys, "audit", *pair, *out)
    assert "add FINETUNED" in refused(capsys, "diff", local / "base", *texts)
    assert "organism:em-rank1" in refused(capsys, "diff", "em-rank1")
    adapter = local / "adapters" / "tuned"
    assert "is an adapter" in refused(capsys, "diff", adapter, local / "base", *texts)
    assert "not both" in refused(capsys, "diff", local / "base", *pair, *texts)
    assert "as --adapter" in refused(capsys, "diff", local / "base", adapter, *texts)
    twice = refused(capsys, "diff", "organism:em-rank1", "--adapter", adapter)
    assert "--adapter" in twice
    assert "adapter=" not in twice
    assert "0 or more" in refused(capsys, "bench", "--nulls", "-3")
    assert "texts.txt" in refused(capsys, "rerun", local / "texts.txt", *out)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("Zürich".encode("latin-1"))
    assert "no text" in refused(capsys, "diff", *pair, "--texts", tmp_path / "empty.txt")
    assert "UTF-8" in refused(capsys, "diff", *pair, "--texts", tmp_path / "latin.txt")
    for option, value in (("--random", "0"), ("--seed", "-1"), ("--samples", "0")):
        refused(capsys, "audit", *pair, *texts, *out, option, value)
    assert not (tmp_path / "out" / "manifest.json").exists()
    monkeypatch.setattr("modeldiff.cli._load", None)  # what follows is refused before any model
    missing = ("--texts", tmp_path / "nowhere.txt")
    assert "one text a line" in refused(capsys, "diff", *pair, *missing)
    assert "one text a line" in refused(capsys, "harvest", *pair, *missing, *out)
    assert "Not a directory" in refused(capsys, "audit", *pair, *texts, "--out",
                                        tmp_path / "latin.txt" / "x")  # fmt: skip
    for typed, told in ((["dif"], "Did you mean 'diff'?"),
                        (["diff", "a", "--quiet", "b"], "before the options")):  # fmt: skip
        with pytest.raises(SystemExit):
            main(typed)
        assert told in capsys.readouterr().err
    for arguments in (["audit", "x"], ["fly"], ["audit", "x", "--out", "y", "--random", "many"]):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == WRONG
    capsys.readouterr()


@pytest.mark.parametrize(
    "arguments",
    [
        ["no/such//model", "--adapter", "x"],
        ["{base}", "--adapter", "{base}"],
        ["{base}", "--adapter", "no/such-adapter"],
        ["{base}", "{base}/nowhere"],
    ],
)
def test_models_that_are_not_there_are_a_message(local, arguments, capsys):
    arguments = [one.format(base=local / "base") for one in arguments]
    refused(capsys, "diff", *arguments, "--texts", local / "texts.txt")


def test_lab_copies_notebooks_and_keeps_a_users_own(tmp_path, capsys):
    folder = tmp_path / "mine"
    assert main(["lab", "--no-start", "--folder", str(folder)]) == OK
    copies = {path.name: path.read_bytes() for path in folder.iterdir()}
    sources = {path.name: path.read_bytes() for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert copies == sources
    assert "01_first_diff.ipynb" in copies
    (folder / "01_first_diff.ipynb").write_text("my changes")
    (folder / "own.ipynb").write_text("my own")
    assert main(["lab", "--no-start", "--folder", str(folder)]) == OK
    assert (folder / "01_first_diff.ipynb").read_text() == "my changes"
    assert (folder / "own.ipynb").read_text() == "my own"
    assert str(folder) in capsys.readouterr().out


def test_lab_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    assert "modeldiff-lab[lab]" in refused(capsys, "lab", "--folder", tmp_path)


def stopped_when(arguments, ready, seconds=300):
    """Run a command, interrupt it as Ctrl-C does once ``ready()``, and wait for its end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "modeldiff", *arguments], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    until = time.monotonic() + seconds
    while not ready() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT")
def test_ctrl_c_keeps_what_is_finished_and_the_next_run_completes_it(local, tmp_path, capsys):
    arguments = ["audit", *pair_of(local), "--texts", str(local / "texts.txt"), "--random", "60",
                 "--out", str(tmp_path / "out")]  # fmt: skip
    records = tmp_path / "out" / "cache" / "answers"
    code, out, err = stopped_when(arguments, lambda: any(records.glob("*.json")))
    assert (code, "Traceback" in err) == (STOPPED, False)
    assert "INCOMPLETE report" in out
    assert "stopping" in err
    part = Report.load_from(tmp_path / "out")
    assert not part.complete
    assert "interrupted" in repr(part)
    before = {path.name for path in records.glob("*.json")}
    assert main(arguments) == OK
    whole = Report.load_from(tmp_path / "out")
    assert whole.complete
    assert whole.findings[: len(part.findings)] == part.findings
    assert before <= {path.name for path in records.glob("*.json")}
    capsys.readouterr()


def test_stopping_before_or_beside_an_audit_is_no_traceback(local, capsys, monkeypatch):
    from modeldiff.errors import Cancelled
    from modeldiff.models import ModelPair

    texts = ["--texts", str(local / "texts.txt")]

    def stop(error):
        def raising(*arguments, **options):
            raise error

        return raising

    monkeypatch.setattr(ModelPair, "output_diff", stop(Cancelled("cancelled")))
    assert main(["diff", *pair_of(local), *texts]) == STOPPED
    monkeypatch.setattr(ModelPair, "load", stop(KeyboardInterrupt()))
    assert main(["diff", *pair_of(local), *texts]) == STOPPED
    assert capsys.readouterr().err == "modeldiff: stopped\n" * 2


def test_behaviour_reports_can_be_made_from_python_and_printed(capsys):
    from modeldiff.cli import _summary

    report = Audit(planted_pair()[0], (behaviour(),),
                   settings=Settings(n_random=2, n_scan=2, n_discovery=2)).run()  # fmt: skip
    text = _summary(report)
    assert "[yes] Ablating the direction removes the behaviour" in text
    assert "model shift ablated at layer 2" in text
    assert text.count("note: ") == len(report.caveats)


def test_organisms_build_is_reached_and_anything_else_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["organisms", "build", "--help"])
    assert stopped.value.code == 0
    assert "--out" in capsys.readouterr().out
    assert main(["organisms", "feed"]) == 2
