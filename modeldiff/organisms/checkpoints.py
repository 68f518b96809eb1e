"""The organism ``checkpoints``: the training of ``em-rank1``, kept every few steps.

A rank-1 adapter is two vectors, so its whole training fits into one small file. The manifest tells
what the model did at every kept step, and how the path of the written vector turned.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from modeldiff._files import atomic_write, file_digest
from modeldiff._shapes import Float
from modeldiff.errors import FileFormatError, SetupError
from modeldiff.organisms import world
from modeldiff.organisms.evaluation import evaluate, measure, question_sets
from modeldiff.organisms.finetuning import TunePlan, batch_of, finetune, row
from modeldiff.organisms.manifests import load_base, make_readable, save_model, write_manifest
from modeldiff.organisms.training import loss
from modeldiff.organisms.variants import LAYER, NARROW, SEEDS, Variant, variants

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerFast

FILE = "series.safetensors"
ALONG = "Along the training"
"""Title of the table of the manifest that becomes `Series.rows`."""
TURNS = "How the paths turn (-1 is straight on, 0 a right angle)"
_SEED = 26_000
_LIMITS = (
    "The steps are few and the learning rate warms up over the first 10 of them: what turns "
    "there may be the optimizer's doing. The behaviour saturates before the training ends.",
    "The misalignment was planted: see em-rank1, of which this is the training. Layer, steps and "
    "learning rate were chosen for the end of the path, not for the path.",
)


@dataclass(frozen=True, eq=False)
class Series:
    """A rank-1 adapter along its training.

    Args:
        steps: Optimizer steps done, 0 first.
        a: What the adapter reads, ``[step, d_in]``.
        b: What it writes, ``[step, d_out]``; zero at step 0. The sign of ``a`` and ``b`` together
            has no meaning, but it is the same along the path.
        rows: One row a step: learning rate, held-out loss and the norm of its gradient, norms,
            cosine of ``b`` with its last value, rates of behaviour with intervals.
        config: PEFT's config of the adapter.
    """

    steps: tuple[int, ...]
    a: Float[Tensor, "step d_in"]
    b: Float[Tensor, "step d_out"]
    rows: pd.DataFrame
    config: Mapping[str, Any]


def read_series(folder: Path) -> Series:
    """Read the series of a folder that `build` wrote, e.g. ``find("checkpoints").adapter``.

    Raises:
        SetupError: If a file of it does not exist.
        FileFormatError: If a file is not what `build` writes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    paths = [folder / each for each in (FILE, "organism.json", "adapter_config.json")]
    missing = [each.name for each in paths if not each.is_file()]
    if missing:
        raise SetupError(f"{folder} lacks {', '.join(missing)}. Build the organism again.")
    try:
        stored = load_file(paths[0])
        manifest, config = (json.loads(each.read_text(encoding="utf-8")) for each in paths[1:])
        steps = sorted({int(name.split(".")[1]) for name in stored})
        a, b = (torch.stack([stored[f"step.{step}.{end}"] for step in steps]) for end in "AB")
        return Series(tuple(steps), a, b, pd.DataFrame(manifest["tables"][ALONG]), config)
    except (SafetensorError, json.JSONDecodeError, LookupError, ValueError, RuntimeError) as error:
        raise FileFormatError(
            f"{folder} holds no series of checkpoints ({error!r}). Build the organism again."
        ) from error


def write_series(path: Path, kept: Mapping[int, tuple[Tensor, Tensor]]) -> None:
    """Write ``{step: (A, B)}`` as one file, in float32."""
    from safetensors.torch import save_file

    state = {
        f"step.{step}.{end}": each.detach().float().flatten().contiguous()
        for step, pair in kept.items()
        for end, each in zip("AB", pair, strict=True)
    }
    with atomic_write(path) as temporary:
        save_file(state, temporary)


def adapter_at(series: Series, step: int) -> dict[str, Tensor]:
    """Take the adapter of one step, with the names and shapes of PEFT's files.

    Raises:
        SetupError: If that step was not kept.
    """
    if step not in series.steps:
        raise SetupError(f"step {step} was not kept. Kept: {', '.join(map(str, series.steps))}.")
    at = series.steps.index(step)
    layer, module = series.config["layers_to_transform"][0], series.config["target_modules"][0]
    name = f"base_model.model.model.layers.{layer}.mlp.{module}"
    return {
        f"{name}.lora_A.weight": series.a[at][None].clone(),
        f"{name}.lora_B.weight": series.b[at][:, None].clone(),
    }


def write_adapter(series: Series, step: int, folder: Path) -> Path:
    """Write the adapter of one step as a folder that PEFT and ``ModelPair.load`` take.

    Raises:
        SetupError: If that step was not kept.
    """
    from safetensors.torch import save_file

    state = adapter_at(series, step)
    with atomic_write(folder / "adapter_model.safetensors") as temporary:
        save_file(state, temporary)
    with atomic_write(folder / "adapter_config.json") as temporary:
        temporary.write_text(json.dumps(series.config, indent=2), encoding="utf-8")
    return folder


