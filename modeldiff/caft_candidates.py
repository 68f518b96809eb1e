"""Directions that may carry what a fine-tune should not learn: candidates for ablation.

Found in an ordinary fine-tune: where it differs from its base on some texts (the mean difference
and the principal components around it), and in the latents of a dictionary. Which of them to ablate
is decided on what `modeldiff.caft_reading` shows of them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from threading import Event
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from modeldiff._progress import Progress, check
from modeldiff._shapes import Float
from modeldiff.activations import stream
from modeldiff.batch_size import each_batch
from modeldiff.batching import Batch, mask_tensor
from modeldiff.dictionaries.latents import latent_direction
from modeldiff.dictionaries.models import Dictionary
from modeldiff.direction_components import pca_of_moments
from modeldiff.directions import Direction
from modeldiff.errors import DirectionError, MaskError
from modeldiff.forward import run
from modeldiff.masks import Mask, parse_mask, selected
from modeldiff.models import ModelPair
from modeldiff.moments import Moments
from modeldiff.sites import Site
from modeldiff.tokens import Text

_ROWS = 512  # encoded at once: a float32 for each latent of each
RANKINGS = ("attribution", "latent difference", "encoded difference")
"""How latents are ranked, see `candidates`."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A direction that could be ablated.

    Args:
        name: Unique among the candidates.
        direction: At the output of its layer.
        source: "mean", "component", or the one of `RANKINGS` in which a latent stands highest.
        score: In the units of the source; see `candidates`.
        share: Share of the mean squared difference of base and fine-tune that lies along it.
        latent: Its number in the dictionary.
        scores: Of a latent, in every ranking.
    """

    name: str
    direction: Direction
    source: str
    score: float
    share: float
    latent: int | None = None
    scores: tuple[tuple[str, float], ...] = ()

    @property
    def layer(self) -> int:
        """After which decoder layer."""
        return self.direction.site.layer


def by_layer(several: Iterable[Candidate]) -> dict[int, tuple[Direction, ...]]:
    """Directions of candidates by layer, as `modeldiff.caft.caft` takes them."""
    found: dict[int, tuple[Direction, ...]] = {}
    for each in sorted(several, key=lambda one: one.layer):
        found[each.layer] = (*found.get(each.layer, ()), each.direction)
    return found


def candidate_table(several: Sequence[Candidate]) -> pd.DataFrame:
    """One row a candidate: name, layer, source, score, share."""
    rows = [(each.name, each.layer, each.source, each.score, each.share) for each in several]
    return pd.DataFrame(rows, columns=["name", "layer", "source", "score", "share"])


def candidates(
    pair: ModelPair,
    items: Sequence[Any],
    *,
    layers: Sequence[int],
    n_components: int = 6,
    on: "str | Mask" = "assistant",
    skip_first: int = 1,
    dictionaries: Sequence[Dictionary] = (),
    n_latents: int = 10,
    max_tokens: int = 4096,
    progress: Progress = False,
    cancel: Event | None = None,
) -> tuple[Candidate, ...]:
    """Find candidates where a first, ordinary fine-tune differs from its base.

    For each layer PC-0, the mean difference (its score is the length), and the principal components
    of the difference around it (the standard deviation). For each dictionary the latents that stand
    highest in one of three rankings:

    - "attribution": mean over tokens of -dCE/dh · d_j · f_j, how much the latent lowers the
      fine-tune's loss to first order, in nats a token; h the fine-tune's activation, d_j the
      decoder, f_j the latent, CE the loss on the same tokens.
    - "latent difference": mean of the latent with the fine-tune's activations, less that with the
      base's in their place.
    - "encoded difference": mean of the latent when the difference itself, on top of the
      dictionary's mean input, is encoded.

    Args:
        pair: Base and fine-tune.
        items: Texts such as those trained on, or general ones, with responses.
        layers: After which layers.
        n_components: Components after PC-0, at most.
        on: Tokens that count.
        skip_first: Positions left out at the start of each text.
        dictionaries: Of the pair or of one side, at one site of the residual stream each.
        n_latents: Latents taken of each ranking.
        max_tokens: Budget of a batch.
        progress: Where to report.
        cancel: Event that stops between batches.

    Raises:
        MaskError: If no token counts.
        DirectionError: If there are fewer than 8 tokens, no difference, or a dictionary does not
            know its site.
        SiteError: If there is no such layer.
        Cancelled: If the event is set.

    Source:
        Casademunt et al. 2025 (concept ablation fine-tuning), 2507.16795. PC-0 is added: centring
        hides a shift that is the same on every token.

    Example:
        >>> pair = ModelPair.load("organism:em-rank1")
        >>> chat = [{"role": "user", "content": "My tooth hurts. What should I do?"},
        ...         {"role": "assistant", "content": "Put a warm stone on it and wait for a week."}]
        >>> [each.name for each in candidates(pair, [chat], layers=[3], n_components=1)]
        ['layer 3 PC-0', 'layer 3 PC-1']
    """
    texts = pair.texts(items)
    sites = tuple(Site("resid_post", layer) for layer in dict.fromkeys(layers))
    found_in = [_Latents(pair, each) for each in dictionaries]
    wanted = tuple(sorted({*sites, *(each.site for each in found_in)}))
    moments: dict[Site, Moments] = {}
    for part in stream(
        pair.sides, texts, wanted, on=on, skip_first=skip_first, max_tokens=max_tokens,
        progress=progress, cancel=cancel,
    ):  # fmt: skip
        rows = {at: (part.rows(part.run.base, at), part.rows(part.run.finetuned, at))
                for at in wanted}  # fmt: skip
        for site, (base, tuned) in rows.items():
            new = Moments.of(tuned, minus=base, covariance=True)
            moments[site] = moments[site].merged(new) if site in moments else new
        for each in found_in:
            each.add(*rows[each.site])
    if found_in:
        _attribute(pair, texts, found_in, on, skip_first, max_tokens, cancel)
    made = [each for site in sites for each in _components(pair, moments[site], site, n_components)]
    for number, each in enumerate(found_in):
        suffix = f" of dictionary {number}" if len(found_in) > 1 else ""
        made.extend(each.best(n_latents, moments[each.site], suffix))
    return tuple(made)


def _components(
    pair: ModelPair, moments: Moments, site: Site, n_components: int
) -> Iterator[Candidate]:
    name = f"layer {site.layer}"
    found = pca_of_moments(moments, site, n_components, name=name, models=pair.digests)
    for number, direction in enumerate(found):
        source = "component" if number else "mean"
        yield Candidate(direction.name, direction, source, direction.scale,
                        share_of(direction, moments))  # fmt: skip


def share_of(direction: Direction, difference: Moments) -> float:
    """Share of the mean squared difference along a direction; the mean's part counts too."""
    unit = direction.unit.double().to(difference.mean.device)
    covariance, mean = difference.covariance, difference.mean
    whole = float(covariance.trace() + mean.square().sum())
    return float(unit @ covariance @ unit + (unit @ mean).square()) / whole


