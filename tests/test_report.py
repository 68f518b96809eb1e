import json
import math
import re
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeldiff import report_files
from modeldiff.errors import FileFormatError, MismatchError, ModelDiffError
from modeldiff.report import Report, Table, TableError
from modeldiff.report_compare import compare_frames
from modeldiff.report_files import _decode_frame, _encode_frame, _json
from tests.report_sample import (
    bare,
    behaviour,
    controls,
    hostile,
    sample,
    with_table,
    without_behaviour,
)

REPORTS = [sample, without_behaviour, hostile]


@cache
def html_of(make) -> str:
    return make().to_html()


@pytest.fixture
def plain_page(monkeypatch):
    """Rendering takes a second, and where only files matter it shows nothing."""
    monkeypatch.setattr(Report, "to_html", lambda _: "a page")


def assert_same(a: Report, b: Report) -> None:
    for field in fields(Report):
        if field.name not in ("tables", "directions"):
            assert getattr(a, field.name) == getattr(b, field.name), field.name
    assert list(a.tables) == list(b.tables)
    for name, table in a.tables.items():
        other = b.tables[name]
        assert (table.title, table.caption) == (other.title, other.caption)
        pd.testing.assert_frame_equal(table.frame, other.frame, check_exact=True)
    assert len(a.directions) == len(b.directions)
    for mine, other in zip(a.directions, b.directions, strict=True):
        assert mine.unit.equal(other.unit)
        for field in fields(mine):
            if field.name != "unit":
                assert getattr(mine, field.name) == getattr(other, field.name)


# --- files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", REPORTS)
def test_a_report_comes_back_exactly(make, tmp_path):
    report = make()
    report.save_to(tmp_path)
    again = Report.load_from(tmp_path)
    assert_same(report, again)
    assert again.content_key == report.content_key
    assert (tmp_path / "report.html").read_text("utf-8") == html_of(make)


def test_every_kind_of_column_comes_back_with_its_dtype(tmp_path):
    frame = pd.DataFrame(
        {
            "float": [math.nan, -0.0, math.inf],
            "extreme": [5e-324, np.finfo(float).max, 0.1 + 0.2],
            "single": np.array([0.1, math.nan, 3e38], np.float32),
            "int": [np.iinfo(np.int64).min, 0, 1],
            "unsigned": np.array([0, 1, 2**64 - 1], np.uint64),
            "small": np.array([-128, 0, 127], np.int8),
            "bool": [True, False, True],
            "text": ["", "\x00\u202e</script>", "漢字🙂"],
            "missing text": ["nan", None, "None"],
            "mixed": pd.Series(["a", None, 1.5], dtype=object),
            "numbers as objects": pd.Series([math.inf, 3, True], dtype=object),
            'hostile "><name': [1, 2, 3],
            "__float__": [1, 2, 3],
        }
    )
    report = with_table(frame)
    report.save_to(tmp_path)
    again = Report.load_from(tmp_path).table("numbers")
    pd.testing.assert_frame_equal(frame, again, check_exact=True)
    assert math.copysign(1, again["float"][1]) == -1
    stored = (tmp_path / "tables" / "numbers.json").read_text()
    assert "NaN" not in stored
    assert "Infinity" not in stored  # strict JSON, readable by anything


def test_a_lone_surrogate_in_a_models_answer_is_no_reason_to_lose_an_audit(tmp_path):
    frame = pd.DataFrame({"token": pd.Series(["\ud800", "ok"], dtype=object)})
    report = replace(with_table(frame), title="\udfff")
    report.save_to(tmp_path)
    assert_same(report, Report.load_from(tmp_path))
    assert "⟨U+D800⟩" in report.to_html()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(), st.text(), st.integers(-(2**63), 2**63 - 1)), max_size=8))
def test_any_numbers_and_text_come_back(rows):
    frame = pd.DataFrame(rows, columns=["float", "text", "int"])
    frame = frame.astype({"float": float, "text": object, "int": "int64"})
    again = _decode_frame(json.loads(_json(_encode_frame(frame))))
    pd.testing.assert_frame_equal(frame, again, check_exact=True)


@pytest.mark.parametrize(
    "frame", [pd.DataFrame(), pd.DataFrame({"a": [], "b": []}), behaviour()[:0]]
)
def test_empty_tables_come_back_and_are_shown(frame, tmp_path):
    report = with_table(frame)
    report.save_to(tmp_path)
    again = Report.load_from(tmp_path).table("numbers")
    assert list(again.columns) == list(frame.columns)
    assert len(again) == 0
    assert "This table has no rows." in report.to_html()


def test_numbers_among_none_become_numbers():
    table = Table(pd.DataFrame({"x": [None, 0.5], "y": [None, None], "z": ["a", None]}), "t", "c")
    assert table.frame.dtypes.astype(str).tolist()[:2] == ["float64", "float64"]
    assert table.frame["x"].tolist()[1] == 0.5
    assert table.frame["z"].tolist()[0] == "a"


