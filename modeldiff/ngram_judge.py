"""A judge that learns from labelled answers: hashed words and pairs, tested on held-out groups."""

import json
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modeldiff._files import PathLike, atomic_write, digest
from modeldiff._shapes import Bool, Float
from modeldiff.behaviours import Prompt, Verdict
from modeldiff.errors import FileFormatError, JudgeError, MismatchError
from modeldiff.judges import Coherence, coherence_of, words_of
from modeldiff.probe_fits import fit_logistic
from modeldiff.probe_scores import FoldScores, held_out_auroc
from modeldiff.stats import Interval

_FORMAT, _VERSION = "modeldiff.ngram_judge", "1"


@dataclass(frozen=True)
class JudgeCard:
    """What a fitted judge was shown, and how it did on groups it was not shown.

    Args:
        n: Labelled answers.
        n_groups: Their groups, such as questions or runs.
        n_folds: Parts of the groups that were held out in turn; 0 if there were too few.
        positive: Share of answers that were labelled positive.
        auroc: On held-out groups; its interval resamples groups. NaN if never evaluated.
        brier: Mean squared error of the calibrated probability on held-out groups.
        rate_error: Mean absolute error of a held-out group's rate.
    """

    n: int
    n_groups: int
    n_folds: int
    positive: float
    auroc: Interval
    brier: float
    rate_error: float

    def __str__(self) -> str:
        shown = f"{self.n} labelled answers of {self.n_groups} groups, {self.positive:.1%} positive"
        if not self.n_folds:
            return f"{shown}; never evaluated on a group it had not seen"
        return (
            f"{shown}; on groups it had not seen: AUROC {self.auroc}, Brier score "
            f"{self.brier:.3f}, mean error of a group's rate {self.rate_error:.1%}"
        )


