"""The audit's edits and their controls, and the tables of what they do."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from modeldiff.audit_answers import Judged
from modeldiff.behaviours import rate_of
from modeldiff.direction_controls import random_like
from modeldiff.directions import Direction
from modeldiff.interventions import Ablate, Cell, Plan, Steer
from modeldiff.stats import bootstrap_mean, null_band

Directions = Mapping[int, Direction]
SHIFT, CONTRAST, TEXT_NULL = "model shift", "answer contrast", "base-text contrast"
STEPS = (1.0, 2.0)
"""Multiples of a direction's raw length that are added to the base."""
SPOILT = 0.05
"""Share of answers that an edit may spoil and still count as the same model's."""


def ablation(directions: Directions, layers: Sequence[int] | None = None) -> Plan:
    """Remove each layer's own direction at that layer; at all layers, or at some."""
    chosen = sorted(directions) if layers is None else layers
    plan = Plan()
    for layer in chosen:
        plan = plan + Ablate(directions[layer], layers=layer)
    return plan


def candidates(directions: Directions) -> dict[str, tuple[int, ...]]:
    """Where the ablation might be made: at every layer, or at a single one."""
    single = {f"layer {layer}": (layer,) for layer in sorted(directions)}
    return {**single, "every layer": tuple(sorted(directions))}


def random_sets(directions: Directions, n: int, seed: int) -> list[dict[int, Direction]]:
    """Random directions, one set of all layers for each control."""
    drawn = {
        layer: random_like(direction, n, seed=seed + 1000 * layer)
        for layer, direction in directions.items()
    }
    return [{layer: several[i] for layer, several in drawn.items()} for i in range(n)]


def cells_of_ablation(name: str, directions: Directions, layers: Sequence[int]) -> Cell:
    """The fine-tune with the directions removed at the given layers."""
    return Cell("finetuned", name, ablation(directions, layers))


def cells_of_steering(name: str, direction: Direction) -> list[Cell]:
    """The base with a direction added, at each of `STEPS` times its raw length."""
    return [Cell("base", f"{name} x{step:g}", Plan((Steer(direction, step),))) for step in STEPS]


def behaviour_row(judged: Judged, side: str, edit: str, label: str, kind: str) -> dict[str, Any]:
    """One row of the table "behaviour"."""
    return {
        "cell": label,
        "side": side,
        "edit": edit,
        "kind": kind,
        **rate_of(judged.cell(side, edit)),
    }


def pooled_row(
    judged: Judged, side: str, edits: Sequence[str], label: str, kind: str = "control"
) -> dict[str, Any]:
    """One row for several cells together."""
    part = judged.table[(judged.table["side"] == side) & judged.table["edit"].isin(edits)]
    return {"cell": label, "side": side, "edit": label, "kind": kind, **rate_of(part)}


def sound(rows: pd.DataFrame, unedited: Mapping[Any, Any]) -> "pd.Series[bool]":
    """Whether an edited model still answers: coherent, and in words that the judge can score.

    Both shares may fall by at most `SPOILT` below the unedited model's; NaN is not sound.
    """
    scored = rows["n"] / (rows["n"] + rows["n_unscored"])
    before = unedited["n"] / (unedited["n"] + unedited["n_unscored"])
    answers = rows["coherent"] >= unedited["coherent"] - SPOILT
    return answers & (scored >= before - SPOILT)


def control_rows(judged: Judged, edits: Sequence[str], seed: int) -> pd.DataFrame:
    """One row for each random direction."""
    rows = []
    for edit in edits:
        row = rate_of(judged.cell("finetuned", edit))
        rows.append({"control": edit, "seed": seed} | {
            name: row[name] for name in ("n", "rate", "rate_low", "rate_high", "coherent")
        })  # fmt: skip
    return pd.DataFrame(rows)


def effect_rows(table: pd.DataFrame, kinds: Mapping[str, str], seed: int) -> pd.DataFrame:
    """Summarise `modeldiff.edit_effects.effects` by cell, with intervals over texts."""
    rows = []
    for (_, side, edit), part in table.groupby(["cell", "side", "edit"], sort=True):
        kl = bootstrap_mean(part["kl"].to_numpy(float), seed=seed)
        loss = bootstrap_mean(part["loss"].to_numpy(float), seed=seed)
        name = str(side) if edit == "none" else f"{side} + {edit}"
        rows.append(
            {
                "cell": name,
                "edit": edit,
                "kind": kinds.get(str(edit), "model"),
                "n_texts": len(part),
                "kl_to_base": kl.estimate,
                "kl_low": kl.low,
                "kl_high": kl.high,
                "loss": loss.estimate,
                "loss_low": loss.low,
                "loss_high": loss.high,
            }
        )
    return pd.DataFrame(rows)