def test_settings_come_back_as_json_would_give_them(tmp_path):
    given = {"layers": (1, 2), "path": Path("a/b"), "n": np.int64(3), "low": -math.inf, "x": None}
    report = bare(settings=given)
    assert report.settings == {"layers": [1, 2], "path": "a/b", "n": 3, "low": -math.inf, "x": None}
    report.save_to(tmp_path)
    assert Report.load_from(tmp_path).settings == report.settings


def files_of(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


SAVED = [
    "directions.safetensors",
    "manifest.json",
    "report.html",
    *(f"tables/{name}.json" for name in sorted(sample().tables)),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    sample().save_to(folder)
    return {name: (folder / name).read_bytes() for name in files_of(folder)}


@pytest.fixture
def folder(saved, tmp_path):
    for name, content in saved.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return tmp_path


def test_the_files_are_the_ones_that_are_documented(saved):
    assert sorted(saved) == SAVED


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("damage", [flipped, lambda raw: raw[:-20], lambda raw: b"", None])
def test_damage_to_any_file_is_found_and_named(folder, name, damage):
    path = folder / name
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    with pytest.raises(FileFormatError, match=re.escape(name)):
        Report.load_from(folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"holds": false', '"holds": true'),
        ('"version": "1"', '"version": "2"'),
        ('"tables/behaviour.json"', '"../../etc/passwd"'),
        ('"format": "modeldiff.report"', '"format": "other"'),
    ],
)
def test_a_manifest_that_was_edited_is_refused(folder, old, new):
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    assert old in text
    manifest.write_text(text.replace(old, new))
    with pytest.raises(FileFormatError, match=r"manifest\.json"):
        Report.load_from(folder)


def test_a_manifest_never_reaches_outside_its_folder(folder):
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["files"]["../secret"] = "0"
    body = {key: manifest[key] for key in ("report", "files")}
    manifest["digest"] = report_files.digest(body)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder.parent / "secret").write_text("s")
    with pytest.raises(FileFormatError, match="which no report has"):
        Report.load_from(folder)


@pytest.mark.parametrize("stop_at", range(1, 6))
def test_an_interrupted_save_leaves_the_old_report(folder, saved, plain_page, monkeypatch, stop_at):
    count = 0

    def stopping(path):
        nonlocal count
        count += 1
        if count == stop_at:
            raise KeyboardInterrupt
        return "0" * 16

    monkeypatch.setattr(report_files, "file_digest", stopping)
    with pytest.raises(KeyboardInterrupt):
        replace(sample(), title="new").save_to(folder)
    monkeypatch.undo()
    assert {name: (folder / name).read_bytes() for name in files_of(folder)} == saved
    assert Report.load_from(folder).title == sample().title


@pytest.mark.parametrize("survivors", range(4))
def test_no_mixture_of_two_reports_can_be_read(folder, plain_page, monkeypatch, survivors):
    """The process dies between two renames: what is left must not pass for a report."""
    rename, done = Path.replace, 0

    def dying(self, target):
        nonlocal done
        if done >= survivors:
            raise OSError("power cut")
        done += not Path(target).name.startswith(".")
        return rename(self, target)

    changed = sample()
    tables = {
        name: replace(table, frame=table.frame[:-1]) for name, table in changed.tables.items()
    }
    monkeypatch.setattr(Path, "replace", dying)
    with pytest.raises(OSError, match="power cut"):
        replace(changed, tables=tables, title="new").save_to(folder)
    monkeypatch.undo()
    if survivors:
        with pytest.raises(FileFormatError):
            Report.load_from(folder)
    else:
        assert_same(Report.load_from(folder), sample())


