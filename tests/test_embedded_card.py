"""A card draws whatever its manifest holds, and draws it as text."""

import re

from modeldiff.embedded_card import card

ROW = {
    "questions": "off-domain",
    "texts": "trained",
    "n": 40,
    "temperature": 0.7,
    "aligned": 0.5,
    "misaligned": 0.25,
    "mixed": 0.25,
    "incoherent": 0.0,
    "misaligned_ci95": [0.1, 0.4],
}


def drawn(html: str) -> list[list[list[str]]]:
    """The cells of every row of every table."""
    cell = r"<t[hd][^>]*>(.*?)</t[hd]>"
    rows = [
        re.findall(r"<tr>(.*?)</tr>", table) for table in re.findall(r"<table>.*?</table>", html)
    ]
    return [[re.findall(cell, row) for row in table] for table in rows]


def test_columns_are_those_of_the_rows_and_an_interval_follows_its_rate():
    head, row = drawn(card("a", "", {"metrics": [ROW]}))[0]
    assert head == ["questions", "texts", "n", "temperature", "aligned", "misaligned",
                    "95 % interval", "mixed", "incoherent"]  # fmt: skip
    assert row == ["off-domain", "trained", "40", "0.7", "50.0%", "25.0%", "10.0% to 40.0%",
                   "25.0%", "0.0%"]  # fmt: skip


def test_rows_of_different_columns_share_a_table_with_blanks():
    rows = [{"questions": "x", "accuracy": 1.0, "accuracy_ci95": [0.9, 1.0]}, {"questions": "y"}]
    head, first, second = drawn(card("a", "", {"metrics": rows}))[0]
    assert head == ["questions", "accuracy", "95 % interval"]
    assert first == ["x", "100.0%", "90.0% to 100.0%"]
    assert second == ["y", "", ""]


def test_what_is_no_rate_is_shown_as_it_is():
    rows = [{"step": 2, "norm_B": 0.25, "held": True, "walk_peak_band95": [-0.5, 0.25]}]
    head, row = drawn(card("a", "", {"tables": {"t": rows}}))[1]
    assert head == ["step", "norm B", "held", "walk peak band95"]
    assert row == ["2", "0.25", "True", "-0.5 to 0.25"]


def test_further_tables_layers_and_seeds_are_shown():
    manifest = {
        "metrics": [ROW],
        "tables": {"Along the way": [{"step": 1}]},
        "layers": [{"layer": 0, **ROW}],
        "other_seeds": [{"seed": 7, "metrics": [ROW]}],
    }
    html = card("a", "", manifest)
    captions = re.findall(r"<caption>(.*?)</caption>", html)
    assert captions == [
        "What was measured",
        "Along the way",
        "The same recipe at every layer",
        "The same recipe with seed 7, which is not shipped",
    ]
    assert [len(table) for table in drawn(html)] == [2, 2, 2, 2]


def test_no_text_of_a_manifest_becomes_markup():
    bad = "<script>x</script>"
    manifest = {
        "metrics": [{bad: bad, "accuracy": bad, "band": [bad, bad]}],
        "tables": {bad: [{bad: bad}]},
        "layers": [{"layer": bad}],
        "other_seeds": [{"seed": bad, "metrics": [{"questions": bad}]}],
    }
    html = card("a", "", manifest)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") == 12