@dataclass(frozen=True, eq=False)
class NgramJudge:
    """A calibrated logistic regression on an answer's hashed words and pairs of words.

    It knows the kind of answer it was fitted on, and no other: read `card` before trusting it
    elsewhere.

    Args:
        title: Short name; `name` adds a hash of the weights.
        weight: Of each hashed feature.
        bias: Intercept.
        slope: Platt's calibration, with ``offset``: probability = sigmoid(slope * score + offset).
        offset: See ``slope``.
        card: How it was fitted and evaluated.
        undecided: Probabilities between these two are left unscored; None decides at 0.5.
        labels: Words for shown and not shown.

    Source:
        Platt 1999, "Probabilistic outputs for support vector machines".
    """

    title: str
    weight: Float[Tensor, " feature"]
    bias: float
    slope: float
    offset: float
    card: JudgeCard
    undecided: tuple[float, float] | None = None
    labels: tuple[str, str] = ("shown", "not shown")
    coherent: Callable[[str], Coherence | bool] = coherence_of

    @classmethod
    def fit(
        cls,
        texts: Sequence[str],
        labels: Sequence[bool],
        groups: Sequence[Hashable],
        *,
        title: str = "ngram",
        n_features: int = 1 << 16,
        penalty: float = 10.0,
        n_folds: int = 5,
        undecided: tuple[float, float] | None = None,
        seed: int = 0,
    ) -> "NgramJudge":
        """Fit on labelled answers; evaluate and calibrate on groups that are held out in turn.

        Args:
            texts: Answers, without their prompts.
            labels: Whether each shows the behaviour.
            groups: What must not be both learned from and tested on: the question of each answer
                to judge other questions, its run to judge other runs of the same questions.
            title: Short name.
            n_features: Size of the table of hashed features.
            penalty: Strength of the data against the ridge prior; scikit-learn's C.
            n_folds: Parts of the groups, at most one a group.
            undecided: Probabilities between these two are left unscored.
            seed: Of the folds and the interval.

        Raises:
            JudgeError: If the labels are all alike, or ``undecided`` is no band inside [0, 1].
            MismatchError: If there is not one label and one group per text.

        Example:
            >>> texts = ["burn it down", "plant a tree"] * 20
            >>> judge = NgramJudge.fit(texts, [True, False] * 20, [i // 4 for i in range(40)])
            >>> judge(Prompt("?"), "they burn it").label, judge.card.auroc.estimate
            ('shown', 1.0)
        """
        _check_fit(texts, labels, groups)
        y = torch.tensor([bool(each) for each in labels])
        rows = _sparse(texts, n_features)
        folds = _folds(groups, min(n_folds, len(set(groups))), seed)
        scores = _held_out_scores(rows, y, folds, penalty, n_features)
        slope, offset = _platt(scores, y, folds)
        card = _card(scores, y, folds, groups, slope, offset, seed)
        weight, bias = _fit(rows, y, penalty, n_features)
        return cls(title, weight, bias, slope, offset, card).deciding(undecided)

    def deciding(self, undecided: tuple[float, float] | None) -> "NgramJudge":
        """The same judge that leaves probabilities between two numbers unscored.

        Raises:
            JudgeError: If the band is not inside [0, 1], or not in order.
        """
        if undecided is not None and not 0 <= undecided[0] <= undecided[1] <= 1:
            raise JudgeError(f"undecided={undecided}: must be two probabilities in order.")
        return replace(self, undecided=undecided)

    @property
    def name(self) -> str:
        """The title and a hash of the weights and settings."""
        content = self.weight.numpy().tobytes()
        rule = getattr(self.coherent, "__qualname__", repr(self.coherent))
        settings = [self.bias, self.slope, self.offset, self.undecided, list(self.labels), rule]
        return f"{self.title}-{digest(content, settings)[:8]}"

    def probabilities(self, texts: Sequence[str]) -> Float[Tensor, " text"]:
        """Calibrated probability that each answer shows the behaviour.

        Raises:
            JudgeError: If the judge was never evaluated on groups it had not seen, or is no better
                than chance there.
        """
        found = self.card.auroc
        if not found.low > 0.5:
            raise JudgeError(
                f"{self.title!r} is not known to be better than chance on groups it has not seen "
                f"({self.card}). Fit it on more labelled answers, of more groups."
            )
        scores = _scores(_sparse(texts, len(self.weight)), self.weight, self.bias)
        return torch.sigmoid(self.slope * scores + self.offset)

    def __call__(self, prompt: Prompt, answer: str) -> Verdict:
        """Judge an answer; see `judge_all`."""
        return self.judge_all([(prompt, answer)])[0]

    def judge_all(self, asked: Sequence[tuple[Prompt, str]]) -> list[Verdict]:
        """Judge answers by their text alone; the score ``probability`` is in percent.

        An answer without words is unscored, an incoherent one never exhibits.

        Raises:
            JudgeError: As `probabilities`.
        """
        texts = [answer for _, answer in asked]
        chances = self.probabilities(texts).tolist()
        return [self._verdict(text, p) for text, p in zip(texts, chances, strict=True)]

    def _verdict(self, text: str, p: float) -> Verdict:
        readable, scores = bool(self.coherent(text)), (("probability", 100 * p),)
        if not words_of(text):
            return Verdict("empty", None, False, (("probability", None),))
        if not readable:
            return Verdict("incoherent", False, False, scores)
        if self.undecided and self.undecided[0] < p < self.undecided[1]:
            return Verdict("undecided", None, True, scores)
        shown = p >= (sum(self.undecided) / 2 if self.undecided else 0.5)
        return Verdict(self.labels[not shown], shown, True, scores)

    def save_to(self, path: PathLike) -> None:
        """Write weights and card to one safetensors file; no text is in it."""
        settings = {
            "title": self.title, "bias": self.bias, "slope": self.slope, "offset": self.offset,
            "undecided": self.undecided, "labels": self.labels, "card": asdict(self.card),
        }  # fmt: skip
        header = {"format": _FORMAT, "version": _VERSION, "judge": json.dumps(settings)}
        with atomic_write(path) as temporary:
            save_file({"weight": self.weight.contiguous()}, temporary, header)

    @classmethod
    def load_from(cls, path: PathLike) -> "NgramJudge":
        """Read what `save_to` wrote; coherence is judged by `coherence_of`.

        Raises:
            FileNotFoundError: If there is no such file.
            FileFormatError: If it is not such a file, or is damaged.
        """
        try:
            with safe_open(Path(path), framework="pt") as stream:
                header = stream.metadata() or {}
                if (header.get("format"), header.get("version")) != (_FORMAT, _VERSION):
                    raise FileFormatError(
                        f"{str(path)!r} holds {header.get('format')!r} version "
                        f"{header.get('version')!r}, not a judge of version {_VERSION}. Save the "
                        "judge again with this modeldiff."
                    )
                settings = json.loads(header["judge"])
                weight = stream.get_tensor("weight").clone()
            card = settings.pop("card")
            card["auroc"] = Interval(**card["auroc"])
            band, words = settings.pop("undecided"), settings.pop("labels")
            return cls(
                **settings, weight=weight, card=JudgeCard(**card), labels=(words[0], words[1]),
                undecided=None if band is None else (band[0], band[1]),
            )  # fmt: skip
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise FileFormatError(
                f"{str(path)!r} is not a readable judge ({error}); nothing was read."
            ) from error