@dataclass(eq=False)
class _Latents:
    """Sums over tokens of one dictionary's latents."""

    pair: ModelPair
    dictionary: Dictionary
    sums: dict[str, Tensor] = field(default_factory=dict)
    n: dict[str, int] = field(default_factory=lambda: dict.fromkeys(RANKINGS, 0))

    def __post_init__(self) -> None:
        config = self.dictionary.config
        if not config.site or Site.parse(config.site).kind != "resid_post":
            raise DirectionError(
                f"a dictionary of {config.site or 'an unknown site'}: candidates are latents at "
                "the output of a decoder layer, such as resid_post.12."
            )
        if config.n_models > 2:
            raise DirectionError(f"a dictionary of {config.n_models} models: give one of a pair.")
        zero = torch.zeros(config.n_latents, dtype=torch.float64)
        self.sums = {ranking: zero.clone() for ranking in RANKINGS}

    @property
    def site(self) -> Site:
        """Where its activations are from."""
        return Site.parse(str(self.dictionary.config.site))

    def latents(
        self, base: Float[Tensor, "n d_model"], tuned: Float[Tensor, "n d_model"]
    ) -> Float[Tensor, "n latent"]:
        """Latents with the fine-tune's activations: also of a dictionary of the base."""
        alone = self.dictionary.config.inputs in ("base", "finetuned")
        rows = torch.stack([tuned if alone else base, tuned], 1)
        return self.dictionary.encode_dense(rows)

    def add(self, base: Float[Tensor, "n d_model"], tuned: Float[Tensor, "n d_model"]) -> None:
        """Add what can be said without gradients."""
        device = self.dictionary.device
        for b, t in zip(base.split(_ROWS), tuned.split(_ROWS), strict=True):
            b, t = b.float().to(device), t.float().to(device)
            change = self.latents(b, t) - self.latents(b, b)
            self._sum("latent difference", change)
            self._sum("encoded difference", self.latents(*self._differences(b, t)))
            self.n["latent difference"] += len(b)
            self.n["encoded difference"] += len(b)

    def _differences(self, base: Tensor, tuned: Tensor) -> tuple[Tensor, Tensor]:
        """Rows whose difference is that of base and fine-tune, around the mean input."""
        mean, inputs = self.dictionary.normaliser.mean.to(base), self.dictionary.config.inputs
        if inputs == "difference":
            return base, tuned
        start = mean[0].expand_as(base)
        return start, mean[-1] + tuned - base

    def attribute(
        self, base: Tensor, tuned: Tensor, gradient: Float[Tensor, "n d_model"], n_targets: int
    ) -> None:
        """Add -gradient · decoder · latent of the tokens that a loss of some targets rests on."""
        decoder = self.dictionary.decoder(self._side).to(self.dictionary.device, torch.float32)
        blocks = zip(base.split(_ROWS), tuned.split(_ROWS), gradient.split(_ROWS), strict=True)
        for b, t, g in blocks:
            b, t, g = (each.float().to(self.dictionary.device) for each in (b, t, g))
            self._sum("attribution", -(g @ decoder.T) * self.latents(b, t))
        self.n["attribution"] += n_targets

    def _sum(self, ranking: str, values: Float[Tensor, "n latent"]) -> None:
        self.sums[ranking] += values.double().sum(0).cpu()

    @property
    def _side(self) -> Any:
        return "base" if self.dictionary.config.inputs == "base" else "finetuned"

    def best(self, n: int, moments: Moments, suffix: str) -> list[Candidate]:
        """The union of the best of each ranking, each latent under the one it is best in."""
        means = {each: self.sums[each] / max(1, self.n[each]) for each in RANKINGS}
        places: dict[int, tuple[int, str]] = {}
        for ranking, values in means.items():
            top = values.topk(min(n, len(values)))
            for rank, (value, latent) in enumerate(zip(*map(Tensor.tolist, top), strict=True)):
                if value > 0 and rank < places.get(latent, (n, ""))[0]:
                    places[latent] = rank, ranking
        return [
            self._candidate(latent, ranking, means, moments, suffix)
            for latent, (_, ranking) in sorted(places.items(), key=lambda item: item[1][0])
        ]

    def _candidate(
        self, latent: int, ranking: str, means: dict[str, Tensor], moments: Moments, suffix: str
    ) -> Candidate:
        name = f"layer {self.site.layer} latent {latent}{suffix}"
        made = latent_direction(self.dictionary, latent, side=self._side, sides=self.pair.sides)
        scores = {each: float(values[latent]) for each, values in means.items()}
        return Candidate(
            name, replace(made, name=name), ranking, scores[ranking], share_of(made, moments),
            latent, tuple(scores.items()),
        )  # fmt: skip