def scan_rows(
    layers: pd.DataFrame, directions: Directions, effects: pd.DataFrame, n_scan: int
) -> pd.DataFrame:
    """Complete the table "layers" with the scan: KL to the base after ablating there alone."""
    mean = effects.groupby("edit")["kl"].mean()
    rows = []
    for row in layers.to_dict("records"):
        layer = int(row["layer"])
        direction = directions.get(layer)
        scanned = {
            "direction_scale": float("nan"),
            "split_half": None,
            "text_null": None,
            "kl_after_ablation": float("nan"),
            "random_low": float("nan"),
            "random_high": float("nan"),
        }
        if direction is not None:
            band = null_band([mean[f"random {i} at {layer}"] for i in range(n_scan)])
            scanned = {
                "direction_scale": direction.scale,
                "split_half": direction.split_half,
                "text_null": direction.text_null,
                "kl_after_ablation": float(mean[f"layer {layer}"]),
                "random_low": band.low,
                "random_high": band.high,
            }
        rows.append(row | scanned)
    return pd.DataFrame(rows).astype({"split_half": float, "text_null": float})


def scan_cells(directions: Directions, n_scan: int, seed: int) -> list[Cell]:
    """Cells of the scan: the ablation everywhere, and at one layer alone beside random ones."""
    controls = random_sets(directions, n_scan, seed + 1)
    everywhere = candidates(directions)["every layer"]
    cells = [Cell("finetuned"), cells_of_ablation("every layer", directions, everywhere)]
    for layer in everywhere:
        cells.append(cells_of_ablation(f"layer {layer}", directions, [layer]))
        cells += [
            cells_of_ablation(f"random {i} at {layer}", drawn, [layer])
            for i, drawn in enumerate(controls)
        ]
    return cells


def pooled_effects(rows: pd.DataFrame, n: int) -> pd.DataFrame:
    """One row for all random directions: the mean, and the band that they span."""
    part = rows[rows["kind"] == "control"]
    kl, loss = (null_band(part[name].to_numpy(float)) for name in ("kl_to_base", "loss"))
    return pd.DataFrame(
        [
            {
                "cell": f"{n} random directions ablated",
                "edit": "random",
                "kind": "control",
                "n_texts": int(part["n_texts"].iloc[0]),
                "kl_to_base": part["kl_to_base"].mean(),
                "kl_low": kl.low,
                "kl_high": kl.high,
                "loss": part["loss"].mean(),
                "loss_low": loss.low,
                "loss_high": loss.high,
            }
        ]
    )


def behaviour_rows(
    judged: Judged, edit: str, nulls: Sequence[Cell], n_random: int
) -> list[dict[str, Any]]:
    """Rows of both models, the edit and its controls."""
    names = [f"random {i}" for i in range(n_random)]
    rows = [
        behaviour_row(judged, "base", "none", "base", "model"),
        behaviour_row(judged, "finetuned", "none", "fine-tuned", "model"),
        behaviour_row(judged, "finetuned", "ablated", edit, "edit"),
        pooled_row(judged, "finetuned", names, f"{n_random} random directions ablated"),
    ]
    for cell in nulls:
        kind = "control" if cell.name == TEXT_NULL else "edit"
        label = f"{cell.name} ablated at every layer"
        rows.append(behaviour_row(judged, "finetuned", cell.name, label, kind))
    return rows


def steering_rows(
    judged: Judged, layer: int, steers: Sequence[Cell], shakes: Sequence[Cell]
) -> list[dict[str, Any]]:
    """Rows of the base with the direction added, each beside random ones of the same step."""
    rows = []
    for step, cell in zip(STEPS, steers, strict=True):
        label = f"base, {cell.name} at layer {layer}"
        rows.append(behaviour_row(judged, "base", cell.name, label, "steer"))
        alike = [one.name for one in shakes if one.name.endswith(f" x{step:g}")]
        label = f"base, random x{step:g} at layer {layer}"
        rows.append(pooled_row(judged, "base", alike, label))
    return rows


def label_rows(judged: Judged, rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Share of each of the judge's labels in the cells of the table "behaviour"."""
    shares = pd.crosstab(
        [judged.table["side"], judged.table["edit"]], judged.table["label"], normalize="index"
    )
    found = []
    for row in rows:
        key = row["side"], row["edit"]
        if key in shares.index:
            mine = {str(label): float(share) for label, share in shares.loc[[key]].iloc[0].items()}
            found.append({"cell": row["cell"], "n": int(row["n"])} | mine)
    return pd.DataFrame(found)


def example_rows(judged: Judged, n: int = 12) -> pd.DataFrame:
    """Answers of both models and of the edited one to the same prompts, at regular steps."""
    columns = {"base": ("base", "none"), "finetuned": ("finetuned", "none"),
               "edited": ("finetuned", "ablated")}  # fmt: skip
    parts = {name: judged.cell(*cell).reset_index(drop=True) for name, cell in columns.items()}
    step = max(1, len(parts["base"]) // n)
    frame = pd.DataFrame({"prompt": parts["base"]["prompt"]})
    for name, part in parts.items():
        frame[name], frame[f"{name}_label"] = part["text"], part["label"]
    return frame.iloc[::step].head(n)


def model_rows(judged: Judged) -> pd.DataFrame:
    """Rows of both models on the discovery prompts."""
    rows = [behaviour_row(judged, side, "none", f"{side} (discovery prompts)", "model")
            for side in ("base", "finetuned")]  # fmt: skip
    return pd.DataFrame(rows)
