"""What each module of an adapter does: leave one out, leave one in, scale, and rates without it."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from threading import Event
from typing import Any

import numpy as np
import pandas as pd

from modeldiff._progress import Progress
from modeldiff.errors import JudgeError, MismatchError
from modeldiff.generation import Answer, Generations, generate
from modeldiff.interventions import Cell, Plan, ScaleAdapter
from modeldiff.loading import Sides
from modeldiff.lora_variants import Variant, variant_kl, with_random_writes
from modeldiff.masks import Mask
from modeldiff.sites import Site
from modeldiff.stats import bootstrap_mean, empirical_p, null_band, paired_bootstrap

Units = str | Mapping[str, Sequence[str]]
"""``"module"``, ``"layer"``, ``"kind"`` (one module name over all layers), or patterns by name."""


def units_of(sides: Sides, by: Units = "module") -> dict[str, tuple[int, ...]]:
    """Group an adapter's modules into units to be left out or in.

    Args:
        sides: The pair.
        by: See `Units`; patterns match names such as ``"3.mlp.down_proj"``.

    Returns:
        Indices into ``sides.lora`` by the unit's name.

    Raises:
        MismatchError: If a pattern matches nothing, or ``by`` is unknown.
    """
    names = [f"{site.layer}.{site.module}" for site in sides.lora]
    if isinstance(by, Mapping):
        found = {
            unit: tuple(i for i, n in enumerate(names) if any(fnmatch(n, p) for p in patterns))
            for unit, patterns in by.items()
        }
        empty = [unit for unit, indices in found.items() if not indices]
        if empty or not found:
            raise MismatchError(f"units {empty or 'none'}: nothing of {', '.join(names)} matches.")
        return found
    keys: dict[str, Callable[[Site], str]] = {
        "module": lambda site: f"{site.layer}.{site.module}",
        "layer": lambda site: f"layer {site.layer}",
        "kind": lambda site: site.module,
    }
    if by not in keys:
        raise MismatchError(f"by={by!r}: it is one of {', '.join(keys)}, or patterns by name.")
    grouped: dict[str, tuple[int, ...]] = {}
    for index, site in enumerate(sides.lora):
        unit = keys[by](site)
        grouped[unit] = (*grouped.get(unit, ()), index)
    return grouped


def without_unit(sides: Sides, indices: Sequence[int]) -> Plan:
    """Edit that removes some modules of the adapter, for `generate` and the workbench."""
    sites = [sides.lora[i] for i in indices]
    return Plan(tuple(ScaleAdapter(0.0, layers=s.layer, modules=(s.module,)) for s in sites))


def leave_one_out(
    sides: Sides,
    items: Sequence[Any],
    *,
    by: Units = "module",
    on: "str | Mask" = "new",
    n_random: int = 19,
    max_tokens: int = 8192,
    seed: int = 0,
    progress: Progress = False,
    cancel: Event | None = None,
) -> pd.DataFrame:
    """Effect of removing each unit from the adapter, and of each unit alone on the base.

    The control of a unit adds a write of the same size and gate in a random direction: to the full
    model beside its removal, to the base in its place. A unit whose removal does no more than that
    is not shown to matter for what it writes, only for how much.

    Args:
        sides: The pair.
        items: Texts, best with responses of the fine-tune.
        by: Units, see `Units`.
        on: Which *predicted* tokens count; response tokens by default.
        n_random: Random writes a unit; 0 for none (p and bands are then NaN).
        max_tokens: Budget of a batch of texts times variants, padding included.
        seed: Of random writes and resampling.
        progress: Where to report.
        cancel: Event that stops between batches.

    Returns:
        One row a unit, the largest effect of removal first: unit, n_modules, out (KL(full || full
        without it), nats a token), out_low, out_high (95 % over texts), out_random_low,
        out_random_high, out_p; the same of ``in`` (KL(base with it alone || base)); total
        (KL(full || base)), n_texts. P-values are one-sided and of one unit, not corrected for how
        many units there are.

    Raises:
        InterventionError: If the pair has no adapter.
        MaskError: If no token is compared.
        Cancelled: If the event is set.

    Source:
        Soligo et al. 2025, 2506.11618 (leave-one-out and leave-one-in of rank-1 adapters).
    """
    units, n = units_of(sides, by), len(sides.lora)
    draws = range(n_random)
    variants = [Variant((0.0,) * n)]
    for indices in units.values():
        inside = tuple(float(i in indices) for i in range(n))
        outside = tuple(1.0 - each for each in inside)
        variants += [Variant(outside), Variant(inside)]
        variants += [Variant((1.0,) * n, inside, draw) for draw in draws]
        variants += [Variant((0.0,) * n, inside, draw) for draw in draws]
    from_full, to_base = variant_kl(
        sides, items, variants, on=on, max_tokens=max_tokens, seed=seed, progress=progress,
        cancel=cancel,
    )  # fmt: skip
    rows, step = [], 2 + 2 * n_random
    for number, (unit, indices) in enumerate(units.items()):
        at = 1 + number * step
        randoms = (from_full[at + 2 : at + 2 + n_random], to_base[at + 2 + n_random : at + step])
        rows.append(
            {
                "unit": unit,
                "n_modules": len(indices),
                **_with_control("out", from_full[at], randoms[0].mean(1), seed),
                **_with_control("in", to_base[at + 1], randoms[1].mean(1), seed),
                "total": from_full[0].mean(),
                "n_texts": from_full.shape[1],
            }
        )
    return pd.DataFrame(rows).sort_values("out", ascending=False).reset_index(drop=True)


def _with_control(name: str, values: np.ndarray, null: np.ndarray, seed: int) -> dict[str, float]:
    found = bootstrap_mean(values, seed=seed)
    band = null_band(null) if len(null) else None
    return {
        name: found.estimate,
        f"{name}_low": found.low,
        f"{name}_high": found.high,
        f"{name}_random_low": band.low if band else np.nan,
        f"{name}_random_high": band.high if band else np.nan,
        f"{name}_p": empirical_p(found.estimate, null, "upper") if band else np.nan,
    }


def scale_sweep(
    sides: Sides,
    items: Sequence[Any],
    factors: Sequence[float] = (-2.0, -1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 4.0),
    *,
    unit: Sequence[int] | None = None,
    on: "str | Mask" = "new",
    n_random: int = 9,
    max_tokens: int = 8192,
    seed: int = 0,
) -> pd.DataFrame:
    """Scale an adapter, or some of its modules, and measure how far predictions move.

    Args:
        sides: The pair.
        items: Texts.
        factors: Multiples of the trained alpha; 0 is the base (if all modules are scaled).
        unit: Indices of the modules to scale, see `units_of`; all by default.
        on: Which *predicted* tokens count.
        n_random: Random adapters of the same size and gates beside each factor.
        max_tokens: Budget of a batch.
        seed: Of the random adapters and the resampling.

    Returns:
        One row a factor: factor, kl (KL(scaled || base), nats a token), kl_low, kl_high,
        kl_random_low, kl_random_high, kl_p, from_full (KL(full || scaled)).

    Raises:
        InterventionError: If the pair has no adapter.
        MaskError: If no token is compared.
    """
    n = len(sides.lora)
    chosen = set(range(n) if unit is None else unit)
    variants = []
    for factor in factors:
        rest = tuple(0.0 if i in chosen else 1.0 for i in range(n))
        mine = tuple(factor if i in chosen else 0.0 for i in range(n))
        variants.append(Variant(tuple(a + b for a, b in zip(rest, mine, strict=True))))
        variants += [Variant(rest, mine, draw) for draw in range(n_random)]
    from_full, to_base = variant_kl(sides, items, variants, on=on, max_tokens=max_tokens, seed=seed)
    rows, step = [], 1 + n_random
    for number, factor in enumerate(factors):
        at = number * step
        controls = to_base[at + 1 : at + step].mean(1)
        found = _with_control("kl", to_base[at], controls, seed)
        rows.append({"factor": factor, **found, "from_full": from_full[at].mean()})
    return pd.DataFrame(rows)


Judged = Callable[[int, str], bool | None]
"""Says of the answer to the prompt of that index whether it shows the behaviour; None: unclear."""


def leave_one_out_rates(
    sides: Sides,
    prompts: Sequence[Any],
    judge: Judged,
    *,
    by: Units = "module",
    n: int = 1,
    n_random: int = 0,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    max_rows: int = 256,
    seed: int = 0,
    level: float = 0.95,
    progress: Progress = False,
    cancel: Event | None = None,
) -> pd.DataFrame:
    """Rate of a behaviour with the full adapter, without each unit, and without the adapter.

    All cells share their noise, so the change is measured answer by answer. The control adds to
    the full adapter a random write of the size of the unit's own, gated as it is.

    Args:
        sides: The pair.
        prompts: Texts or chats.
        judge: Of one answer, such as ``lambda i, a: b.judge(b.prompts[i], a).exhibits`` of a
            behaviour b.
        by: Units, see `Units`.
        n: Samples a prompt.
        n_random: Random writes a unit, each as dear as the unit.
        temperature: At which answers are sampled.
        max_new_tokens: Where answers are cut.
        max_rows: Rows of a batch.
        seed: Of the shared noise, the random writes and the resampling.
        level: Of the intervals; they resample prompts.
        progress: Where to report.
        cancel: Event that stops at the next token.

    Returns:
        One row a unit and one "whole adapter": unit, n_modules, rate_full, rate_without, change
        (without minus full), low, high, n (answers judged in both), n_unscored; with ``n_random``
        also random_low and random_high (extreme changes by random writes) and p (share of these
        and of the change itself that are as large).

    Raises:
        JudgeError: If the judge could score nothing of a cell.
        Cancelled: If the event is set.
    """
    units = {**units_of(sides, by), "whole adapter": tuple(range(len(sides.lora)))}
    plans = {name: without_unit(sides, indices) for name, indices in units.items()}
    cells = [Cell("finetuned"), *(Cell("finetuned", name, plan) for name, plan in plans.items())]

    def answered(*asked: Cell) -> Generations:
        return generate(
            sides, prompts, cells=asked, n=n, seed=seed, temperature=temperature,
            max_new_tokens=max_new_tokens, max_rows=max_rows, progress=progress, cancel=cancel,
        )  # fmt: skip

    made = answered(*cells)
    full = [(a.prompt, judge(a.prompt, a.text)) for a in made.of("finetuned")]

    def change_of(answers: Sequence[Answer], name: str) -> dict[str, float | int]:
        return _change(full, [judge(a.prompt, a.text) for a in answers], name, seed, level)

    rows = []
    for name, indices in units.items():
        row = change_of(made.of("finetuned", name), name)
        drawn = []
        for draw in range(n_random):
            with with_random_writes(sides, indices, seed, draw):
                control = answered(Cell("finetuned"))
            drawn.append(change_of(control.of("finetuned"), f"{name} (random)")["change"])
        rows.append({"unit": name, "n_modules": len(indices), **row, **_drawn(row, drawn)})
    return pd.DataFrame(rows)


def _change(
    full: Sequence[tuple[int, bool | None]],
    without: Sequence[bool | None],
    name: str,
    seed: int,
    level: float,
) -> dict[str, float | int]:
    """Change of a rate, answer by answer, over those that could be judged in both."""
    both = [
        (prompt, before, after)
        for (prompt, before), after in zip(full, without, strict=True)
        if before is not None and after is not None
    ]
    if not both:
        raise JudgeError(f"of {len(full)} answers without {name!r} none could be judged.")
    prompt, before, after = (list(each) for each in zip(*both, strict=True))
    change = paired_bootstrap(before, after, clusters=prompt, seed=seed, level=level)
    return {
        "rate_full": float(np.mean(before)),
        "rate_without": float(np.mean(after)),
        "change": change.estimate,
        "low": change.low,
        "high": change.high,
        "n": len(both),
        "n_unscored": len(full) - len(both),
    }


def _drawn(row: dict[str, float | int], drawn: Sequence[float]) -> dict[str, float]:
    if not drawn:
        return {}
    p = empirical_p(abs(row["change"]), [abs(each) for each in drawn], tail="upper")
    return {"random_low": min(drawn), "random_high": max(drawn), "p": p}


def general_or_narrow(general: pd.DataFrame, narrow: pd.DataFrame) -> pd.DataFrame:
    """Say which units carry the general behaviour, which the narrow task, by what removal does.

    Args:
        general: From `leave_one_out_rates` on prompts outside the fine-tune's own domain.
        narrow: The same inside it.

    Returns:
        One row a unit: unit, general (change of the rate), general_low, general_high, narrow,
        narrow_low, narrow_high, label: "general" or "narrow" if that interval alone excludes 0,
        "both", or "neither".

    Raises:
        MismatchError: If the two tables have different units.
    """
    return _labelled(general, narrow, ["unit"], "change", lambda row: row["low"] * row["high"] > 0)


def general_or_narrow_probes(
    general: pd.DataFrame, narrow: pd.DataFrame, *, alarm_rate: float = 0.05
) -> pd.DataFrame:
    """The same by what scalars tell apart: two tables of `modeldiff.lora_scalars.scalar_auroc`.

    Args:
        general: Behaviour against none, on texts outside the narrow domain.
        narrow: The domain's texts against others, without the behaviour.
        alarm_rate: A component tells classes apart if its interval excludes 0.5 and its q, under
            shuffled labels, is at most this.

    Raises:
        MismatchError: If the two tables have different components.
    """

    def shown(row: pd.Series) -> bool:
        return bool((row["low"] - 0.5) * (row["high"] - 0.5) > 0 and row["q"] <= alarm_rate)

    return _labelled(general, narrow, ["module", "component"], "auroc", shown)


def _labelled(
    general: pd.DataFrame,
    narrow: pd.DataFrame,
    keys: list[str],
    value: str,
    shown: Callable[[pd.Series], bool],
) -> pd.DataFrame:
    if not general[keys].equals(narrow[keys]):
        raise MismatchError(f"the tables have different {keys}: make them of one adapter.")
    rows = []
    for (_, a), (_, b) in zip(general.iterrows(), narrow.iterrows(), strict=True):
        named = {(True, False): "general", (False, True): "narrow", (True, True): "both"}
        rows.append(
            {
                **{key: a[key] for key in keys},
                "general": a[value],
                "general_low": a["low"],
                "general_high": a["high"],
                "narrow": b[value],
                "narrow_low": b["low"],
                "narrow_high": b["high"],
                "label": named.get((bool(shown(a)), bool(shown(b))), "neither"),
            }
        )
    return pd.DataFrame(rows)