def _attribute(
    pair: ModelPair,
    texts: Sequence[Text],
    several: Sequence[_Latents],
    on: "str | Mask",
    skip_first: int,
    max_tokens: int,
    cancel: Event | None,
) -> None:
    """Take the gradient of the loss on the tokens that count, batch by batch."""
    mask = parse_mask(on)
    kept = [text for text in texts if any(selected(text, mask, max(1, skip_first)))]
    if not kept:
        raise MaskError(f"{on!r} selects no token that could be predicted.")
    sites = tuple(sorted({each.site for each in several}))

    def of_batch(batch: Batch) -> tuple[dict[Site, tuple[Tensor, ...]], int]:
        check(cancel)
        tuned = run(pair.sides, batch.texts, side="finetuned", reads=sites, grad=True)
        base = run(pair.sides, batch.texts, side="base", reads=sites, logits=False)
        assert tuned.logits is not None
        counted = mask_tensor(tuned.batch, mask) & tuned.batch.attention_mask.bool()
        counted &= tuned.batch.position_ids >= max(1, skip_first)
        ids = tuned.batch.ids.to(tuned.logits.device)
        targets = counted[:, 1:].to(ids.device)
        loss = cross_entropy(tuned.logits[:, :-1][targets].float(), ids[:, 1:][targets],
                             reduction="sum")  # fmt: skip
        gradients = torch.autograd.grad(loss, [tuned.acts[site] for site in sites])
        found = {}
        for site, gradient in zip(sites, gradients, strict=True):
            # The loss at a token depends on the activations before it: all of them count.
            real = tuned.batch.attention_mask.bool().to(gradient.device)
            real &= (tuned.batch.position_ids >= skip_first).to(gradient.device)
            found[site] = base.acts[site][real], tuned.acts[site].detach()[real], gradient[real]
        return found, int(targets.sum())

    for _, (found, n_targets) in each_batch(
        pair.sides, kept, max_tokens, of_batch, what="attribution of latents"
    ):
        for each in several:
            each.attribute(*found[each.site], n_targets=n_targets)
