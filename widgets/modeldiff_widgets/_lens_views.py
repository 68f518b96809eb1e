"""What the panel Lens shows, as HTML: tokens, answers about one token or a topic, patchscopes."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from modeldiff.difference_lens import KINDS, DifferenceLens, DifferenceTrace
from modeldiff.patchscope import Patchscope
from modeldiff.report_text import token_text
from modeldiff_widgets import _render

_TONES = {"difference": "finetuned", "random": "random", "random difference": "random"}
_WORDS = 5
_TITLES = {"random": "random direction", "random difference": "random difference"}


def positions_html(lens: DifferenceLens, trace: DifferenceTrace, position: int) -> str:
    """One line a position: how large the difference is, how sure, and what it promotes."""
    if not len(lens.reach):
        return ""
    sizes = trace.table().set_index("position")
    first = lens.tokens[(lens.tokens["kind"] == KINDS[0]) & (lens.tokens["rank"] < _WORDS)
                        & (lens.tokens["end"] == "promoted")]  # fmt: skip
    words = {at: " ".join(map(token_text, rows["token"])) for at, rows in
             first.groupby("position")}  # fmt: skip
    rows = [
        [str(row["position"]), float(sizes["relative"][row["position"]]),
         float(sizes["split_half"][row["position"]]), float(row["reach"]), float(row["p_random"]),
         float(row["p_random_difference"]), words.get(row["position"], "")]
        for row in lens.reach.to_dict("records")
    ]  # fmt: skip
    headings = ["position", "norm / base's", "split-half", "reach", "p random",
                "p random difference", "promotes"]  # fmt: skip
    at = lens.reach["position"].tolist().index(position) if len(rows) else -1
    return _render.table(headings, rows, numeric=range(6), selected=at)


def words_html(lens: DifferenceLens, position: int, control: int, n: int) -> str:
    """Tokens at both ends at a position, beside one control of each kind, with the verdict."""
    here = lens.tokens[lens.tokens["position"] == position]
    if not len(here):
        return _render.note("The models do not differ at any position: there are no tokens.")
    most = float(here["logit"].abs().max()) or 1.0
    blocks = []
    for end in ("promoted", "suppressed"):
        for kind in KINDS:
            number = 0 if kind == KINDS[0] else control
            rows = here[(here["end"] == end) & (here["kind"] == kind) & (here["control"] == number)]
            title = end if kind == KINDS[0] else f"{_TITLES[kind]} {number}: {end}"
            blocks.append((title, _TONES[kind], _bars(rows, most, _TONES[kind])))
    rows = _render.columns(blocks[:3]) + _render.columns(blocks[3:])
    return rows + _render.note(_verdict(lens, position, n))


def _bars(rows: pd.DataFrame, most: float, tone: Any) -> str:
    pairs = zip(rows["token"], rows["logit"], strict=True)
    return _render.token_bars([(t, abs(x) / most, f"{x:+.2f}") for t, x in pairs], tone)


def _verdict(lens: DifferenceLens, position: int, n: int) -> str:
    row = lens.reach[lens.reach["position"] == position].iloc[0]
    p, least = max(row["p_random"], row["p_random_difference"]), 1 / (n + 1)
    said = (
        "reaches further than every control of both kinds" if p <= least + 1e-9
        else "does not reach further than all of its controls: such tokens may mean nothing"
    )  # fmt: skip
    flag = " The first token, or a massive one: may be an artefact." if row["flagged"] else ""
    return (
        f"Its largest logit is {row['reach']:.2f}; it {said} (p = {row['p_random']:.2g} "
        f"among {n} random directions, {row['p_random_difference']:.2g} among {n} random "
        f"differences).{flag} Logits at root mean square 1, centred over the vocabulary."
    )


def query_html(table: pd.DataFrame, before: str = "") -> str:
    """Answer of `token_query`."""
    headings = ["token", "logit", "95 % of random directions", "p", "random differences", "p",
                "rank", "random ranks"]  # fmt: skip
    rows = [
        [token_text(str(r["token"])), _signed(r["logit"]),
         _range(r["random_low"], r["random_high"]), float(r["random_p"]),
         _range(r["difference_low"], r["difference_high"]), float(r["difference_p"]),
         f"{r['rank'] + 1:,} of {r['n_tokens']:,}",
         f"{r['rank_low'] + 1:,} to {r['rank_high'] + 1:,}"]
        for r in table.to_dict("records")
    ]  # fmt: skip
    return _render.table(headings, rows, numeric=range(1, len(headings))) + _render.note(
        f"{before}Rank 1 is promoted most. P-values are two-sided and of one token, not corrected "
        "for how many are asked for."
    )


def _range(low: float, high: float) -> str:
    return "–" if math.isnan(low) else f"{_signed(low)} to {_signed(high)}"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def relevance_html(table: pd.DataFrame, words: Sequence[str]) -> str:
    """Table of `relevance_test`; its first row is the one to quote."""
    if not len(table):
        return _render.note("There are no tokens to test.")
    first = table.iloc[0]
    several = table if len(table) > 2 else table.head(1)  # one position is all of them
    headings = ["position", "tokens", "of the topic", "95 %", "random", "rank p",
                "random difference", "rank p"]  # fmt: skip
    rows = [
        [str(r["position"]), f"{r['n_relevant']} of {r['n']}", _percent(r["share"]),
         f"{_percent(r['low'])} to {_percent(r['high'])}", _percent(r["random"]),
         float(r["rank_random"]), _percent(r["random_difference"]),
         float(r["rank_random_difference"])]
        for r in several.to_dict("records")
    ]  # fmt: skip
    verdict = "more than its controls" if first["relevant"] else "no more than its controls"
    return _render.table(headings, rows, numeric=range(1, len(headings))) + _render.note(
        f"{', '.join(words)}: promoted {verdict}. Tokens that 5 % of the unrelated texts hold do "
        "not count; rank p is the share of controls that reach as much, one of them itself."
    )


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.0f} %"


def patchscope_html(found: Patchscope, before: str = "") -> str:
    """Tokens of the vector beside those of one control of each kind, and which length it had."""
    blocks: list[tuple[str, str, str]] = []
    tone: Any
    for kind, title, tone in (
        ("direction", "read as", "finetuned"), ("random", "random direction", "random"),
        ("control", "random difference", "random"),
    ):  # fmt: skip
        rows = found.tokens[found.tokens["kind"] == kind]
        first = rows[rows["name"] == rows["name"].iloc[0]] if len(rows) else rows
        pairs = zip(first["token"], first["probability"], strict=True)
        bars = _render.token_bars([(t, p, f"{p:.3f}") for t, p in pairs], tone)
        blocks.append((title, tone, bars if len(first) else _render.note("no token in common")))
    best = found.scales[found.scales["scale"] == found.scale].iloc[0]
    sharp = (
        f"Length {found.scale:g} times the mean norm ({found.scale * found.norm:.3g}): score "
        f"{best['score']:.3f}, random {best['random_score']:.3f}, random differences "
        f"{best['control_score']:.3f}; p = {found.p:.2g}"
    )
    weak = "" if found.p <= 0.1 else ": read no more sharply than its controls"
    return _render.columns(blocks) + _render.note(
        f"{before}{sharp}{weak}. Bars are probabilities of tokens that are likely after every "
        "prompt."
    )
