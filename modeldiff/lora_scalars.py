"""The hidden state of an adapter, token by token: how much of what it writes is added where.

Component i of a module has the scalar ``s = singular[i] * (right[:, i] . x)``; the module adds
``sum_i s_i left[:, i]``. All modules' scalars come from one forward pass of the fine-tune.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from modeldiff._progress import Progress, check, reporter
from modeldiff._shapes import Float, Int
from modeldiff.batch_size import each_batch
from modeldiff.batching import Batch
from modeldiff.errors import InterventionError, MaskError, MismatchError
from modeldiff.forward import as_texts, run
from modeldiff.interventions import Plan, Replace, ScaleAdapter, Steer
from modeldiff.loading import Sides
from modeldiff.logit_lens import LogitLens
from modeldiff.lora import AdapterModule, write_directions
from modeldiff.masks import Mask, parse_mask
from modeldiff.stats import Interval, auroc, benjamini_hochberg
from modeldiff.tokens import Text, selected


@dataclass(frozen=True, eq=False)
class Scalars:
    """Scalars of an adapter's modules, one row per kept token, texts in order.

    Args:
        modules: The modules.
        values: ``[token, component]`` by the module's name, float64; lengths in the residual
            stream where the module writes there.
        texts: What was run.
        text_index: Which text each row belongs to.
        position: Its position in the text.
        token_ids: Its token.
    """

    modules: tuple[AdapterModule, ...]
    values: dict[str, Float[Tensor, "token component"]]
    texts: tuple[Text, ...]
    text_index: Int[Tensor, " token"]
    position: Int[Tensor, " token"]
    token_ids: Int[Tensor, " token"]

    def __len__(self) -> int:
        return len(self.text_index)

    def columns(self) -> list[tuple[str, int]]:
        """Every module and component, in order."""
        return [(name, i) for name, each in self.values.items() for i in range(each.shape[1])]

    def table(self) -> pd.DataFrame:
        """One row a token: text, position, token_id, token, and a column a component."""
        places = list(zip(self.text_index.tolist(), self.position.tolist(), strict=True))
        rows = {
            "text": self.text_index.numpy(),
            "position": self.position.numpy(),
            "token_id": self.token_ids.numpy(),
            "token": [self.texts[text].pieces[at] for text, at in places],
        }
        parts = {f"{name} {i}": self.values[name][:, i].numpy() for name, i in self.columns()}
        return pd.DataFrame({**rows, **parts})

    def summary(
        self, *, seed: int = 0, n_resamples: int = 1000, level: float = 0.95
    ) -> pd.DataFrame:
        """How much of every component is a constant push.

        The bias fraction is mean^2 / E[s^2]: 1 if the scalar is the same at every token, so that
        the component is a steering vector; near 0 if it depends on the token. Ablating it to zero
        and to its mean differ by that much. Intervals resample whole texts.

        Returns:
            One row a component: module, component, mean, std, positive (share of tokens),
            bias_fraction, bias_low, bias_high (NaN with one text), n_texts, n_tokens.
        """
        index = np.unique(self.text_index.numpy(), return_inverse=True)[1]
        n_texts, rng = int(index.max()) + 1, np.random.default_rng(seed)
        drawn = rng.multinomial(n_texts, [1 / n_texts] * n_texts, size=n_resamples)
        sizes = np.bincount(index)
        tails = [(1 - level) / 2, (1 + level) / 2]
        rows = []
        for name, i in self.columns():
            s = self.values[name][:, i].numpy()
            sums, squares = np.bincount(index, s), np.bincount(index, s * s)
            spread = _bias(drawn @ sums, drawn @ squares, drawn @ sizes)
            low, high = np.quantile(spread, tails) if n_texts > 1 else (np.nan, np.nan)
            rows.append(
                {
                    "module": name,
                    "component": i,
                    "mean": s.mean(),
                    "std": s.std(),
                    "positive": (s > 0).mean(),
                    "bias_fraction": float(_bias(s.sum(), (s * s).sum(), len(s))),
                    "bias_low": low,
                    "bias_high": high,
                    "n_texts": n_texts,
                    "n_tokens": len(s),
                }
            )
        return pd.DataFrame(rows)


def _bias(sums: Any, squares: Any, n: Any) -> Any:
    return np.asarray(sums) ** 2 / (np.asarray(n) * np.maximum(squares, 1e-300))


def lora_scalars(
    sides: Sides,
    items: Sequence[Any],
    modules: Sequence[AdapterModule],
    *,
    on: "str | Mask" = "all",
    skip_first: int = 1,
    max_tokens: int = 4096,
    progress: Progress = False,
    cancel: Event | None = None,
) -> Scalars:
    """Compute every module's scalars in one forward pass, which ends at the last module.

    Args:
        sides: The pair.
        items: Texts, chats, completions.
        modules: From `adapter_modules` of this pair.
        on: Tokens to keep.
        skip_first: Positions dropped at the start of each text.
        max_tokens: Budget of a batch, padding included; halved where memory runs out.
        progress: Where to report.
        cancel: Event that stops between batches.

    Raises:
        MaskError: If no token is kept.
        Cancelled: If the event is set.

    Source:
        Scalars of rank-1 adapters, Soligo et al. 2025, 2506.11618.
    """
    texts, mask = as_texts(sides, items), parse_mask(on)
    keeps = [selected(text, mask, skip_first) for text in texts]
    if not any(any(keep) for keep in keeps):
        raise MaskError(f"the mask {on!r} with skip_first={skip_first} keeps no token.")
    rows: dict[str, list[Tensor]] = {module.name: [] for module in modules}
    owners, positions = [], []
    report, done = reporter(progress, "scalars"), 0

    def of_batch(batch: Batch) -> tuple[Tensor, Tensor, list[Tensor]]:
        check(cancel)
        return _of_batch(sides, batch, modules, keeps)

    for batch, (owner, position, values) in each_batch(
        sides, texts, max_tokens, of_batch, what="scalars"
    ):
        owners.append(owner)
        positions.append(position)
        for module, value in zip(modules, values, strict=True):
            rows[module.name].append(value)
        done += len(batch.texts)
        report(done, len(texts), f"{done}/{len(texts)} texts")
    owner, position = torch.cat(owners), torch.cat(positions)
    order = torch.argsort(owner * (int(position.max()) + 1) + position)
    owner, position = owner[order], position[order]
    places = zip(owner.tolist(), position.tolist(), strict=True)
    return Scalars(
        modules=tuple(modules),
        values={name: torch.cat(parts)[order] for name, parts in rows.items()},
        texts=texts,
        text_index=owner,
        position=position,
        token_ids=torch.tensor([texts[i].ids[p] for i, p in places]),
    )


def _of_batch(
    sides: Sides, batch: Batch, modules: Sequence[AdapterModule], keeps: Sequence[Sequence[bool]]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Text and position of each kept token of a batch, and every module's scalars there."""
    sites = tuple(module.site for module in modules)
    got = run(sides, batch.texts, side="finetuned", reads=sites, logits=False, pad_side="right")
    keep = torch.zeros(batch.ids.shape, dtype=torch.bool)
    for row, index in enumerate(batch.order):
        keep[row, : len(keeps[index])] = torch.tensor(keeps[index])
    row, position = keep.nonzero(as_tuple=True)
    values = [got.acts[each.site].cpu()[keep].double() @ each.mixing for each in modules]
    return torch.tensor(batch.order)[row], position, values


