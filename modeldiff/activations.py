"""Paired activations: both sides of a pair on the same tokens, aligned token by token."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any, TypeVar

import torch
from torch import Tensor

from modeldiff._progress import Progress, check, reporter
from modeldiff._shapes import Bool, Float, Int
from modeldiff.batch_size import each_batch
from modeldiff.batching import Batch
from modeldiff.errors import MaskError, MismatchError
from modeldiff.forward import PairRun, as_texts, run_pair
from modeldiff.loading import Sides
from modeldiff.masks import Mask, parse_mask
from modeldiff.sites import Site, parse_sites
from modeldiff.tokens import Text, selected

R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Activations:
    """Activations of both sides at some sites, one row per kept token.

    Rows are in the order of the texts and of the tokens in them; row i of every tensor is the
    same token.

    Args:
        base: ``[token, width]`` by site, in the storage dtype.
        finetuned: The same of the fine-tuned side; ``lora`` sites are here alone.
        texts: What was run.
        text_index: Which text each row belongs to.
        position: Its position in the text.
        token_ids: Its token.
    """

    base: dict[Site, Float[Tensor, "token width"]]
    finetuned: dict[Site, Float[Tensor, "token width"]]
    texts: tuple[Text, ...]
    text_index: Int[Tensor, " token"]
    position: Int[Tensor, " token"]
    token_ids: Int[Tensor, " token"]

    def __len__(self) -> int:
        return len(self.text_index)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Captured sites, in forward order."""
        return tuple(sorted(self.finetuned))

    @property
    def site(self) -> Site:
        """The captured site, if it is a single one.

        Raises:
            MismatchError: If there are several.
        """
        if len(self.sites) != 1:
            raise MismatchError(f"captured {len(self.sites)} sites; say which: acts.base[site].")
        return self.sites[0]

    def difference(self, site: "str | Site") -> Float[Tensor, "token width"]:
        """Fine-tuned minus base at a site, in float32.

        Raises:
            MismatchError: If the sides have other widths there.
        """
        at = Site.parse(site)
        widths = self.base[at].shape[1], self.finetuned[at].shape[1]
        if widths[0] != widths[1]:
            raise MismatchError(
                f"{at} has {widths[0]} channels in the base and {widths[1]} in the fine-tune: they "
                "have no difference. Take a site of the residual stream."
            )
        return self.finetuned[at].float() - self.base[at].float()


@dataclass(frozen=True, eq=False)
class Part:
    """The kept tokens of one batch, as `stream` yields them.

    Args:
        run: Padded activations of both sides.
        keep: Which tokens of the batch are kept, ``[row, token]``.
        text_index: Which of the texts each kept token belongs to.
        position: Its position in the text, padding not counted.
    """

    run: PairRun
    keep: Bool[Tensor, "row seq"]
    text_index: Int[Tensor, " token"]
    position: Int[Tensor, " token"]

    def rows(self, acts: dict[Site, Tensor], site: Site) -> Float[Tensor, "token width"]:
        """Kept rows of one side at one site, in the model's dtype and on its device."""
        return acts[site][self.keep.to(acts[site].device)]


@dataclass(frozen=True, eq=False)
class Planned:
    """A batch that is still to be run, with the tokens to keep of it; fields as of `Part`."""

    batch: Batch
    keep: Bool[Tensor, "row seq"]
    text_index: Int[Tensor, " token"]
    position: Int[Tensor, " token"]


def planned(
    sides: Sides,
    texts: tuple[Text, ...],
    work: Callable[[Planned], R],
    *,
    what: str = "capture",
    on: "str | Mask" = "all",
    skip_first: int = 1,
    max_tokens: int = 4096,
    progress: Progress = False,
    cancel: Event | None = None,
) -> Iterator[tuple[Planned, R]]:
    """Batch the texts that have tokens to keep, and work on each batch; reports after each.

    Args:
        sides: The pair.
        texts: What to run.
        work: Done with each batch; again with halves of it if memory runs out.
        what: Name of the work, see `modeldiff.batch_size.fitted`.
        on: Tokens to keep.
        skip_first: Positions dropped at the start of each text.
        max_tokens: Budget of a batch, padding included.
        progress: Where to report.
        cancel: Event that stops between batches.

    Raises:
        MaskError: If no token of any text is kept.
        SetupError: If memory runs out on a single text.
        Cancelled: If the event is set.
    """
    mask = parse_mask(on)
    keeps = [selected(text, mask, skip_first) for text in texts]
    if not any(any(keep) for keep in keeps):
        raise MaskError(
            f"the mask {on!r} with skip_first={skip_first} keeps no token of {len(texts)} texts. "
            "Roles exist in chats only, 'new' only where there is a response."
        )
    report = reporter(progress, "capture")
    done = 0
    kept = [index for index, keep in enumerate(keeps) if any(keep)]

    def of_batch(batch: Batch) -> tuple[Planned, R]:
        check(cancel)
        keep = torch.zeros(batch.ids.shape, dtype=torch.bool)
        owner = [kept[index] for index in batch.order]
        for row, index in enumerate(owner):
            keep[row, : len(keeps[index])] = torch.tensor(keeps[index])
        row, position = keep.nonzero(as_tuple=True)
        each = Planned(batch, keep, torch.tensor(owner)[row], position)
        return each, work(each)

    used = [texts[i] for i in kept]
    for batch, found in each_batch(sides, used, max_tokens, of_batch, what=what):
        yield found
        done += len(batch.texts)
        report(done, len(kept), f"{done}/{len(kept)} texts")


