"""Where, at what dose and in which model a direction makes the next word one of taking back.

The measure is the probability of the cue as the next token at known places, which needs no
sampling. Directions are held against random ones of the same length, windows against the same
windows with shuffled labels. `modeldiff.backtracking_text` counts the cue in generated text.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from threading import Event
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from modeldiff._progress import Progress, check, reporter
from modeldiff._shapes import Float
from modeldiff.backtracking import Offsets, base_texts, group_directions, windows_before
from modeldiff.batch_size import each_batch
from modeldiff.batching import Batch
from modeldiff.direction_controls import random_like
from modeldiff.directions import Direction
from modeldiff.divergence import unembedding
from modeldiff.errors import InterventionError, MaskError
from modeldiff.forward import final_states
from modeldiff.interventions import Edit, Plan, Side, Steer, as_plan
from modeldiff.loading import SIDES
from modeldiff.masks import Mask
from modeldiff.models import ModelPair
from modeldiff.sites import Site
from modeldiff.stats import bootstrap_mean, null_band
from modeldiff.thinking_spans import Sentence
from modeldiff.tokens import Text

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class CueProbe:
    """Asks for the probability of a cue as the next token.

    Args:
        texts: What is read.
        places: After which tokens: text and position.
        token_ids: Of the cue; their probabilities are added.
    """

    texts: tuple[Text, ...]
    places: tuple[tuple[int, int], ...]
    token_ids: tuple[int, ...]

    def __call__(
        self, pair: ModelPair, side: Side, do: "Edit | Plan | None" = None, max_tokens: int = 4096
    ) -> Float[Tensor, " place"]:
        """Probability at each place, float64.

        Raises:
            InterventionError: If an edit did not fire.
        """
        asked: dict[int, list[int]] = {}
        for number, (text, _) in enumerate(self.places):
            asked.setdefault(text, []).append(number)
        used, sides = sorted(asked), pair.sides
        found = torch.zeros(len(self.places), dtype=torch.float64)
        unembed = unembedding(sides.root(side), sides.site_map)

        @torch.no_grad()
        def of_batch(batch: Batch) -> tuple[list[int], Tensor]:
            states = final_states(sides, batch, side, as_plan(do))
            at = [(r, n) for r, i in enumerate(batch.order) for n in asked[used[i]]]
            rows, columns = [r for r, _ in at], [self.places[n][1] for _, n in at]
            p = unembed(states[rows, columns]).softmax(-1)[:, list(self.token_ids)].sum(-1)
            return [n for _, n in at], p.double().cpu()

        texts = [self.texts[i] for i in used]
        for _, (places, p) in each_batch(sides, texts, max_tokens, of_batch, what="cue"):
            found[places] = p
        return found

    def split(self, seed: int) -> "tuple[CueProbe, CueProbe]":
        """Split by text, at random, into halves: one to choose on, one to report.

        Raises:
            MaskError: If there are places in fewer than two texts.
        """
        several = sorted({text for text, _ in self.places})
        if len(several) < 2:
            raise MaskError(f"places in {len(several)} texts: two texts or more can be split.")
        order = torch.randperm(len(several), generator=torch.Generator().manual_seed(seed)).tolist()
        first = {several[i] for i in order[: len(several) // 2]}
        parts = [tuple(each for each in self.places if (each[0] in first) == half)
                 for half in (True, False)]  # fmt: skip
        return replace(self, places=parts[0]), replace(self, places=parts[1])


def cue_tokens(pair: ModelPair, words: Sequence[str] = ("wait", "hmm")) -> tuple[int, ...]:
    """Tokens that are one of the words: lower case or capital, with a space before it or without.

    Raises:
        MaskError: If no form of any word is one token.
    """
    found = set[int]()
    for word in words:
        for form in (word.lower(), word.capitalize(), word.upper()):
            for written in (form, f" {form}"):
                ids = pair.tokenizer(written, add_special_tokens=False).input_ids
                found |= set(ids) if len(ids) == 1 else set()
    unknown = pair.tokenizer.unk_token_id
    found = {each for each in found if each != unknown}
    if not found:
        raise MaskError(f"none of the words {list(words)} is one token of this tokenizer.")
    return tuple(sorted(found))


def cue_probe(
    pair: ModelPair,
    texts: Sequence[Text],
    sentences: Sequence[Sentence],
    *,
    label: str = "backtracking",
    words: Sequence[str] = ("wait", "hmm"),
) -> CueProbe:
    """Ask right before every sentence that is not of a label.

    Before those that are the model takes something back anyway.

    Args:
        pair: The pair.
        texts: What is read.
        sentences: Of them, with labels.
        label: Of sentences before which is not asked.
        words: The cue.

    Raises:
        MaskError: If there is no such place, or no word is one token.
    """
    places = tuple(
        (each.text, each.first - 1) for each in sentences if each.label != label and each.first > 0
    )
    if not places:
        raise MaskError(f"there is no sentence but {label!r} ones: nowhere is left to ask at.")
    return CueProbe(tuple(texts), places, cue_tokens(pair, words))


def equal_length(
    directions: Mapping[str, Direction], length: float | None = None
) -> dict[str, Direction]:
    """Give directions one length, that of the first by default, so that a coefficient is a dose.

    Raises:
        InterventionError: If there are none.
    """
    if not directions:
        raise InterventionError("no directions to steer with.")
    size = next(iter(directions.values())).scale if length is None else length
    return {name: replace(each, scale=size) for name, each in directions.items()}


def probe_grid(
    pair: ModelPair,
    probe: CueProbe,
    vectors: Mapping[str, Direction],
    coefficients: Sequence[float] = (1.0,),
    *,
    where: "str | Mask" = "all",
    n_random: int = 20,
    seed: int = 0,
    progress: Progress = False,
    cancel: Event | None = None,
) -> pd.DataFrame:
    """Probability of the cue in base and fine-tune under each vector, beside random directions.

    Args:
        pair: The pair.
        probe: Where it is asked.
        vectors: By name, such as {"base": ..., "finetuned": ...}; all get the first one's length.
        coefficients: Multiples of that length.
        where: Tokens that are steered.
        n_random: Random directions of the same length, the same for every vector.
        seed: Of the random directions and the bootstrap.
        progress: Where to report.
        cancel: Event that stops between passes.

    Returns:
        One row a vector, side and coefficient: vector, side, coefficient, rate (mean probability),
        low, high (95 %, over texts), plain (unsteered), ratio (rate / plain), n_random,
        random_rate, random_low, random_high.

    Source:
        Ward et al. 2025, 2507.12638, for the grid; the band is ours.
    """
    named, texts = equal_length(vectors), [text for text, _ in probe.places]
    controls = random_like(next(iter(named.values())), n_random, seed=seed)
    jobs: list[tuple[Side, float]] = [(side, c) for side in SIDES for c in coefficients]
    report, rows = reporter(progress, "probe"), list[Row]()
    plain = {side: float(probe(pair, side).mean()) for side in SIDES}
    for number, (side, c) in enumerate(jobs):
        chance = []
        for each in controls:
            check(cancel)
            chance.append(float(probe(pair, side, Steer(each, c, where=where)).mean()))
        for name, vector in named.items():
            p = probe(pair, side, Steer(vector, c, where=where))
            found = bootstrap_mean(p, clusters=texts, seed=seed)
            rows.append(
                {
                    "vector": name,
                    "side": side,
                    "coefficient": c,
                    "rate": found.estimate,
                    "low": found.low,
                    "high": found.high,
                    "plain": plain[side],
                    "ratio": found.estimate / plain[side] if plain[side] else math.nan,
                    **chance_band(chance),
                }
            )
        report(number + 1, len(jobs), f"{side} {c:+g}")
    return pd.DataFrame(rows)


def chance_band(values: Sequence[float]) -> Row:
    """Mean and band of random directions' effects; those that are not finite do not count."""
    scored = [each for each in values if math.isfinite(each)]
    band = null_band(scored) if scored else None
    return {
        "n_random": len(scored),
        "random_rate": sum(scored) / len(scored) if scored else math.nan,
        "random_low": band.low if band else math.nan,
        "random_high": band.high if band else math.nan,
    }