def gate_table(
    scalars: Scalars, lenses: "dict[str, LogitLens]", *, k: int = 5, min_count: int = 3
) -> pd.DataFrame:
    """Set beside each other what opens a component and what it then says: gate x write.

    Tokens that open it come with the sign of their scalar; for a negative scalar the component
    writes the opposite, so the suppressed tokens are what it says.

    Args:
        scalars: Of some texts.
        lenses: From `write_lens`.
        k: Tokens in a cell.
        min_count: A token must occur so often to count.

    Returns:
        One row a component and sign with a lens: module, component, sign, share (of the squared
        scalar at tokens of that sign), opened_by, says, p (of the lens, against random).

    Raises:
        MaskError: If no token occurs ``min_count`` times.
    """
    table = scalars.table()
    tokens = table.groupby("token").agg(dict.fromkeys(table.columns[4:], "mean"))
    counts = table["token"].value_counts()
    tokens = tokens[counts.reindex(tokens.index) >= min_count]
    if not len(tokens):
        raise MaskError(f"no token occurs {min_count} times in {len(table)}; lower min_count.")
    rows = []
    for name, i in scalars.columns():
        lens = lenses.get(f"{name} write {i}")
        if lens is None:
            continue
        s, means = table[f"{name} {i}"], tokens[f"{name} {i}"]
        for sign, end, turned in ((1, "promoted", means), (-1, "suppressed", -means)):
            top = turned[turned > 0].nlargest(k)
            rows.append(
                {
                    "module": name,
                    "component": i,
                    "sign": sign,
                    "share": float((s[s * sign > 0] ** 2).sum() / max(float((s**2).sum()), 1e-300)),
                    "opened_by": top.index.tolist(),
                    "says": lens.of(end)["token"].tolist()[:k],
                    "p": lens.p,
                }
            )
    return pd.DataFrame(rows)