def stream(
    sides: Sides,
    texts: tuple[Text, ...],
    sites: tuple[Site, ...],
    *,
    on: "str | Mask" = "all",
    skip_first: int = 1,
    final: bool = False,
    max_tokens: int = 4096,
    progress: Progress = False,
    cancel: Event | None = None,
) -> Iterator[Part]:
    """Run both sides batch by batch; memory does not grow with the number of texts.

    Args:
        sides: The pair.
        texts: What to run; batches are sorted by length, `Part.text_index` tells them apart.
        sites: What to read.
        on: Tokens to keep.
        skip_first: Positions dropped at the start of each text (BOS carries massive activations).
        final: Also compute the output of the final norm.
        max_tokens: Budget of a batch, padding included.
        progress: Where to report.
        cancel: Event that stops between batches.

    Raises:
        MaskError: If no token of any text is kept.
        SetupError: If memory runs out on a single text.
        Cancelled: If the event is set.
    """

    def work(each: Planned) -> Part:
        run = run_pair(sides, each.batch, sites, final=final, keep=each.keep, cancel=cancel)
        return Part(run, each.keep, each.text_index, each.position)

    for _, part in planned(
        sides, texts, work, on=on, skip_first=skip_first, max_tokens=max_tokens,
        progress=progress, cancel=cancel,
    ):  # fmt: skip
        yield part


def capture(
    sides: Sides,
    items: Sequence[Any],
    at: "str | Site | Sequence[str | Site]",
    *,
    on: "str | Mask" = "all",
    skip_first: int = 1,
    dtype: torch.dtype = torch.float32,
    max_tokens: int = 4096,
    progress: Progress = False,
    cancel: Event | None = None,
) -> Activations:
    """Capture both sides' activations on the same tokens.

    Each side stops after the last site; the unembedding never runs; for adapter pairs the layers
    below the first adapted one run once for both sides.

    Args:
        sides: The pair.
        items: Texts, chats, completions.
        at: Site or sites, such as "resid_post.12".
        on: Tokens to keep: "all", "prompt", "new", a role, or a `Mask`.
        skip_first: Positions dropped at the start of each text.
        dtype: Storage dtype, float32 or bfloat16.
        max_tokens: Budget of a batch, padding included.
        progress: Where to report.
        cancel: Event that stops between batches.

    Raises:
        MaskError: If no token is kept.
        MismatchError: If the storage dtype is another.
        SiteError: If a site does not exist.
        Cancelled: If the event is set.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise MismatchError(f"dtype={dtype}: activations are kept as float32 or bfloat16.")
    sites, texts = parse_sites(at), as_texts(sides, items)
    stored: dict[str, dict[Site, list[Tensor]]] = {"base": {}, "finetuned": {}}
    indices, positions = [], []
    for part in stream(
        sides, texts, sites, on=on, skip_first=skip_first, max_tokens=max_tokens,
        progress=progress, cancel=cancel,
    ):  # fmt: skip
        for name, acts in (("base", part.run.base), ("finetuned", part.run.finetuned)):
            for site in acts:
                rows = part.rows(acts, site).to("cpu", dtype)
                stored[name].setdefault(site, []).append(rows)
        indices.append(part.text_index)
        positions.append(part.position)
    index, position = torch.cat(indices), torch.cat(positions)
    order = torch.argsort(index * (int(position.max()) + 1) + position)
    index, position = index[order], position[order]
    places = zip(index.tolist(), position.tolist(), strict=True)
    ids = torch.tensor([texts[i].ids[p] for i, p in places])
    return Activations(
        base=_joined(stored["base"], order),
        finetuned=_joined(stored["finetuned"], order),
        texts=texts,
        text_index=index,
        position=position,
        token_ids=ids,
    )


def _joined(
    parts: dict[Site, list[Tensor]], order: Tensor
) -> dict[Site, Float[Tensor, "token width"]]:
    joined = {}
    for site in list(parts):
        joined[site] = torch.cat(parts.pop(site))[order]
    return joined
