"""Fitting linear probes in float64: logistic regression, mean difference, attention pooling."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modeldiff._shapes import Bool, Float, Int
from modeldiff.errors import MismatchError

Pooling = Literal["mean", "max", "attention"]


@dataclass(frozen=True, eq=False)
class Tokens:
    """Activations of the tokens of several texts.

    Args:
        rows: One a token.
        text_index: Which text each belongs to.
    """

    rows: Float[Tensor, "token width"]
    text_index: Int[Tensor, " token"]

    def of_texts(self, texts: Sequence[int]) -> "Tokens":
        """The tokens of some texts, which are then numbered from 0 in the order given."""
        number = torch.full((int(self.text_index.max()) + 1,), -1)
        number[list(texts)] = torch.arange(len(texts))
        new = number[self.text_index]
        return Tokens(self.rows[new >= 0], new[new >= 0])


@dataclass(frozen=True, eq=False)
class Fitted:
    """A linear score of features: ``features @ weight + bias``."""

    weight: Float[Tensor, " feature"]
    bias: float

    def __call__(self, features: Float[Tensor, "text feature"]) -> Float[Tensor, " text"]:
        """Score texts."""
        return features.double() @ self.weight + self.bias


def pooled(tokens: Tokens, pooling: Pooling) -> Float[Tensor, "text width"]:
    """Mean or maximum over the tokens of each text, float64.

    Raises:
        MismatchError: For attention, which is learned with the probe.

    Example:
        >>> two = Tokens(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1]))
        >>> pooled(two, "mean").tolist(), pooled(two, "max").tolist()
        ([[2.0], [5.0]], [[3.0], [5.0]])
    """
    if pooling not in ("mean", "max"):
        raise MismatchError(f"pooling {pooling!r} has no features of its own: mean or max.")
    rows, index = tokens.rows.double(), tokens.text_index
    empty = rows.new_zeros(int(index.max()) + 1, rows.shape[1])
    how = "mean" if pooling == "mean" else "amax"
    where = index[:, None].expand_as(rows)
    return empty.scatter_reduce(0, where, rows, how, include_self=False)


def _standard(rows: Float[Tensor, "row feature"]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature; 1 where it does not vary."""
    mean, spread = rows.mean(0), rows.std(0, correction=0)
    return mean, torch.where(spread > 1e-12 * (1 + mean.abs()), spread, 1.0)


def fit_logistic(
    features: Float[Tensor, "text feature"], labels: Bool[Tensor, " text"], penalty: float
) -> Fitted:
    """Logistic regression on standardised features with a ridge prior, by Newton's method.

    Minimises ``penalty * sum(loss) + |w|² / 2`` over the weights of the standardised features; the
    intercept is free.

    Args:
        features: One row a text.
        labels: Of each.
        penalty: Strength of the data; scikit-learn's C.

    Example:
        >>> x = torch.tensor([[-1.0], [0.0], [0.5], [2.0]])
        >>> bool(fit_logistic(x, torch.tensor([False, False, True, True]), 1.0).weight > 0)
        True
    """
    rows = features.double()
    mean, spread = _standard(rows)
    z = (rows - mean) / spread
    turn = None
    if z.shape[1] > len(z):  # the weights lie in the span of the rows
        turn = torch.linalg.qr(z.T).Q
        z = z @ turn
    weight = _newton(torch.cat([z, torch.ones(len(z), 1).double()], 1), labels.double(), penalty)
    own, bias = weight[:-1], float(weight[-1])
    own = (own if turn is None else turn @ own) / spread
    return Fitted(own, bias - float(mean @ own))


