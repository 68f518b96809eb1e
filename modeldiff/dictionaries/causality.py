"""Do latents carry what the fine-tune does? Add them to the base's activations, and see.

At the dictionary's site the base's activation is taken, what some latents add in the fine-tune over
the base is added, and the fine-tune's upper layers go on from there. If those latents are what the
fine-tune changed at this site, its predictions come back.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from modeldiff._progress import Progress, check, reporter
from modeldiff._shapes import Bool, Float
from modeldiff.batch_size import each_batch
from modeldiff.batching import Batch, mask_tensor
from modeldiff.dictionaries.latents import check_latents
from modeldiff.dictionaries.models import Dictionary
from modeldiff.dictionaries.scaling import Scaling
from modeldiff.divergence import kl_and_loss, unembedding
from modeldiff.errors import MaskError, MismatchError
from modeldiff.forward import as_texts, final_states, run_pair
from modeldiff.interventions import Plan, Replace
from modeldiff.loading import Sides
from modeldiff.masks import Mask
from modeldiff.sites import Site

CONTROLS = ("none", "offset", "reconstruction", "error", "replacement")
"""Patches beside the sets of latents: nothing; the dictionary's constants (means and biases); all
latents and the constants; what the dictionary leaves out; the fine-tune's own activation."""


@dataclass(frozen=True, eq=False)
class Causality:
    """How much of the distance between patched base and fine-tune each patch closes.

    Args:
        texts: One row a patch and text: patch, n_latents, text, n_tokens, kl (KL(finetuned ||
            patched), nats a token, mean over the text's tokens).
        summary: One row a patch: patch, n_latents, kl (mean over tokens), closed (share of the
            KL without a patch that it closes: 1 all, 0 none, negative if it moves away), and a
            95 % interval of it by texts, low and high.
    """

    texts: pd.DataFrame
    summary: pd.DataFrame

    def closed(self, patch: str) -> float:
        """Share of the KL that a patch closes."""
        return dict(zip(self.summary["patch"], self.summary["closed"].tolist(), strict=True))[patch]


def latent_sets(
    scaling: Scaling,
    candidates: Sequence[int],
    *,
    shares: Sequence[float] = (0.05, 0.1, 0.5),
    n_random: int = 1,
    seed: int = 0,
) -> dict[str, list[int]]:
    """Rank latents by how little the base has of them, and cut the ranking into sets.

    The rank is the sum of the ranks by nu_error and by nu_reconstruction, low ones first.

    Args:
        scaling: Of the dictionary.
        candidates: Latents to rank, such as those that are heavier in the fine-tune. Those
            without a nu are left out.
        shares: Of the candidates, in each set.
        n_random: Random sets of each size beside the best and the worst.
        seed: Of these.

    Returns:
        Sets by name: "best 5%", "worst 5%", "random 5%" (numbered if several) and so on, and
        "candidates 100%".

    Raises:
        MismatchError: If no candidate has both nus, or a share is not inside (0, 1).
    """
    error, rec = scaling.nu("error").cpu(), scaling.nu("reconstruction").cpu()
    known = [j for j in candidates if bool(error[j].isfinite() & rec[j].isfinite())]
    if not known or not all(0 < share < 1 for share in shares):
        raise MismatchError(
            f"{len(known)} of {len(candidates)} candidates have both nus, shares {list(shares)}: "
            "at least one candidate is needed, and shares inside (0, 1)."
        )
    table = pd.DataFrame({"error": error[known].numpy(), "rec": rec[known].numpy()}, index=known)
    ranked = table.rank().sum(axis=1).sort_values(kind="stable").index.tolist()
    rng, sets = np.random.default_rng(seed), {}
    for share in shares:
        n, name = max(1, round(share * len(ranked))), f"{100 * share:g}%"
        sets[f"best {name}"] = ranked[:n]
        sets[f"worst {name}"] = ranked[-n:]
        for i in range(n_random):
            label = f"random {name}" if n_random == 1 else f"random {name} #{i}"
            sets[label] = rng.choice(ranked, n, replace=False).tolist()
    return {**sets, "candidates 100%": ranked}