def test_a_first_save_that_is_interrupted_leaves_no_report(tmp_path, plain_page, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(report_files, "save_directions", stop)
    with pytest.raises(KeyboardInterrupt):
        sample().save_to(tmp_path / "audit")
    assert files_of(tmp_path) == []
    with pytest.raises(FileFormatError, match="manifest"):
        Report.load_from(tmp_path / "audit")


def test_replacing_a_report_removes_its_old_tables_and_nothing_else(folder, plain_page):
    (folder / "notes.txt").write_text("mine")
    (folder / "tables" / "mine.json").write_text("{}")
    report = without_behaviour()
    report.save_to(folder)
    assert_same(Report.load_from(folder), report)
    kept = {"notes.txt", "tables/mine.json", "manifest.json", "report.html"}
    assert set(files_of(folder)) - {"directions.safetensors"} == kept | {
        "tables/effects.json",
        "tables/controls.json",
    }


# --- values --------------------------------------------------------------------------------


def test_tables_are_copies():
    report, frame = sample(), behaviour()
    copy = report.table()
    copy["rate"] = 9.0
    pd.testing.assert_frame_equal(report.table(), behaviour())
    table = Table(frame, "t", "c")
    frame.loc[0, "rate"] = 9.0
    pd.testing.assert_frame_equal(table.frame, behaviour())


def test_a_missing_table_is_an_error_that_names_the_others():
    with pytest.raises(TableError, match=r"no table 'behaviour'. Its tables: effects, controls\.$"):
        without_behaviour().table()
    assert issubclass(TableError, KeyError)
    assert issubclass(TableError, ModelDiffError)
    assert without_behaviour().main_table == "effects"


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"a": [1]}, index=["x"]),
        pd.DataFrame({0: [1]}),
        pd.DataFrame([[1, 2]], columns=["a", "a"]),
        pd.DataFrame({"when": pd.to_datetime(["2020-01-01"])}),
        pd.DataFrame({"list": [[1]]}),
        pd.DataFrame({"c": pd.Series(["a"], dtype="category")}),
        pd.DataFrame({"c": [1j]}),
    ],
)
def test_a_table_that_could_not_be_kept_is_refused_at_once(frame):
    with pytest.raises(MismatchError, match="table 'odd'"):
        Table(frame, "odd", "")


@pytest.mark.parametrize("name", ["../up", "A", "", "a b", ".hidden", "a/b"])
def test_names_of_tables_are_names_of_files(name):
    with pytest.raises(MismatchError, match="name a table"):
        bare(tables={name: Table(behaviour(), "t", "c")})


def test_settings_that_json_cannot_hold_are_refused_and_found():
    with pytest.raises(MismatchError, match=r"settings\['load'\]\['mask'\]\[1\] is a set"):
        bare(settings={"load": {"mask": [0, {1}]}})


def test_repr_is_short_and_says_if_it_was_interrupted():
    assert repr(sample()).startswith(
        "Report 'em-rank1 against em-base' · findings: 2 shown, 1 refuted, 1 open · tables: behav"
    )
    assert repr(without_behaviour()).endswith("interrupted")


# --- comparing -----------------------------------------------------------------------------


def test_a_report_agrees_with_itself_and_wall_times_do_not_matter():
    report = sample()
    result = report.compare(replace(report, seconds={"answers": 99.0}))
    assert result["within"].all()
    assert set(result["table"]) == set(report.tables)
    columns = sum(len(table.frame.columns) for table in report.tables.values())
    assert len(result) == columns
    assert (result["n_different"] == 0).all()


def test_compare_finds_a_planted_difference_of_the_right_size():
    frame = behaviour()
    frame["rate"] += np.where(frame.index == 2, 0.25, 0)
    frame.loc[3, "coherent"] = math.nan
    frame.loc[4, "cell"] = "other"
    report = sample()
    changed = replace(report, tables={**report.tables, "behaviour": Table(frame, "t", "c")})
    result = report.compare(changed).set_index(["table", "column"])
    wrong = result[~result["within"]]
    assert set(wrong.index) == {("behaviour", c) for c in ("rate", "coherent", "cell")}
    assert wrong.loc[("behaviour", "rate"), "max_difference"] == pytest.approx(0.25, abs=1e-12)
    assert wrong["max_difference"].isna().tolist() == [True, False, True]
    assert list(wrong["n_different"]) == [1, 1, 1]
    loose = report.compare(changed, tolerance=0.3).set_index(["table", "column"])
    assert loose.loc[("behaviour", "rate"), "within"]


def test_compare_knows_infinities_and_missing_values():
    a = pd.DataFrame({"x": [math.inf, math.nan, -math.inf], "y": pd.Series([None, "a", True])})
    assert compare_frames({"t": a}, {"t": a.copy()}, 0.0)["within"].all()
    b = a.assign(x=[-math.inf, math.nan, -math.inf])
    assert compare_frames({"t": a}, {"t": b}, 1e9)["within"].tolist() == [False, True]


def test_what_cannot_be_compared_is_a_row_and_not_an_error():
    ours = {"a": controls(), "b": pd.DataFrame({"x": [1.0]}), "c": pd.DataFrame({"x": [1]})}
    theirs = {"a": controls()[:5], "b": pd.DataFrame({"y": [1.0]}), "d": pd.DataFrame({"x": [1]})}
    result = compare_frames(ours, theirs, 1e-6)
    assert not result["within"].any()
    assert result["max_difference"].isna().all()
    notes = result.groupby("table")["note"].agg(set)
    assert notes["a"] == {"20 rows here, 5 in the other report"}
    assert notes["b"] == {"column only in this report", "column only in the other report"}
    assert notes["c"] == {"only in this report"}
    assert notes["d"] == {"only in the other report"}