def _newton(x: Tensor, y: Tensor, penalty: float) -> Float[Tensor, " feature"]:
    """Damped Newton's method; the last column's weight is not penalised."""
    ridge = torch.ones(x.shape[1]).double()
    ridge[-1] = 1e-9
    weight = torch.zeros(x.shape[1]).double()
    score = x @ weight
    start = _objective(score, y, weight, ridge, penalty)
    for _ in range(100):
        p = torch.sigmoid(score)
        gradient = penalty * (x.T @ (p - y)) + ridge * weight
        hessian = penalty * (x.T * (p * (1 - p))) @ x + torch.diag(ridge)
        step = torch.linalg.solve(hessian, gradient)
        decrease = float(gradient @ step)
        if decrease < 1e-15 * (1 + start):
            break
        along, size = x @ step, 1.0
        while True:  # half the step until it lowers the objective as it should
            new = _objective(score - size * along, y, weight - size * step, ridge, penalty)
            if new <= start - 1e-4 * size * decrease or size < 1e-6:
                break
            size /= 2
        weight, score, start = weight - size * step, score - size * along, new
    return weight


def _objective(score: Tensor, y: Tensor, weight: Tensor, ridge: Tensor, penalty: float) -> float:
    loss = torch.nn.functional.softplus(score) - y * score
    return float(penalty * loss.sum() + (ridge * weight * weight).sum() / 2)


def fit_mean_difference(
    features: Float[Tensor, "text feature"], labels: Bool[Tensor, " text"]
) -> Fitted:
    """Project on the difference of the classes' means; the threshold is half way."""
    rows = features.double()
    high, low = rows[labels].mean(0), rows[~labels].mean(0)
    return Fitted(high - low, -float((high - low) @ (high + low)) / 2)


def fit_attention(
    tokens: Tokens, labels: Bool[Tensor, " text"], penalty: float, n_steps: int = 60
) -> Callable[[Tokens], Float[Tensor, " text"]]:
    """Learn which tokens to look at together with what to read there.

    The score of a text is sum over tokens of softmax(q · z) (w · z) + b. It starts as the logistic
    probe of means (q = 0), with the same prior on q as on w, and is fitted by L-BFGS.

    Args:
        tokens: Of the training texts.
        labels: Of each.
        penalty: As for `fit_logistic`.
        n_steps: Iterations at most.

    Returns:
        The score of other texts' tokens.
    """
    mean, spread = _standard(tokens.rows.double())
    z, real = _padded((tokens.rows.double() - mean) / spread, tokens.text_index)
    averages = (z * real[..., None]).sum(1) / real.sum(1, keepdim=True)
    start = fit_logistic(averages, labels, penalty)
    q, w = torch.zeros_like(start.weight), start.weight.clone()
    b, y = torch.tensor(start.bias).double(), labels.double()
    several = [each.requires_grad_(True) for each in (q, w, b)]
    search = torch.optim.LBFGS(several, max_iter=n_steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        score = _attended(z, real, q, w) + b
        each = torch.nn.functional.softplus(score) - y * score
        total = each.mean() + (w @ w + q @ q) / (2 * penalty * len(y))
        total.backward()
        return total

    with torch.enable_grad():
        search.step(loss)  # pyright: ignore[reportArgumentType]

    def score(other: Tokens) -> Float[Tensor, " text"]:
        rows, known = _padded((other.rows.double() - mean) / spread, other.text_index)
        return (_attended(rows, known, q, w) + b).detach()

    return score


def _attended(z: Tensor, real: Tensor, q: Tensor, w: Tensor) -> Float[Tensor, " text"]:
    looks = (z @ q).masked_fill(~real, -torch.inf).softmax(1)
    return (looks * (z @ w)).sum(1)


def _padded(rows: Tensor, text_index: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens as ``[text, token, width]``, and which of them are real."""
    order = torch.argsort(text_index, stable=True)
    index = text_index[order]
    counts = torch.bincount(index)
    place = torch.arange(len(index)) - (counts.cumsum(0) - counts)[index]
    z = rows.new_zeros(len(counts), int(counts.max()), rows.shape[1])
    real = torch.zeros(z.shape[:2], dtype=torch.bool)
    z[index, place], real[index, place] = rows[order], True
    return z, real