def causality(
    sides: Sides,
    dictionary: Dictionary,
    items: Sequence[Any],
    sets: Mapping[str, Sequence[int]],
    *,
    site: "Site | str | None" = None,
    on: "str | Mask" = "all",
    skip_first: int = 1,
    seed: int = 0,
    max_tokens: int = 4096,
    budget: int = 256 << 20,
    progress: Progress = False,
    cancel: Event | None = None,
) -> Causality:
    """Measure how much of KL(fine-tuned || patched base) sets of latents close.

    The patched activation of a token is ``base + sum_j f_j (d_j^ft - d_j^base)`` over the
    latents of a set, in raw space, f_j from both models' activations at that token. Beside the
    sets stand "all latents" and the patches of `CONTROLS`; "reconstruction" and "error" together
    are "replacement", which leaves nothing of the KL but that of the tokens that are skipped.

    Args:
        sides: The pair.
        dictionary: A crosscoder on it.
        items: Texts, chats, completions; teacher-forced.
        sets: Latents by name, see `latent_sets`.
        site: Where the dictionary's activations are from; by default what it knows.
        on: Which *predicted* tokens count; the first token of a text never does.
        skip_first: Positions at the start of each text that keep the base's activation in every
            patch: the dictionary was not trained on them.
        seed: Of the intervals.
        max_tokens: Budget of a batch, padding included; halved where memory runs out.
        budget: Bytes for temporaries over the vocabulary.
        progress: Where to report.
        cancel: Event that stops between patches.

    Raises:
        MismatchError: If the dictionary is no crosscoder of a pair or lacks a latent, no site is
            known, or without a patch nothing differs: then all that changed is above the site.
        MaskError: If no token is compared.
        Cancelled: If the event is set; ``partial`` has the rows of the texts so far.

    Source:
        Minder et al. 2025, 2504.02922 (best, worst and random halves; error patches).
    """
    where = _site(dictionary, site)
    for latents in sets.values():
        check_latents(dictionary.config.n_latents, latents)
    texts, report = as_texts(sides, items), reporter(progress, "causality")
    rows: list[dict[str, Any]] = []
    done = 0

    def of_batch(batch: Batch) -> list[dict[str, Any]]:
        keep, found = mask_tensor(batch, on), []
        keep[:, 0] = False
        if keep.any():
            patching = _Patching(sides, batch, where, keep, skip_first, budget)
            for name, n_latents, added in _Patches(dictionary, *patching.acts).each(sets):
                check(cancel, pd.DataFrame(rows))
                found += [{"patch": name, "n_latents": n_latents, **row}
                          for row in patching.measure(added)]  # fmt: skip
        return found

    for batch, found in each_batch(sides, texts, max_tokens, of_batch, what="causality"):
        rows += found
        done += len(batch.texts)
        report(done, len(texts), f"{done}/{len(texts)} texts")
    if not rows:
        raise MaskError(f"the mask {on!r} leaves no predicted token in {len(texts)} texts.")
    table = pd.DataFrame(rows)
    return Causality(table, _summary(table, seed))


def _site(dictionary: Dictionary, site: "Site | str | None") -> Site:
    where = site or dictionary.config.site
    if dictionary.config.n_models != 2 or not where:
        raise MismatchError(
            f"causality needs a crosscoder of two models and its site; this one has "
            f"{dictionary.config.n_models} and {str(where) or 'no site (give site=)'}."
        )
    return Site.parse(where)


