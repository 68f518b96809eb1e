"""What candidates for ablation say: their passages, tokens and histograms; and what was chosen.

A `Reading` shows base and fine-tune on some texts and nothing else: no labels, no judge's verdicts.
A `Choice` made on it, by hand, by keywords or by a judge of passages, knows no more than that.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import comb
from pathlib import Path
from threading import Event
from typing import Any

import pandas as pd

from modeldiff._files import PathLike, atomic_write, digest
from modeldiff._progress import Progress
from modeldiff.behaviours import Judge, Prompt, verdicts_of
from modeldiff.caft_candidates import Candidate, candidate_table
from modeldiff.caft_contexts import ENDS, By, Context, End, Of, extremes, histograms, projections
from modeldiff.directions import Direction
from modeldiff.errors import DirectionError, FileFormatError
from modeldiff.logit_lens import logit_lens
from modeldiff.masks import Mask
from modeldiff.models import ModelPair
from modeldiff.report_text import visible

_VERSION = 1


@dataclass(frozen=True, eq=False)
class Reading:
    """What can be seen of candidates.

    Args:
        summary: One row a candidate: name, layer, source, score, share, mean_base, mean_finetuned
            (of the projection), shift (their difference in standard deviations of the base).
        contexts: The extremes of every candidate.
        lens: One row a token: name, kind ("direction" or "random"), end, rank, token, logit, p; see
            `modeldiff.logit_lens`.
        histograms: One row a bin: name, low, high, base, finetuned (tokens).
        n_tokens: Tokens looked at.
        of: Whose projection the contexts are extremes of.
    """

    summary: pd.DataFrame
    contexts: tuple[Context, ...]
    lens: pd.DataFrame
    histograms: pd.DataFrame
    n_tokens: int
    of: Of
    directions: tuple[str, ...]
    """Content keys of the directions."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the candidates."""
        return tuple(self.summary["name"])

    @property
    def key(self) -> str:
        """Hash of the directions and of everything shown."""
        shown = [vars(each) for each in self.contexts]
        return digest(list(self.names), list(self.directions), shown, self.n_tokens, self.of)

    def of_candidate(self, name: str, end: End | None = None) -> tuple[Context, ...]:
        """Contexts of one candidate, most extreme first; of one end, or the maxima first."""
        return tuple(
            each for each in self.contexts if each.candidate == name and end in (None, each.end)
        )

    def tokens(self, name: str, end: str, kind: str = "direction", n: int = 10) -> list[str]:
        """First tokens that a candidate, or its random control, promotes or suppresses."""
        rows = self.lens
        rows = rows[(rows["name"] == name) & (rows["end"] == end) & (rows["kind"] == kind)]
        return rows.nsmallest(n, "rank")["token"].tolist()

    def table(self, n_tokens: int = 8) -> pd.DataFrame:
        """The summary, with the first passages and tokens of both ends beside the control's."""
        found = self.summary.copy()
        for end in ENDS:
            firsts = {each.candidate: str(each) for each in self.contexts
                      if each.end == end and each.rank == 0}  # fmt: skip
            found[f"{end}_context"] = [firsts.get(name, "") for name in self.names]
        for column, end, kind in (
            ("promoted", "promoted", "direction"),
            ("suppressed", "suppressed", "direction"),
            ("control_promoted", "promoted", "random"),
        ):
            shown = (self.tokens(name, end, kind, n_tokens) for name in self.names)
            found[column] = [" ".join(visible(each.strip()) for each in row) for row in shown]
        reach = self.lens.groupby("name")["p"].first()
        found["p"] = [float(reach[name]) for name in self.names]
        return found

    def _repr_html_(self) -> str:
        table = self.table()
        head = "".join(f"<th>{escape(str(each))}</th>" for each in table.columns)
        rows = "".join(
            "<tr>" + "".join(f"<td>{escape(_cell(each))}</td>" for each in row) + "</tr>"
            for row in table.itertuples(index=False)
        )
        caption = f"{len(table)} candidates on {self.n_tokens:,} tokens"
        return f"<table><caption>{escape(caption)}</caption><tr>{head}</tr>{rows}</table>"


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def interpretation(
    pair: ModelPair,
    items: Sequence[Any],
    candidates: Sequence[Candidate],
    *,
    k: int = 12,
    window: tuple[int, int] = (16, 8),
    of: Of = "finetuned",
    by: By = "token",
    on: "str | Mask" = "assistant",
    skip_first: int = 1,
    bins: int = 40,
    lens_tokens: int = 10,
    seed: int = 0,
    max_tokens: int = 4096,
    progress: Progress = False,
    cancel: Event | None = None,
) -> Reading:
    """Show what candidates say: extreme passages, tokens beside a control, histograms by model.

    Memory is two float32 for each token that counts and candidate.

    Args:
        pair: Base and fine-tune.
        items: Texts to look at.
        candidates: From `modeldiff.caft_candidates.candidates`; their names must differ.
        k: Passages at each end, each from another text.
        window: Tokens shown before and after the extreme one.
        of: Whose projection is to be extreme: a side's activation, or the difference.
        by: Rank texts by their most extreme token, or by the mean over their tokens that count
            (and show the most extreme one).
        on: Tokens that count.
        skip_first: Positions left out at the start of each text.
        bins: Of the histograms; both models share them.
        lens_tokens: Tokens of the logit lens at each end.
        seed: Of the lens's random controls, which have the directions' length.
        max_tokens: Budget of a batch.
        progress: Where to report.
        cancel: Event that stops between batches.

    Raises:
        DirectionError: If there are no candidates, or two have one name.
        MaskError: If no token counts.
        Cancelled: If the event is set.

    Source:
        Casademunt et al. 2025 (concept ablation fine-tuning), 2507.16795.
    """
    names = [each.name for each in candidates]
    if not names or len(set(names)) < len(names):
        raise DirectionError(f"{len(names)} candidates, {len(set(names))} names: each needs one.")
    texts = pair.texts(items)
    found = projections(
        pair, texts, candidates, on=on, skip_first=skip_first, max_tokens=max_tokens,
        progress=progress, cancel=cancel,
    )  # fmt: skip
    summary = candidate_table(candidates)
    summary["mean_base"] = found.base.double().mean(0).tolist()
    summary["mean_finetuned"] = found.finetuned.double().mean(0).tolist()
    spread = found.base.double().std(0, correction=0).clamp(min=1e-12)
    summary["shift"] = (
        (summary["mean_finetuned"] - summary["mean_base"]) / spread.numpy()
    ).tolist()
    return Reading(
        summary=summary,
        contexts=tuple(extremes(found, texts, names, k, window, of, by)),
        lens=_lenses(pair, candidates, lens_tokens, seed),
        histograms=histograms(found, names, bins),
        n_tokens=len(found.text),
        of=of,
        directions=tuple(each.direction.content_key for each in candidates),
    )