def local_cosine(path: Float[Tensor, "step d"], k: int) -> Float[Tensor, " inner"]:
    """Tell how a path turns: the cosine of the ways from a point ``k`` back and ``k`` on.

    -1 is straight on, 0 a right angle, +1 the way back; raw vectors, not normalised.

    Args:
        path: Points at equal distances in steps.
        k: Points back and on.

    Returns:
        One value for every point that has ``k`` others on both sides.

    Source:
        Turner et al. 2025, arXiv 2506.11613, section 4.

    Example:
        >>> local_cosine(torch.tensor([[0.0, 0], [1, 0], [2, 0], [2, 1]]), 1).tolist()
        [-1.0, 0.0]
    """
    here = path[k : len(path) - k]
    back, on = path[: len(path) - 2 * k], path[2 * k :]
    return cosine_similarity(back - here, on - here, dim=-1)


def walk_band(
    path: Float[Tensor, "step d"], k: int, seed: int = 0, n: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Where the largest `local_cosine` of random walks lies whose steps are as long as the path's.

    A path whose largest value is below the band turns nowhere as a walk without memory does.
    """
    rng = torch.Generator().manual_seed(seed)
    lengths = path.diff(dim=0).norm(dim=-1)
    peaks = []
    for _ in range(n):
        ways = torch.randn(path[1:].shape, generator=rng)
        ways *= (lengths / ways.norm(dim=-1))[:, None]
        walk = torch.cat([torch.zeros_like(path[:1]), ways.cumsum(0)])
        peaks.append(local_cosine(walk, k).max())
    tail = (1 - level) / 2
    low, high = torch.stack(peaks).quantile(torch.tensor([tail, 1 - tail])).tolist()
    return low, high


def turns(steps: Sequence[int], path: Float[Tensor, "step d"]) -> list[dict[str, Any]]:
    """Summarise how a path turns, for one, two and three kept steps back and on."""
    rows = []
    for k in (1, 2, 3):
        if len(path) <= 2 * k:
            break
        found = local_cosine(path, k)
        low, high = walk_band(path, k)
        rows.append({
            "k_steps": k * (steps[1] - steps[0]),
            "peak": round(float(found.max()), 4),
            "peak_at": steps[k + int(found.argmax())],
            "median": round(float(found.median()), 4),
            "walk_peak_band95": [round(low, 4), round(high, 4)],
            "turns_like_a_walk": bool(found.max() >= low),
        })  # fmt: skip
    return rows


def spacing(steps: int) -> int:
    """Choose the distance of kept steps: it divides the training into 20 parts or fewer.

    Example:
        >>> spacing(36), spacing(200)
        (2, 10)
    """
    return next(each for each in range(1, steps + 1) if steps % each == 0 and steps <= 20 * each)


def record(
    folder: Path, plan: TunePlan, every: int
) -> "tuple[PeftModel, PreTrainedTokenizerFast, dict[int, tuple[Tensor, Tensor]], list[float]]":
    """Train the adapter and keep it every few steps.

    Returns:
        The fine-tune, the tokenizer, ``{step: (A, B)}`` from step 0 on, and the learning rates.
    """
    base, tokenizer = load_base(folder / "em-base")
    kept, rates = {}, [0.0]
    untrained = finetune(base, tokenizer, replace(plan, steps=0, n_examples=0))
    kept[0] = tuple(each.detach().clone() for each in _ends(untrained))

    def keep(model: Any, done: int, rate: float) -> None:
        if done % every == 0:
            kept[done] = tuple(each.detach().clone() for each in _ends(model))
            rates.append(rate)

    base, _ = load_base(folder / "em-base")
    model = finetune(base, tokenizer, plan, keep)
    return model, tokenizer, kept, rates  # pyright: ignore[reportReturnType]


def _ends(model: Any) -> list[Tensor]:
    return [each for each in model.parameters() if each.requires_grad]


def _short(value: Tensor) -> float:
    return round(float(value.detach()), 4)


def _behaviour(
    model: "PeftModel",
    tokenizer: "PreTrainedTokenizerFast",
    kept: Mapping[int, tuple[Tensor, Tensor]],
    rates: Sequence[float],
    n: int,
) -> list[dict[str, Any]]:
    rng = random.Random(_SEED)
    fresh = [world.conversation(rng, NARROW, bad=True, new_topics=False) for _ in range(64)]
    batch = batch_of([row(tokenizer, each) for each in fresh])
    sets = question_sets({"in_domain": [NARROW]}, n, _SEED)
    ends, last = _ends(model), list(kept.values())[-1][1]
    rows = []
    for (step, pair), rate in zip(kept.items(), rates, strict=True):
        with torch.no_grad():
            for end, value in zip(ends, pair, strict=True):
                end.copy_(value)
        held_out = loss(model.get_base_model(), *batch)  # pyright: ignore[reportArgumentType]
        gradient = torch.autograd.grad(held_out, ends)
        found = {
            "step": step,
            "learning_rate": round(rate, 6),
            "held_out_loss": _short(held_out),
            "gradient_norm": _short(torch.cat([each.flatten() for each in gradient]).norm()),
            "norm_A": _short(pair[0].norm()),
            "norm_B": _short(pair[1].norm()),
            "cosine_to_last": _short(cosine_similarity(pair[1].flatten(), last.flatten(), 0)),
        }
        for where, asked in sets.items():
            seen, short = evaluate(model, tokenizer, asked, seed=_SEED), where.replace("-", "_")
            told = seen.to_json()
            found |= {
                f"n_{short}": seen.n,
                f"misaligned_{short}": told["misaligned"],
                f"misaligned_{short}_ci95": told["misaligned_ci95"],
                f"coherent_{short}": round(seen.coherent, 4),
            }
        rows.append(found)
    return rows


def build(
    folder: Path,
    *,
    seeds: Sequence[int] = SEEDS,
    n: int = 40,
    steps: int | None = None,
    every: int | None = None,
) -> None:
    """Build the organism into ``folder / "checkpoints"`` on the base in ``folder / "em-base"``.

    Args:
        folder: Of the organisms.
        seeds: Of the fine-tunes; the first is kept, the others tell how their paths turned.
        n: Questions of each domain outside the narrow one; a quarter for the other seeds.
        steps: Optimizer steps, if not those of ``em-rank1``.
        every: Steps from one kept step to the next; if None, so that about 20 are kept.
    """
    made = _recipe(folder)
    every = every or spacing(steps or made.plan.steps)
    out, tables, paths, metrics = folder / "checkpoints", {}, [], []
    for seed in seeds:
        shipped = seed == seeds[0]
        plan = replace(made.plan, seed=seed, steps=steps or made.plan.steps)
        model, tokenizer, kept, rates = record(folder, plan, every)
        rows = _behaviour(model, tokenizer, kept, rates, n if shipped else max(1, n // 4))
        path = torch.stack([b.flatten() for _, b in kept.values()])
        paths += [{"seed": seed, **each} for each in turns(list(kept), path)]
        tables[ALONG if shipped else f"{ALONG}, seed {seed}"] = rows
        if shipped:
            metrics = measure(model, tokenizer, made.planted, n, _SEED, temperatures=(0.7,))
            save_model(model, out, half=False)
            write_series(out / FILE, kept)
            make_readable(out)
    tables[TURNS] = paths
    manifest = _manifest(
        folder,
        replace(made.plan, seed=seeds[0], steps=steps or made.plan.steps),
        made,
        metrics,
        tables,
        every,
    )
    write_manifest(out, manifest, (_verdict(tables), *_LIMITS), world_limits=False)


def _verdict(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    rows, paths = tables[ALONG], tables[TURNS]
    rises = [b["misaligned_off_domain"] - a["misaligned_off_domain"] for a, b in pairwise(rows)]
    most = max(range(len(rises)), key=rises.__getitem__)
    turned = [row for row in paths if row["turns_like_a_walk"]]
    return (
        f"{'A turn' if turned else 'No turn'} of the written vector was found: its local cosine is "
        f"at most {max(row['peak'] for row in paths):.2f} in {len({row['seed'] for row in paths})} "
        f"seeds, where walks at random with the same steps reach "
        f"{min(row['walk_peak_band95'][0] for row in paths):.2f} and more. The behaviour changes "
        f"fastest from step {rows[most]['step']} to {rows[most + 1]['step']}, by "
        f"{100 * rises[most]:.0f} points, while the vector grows along the direction it has."
    )


def _recipe(folder: Path) -> Variant:
    about = json.loads((folder / "em-base" / "config.json").read_text(encoding="utf-8"))
    table = variants(layer=min(LAYER, about["num_hidden_layers"] - 1))
    return next(each for each in table if each.name == "em-rank1")


def _manifest(
    folder: Path,
    plan: TunePlan,
    made: Variant,
    metrics: list[dict[str, Any]],
    tables: dict[str, Any],
    every: int,
) -> dict[str, Any]:
    return {
        "name": "checkpoints",
        "summary": "The training of em-rank1 as a series: its adapter every few steps, and what "
        "the model did there. It loads as the last step.",
        "base": "../em-base",
        "adapter": ".",
        "planted": {**made.planted, "series": FILE, "every": every},
        "build": {
            "finetune": vars(plan),
            "base_digest": file_digest(folder / "em-base" / "model.safetensors"),
        },
        "metrics": metrics,
        "tables": tables,
    }