class _Patching:
    """One batch: what the models compute on it, and what the fine-tune makes of patched bases."""

    def __init__(
        self,
        sides: Sides,
        batch: Batch,
        site: Site,
        keep: Bool[Tensor, "row token"],
        skip_first: int,
        budget: int,
    ) -> None:
        pair = run_pair(sides, batch, (site,), final=True)
        assert pair.final is not None
        self.sides, self.batch, self.site, self.budget = sides, batch, site, budget
        self.base = pair.base[site]
        covered = batch.attention_mask.bool() & (batch.position_ids >= skip_first)
        self.covered = covered.to(self.base.device)
        self.row, self.column = keep.to(self.base.device).nonzero(as_tuple=True)
        self.came = batch.ids.to(self.base.device)[self.row, self.column]
        self.truth = pair.final[1][self.row, self.column - 1]
        self.unembed = unembedding(sides.root("finetuned"), sides.site_map)
        self.acts = self.base[self.covered], pair.finetuned[site][self.covered]
        """Both sides' activations at the tokens that are patched."""

    @torch.no_grad()
    def measure(self, added: Float[Tensor, "token d_model"]) -> list[dict[str, Any]]:
        """KL(finetuned || base plus what is added), one row a text."""
        patched = self.base.float().clone()
        patched[self.covered] += added.to(patched)
        plan = Plan((Replace(self.site, patched.to(self.base.dtype)),))
        states = final_states(self.sides, self.batch, "finetuned", plan)[self.row, self.column - 1]
        kl, _ = kl_and_loss(
            self.truth, states, self.unembed, self.unembed, self.came, self.budget
        )  # fmt: skip
        of_text = {row: kl[self.row == row].double() for row in self.row.unique().tolist()}
        return [
            {"text": self.batch.order[row], "n_tokens": len(mine), "kl": float(mine.mean())}
            for row, mine in of_text.items()
        ]


class _Patches:
    """What is added to the base's activations at some tokens, raw, patch by patch."""

    @torch.no_grad()
    def __init__(self, dictionary: Dictionary, base: Tensor, finetuned: Tensor) -> None:
        x = torch.stack([base, finetuned], 1).to(dictionary.device, torch.float32)
        self.codes = dictionary.encode(x)
        self.written = dictionary.decoder("finetuned") - dictionary.decoder("base")
        self.gap = x[:, 1] - x[:, 0]
        found = dictionary.decode(self.codes)
        self.found = found[:, 1] - found[:, 0]

    def each(self, sets: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, int, Tensor]]:
        """Name, number of latents and what is added, for sets and controls."""
        n = self.codes.n_latents
        none, everything = torch.zeros_like(self.gap), self.of(range(n))
        yield "none", 0, none
        for name, latents in sets.items():
            yield name, len(latents), self.of(latents)
        yield "all latents", n, everything
        yield "offset", 0, self.found - everything
        yield "reconstruction", n, self.found
        yield "error", 0, self.gap - self.found
        yield "replacement", 0, self.gap

    def of(self, latents: Sequence[int]) -> Float[Tensor, "token d_model"]:
        """The sum over some latents."""
        chosen = torch.zeros(self.codes.n_latents, device=self.gap.device)
        chosen[list(latents)] = 1.0
        value = self.codes.value * chosen[self.codes.latent]
        on = value.nonzero()[:, 0]
        added = value[on, None] * self.written[self.codes.latent[on]]
        return torch.zeros_like(self.gap).index_add_(0, self.codes.row[on], added)


def _summary(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Ratios of sums over tokens, with intervals that resample whole texts."""
    weights = table["kl"] * table["n_tokens"]
    wide = weights.to_frame("sum").join(table[["patch", "text"]]).pivot_table(
        index="text", columns="patch", values="sum", sort=False
    )  # fmt: skip
    tokens = table[table["patch"] == "none"].set_index("text")["n_tokens"]
    reference = wide["none"].to_numpy()
    if not reference.sum() > 0:
        raise MismatchError(
            "the fine-tune's upper layers give the same predictions from the base's activations: "
            "nothing below the site changed. Use a dictionary at a later site."
        )
    drawn = np.random.default_rng(seed).integers(len(wide), size=(2000, len(wide)))
    sizes, rows = table.groupby("patch", sort=False)["n_latents"].first(), []
    for name, n_latents in sizes.items():
        own = wide[name].to_numpy()
        resampled = 1 - own[drawn].sum(1) / reference[drawn].sum(1)
        low, high = np.quantile(resampled, (0.025, 0.975)) if len(wide) > 1 else (np.nan, np.nan)
        closed, kl = 1 - own.sum() / reference.sum(), own.sum() / tokens.sum()
        rows.append({"patch": name, "n_latents": n_latents, "kl": kl, "closed": closed,
                     "low": low, "high": high})  # fmt: skip
    return pd.DataFrame(rows)
