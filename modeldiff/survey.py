"""One pass over texts that measures everything the audit needs of activations, layer by layer.

Nothing is stored but sums: means and norms of both sides for each class of text and each half of
the texts, and each text's mean relative difference. Memory does not grow with the number of texts.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from modeldiff._progress import Progress
from modeldiff.activations import Part, Planned, planned
from modeldiff.direction_methods import mean_difference
from modeldiff.directions import Direction
from modeldiff.errors import DirectionError
from modeldiff.forward import run_pair
from modeldiff.interventions import Side
from modeldiff.loading import SIDES, Sides
from modeldiff.masks import Mask
from modeldiff.moments import Moments, mean_and_norm
from modeldiff.sites import Site
from modeldiff.stats import bootstrap_mean
from modeldiff.tokens import Text

Key = tuple[Side, Site, str, int]


@dataclass(frozen=True, eq=False)
class Survey:
    """Sums over the kept tokens of some texts.

    Args:
        sites: Where was measured.
        moments: Of activations by side, site, class of text and half (0 or 1) of the texts.
        per_text: One row a text and site: text, site, n_tokens, relative_difference (mean over
            tokens of |h_ft - h_base| / |h_base|) and cosine (of h_ft with h_base).
        digests: Content hashes of the models.
        seed: Seed of the halves.
    """

    sites: tuple[Site, ...]
    moments: dict[Key, Moments]
    per_text: pd.DataFrame
    digests: dict[str, str]
    seed: int

    def of(self, side: Side, site: Site, label: str, half: int | None = None) -> Moments:
        """Moments of one class of text, of one half or of both.

        Raises:
            DirectionError: If no text is of this class.
        """
        halves = (0, 1) if half is None else (half,)
        found = [self.moments.get((side, site, label, h)) for h in halves]
        present = [moments for moments in found if moments is not None]
        if not present:
            known = sorted({key[2] for key in self.moments})
            raise DirectionError(f"no token of a text labelled {label!r}; there are {known}.")
        return present[0] if len(present) == 1 else present[0].merged(present[1])

    def counts(self) -> dict[str, int]:
        """Tokens of each class of text."""
        site, found = self.sites[0], {}
        for side, at, label, _ in self.moments:
            if side == "base" and at == site:
                found[label] = self.of("base", site, label).n
        return found

    def layers(self, seed: int = 0) -> pd.DataFrame:
        """Mean relative difference and cosine of each site, with intervals over texts."""
        rows = []
        for site, part in self.per_text.groupby("site", sort=False):
            found = bootstrap_mean(part["relative_difference"].to_numpy(float), seed=seed)
            rows.append(
                {
                    "layer": Site.parse(str(site)).layer,
                    "relative_difference": found.estimate,
                    "low": found.low,
                    "high": found.high,
                    "cosine": float(part["cosine"].mean()),
                }
            )
        return pd.DataFrame(rows)


@dataclass(eq=False)
class _Sums:
    moments: dict[Key, Moments] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self, site: Site, found: dict[int, dict[str, Any]], labels: Sequence[str],
        halves: Sequence[int],
    ) -> None:  # fmt: skip
        """Take what `measured` found at a site of a batch."""
        for text, one in found.items():
            for side in SIDES:
                key = side, site, labels[text], halves[text]
                new, known = Moments(one["n"], *one[side]), self.moments.get(key)
                if not bool(new.mean.isfinite().all()):
                    raise DirectionError(
                        f"activations of text {text} at {site} ({side}) are not finite. Was the "
                        "model run in float16? Use bfloat16 or float32."
                    )
                self.moments[key] = new if known is None else known.merged(new)
            self.rows.append(
                {
                    "text": text,
                    "site": str(site),
                    "n_tokens": one["n"],
                    "relative_difference": one["relative_difference"],
                    "cosine": one["cosine"],
                }
            )


def measured(base: Tensor, tuned: Tensor, text_index: Tensor) -> dict[int, dict[str, Any]]:
    """Moments and mean differences of each text's rows ``[token, width]`` at one site.

    Also run by servers without this package: builtins and tensors alone.

    Returns:
        By text: ``n``, float64 mean and mean norm of ``base`` and ``finetuned``, and the means of
        ``relative_difference`` and ``cosine``.
    """
    relative = (tuned.float() - base.float()).norm(dim=-1) / base.float().norm(dim=-1)
    cosine = torch.nn.functional.cosine_similarity(tuned.float(), base.float(), dim=-1)
    cosine = cosine.clamp(-1, 1).masked_fill(relative == 0, 1.0)  # not 1 up to rounding
    found = {}
    for text in text_index.unique().tolist():
        mine = (text_index == text).to(base.device)
        found[text] = {
            "n": int(mine.sum()),
            "base": mean_and_norm(base[mine].float()),
            "finetuned": mean_and_norm(tuned[mine].float()),
            "relative_difference": float(relative[mine].mean()),
            "cosine": float(cosine[mine].mean()),
        }
    return found


def survey(
    sides: Sides,
    texts: tuple[Text, ...],
    labels: Sequence[str],
    *,
    groups: Sequence[Hashable] | None = None,
    on: "str | Mask" = "all",
    seed: int = 0,
    progress: Progress = False,
    cancel: Event | None = None,
) -> Survey:
    """Measure ``resid_post`` of every layer on labelled texts, in one pass.

    Args:
        sides: The pair.
        texts: What to run.
        labels: Class of each text, such as "misaligned" or "aligned".
        groups: Of each text, such as the prompt that it answers: whole groups go to one half.
            Without, every text is a group.
        on: Tokens that count.
        seed: Seed of the halves.
        progress: Where to report.
        cancel: Event that stops between batches.
    """
    sites = tuple(Site("resid_post", layer) for layer in range(sides.shape("base").n_layers))
    halves = _halves(labels, range(len(labels)) if groups is None else groups, seed)
    sums = _Sums()

    def work(each: Planned) -> dict[Site, dict[int, dict[str, Any]]]:
        return _measured(sides, each, sites, cancel)

    for _, measures in planned(sides, texts, work, on=on, progress=progress, cancel=cancel):
        for site, found in measures.items():
            sums.add(site, found, labels, halves)
    per_text = pd.DataFrame(sums.rows).sort_values("text", kind="stable", ignore_index=True)
    return Survey(sites, sums.moments, per_text, sides.digests, seed)


def _measured(
    sides: Sides, each: Planned, sites: tuple[Site, ...], cancel: Event | None
) -> dict[Site, dict[int, dict[str, Any]]]:
    if sides.kind == "remote" and sides.adapter:
        from modeldiff.remote_runs import surveyed

        return surveyed(sides, each.batch, sites, each.keep, each.text_index, cancel=cancel)
    run = run_pair(sides, each.batch, sites, keep=each.keep, cancel=cancel)
    part = Part(run, each.keep, each.text_index, each.position)
    return {
        site: measured(part.rows(run.base, site), part.rows(run.finetuned, site), each.text_index)
        for site in sites
    }


def _halves(labels: Sequence[str], groups: Sequence[Hashable], seed: int) -> list[int]:
    """Split the groups of each class of texts in half at random; none is in both halves."""
    rng = np.random.default_rng(seed)
    halves: dict[Hashable, int] = {}
    for label in sorted(set(labels)):
        mine = [group for group, each in zip(groups, labels, strict=True) if each == label]
        new = [group for group in dict.fromkeys(mine) if group not in halves]
        for place, i in enumerate(rng.permutation(len(new))):
            halves[new[i]] = int(place < len(new) // 2)
    return [halves[group] for group in groups]


def data_directions(found: Survey, positive: str, negative: str, name: str) -> dict[int, Direction]:
    """The fine-tune's activations on one class of text minus another, for every layer.

    The base's cosine on the same texts is each direction's ``text_null``: how much of it is a
    property of the texts.

    Raises:
        DirectionError: If a class has too few tokens, or the classes do not differ.

    Source:
        Soligo et al. 2025 (convergent linear representations of emergent misalignment),
        2506.11618; the null is ours.
    """
    directions = {}
    for site in found.sites:
        directions[site.layer] = mean_difference(
            found.of("finetuned", site, positive),
            found.of("finetuned", site, negative),
            site,
            f"{name}, layer {site.layer}",
            halves=_halved(found, site, ("finetuned", positive), ("finetuned", negative)),
            base_contrast=(found.of("base", site, positive), found.of("base", site, negative)),
            sources=(positive, negative),
            models=found.digests,
            seed=found.seed,
        )
    return directions


def base_directions(found: Survey, positive: str, negative: str, name: str) -> dict[int, Direction]:
    """The same contrast in the base model: the control that tells texts from fine-tuning.

    Raises:
        DirectionError: If a class has too few tokens, or the classes do not differ.
    """
    return {
        site.layer: mean_difference(
            found.of("base", site, positive),
            found.of("base", site, negative),
            site,
            f"{name}, layer {site.layer}",
            halves=_halved(found, site, ("base", positive), ("base", negative)),
            sources=(positive, negative),
            models=found.digests,
            seed=found.seed,
        )
        for site in found.sites
    }


def model_directions(found: Survey, label: str, name: str) -> dict[int, Direction]:
    """The fine-tune's minus the base's activations on the same texts, where they differ.

    Layers at which the two are equal have no direction and are left out; a null pair has none.

    Raises:
        DirectionError: If there are too few tokens.
    """
    differing = found.per_text.groupby("site")["relative_difference"].max()
    return {
        site.layer: mean_difference(
            found.of("finetuned", site, label),
            found.of("base", site, label),
            site,
            f"{name}, layer {site.layer}",
            halves=_halved(found, site, ("finetuned", label), ("base", label)),
            sources=(label,),
            models=found.digests,
            sign="from base to finetuned",
            seed=found.seed,
        )
        for site in found.sites
        if differing[str(site)] > 0
    }


def _halved(
    found: Survey, site: Site, positive: tuple[Side, str], negative: tuple[Side, str]
) -> tuple[tuple[Moments, Moments], tuple[Moments, Moments]] | None:
    """Moments of both halves, if both halves have texts of both classes."""
    pairs: list[tuple[Moments, Moments]] = []
    for half in (0, 1):
        there = found.moments.get((positive[0], site, positive[1], half))
        here = found.moments.get((negative[0], site, negative[1], half))
        if there is None or here is None:
            return None
        pairs.append((there, here))
    return pairs[0], pairs[1]