def window_scan(
    pair: ModelPair,
    texts: Sequence[Text],
    sentences: Sequence[Sentence],
    windows: Sequence[Offsets],
    probe: CueProbe,
    site: "str | Site",
    *,
    label: str = "backtracking",
    source: Side = "base",
    where: "str | Mask" = "all",
    length: float | None = None,
    n_shuffled: int = 20,
    table: Mapping[Any, Any] | None = None,
    seed: int = 0,
    max_tokens: int = 4096,
    progress: Progress = False,
    cancel: Event | None = None,
) -> pd.DataFrame:
    """Where before a sentence the direction is: its effect by the window that it is found in.

    All windows' directions are steered with at one length. Beside each the same window with the
    labels of the sentences shuffled, stretched by the same factor: what a mean of so many windows
    is by chance.

    Args:
        pair: The pair.
        texts: Reasoning, rendered.
        sentences: All of them, with labels.
        windows: First and last tokens, counted from the sentence's first.
        probe: What is measured; best on other texts.
        site: Where.
        label: Of the sentences.
        source: Whose activations.
        where: Tokens that are steered.
        length: Of all directions; by default half of the mean norm of the residual stream there.
        n_shuffled: Shuffles.
        table: See `modeldiff.backtracking.for_base`; what the base reads instead.
        seed: Of the shuffles.
        max_tokens: Of a batch.
        progress: Where to report.
        cancel: Event that stops between passes.

    Returns:
        One row a window: first, last, n_windows, raw_length, split_half, base, finetuned (effects:
        probability of the cue), shuffled_low, shuffled_high (the band in the fine-tune), outside
        (whether the fine-tune's effect is above it). ``attrs`` hold the unsteered "plain" of both
        sides, "length", and "peak", the window of the largest effect in the fine-tune.

    Raises:
        DirectionError: If a window is left with too few tokens.
        InterventionError: If the site is not in the residual stream and no length is given.
    """
    at, report = Site.parse(site), reporter(progress, "window scan")
    read, _ = base_texts(pair.sides, texts, table)
    found: list[tuple[Offsets, int, list[Direction]]] = []
    for window in windows:
        several = _with_shuffles(
            pair, texts, sentences, window, at, label, source, n_shuffled, read, seed, max_tokens,
            cancel,
        )  # fmt: skip
        found.append((window, *several))
    size = _length([several[0] for _, _, several in found]) if length is None else length
    rows = []
    for number, (window, n, (own, *shuffled)) in enumerate(found):
        factor, effect = size / own.scale, dict[str, float]()
        for side in SIDES:
            effect[side] = _effect(pair, probe, side, own, factor, where)
        chance = []
        for each in shuffled:
            check(cancel)
            chance.append(_effect(pair, probe, "finetuned", each, factor, where))
        band = null_band(chance) if chance else None
        rows.append(
            {
                "first": window[0],
                "last": window[1],
                "n_windows": n,
                "raw_length": own.scale,
                "split_half": own.split_half,
                **effect,
                "shuffled_low": band.low if band else math.nan,
                "shuffled_high": band.high if band else math.nan,
                "outside": bool(band) and effect["finetuned"] > band.high,
            }
        )
        report(number + 1, len(found), f"window {window}")
    scan = pd.DataFrame(rows)
    scan.attrs = {
        "plain": {side: float(probe(pair, side).mean()) for side in SIDES},
        "length": size,
        "peak": tuple(windows[int(scan["finetuned"].argmax())]),
    }
    return scan


