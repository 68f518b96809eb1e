"""Many variants of an adapter in one batch: every row's writes are multiplied by its own factors.

A variant joins the batch at the first layer in which it differs from the full or the bare model;
the layers below are not run again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modeldiff._files import digest
from modeldiff._progress import Progress, check, reporter
from modeldiff._shapes import Float
from modeldiff.architectures import module_at
from modeldiff.batch_size import at_once, each_batch
from modeldiff.batching import Batch, mask_tensor
from modeldiff.divergence import block_size, blocks, unembedding
from modeldiff.errors import InterventionError, MaskError
from modeldiff.forward import as_texts, device_of, inputs_of
from modeldiff.hooks import first, hidden_argument, outputs_of, recorded, stopping
from modeldiff.interventions import Side
from modeldiff.loading import SIDES, Sides
from modeldiff.masks import Mask
from modeldiff.sites import Site


@dataclass(frozen=True)
class Variant:
    """How strongly each adapted module writes.

    Args:
        factors: One a ``lora`` site of the adapter, in order: 1 as trained, 0 removed.
        random: One a site: multiple of a *random* write of the same size that is added, gated by
            what the module reads; 0 for none. The control of what a change of this size does.
        draw: Which random writes.
    """

    factors: tuple[float, ...]
    random: tuple[float, ...] = ()
    draw: int = 0

    def entry(self, sites: Sequence[Site]) -> tuple[Side, int]:
        """Model that it agrees with the longest, and the first layer in which it differs."""
        base, full = (
            min(
                (
                    site.layer
                    for i, site in enumerate(sites)
                    if self.factors[i] != value or (self.random and self.random[i])
                ),
                default=sites[-1].layer,
            )
            for value in (0.0, 1.0)
        )
        return ("base", base) if base > full else ("finetuned", full)


def variant_kl(
    sides: Sides,
    items: Sequence[Any],
    variants: Sequence[Variant],
    *,
    on: "str | Mask" = "new",
    max_tokens: int = 8192,
    budget: int = 256 << 20,
    seed: int = 0,
    progress: Progress = False,
    cancel: Event | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Distances of variants of an adapter from the full fine-tune and from the base.

    Args:
        sides: The pair, with an adapter.
        items: Texts, chats, completions; teacher-forced.
        variants: What to compare.
        on: Which *predicted* tokens count; the first token of a text never does.
        max_tokens: Budget of a batch of texts times variants, padding included; halved where
            memory runs out.
        budget: Bytes for temporaries over the vocabulary.
        seed: Of random writes.
        progress: Where to report.
        cancel: Event that stops between batches.

    Returns:
        KL(full || variant) and KL(variant || base), each ``[variant, text]``: nats a token, mean
        over a text's tokens, float64. Texts without a counted token are left out.

    Raises:
        InterventionError: If the pair has no adapter, or a variant has not one factor a module.
        MaskError: If no token is compared.
        Cancelled: If the event is set.
    """
    _check(sides, variants)
    texts = as_texts(sides, items)
    out = np.full((2, len(variants), len(texts)), np.nan)
    report, done = reporter(progress, "variants"), 0
    n_tokens = max(1, max_tokens // min(8, len(variants)))  # of the texts alone

    @torch.no_grad()
    def of_batch(batch: Batch) -> np.ndarray:
        keep = mask_tensor(batch, on)
        keep[:, 0] = False
        if not keep.any():
            return np.full((2, len(variants), len(batch.texts)), np.nan)
        sweep, n = _Sweep(sides, batch, keep, seed, budget), batch.ids.numel()
        return at_once(
            sides.roots[0], max(1, max_tokens // n),
            lambda size: sweep.distances(variants, size, cancel), what="variants", width=n,
        )  # fmt: skip

    for batch, values in each_batch(sides, texts, n_tokens, of_batch, what="texts of variants"):
        out[:, :, list(batch.order)] = values
        done += len(batch.texts)
        report(done, len(texts), f"{done}/{len(texts)} texts")
    known = ~np.isnan(out[0, 0])
    if not known.any():
        raise MaskError(f"the mask {on!r} leaves no predicted token in {len(texts)} texts.")
    return out[0][:, known], out[1][:, known]


def _check(sides: Sides, variants: Sequence[Variant]) -> None:
    if sides.kind != "adapter":
        raise InterventionError("variants of an adapter need a pair with one: load(adapter=...).")
    n = len(sides.lora)
    wrong = [v for v in variants if len(v.factors) != n or len(v.random) not in (0, n)]
    if wrong or not variants:
        raise InterventionError(f"{len(variants)} variants; each needs {n} factors, one a module.")


class _Sweep:
    """One batch of texts: both unedited passes, from which every variant branches off."""

    def __init__(self, sides: Sides, batch: Batch, keep: Tensor, seed: int, budget: int) -> None:
        self.sides, self.batch, self.seed, self.budget = sides, batch, seed, budget
        self.n_layers = sides.shape("base").n_layers
        self.paths = [sides.site_map.layer(i) for i in range(self.n_layers)]
        self.calls: dict[Side, dict[str, tuple[Any, Any]]] = {}
        self.final: dict[Side, Tensor] = {}
        self.row, self.column = keep.nonzero(as_tuple=True)
        norm = sides.site_map.norm
        for side in SIDES:
            with (
                sides.on(side) as root,
                recorded(root, self.paths[sides.first_changed :]) as calls,
                outputs_of(root, norm) as kept,
                stopping(root, norm),
            ):
                root(**inputs_of(batch, device_of(root)), use_cache=False)
            self.calls[side], self.final[side] = calls, self._predicting(kept[0])

    def _predicting(self, states: Tensor) -> Tensor:
        """States of the counted tokens' predecessors, text by text; of any number of variants."""
        rows = states.unflatten(0, (-1, len(self.batch.texts)))
        return rows[:, self.row.to(states.device), self.column.to(states.device) - 1].flatten(0, 1)

    def distances(self, variants: Sequence[Variant], size: int, cancel: Event | None) -> np.ndarray:
        """Both distances of variants, ``size`` at a time: those that enter late together."""
        found = np.full((2, len(variants), len(self.batch.texts)), np.nan)
        order = sorted(range(len(variants)), key=lambda i: variants[i].entry(self.sides.lora)[1])
        for start in range(0, len(order), size):
            check(cancel)
            chunk = order[start : start + size]
            found[:, chunk] = self.run([variants[i] for i in chunk])
        return found

    def run(self, variants: Sequence[Variant]) -> np.ndarray:
        """Both distances, ``[2, variant, text]``; NaN where a text has no counted token."""
        states = self._predicting(self._states(variants)).unflatten(0, (len(variants), -1))
        kls = torch.zeros(2, len(variants), len(self.row), dtype=torch.float64)
        unembed = unembedding(self.sides.roots[1], self.sides.site_map)
        vocab = unembed(states[0, :1]).shape[-1]
        for block in blocks(len(self.row), block_size(vocab, self.budget)):
            base, full = (unembed(self.final[each][block]).log_softmax(-1) for each in SIDES)
            p_full = full.exp()
            for index in range(len(variants)):
                mine = unembed(states[index, block]).log_softmax(-1)
                kls[0, index, block] = (p_full * (full - mine)).sum(-1).double().cpu()
                kls[1, index, block] = (mine.exp() * (mine - base)).sum(-1).double().cpu()
        counts = torch.bincount(self.row, minlength=len(self.batch.texts)).double()
        sums = torch.zeros(2, len(variants), len(counts), dtype=torch.float64)
        sums.index_add_(2, self.row, kls)
        return (sums / counts).numpy()  # 0 / 0 is NaN

    def _states(self, variants: Sequence[Variant]) -> Tensor:
        """Final norm's outputs of sorted variants, ``[variant x text, token, width]``."""
        entries: list[tuple[Side, int]] = [variant.entry(self.sides.lora) for variant in variants]
        n_rows, active = len(self.batch.texts), 0
        h: Tensor | None = None
        with self.sides.on("finetuned") as root, self._writing(root, variants):
            for layer in range(entries[0][1], self.n_layers):
                joining: list[Side] = [side for side, at in entries[active:] if at == layer]
                parts = [] if h is None else [h]
                parts += [hidden_argument(self.calls[side][self.paths[layer]]) for side in joining]
                active += len(joining)
                args, kwargs = self.calls["finetuned"][self.paths[layer]]
                rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
                again = _repeated((args[1:], rest), n_rows, active)
                module = module_at(root, self.paths[layer])
                h = first(module(torch.cat(parts), *again[0], **again[1]))
            assert h is not None
            return module_at(root, self.sides.site_map.norm)(h)

    @contextmanager
    def _writing(self, root: nn.Module, variants: Sequence[Variant]) -> Iterator[None]:
        """Give every row its own factors; early layers see the first variants only."""
        n_rows, name = len(self.batch.texts), self.sides.adapter
        with ExitStack() as stack:
            for index, site in enumerate(self.sides.lora):
                path = f"{self.sides.site_map.layer(site.layer)}.{site.module}.lora_B.{name}"
                module: Any = module_at(root, path)
                factors = torch.tensor([v.factors[index] for v in variants])
                writes = self._random_writes(module.weight, index, variants)
                handle = module.register_forward_hook(_scaling(factors, writes, n_rows))
                stack.callback(handle.remove)
            yield

    def _random_writes(
        self, b: Tensor, index: int, variants: Sequence[Variant]
    ) -> dict[int, Tensor]:
        """Random matrices with the singular values and read directions of B, by variant."""
        wanted = {k: v for k, v in enumerate(variants) if v.random and v.random[index]}
        return {
            k: variant.random[index] * random_write(b, self.seed, index, variant.draw)
            for k, variant in wanted.items()
        }


def random_write(
    b: Float[Tensor, "d_out r"], seed: int, index: int, draw: int
) -> Float[Tensor, "d_out r"]:
    """Draw a matrix with the singular values and read directions of B, writing elsewhere.

    Args:
        b: An adapter's B.
        seed: Of all draws.
        index: Of the module among the adapter's.
        draw: Which of the module's.

    Example:
        >>> b = torch.tensor([[3.0], [4.0], [0.0]])
        >>> round(float(random_write(b, 0, 0, 0).norm()), 4)
        5.0
    """
    triangle = torch.linalg.qr(b.detach().cpu().double()).R
    generator = torch.Generator().manual_seed(int(digest(seed, index, draw), 16) % 2**63)
    drawn = torch.randn(b.shape, generator=generator, dtype=torch.float64)
    return (torch.linalg.qr(drawn).Q @ triangle).to(b)


@contextmanager
def with_random_writes(
    sides: Sides, modules: Sequence[int], seed: int, draw: int
) -> Iterator[None]:
    """Add to what some modules of the adapter write a random write of the same size.

    Args:
        sides: The pair, with an adapter.
        modules: Indices into ``sides.lora``.
        seed: Of all draws.
        draw: Which.
    """
    with ExitStack() as stack:
        root = stack.enter_context(sides.on("finetuned"))
        for index in modules:
            site = sides.lora[index]
            path = f"{sides.site_map.layer(site.layer)}.{site.module}.lora_B.{sides.adapter}"
            module: Any = module_at(root, path)
            write = random_write(module.weight, seed, index, draw)
            handle = module.register_forward_hook(_adding(write))
            stack.callback(handle.remove)
        yield


def _adding(write: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    return lambda module, args, output: output + args[0] @ write.T


def _scaling(
    factors: Tensor, writes: Mapping[int, Tensor], n_rows: int
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        present = output.shape[0] // n_rows
        rows = factors[:present].repeat_interleave(n_rows).to(output)
        out = output * rows[:, None, None]
        for k, write in writes.items():
            if k < present:
                rows_of = slice(k * n_rows, (k + 1) * n_rows)
                out[rows_of] += args[0][rows_of] @ write.T
        return out

    return hook


def _repeated(value: Any, n_rows: int, times: int) -> Any:
    """Repeat a batch's recorded arguments for several variants; what has one row broadcasts."""
    if isinstance(value, Tensor):
        many = value.dim() > 1 and value.shape[0] == n_rows and n_rows > 1
        return value.repeat(times, *[1] * (value.dim() - 1)) if many else value
    if isinstance(value, Mapping):
        return {name: _repeated(each, n_rows, times) for name, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_repeated(each, n_rows, times) for each in value)
    return value