def _lenses(pair: ModelPair, candidates: Sequence[Candidate], k: int, seed: int) -> pd.DataFrame:
    parts = []
    for each in candidates:
        found = logit_lens(pair.sides, each.direction, k=k, seed=seed)
        for kind in ("direction", "random"):
            for end in ("promoted", "suppressed"):
                rows = found.of(end, kind)[["end", "rank", "token", "logit"]]
                parts.append(rows.assign(name=each.name, kind=kind, p=found.p))
    columns = ["name", "kind", "end", "rank", "token", "logit", "p"]
    return pd.concat(parts, ignore_index=True)[columns]


@dataclass(frozen=True)
class Choice:
    """Candidates that were ticked, and why.

    Args:
        ticked: Their names.
        rationale: Why, in words.
        reading: `Reading.key` of what it was decided on.
        reasons: Name of each ticked candidate and what was seen in it.
    """

    ticked: tuple[str, ...]
    rationale: str
    reading: str = ""
    reasons: tuple[tuple[str, str], ...] = ()

    def of(self, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
        """The ticked ones of some candidates, in their order.

        Raises:
            DirectionError: If one is not among them.
        """
        missing = set(self.ticked) - {each.name for each in candidates}
        if missing:
            raise DirectionError(
                f"{sorted(missing)} ticked, but not among the {len(candidates)} candidates: the "
                "choice was made on others."
            )
        return tuple(each for each in candidates if each.name in self.ticked)

    def directions(self, candidates: Sequence[Candidate]) -> dict[int, tuple[Direction, ...]]:
        """The directions of the ticked ones by layer, as `modeldiff.caft.caft` takes them."""
        found: dict[int, tuple[Direction, ...]] = {}
        for each in self.of(candidates):
            found[each.layer] = (*found.get(each.layer, ()), each.direction)
        return found

    def save_to(self, path: PathLike) -> None:
        """Write it as JSON, whole or not at all."""
        record = {"version": _VERSION, **vars(self)}
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False), "utf-8")

    @classmethod
    def load_from(cls, path: PathLike) -> "Choice":
        """Read what `save_to` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            FileFormatError: If the file is not a choice, or of another version.
        """
        try:
            record = json.loads(Path(path).read_text("utf-8"))
            if record["version"] != _VERSION:
                raise FileFormatError(
                    f"{str(path)!r} has version {record['version']!r}, this modeldiff reads "
                    f"{_VERSION}."
                )
            reasons = tuple((str(name), str(why)) for name, why in record["reasons"])
            ticked = tuple(map(str, record["ticked"]))
            return cls(ticked, str(record["rationale"]), str(record["reading"]), reasons)
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, FileFormatError):
                raise
            raise FileFormatError(
                f"{str(path)!r} holds no choice of candidates: {error}"
            ) from error