def _length(directions: Sequence[Direction]) -> float:
    """Half of the residual norm where the directions are."""
    norms = [each.resid_norm for each in directions if each.resid_norm]
    if len(norms) < len(directions):
        raise InterventionError(
            f"{directions[0].site} is not in the residual stream: say how long the directions are "
            "to be, with length=."
        )
    return 0.5 * mean(norms)


def _effect(
    pair: ModelPair, probe: CueProbe, side: Side, direction: Direction, factor: float, where: Any
) -> float:
    return float(probe(pair, side, Steer(direction, factor, where=where)).mean())


def _with_shuffles(
    pair: ModelPair,
    texts: Sequence[Text],
    sentences: Sequence[Sentence],
    window: Offsets,
    site: Site,
    label: str,
    source: Side,
    n_shuffled: int,
    read: Sequence[Text],
    seed: int,
    max_tokens: int,
    cancel: Event | None,
) -> tuple[int, list[Direction]]:
    """The direction of a window, and what it is under shuffled labels."""
    placed = windows_before(texts, sentences, window)
    kept = [(each, s.label) for each, s in zip(placed, sentences, strict=True) if each is not None]
    mine = [i for i, (_, name) in enumerate(kept) if name == label]
    draw = torch.Generator().manual_seed(seed)
    groups = {label: mine} | {
        f"shuffled {k}": torch.randperm(len(kept), generator=draw)[: len(mine)].tolist()
        for k in range(n_shuffled)
    }
    found, _ = group_directions(
        pair, texts, [each for each, _ in kept], groups, range(len(kept)), [site], base=read,
        what=f"window {window[0]} to {window[1]}", models=(source,), seed=seed,
        max_tokens=max_tokens, cancel=cancel,
    )  # fmt: skip
    return len(mine), [by_side[source][site] for by_side in found.values()]
