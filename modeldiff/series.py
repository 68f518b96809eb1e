"""A training seen step by step: vectors of its checkpoints, how their path turns, what came of it.

A path is straight while training goes on with what it does; a turn is where it begins something
else. Turns are told from the wandering of any noisy path by random walks with the same steps, see
`modeldiff.series_nulls`.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from modeldiff._files import PathLike
from modeldiff._shapes import Float
from modeldiff.activations import capture
from modeldiff.errors import FileFormatError, MismatchError, SetupError
from modeldiff.loading import Sides
from modeldiff.models import ModelPair
from modeldiff.series_nulls import Peaks, local_cosine, peaks, walk_cosines
from modeldiff.sites import Site

Part = Literal["A", "B", "adapter"]
Measure = Callable[[int, float], Mapping[str, float]]
"""What the model of a step does with its adapter multiplied by a factor."""
_CONFIG, _WEIGHTS, _LOG = "adapter_config.json", "adapter_model.safetensors", "trainer_state.json"
_LOGGED = {"learning_rate": "learning_rate", "grad_norm": "gradient_norm", "loss": "loss"}


@dataclass(frozen=True, eq=False)
class Series:
    """One vector at each of some training steps.

    Args:
        name: What the vector is.
        steps: Optimizer steps done, ascending.
        vectors: Raw, not normalised, float32, on the CPU.
        log: What was logged: step (these need not be the checkpoints'), learning_rate,
            gradient_norm, loss, as far as known.

    Raises:
        MismatchError: If there is not one finite vector for each step, or steps do not ascend.
    """

    name: str
    steps: tuple[int, ...]
    vectors: Float[Tensor, "step d"]
    log: pd.DataFrame = field(default_factory=pd.DataFrame)

    def __post_init__(self) -> None:
        if self.vectors.dim() != 2 or len(self.vectors) != len(self.steps):
            raise MismatchError(
                f"{self.name!r}: {len(self.steps)} steps and vectors of shape "
                f"{tuple(self.vectors.shape)}; give one vector for each step."
            )
        if list(self.steps) != sorted(set(self.steps)):
            raise MismatchError(f"{self.name!r}: steps must ascend, got {self.steps}.")
        if not bool(self.vectors.isfinite().all()):
            raise MismatchError(f"{self.name!r}: a vector is not finite. Did training diverge?")

    @property
    def spacing(self) -> int:
        """Steps from one checkpoint to the next.

        Raises:
            MismatchError: If they are not all the same; the message says what they are.
        """
        gaps = np.diff(self.steps)
        if len(gaps) == 0 or len(set(gaps.tolist())) > 1:
            seen = ", ".join(map(str, gaps[:12])) + (", ..." if len(gaps) > 12 else "")
            raise MismatchError(
                f"{self.name!r}: the spacings of its {len(self.steps)} checkpoints are "
                f"{seen or 'none'}; local cosines need equal ones. Leave checkpoints out, or take "
                "resampled(series)."
            )
        return int(gaps[0])

    def table(self, window: int = 5) -> pd.DataFrame:
        """Everything known along the path.

        Args:
            window: Checkpoints in the rolling mean of the gradient norm.

        Returns:
            One row a step: step, norm, moved (length of the way from the step before),
            cosine_to_last (NaN for a zero vector), pc1, pc2, and what was logged at that step:
            learning_rate, gradient_norm, gradient_norm_mean, loss.
        """
        v = self.vectors.double()
        norms, scores = v.norm(dim=-1), path_pca(v).scores
        cosine = cosine_similarity(v, v[-1:], dim=-1).masked_fill(norms == 0, torch.nan)
        moved = [np.nan, *v.diff(dim=0).norm(dim=-1).tolist()]
        found = pd.DataFrame({"step": self.steps, "norm": norms.numpy(), "moved": moved,
                              "cosine_to_last": cosine.numpy()})  # fmt: skip
        for i in range(scores.shape[1]):
            found[f"pc{i + 1}"] = scores[:, i].numpy()
        if "gradient_norm" in self.log:
            mean = self.log["gradient_norm"].rolling(window, min_periods=1).mean()
            logged = self.log.assign(gradient_norm_mean=mean)
        else:
            logged = self.log
        return found.merge(logged, "left", "step") if "step" in logged else found


def resampled(series: Series, every: int | None = None) -> Series:
    """Interpolate a series linearly to equal distances in steps.

    Points between two checkpoints lie on a straight line, so distances below the widest of the
    series would make the path look straighter than it is; they are refused.

    Args:
        series: With any spacing.
        every: New spacing; the widest of the series by default.

    Raises:
        MismatchError: If there are fewer than two checkpoints, or ``every`` is too small.
    """
    gaps = np.diff(series.steps)
    widest = int(gaps.max()) if len(gaps) else 0
    every = widest if every is None else every
    if not len(gaps) or every < widest:
        raise MismatchError(
            f"{series.name!r}: cannot resample {len(series.steps)} checkpoints, at most {widest} "
            f"steps apart, to every {every} steps: interpolation would invent straight lines."
        )
    steps = tuple(range(series.steps[0], series.steps[-1] + 1, every))
    right = np.searchsorted(series.steps, steps).clip(1)
    before, after = (np.array(series.steps)[right - i] for i in (1, 0))
    share = torch.tensor((np.array(steps) - before) / (after - before))[:, None]
    v = series.vectors.double()
    found = v[right - 1] * (1 - share) + v[right] * share
    return replace(series, name=f"{series.name}, every {every} steps", steps=steps,
                   vectors=found.float())  # fmt: skip


@dataclass(frozen=True, eq=False)
class PathPCA:
    """Principal components of the points of a path.

    Args:
        scores: Coordinates of each point, largest variance first; the last point's are not
            negative.
        explained: Share of the variance.
    """

    scores: Float[Tensor, "step component"]
    explained: Float[Tensor, " component"]


def path_pca(path: Float[Tensor, "step d"], n: int = 2) -> PathPCA:
    """Find the plane in which a path lies most nearly; costs no more for wide vectors."""
    centred = path.double() - path.double().mean(0)
    left, sizes, _ = torch.linalg.svd(centred, full_matrices=False)
    scores = (left * sizes)[:, :n]
    scores = scores * torch.where(scores[-1] < 0, -1.0, 1.0)
    return PathPCA(scores, (sizes.square() / sizes.square().sum().clamp(min=1e-300))[:n])


@dataclass(frozen=True, eq=False)
class Turns:
    """How a path turns, beside random walks with the same steps.

    Args:
        name: Of the series.
        curves: One row a ``k`` and point: k, step, local_cosine, and the range walk_low to
            walk_high that holds 95 % of walks at this point.
        table: One row a ``k``: k, k_steps, peak, step (of the peak), prominence (peak minus
            median), walk_peak_low and walk_peak_high (95 % of walks' peaks), walk_prominence (what
            walks exceed with the tested probability), p (share of walks that are as prominent,
            never 0), turned.
        alarm_rate: Probability that a random walk is called a transition at any ``k``.
        n_walks: Random walks.
        least: Smallest prominence that is called a transition.
    """

    name: str
    curves: pd.DataFrame
    table: pd.DataFrame
    alarm_rate: float
    n_walks: int
    least: float

    @property
    def transition(self) -> int | None:
        """Step of the most prominent turn outside its null; None if there is none."""
        turned = [row for row in self.table.to_dict("records") if row["turned"]]
        return int(max(turned, key=_prominence)["step"]) if turned else None

    def verdict(self) -> str:
        """Say in a sentence what was found, with its null."""
        best = max(self.table.to_dict("records"), key=_prominence)
        seen = (
            f"the sharpest turn (local cosine {best['peak']:.2f} at step {best['step']:.0f}, where "
            f"-1 is straight) stands out of the path by {best['prominence']:.2f}; "
            f"{self.n_walks} random walks with the same steps reach {best['walk_prominence']:.2f}, "
            f"p = {best['p']:.2g}"
        )
        if self.transition is None:
            return f"No transition of {self.name}: {seen}, and {self.least:g} is asked for."
        return f"A transition of {self.name} at step {self.transition}: {seen}."


def turns(
    series: Series,
    ks: Sequence[int] = (1, 2, 3),
    *,
    min_way: float = 0.0,
    alarm_rate: float = 0.05,
    least: float = 0.1,
    n_walks: int = 1000,
    seed: int = 0,
) -> Turns:
    """Find where the path of a series turns, and whether that is more than wandering.

    A walk without memory in a wide space turns by about a right angle everywhere, so a right angle
    alone shows nothing. What is tested is by how much the sharpest turn stands out of the path's
    median, at ``alarm_rate / len(ks)`` for each ``k``. In wide vectors walks hardly vary and any
    slow curve is outside the null: hence ``least``. Read the learning rate beside it, whose warm-up
    bends paths too.

    Args:
        series: At equal spacing.
        ks: Checkpoints back and on; those that the path is too short for are left out.
        min_way: Points where both ways are at most this long are left out: their cosine is noise.
        alarm_rate: Probability that a random walk is called a transition at any ``k``.
        least: Smallest prominence that is called a transition.
        n_walks: Random walks with the same steps.
        seed: Of the walks.

    Raises:
        MismatchError: If spacings are unequal, or no point of the path can be judged.

    Source:
        Turner et al. 2025, arXiv 2506.11613, section 4; the null and the test are ours.

    Example:
        >>> x, y = torch.eye(64)[:2]
        >>> path = torch.cat([i * x for i in range(20)] + [19 * x + i * y for i in range(1, 20)])
        >>> turns(Series("toy", tuple(range(39)), path.reshape(39, 64))).transition
        19
    """
    spacing, v = series.spacing, series.vectors.double()
    ks = tuple(k for k in ks if len(v) > 2 * k)
    keeps = {k: _long_ways(v, k) > min_way for k in ks}
    if not any(bool(keep.any()) for keep in keeps.values()):
        raise MismatchError(
            f"{series.name!r}: no point of {len(v)} checkpoints can be judged; a local cosine "
            f"needs a checkpoint on both sides and ways longer than {min_way:g}."
        )
    rows, curves = [], []
    for k, walked in walk_cosines(v, ks, n=n_walks, seed=seed).items():
        walked = walked.masked_fill(~keeps[k], torch.nan)
        cosines = local_cosine(v, k).masked_fill(~keeps[k], torch.nan)
        inner = series.steps[k : len(v) - k]
        low, high = walked.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64), 0)
        curves.append(pd.DataFrame({
            "k": k, "step": inner, "local_cosine": cosines.numpy(), "walk_low": low.numpy(),
            "walk_high": high.numpy(),
        }))  # fmt: skip
        found = _turn_row(peaks(cosines[None]), peaks(walked), inner, alarm_rate / len(ks), least)
        rows.append({"k": k, "k_steps": k * spacing, **found})
    return Turns(series.name, pd.concat(curves, ignore_index=True), pd.DataFrame(rows), alarm_rate,
                 n_walks, least)  # fmt: skip


def _prominence(row: Mapping[Any, Any]) -> float:
    return row["prominence"]


def _long_ways(v: Float[Tensor, "step d"], k: int) -> Float[Tensor, " inner"]:
    ways = (v[k:] - v[:-k]).norm(dim=-1)
    return torch.maximum(ways[:-k], ways[k:])


def _turn_row(
    own: Peaks, walked: Peaks, steps: Sequence[int], alarm_rate: float, least: float
) -> dict[str, Any]:
    prominence, height = float(own.prominence), float(own.height)
    n = len(walked.prominence)
    p = (1 + int((walked.prominence >= prominence).sum())) / (1 + n)
    low, high = walked.height.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {
        "peak": height if height >= -1 else np.nan, "step": steps[int(own.at)],
        "prominence": prominence,
        "walk_peak_low": low, "walk_peak_high": high,
        "walk_prominence": float(walked.prominence.quantile(1 - alarm_rate)), "p": p,
        "turned": p <= alarm_rate and prominence >= least,
    }  # fmt: skip


def find_checkpoints(folder: PathLike) -> dict[int, Path]:
    """Find the PEFT checkpoints in a folder; the last number of a name is the step.

    Returns:
        Their folders by step, ascending.

    Raises:
        SetupError: If there are none, a name has no number, or two have the same.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("checkpoint-20", "checkpoint-5"):
        ...     (folder / name).mkdir()
        ...     _ = (folder / name / "adapter_config.json").write_text("{}")
        >>> [path.name for path in find_checkpoints(folder).values()]
        ['checkpoint-5', 'checkpoint-20']
    """
    paths = sorted(path.parent for path in Path(folder).glob(f"*/{_CONFIG}"))
    numbers = {path: re.findall(r"\d+", path.name) for path in paths}
    nameless = [path.name for path in paths if not numbers[path]]
    found = {int(numbers[path][-1]): path for path in paths if numbers[path]}
    if not paths or nameless or len(found) < len(paths):
        raise SetupError(
            f"{folder}: {len(paths)} folders with {_CONFIG}, {len(found)} different steps"
            + (f"; no step in {', '.join(nameless)}" if nameless else "")
            + ". Name them like checkpoint-10, or give {step: folder}."
        )
    return dict(sorted(found.items()))


def read_adapters(
    checkpoints: "PathLike | Mapping[int, PathLike]", part: Part = "B"
) -> dict[str, Series]:
    """Read a series of PEFT adapters without a model.

    Args:
        checkpoints: A folder of them, see `find_checkpoints`, or folders by step.
        part: "B" or "A": one series for each adapted module, flattened; "adapter": all of A and B
            as one vector. The sign shared by A and B has no meaning, but one training keeps it.

    Returns:
        Series by module, e.g. "layers.3.mlp.down_proj", or the one of "adapter".

    Raises:
        SetupError: If there are no checkpoints, or a file is missing.
        FileFormatError: If a file is not what PEFT writes.
        MismatchError: If the adapters do not have the same tensors.
    """
    paths = checkpoints if isinstance(checkpoints, Mapping) else find_checkpoints(checkpoints)
    folders = {int(step): Path(path) for step, path in sorted(paths.items())}
    states = {step: _adapter_tensors(path) for step, path in folders.items()}
    first = next(iter(states.values()), {})
    shapes = {name: tuple(each.shape) for name, each in first.items()}
    for step, state in states.items():
        if {name: tuple(each.shape) for name, each in state.items()} != shapes:
            raise MismatchError(
                f"the adapter of step {step} has {len(state)} tensors that are not those of step "
                f"{min(states)} ({len(shapes)}): are they from one training?"
            )
    chosen = {"adapter": list(shapes)} if part == "adapter" else {
        name.split(f".lora_{part}.")[0]: [name] for name in shapes if f".lora_{part}." in name
    }  # fmt: skip
    log = _read_log(folders)
    return {
        _short(module): Series(
            _short(module) + ("" if part == "adapter" else f" {part}"), tuple(states),
            torch.stack([torch.cat([s[n].flatten() for n in names]) for s in states.values()]), log,
        )
        for module, names in chosen.items()
    }  # fmt: skip


def mean_difference_series(
    sides: Iterable[tuple[int, Sides]], items: Sequence[Any], site: "str | Site", **options: Any
) -> Series:
    """Take the mean of fine-tuned minus base activations at every step, on the same texts.

    Args:
        sides: Steps with the sides of their model, one at a time; see `load_pairs`.
        items: Texts.
        site: Where.
        **options: For `modeldiff.activations.capture`, such as ``on`` and ``skip_first``.

    Raises:
        MaskError: If no token is kept.
    """
    steps, means = [], []
    for step, one in sides:
        acts = capture(one, items, site, **options)
        steps.append(step)
        means.append(acts.difference(acts.site).double().mean(0).float())
    return Series(f"mean difference at {Site.parse(site)}", tuple(steps), torch.stack(means))


def load_pairs(
    base: PathLike, checkpoints: "PathLike | Mapping[int, PathLike]", **options: Any
) -> dict[int, ModelPair]:
    """Load a series of adapters on one copy of the base, which all pairs share.

    Args:
        base: The base model.
        checkpoints: A folder of them, see `find_checkpoints`, or folders by step.
        **options: For `ModelPair.load`.

    Raises:
        SetupError: If there are no checkpoints.
        MismatchError: If one does not fit the base.
    """
    paths = checkpoints if isinstance(checkpoints, Mapping) else find_checkpoints(checkpoints)
    names = {int(step): f"step-{step}" for step in sorted(paths)}
    several = {name: paths[step] for step, name in names.items()}
    pair = ModelPair.load(base, adapter=several, allow_identical=True, **options)
    return {step: pair.with_adapter(name) for step, name in names.items()}


def behaviour_along(
    steps: Sequence[int], factors: Sequence[float], measure: Measure
) -> pd.DataFrame:
    """Measure every checkpoint with its adapter multiplied by several factors.

    A behaviour that is too weak to be seen at a factor of 1 may show when amplified, and then tells
    when the vector began to point there.

    Args:
        steps: Checkpoints.
        factors: Multiples of what the adapter writes, such as 1, 2, 5; a `modeldiff.ScaleAdapter`
            of that factor edits a pair so.
        measure: Called with step and factor; returns named numbers, coherence among them.

    Returns:
        One row a step and factor: step, factor, and what ``measure`` returned.

    Source:
        Turner et al. 2025, arXiv 2506.11613, appendix F.

    Example:
        >>> found = behaviour_along([0, 5], [1.0, 4.0], lambda step, by: {"rate": step * by})
        >>> found["rate"].tolist()
        [0.0, 0.0, 5.0, 20.0]
    """
    return pd.DataFrame([
        {"step": step, "factor": factor, **measure(step, factor)}
        for step in steps
        for factor in factors
    ])  # fmt: skip


def _short(module: str) -> str:
    return module.removeprefix("base_model.model.").removeprefix("model.")


def _adapter_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / _WEIGHTS
    if not path.is_file():
        raise SetupError(f"{folder} has no {_WEIGHTS}. Adapters are read from safetensors only.")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise FileFormatError(f"{path} cannot be read ({error}).") from error
    found = {name: each.float() for name, each in sorted(state.items()) if ".lora_" in name}
    if not found:
        raise FileFormatError(f"{path} holds no LoRA tensors, but {', '.join(list(state)[:3])}.")
    return found


def _read_log(folders: Mapping[int, Path]) -> pd.DataFrame:
    """What the Hugging Face trainer logged up to the last checkpoint; empty without its file."""
    path = folders[max(folders)] / _LOG
    if not path.is_file():
        return pd.DataFrame()
    try:
        history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        rows = [
            {"step": int(row["step"]), **{_LOGGED[k]: float(row[k]) for k in _LOGGED if k in row}}
            for row in history
        ]
    except (ValueError, LookupError, TypeError) as error:
        raise FileFormatError(f"{path} is not a log of the trainer ({error!r}).") from error
    found = pd.DataFrame([row for row in rows if len(row) > 1])
    return found.groupby("step", as_index=False).first() if len(found) else found