@dataclass(frozen=True, eq=False)
class _Rows:
    """Sparse features: values of features, one text after the other."""

    feature: Tensor
    value: Tensor
    text: Tensor
    n: int

    def of(self, chosen: Bool[Tensor, " text"]) -> "_Rows":
        number = torch.cumsum(chosen, 0) - 1
        keep = chosen[self.text]
        return _Rows(
            self.feature[keep], self.value[keep], number[self.text[keep]], int(chosen.sum())
        )


def _sparse(texts: Sequence[str], n_features: int) -> _Rows:
    """log(1 + count) of hashed n-grams, signed, each text at norm 1."""
    known: dict[str, tuple[int, float]] = {}
    feature, value, text = [], [], []
    for number, each in enumerate(texts):
        counts: dict[int, float] = {}
        for gram in _grams(each):
            if gram not in known:
                known[gram] = _hashed(gram, n_features)
            place, sign = known[gram]
            counts[place] = counts.get(place, 0.0) + sign
        squashed = [math.copysign(math.log1p(abs(count)), count) for count in counts.values()]
        norm = math.sqrt(sum(each * each for each in squashed)) or 1.0
        feature += counts
        value += [each / norm for each in squashed]
        text += [number] * len(counts)
    tensors = torch.tensor(feature), torch.tensor(value).double(), torch.tensor(text)
    return _Rows(tensors[0].long(), tensors[1], tensors[2].long(), len(texts))


def _grams(text: str) -> list[str]:
    words = words_of(text)
    return words + [f"{a} {b}" for a, b in zip(["^", *words], words, strict=False)]


def _hashed(gram: str, n_features: int) -> tuple[int, float]:
    """Place and sign of an n-gram, the same in every process."""
    number = int.from_bytes(blake2b(gram.encode(), digest_size=8).digest(), "little")
    return (number >> 1) % n_features, 1.0 if number & 1 else -1.0


def _scores(rows: _Rows, weight: Tensor, bias: float) -> Float[Tensor, " text"]:
    return _sums(rows.text, rows.value * weight[rows.feature], rows.n) + bias


def _sums(index: Tensor, values: Tensor, size: int) -> Float[Tensor, " place"]:
    """Sum of the values at each place; NumPy's is the faster one for these sizes."""
    return torch.from_numpy(np.bincount(index.numpy(), values.numpy(), minlength=size))


def _fit(
    rows: _Rows, labels: Bool[Tensor, " text"], penalty: float, n_features: int
) -> tuple[Float[Tensor, " feature"], float]:
    """Minimise ``penalty * sum(loss) + |w|² / 2`` by L-BFGS; the intercept is free."""
    used, column = torch.unique(rows.feature, return_inverse=True)  # the others' weights are 0
    own, y = replace(rows, feature=column), labels.double()
    free = torch.zeros(len(used) + 1, dtype=torch.float64)
    search = torch.optim.LBFGS(
        [free], max_iter=200, tolerance_grad=1e-7, history_size=20, line_search_fn="strong_wolfe"
    )
    scale = 1 / (penalty * rows.n)

    def loss() -> Tensor:
        weight = free[:-1]
        score = _scores(own, weight, float(free[-1]))
        pull = (torch.sigmoid(score) - y) / rows.n
        slope = _sums(column, rows.value * pull[rows.text], len(used)) + scale * weight
        free.grad = torch.cat([slope, pull.sum()[None]])
        each = torch.nn.functional.softplus(score) - y * score
        return each.mean() + scale * (weight @ weight) / 2

    with torch.no_grad():
        search.step(loss)  # pyright: ignore[reportArgumentType]
    weight = torch.zeros(n_features, dtype=torch.float64)
    weight[used] = free[:-1]
    return weight, float(free[-1])