def scalar_auroc(
    scalars: Scalars,
    labels: Sequence[bool | None],
    *,
    pool: str = "mean",
    n_shuffles: int = 199,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """How well each component's scalar tells two classes of text apart.

    Args:
        scalars: Of some texts.
        labels: One a text; None leaves the text out.
        pool: "mean" or "max" over a text's kept tokens.
        n_shuffles: Shufflings of the labels.
        level: Of the intervals.
        seed: Of the shufflings.

    Returns:
        One row a component: module, component, auroc, low, high, shuffled_high (quantile of
        max(a, 1 - a) under shuffled labels), p (two-sided, from the shufflings), q
        (Benjamini-Hochberg), n_true, n_false.

    Raises:
        MismatchError: If there is not one label a text, a class is empty, or ``pool`` is unknown.
    """
    if len(labels) != len(scalars.texts) or pool not in ("mean", "max"):
        raise MismatchError(
            f"{len(labels)} labels for {len(scalars.texts)} texts, pool={pool!r}: one label a "
            "text, and pool is 'mean' or 'max'."
        )
    present = scalars.text_index.unique().tolist()
    chosen = [i for i in present if labels[i] is not None]
    truth = np.array([bool(labels[i]) for i in chosen])
    if not 0 < truth.sum() < len(truth):
        raise MismatchError(f"{truth.sum()} of {len(truth)} labels are True: both are needed.")
    rng = np.random.default_rng(seed)
    shuffled = [rng.permutation(truth) for _ in range(n_shuffles)]
    rows = []
    for name, i in scalars.columns():
        column = scalars.values[name][:, i]
        parts = [column[scalars.text_index == text] for text in chosen]
        pooled = np.array([float(part.mean() if pool == "mean" else part.max()) for part in parts])
        found = _auroc(pooled, truth, level)
        null = np.array([_auroc(pooled, each, level).estimate for each in shuffled])
        null = np.maximum(null, 1 - null)
        reached = max(found.estimate, 1 - found.estimate)
        rows.append(
            {
                "module": name,
                "component": i,
                "auroc": found.estimate,
                "low": found.low,
                "high": found.high,
                "shuffled_high": float(np.quantile(null, level)),
                "p": (1 + int((null >= reached - 1e-12).sum())) / (1 + n_shuffles),
                "n_true": int(truth.sum()),
                "n_false": int((~truth).sum()),
            }
        )
    table = pd.DataFrame(rows)
    return table.assign(q=benjamini_hochberg(table["p"].to_numpy()))


def _auroc(pooled: np.ndarray, truth: np.ndarray, level: float) -> Interval:
    return auroc(pooled[truth], pooled[~truth], level)


def zero_scalars(modules: Sequence[AdapterModule], where: "str | Mask" = "all") -> Plan:
    """Silence modules at some tokens."""
    parts = (
        ScaleAdapter(0.0, layers=each.site.layer, modules=(each.site.module,), where=where)
        for each in modules
    )
    return Plan(tuple(parts))


def set_scalar(
    module: AdapterModule, value: float, where: "str | Mask" = "all", component: int = 0
) -> Plan:
    """Set one component's scalar at some tokens to a value, other components to zero.

    Works while generating too. The mean of `Scalars.summary` gives mean ablation.

    Args:
        module: One that writes to the residual stream.
        value: Signed length along the write direction; 0 is `zero_scalars`.
        where: Tokens.
        component: Which.

    Raises:
        DirectionError: If the module writes elsewhere.
        InterventionError: If it has no such component.
    """
    writes = write_directions(module)
    if not 0 <= component < len(writes):
        raise InterventionError(f"{module.name} has components 0 to {len(writes) - 1}.")
    if value == 0:
        return zero_scalars([module], where)
    write = writes[component]
    return zero_scalars([module], where) + Steer(write, value / write.scale, where=where)


def swap_scalars(
    sides: Sides,
    items: Sequence[Any],
    others: Sequence[Any],
    modules: Sequence[AdapterModule],
    where: "str | Mask" = "all",
) -> Plan:
    """Give modules the hidden states that they have on other texts, token by token.

    For `modeldiff.forward.run` of ``items`` as one batch.

    Args:
        sides: The pair.
        items: The texts that will be run.
        others: As many, each with as many tokens.
        modules: Whose hidden states.
        where: Tokens to swap.

    Raises:
        MismatchError: If a text has another number of tokens than its counterpart.
    """
    mine, theirs = as_texts(sides, items), as_texts(sides, others)
    sizes = [[text.n_tokens for text in each] for each in (mine, theirs)]
    if sizes[0] != sizes[1]:
        raise MismatchError(f"texts of {sizes[0]} tokens, others of {sizes[1]}: they must agree.")
    sites = tuple(module.site for module in modules)
    got = run(sides, theirs, side="finetuned", reads=sites, logits=False)
    return Plan(tuple(Replace(site, got.acts[site], where=where) for site in sites))