def choose_by_keywords(
    reading: Reading, words: Sequence[str], *, level: float = 0.05, rationale: str = ""
) -> Choice:
    """Tick candidates that tell answers with the words from answers without them.

    A candidate is ticked if more answers at one of its ends than at the other hold any of the
    words; or if one of the words is among its lens's tokens and not among its control's, and the
    lens reaches further than random controls do.

    Args:
        reading: What to look at.
        words: Whole words or phrases, whatever their case.
        level: Chance, for each of the two, that a candidate that says nothing is ticked (Fisher's
            exact test between the ends).
        rationale: Why these words.

    Raises:
        DirectionError: If there are no words.
    """
    found = [each.strip() for each in words if each.strip()]
    if not found:
        raise DirectionError("no keywords to look for.")
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, found))})(?!\w)", re.IGNORECASE)
    hits = {each: pattern.search(each.answer) is not None for each in reading.contexts}
    reasons = dict(_by_contrast(reading, hits, level, "hold a keyword"))
    reach = reading.lens.groupby("name")["p"].first()
    for name in reading.names:
        own, control = _said(reading, name, "direction"), _said(reading, name, "random")
        said = sorted(each for each in own - control if pattern.fullmatch(each))
        if said and float(reach[name]) <= level:
            more = f"the logit lens says {', '.join(said)}"
            reasons[name] = "; ".join(filter(None, [reasons.get(name, ""), more]))
    return _choice(reading, reasons, rationale or f"keywords: {', '.join(found)}")


def _said(reading: Reading, name: str, kind: str) -> set[str]:
    ends = ("promoted", "suppressed")
    return {each.strip() for end in ends for each in reading.tokens(name, end, kind)}


def choose_by_judge(
    reading: Reading, judge: Judge, *, level: float = 0.05, rationale: str = ""
) -> Choice:
    """Tick candidates that tell answers that exhibit something to a judge from others.

    The judge sees the answer that a passage is from, and the question before it. Those that it
    cannot judge are left out.

    Args:
        reading: What to look at.
        judge: Of a behaviour; preferably not the one that will judge the trained model.
        level: Chance that a candidate that says nothing is ticked (Fisher's exact test between the
            answers at its two ends).
        rationale: Why this judge.
    """
    asked = [(Prompt(each.question), each.answer) for each in reading.contexts]
    verdicts = verdicts_of(judge, asked)
    hits = {each: verdict.exhibits for each, verdict in zip(reading.contexts, verdicts, strict=True)
            if verdict.exhibits is not None}  # fmt: skip
    reasons = dict(_by_contrast(reading, hits, level, f"exhibit it to {judge.name}"))
    return _choice(reading, reasons, rationale or f"judge: {judge.name}")


def _by_contrast(
    reading: Reading, hits: Mapping[Context, bool], level: float, what: str
) -> Iterator[tuple[str, str]]:
    for name in reading.names:
        first, second = ([hits[each] for each in reading.of_candidate(name, end) if each in hits]
                         for end in ENDS)  # fmt: skip
        p = _fisher(sum(first), len(first), sum(second), len(second))
        if p <= level:
            counts = " and ".join(
                f"{sum(found)} of {len(found)} answers at its {end}"
                for end, found in zip(ENDS, (first, second), strict=True)
            )
            yield name, f"{counts} {what} (p {p:.2g})"


def _fisher(a: int, n: int, b: int, m: int) -> float:
    """Two-sided p of a hits among n and b among m, by Fisher's exact test; 1 if nothing is told."""
    ways = [comb(n, i) * comb(m, a + b - i) for i in range(a + b + 1)]
    return sum(each for each in ways if each <= ways[a]) / sum(ways)


def _choice(reading: Reading, reasons: Mapping[str, str], rationale: str) -> Choice:
    ticked = tuple(name for name in reading.names if name in reasons)
    return Choice(ticked, rationale, reading.key, tuple((name, reasons[name]) for name in ticked))