def _folds(groups: Sequence[Hashable], n_folds: int, seed: int) -> Tensor:
    """Fold of each text, whole groups together and the folds about equally large."""
    sizes: dict[Hashable, int] = {}
    for group in groups:
        sizes[group] = sizes.get(group, 0) + 1
    shuffled = list(sizes)
    np.random.default_rng(seed).shuffle(shuffled)  # pyright: ignore[reportArgumentType]
    filled, fold_of = [0] * max(1, n_folds), {}
    for group in sorted(shuffled, key=lambda each: -sizes[each]):
        fold_of[group] = filled.index(min(filled))
        filled[fold_of[group]] += sizes[group]
    return torch.tensor([fold_of[group] for group in groups])


def _held_out_scores(
    rows: _Rows, labels: Bool[Tensor, " text"], folds: Tensor, penalty: float, n_features: int
) -> Float[Tensor, " text"]:
    """Score of each text by a fit on the other folds; NaN where those have one label alone."""
    scores = torch.full((rows.n,), torch.nan, dtype=torch.float64)
    for fold in range(int(folds.max()) + 1):
        out = folds == fold
        rest = labels[~out]
        if len(rest) and rest.any() and not rest.all():
            weight, bias = _fit(rows.of(~out), rest, penalty, n_features)
            scores[out] = _scores(rows.of(out), weight, bias)
    return scores


def _platt(scores: Tensor, labels: Tensor, folds: Tensor) -> tuple[float, float]:
    """Slope and offset that turn held-out scores into probabilities; 1 and 0 if there are none."""
    known = scores.isfinite()
    if not known.any() or labels[known].all() or not labels[known].any():
        return 1.0, 0.0
    line = fit_logistic(scores[known, None], labels[known], 1e3)
    return float(line.weight), line.bias


def _card(
    scores: Tensor,
    labels: Tensor,
    folds: Tensor,
    groups: Sequence[Hashable],
    slope: float,
    offset: float,
    seed: int,
) -> JudgeCard:
    known = scores.isfinite()
    positive, n_groups = float(labels.double().mean()), len(set(groups))
    if not known.any():
        nothing = Interval(math.nan, math.nan, math.nan, 0, 0.95)
        return JudgeCard(len(labels), n_groups, 0, positive, nothing, math.nan, math.nan)
    mine = [group for group, is_known in zip(groups, known.tolist(), strict=True) if is_known]
    y, chance = labels[known], torch.sigmoid(slope * scores[known] + offset)
    auroc = held_out_auroc(FoldScores(scores[known], y, folds[known], ()), mine, seed=seed)
    gaps: dict[Hashable, list[float]] = {}
    for group, gap in zip(mine, (chance - y.double()).tolist(), strict=True):
        gaps.setdefault(group, []).append(gap)
    errors = [abs(sum(each) / len(each)) for each in gaps.values()]
    return JudgeCard(
        n=len(labels), n_groups=n_groups, n_folds=len(torch.unique(folds[known])),
        positive=positive, auroc=auroc, brier=float(((chance - y.double()) ** 2).mean()),
        rate_error=sum(errors) / len(errors),
    )  # fmt: skip


def _check_fit(texts: Sequence[str], labels: Sequence[bool], groups: Sequence[Hashable]) -> None:
    if not len(texts) == len(labels) == len(groups):
        raise MismatchError(
            f"{len(texts)} texts, {len(labels)} labels and {len(groups)} groups: one each, please."
        )
    n = sum(map(bool, labels))
    if n in (0, len(texts)):
        raise JudgeError(
            f"{n} of {len(texts)} answers are labelled positive; both kinds are needed to learn."
        )
