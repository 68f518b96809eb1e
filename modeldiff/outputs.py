"""What the fine-tune changed in the outputs: divergences per token, and which tokens moved.

A row is a *predicted token*: the comparison of both models' distributions over it, given the same
tokens before it. The first token of a text has no row.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from modeldiff._progress import Progress
from modeldiff._shapes import Float, Int
from modeldiff.activations import Planned, planned
from modeldiff.batching import Batch
from modeldiff.divergence import check_finite, check_k, compared, unembedding
from modeldiff.forward import as_texts, run_pair
from modeldiff.loading import SIDES, Sides
from modeldiff.masks import Mask
from modeldiff.stats import Interval, bootstrap_mean
from modeldiff.tokens import Text, n_ids, token_names

TOKEN_COLUMNS = {
    "kl_ft_base": "KL(finetuned || base), nats",
    "kl_base_ft": "KL(base || finetuned), nats",
    "js": "Jensen-Shannon divergence, nats (at most 0.693)",
    "logprob_base": "log probability of the token that came, base, nats",
    "logprob_ft": "the same, finetuned",
    "delta_logprob": "logprob_ft - logprob_base, nats",
    "rank_base": "rank of the token that came, 0 the most likely, base",
    "rank_ft": "the same, finetuned",
    "rank_move": "rank_base - rank_ft; positive: the fine-tune finds it likelier",
    "entropy_base": "entropy of the prediction, base, nats",
    "entropy_ft": "the same, finetuned",
    "entropy_change": "entropy_ft - entropy_base, nats",
    "top1_base": "most likely token, base",
    "top1_ft": "most likely token, finetuned",
    "top1_flip": "whether the two differ",
    "top_overlap": "share of the top k that both have",
}
"""Numeric columns of `OutputDiff.tokens` and what they mean."""


@dataclass(frozen=True, eq=False)
class OutputDiff:
    """Output differences of a pair on some texts.

    Args:
        tokens: One row a predicted token: source, text, position, token_id, token, role, and the
            columns of `TOKEN_COLUMNS`.
        vocabulary: One row a token of the vocabulary: how often it is among the k most promoted
            and most demoted, its mean log ratio (nats), mean change of probability, and the
            share of positions at which it is promoted.
        texts: What was compared.
        top_ids: The k most likely tokens of base and fine-tune, ``[row, 2, k]``.
        top_logprobs: Their log probabilities.
        k: How many.
    """

    tokens: pd.DataFrame
    vocabulary: pd.DataFrame
    texts: tuple[Text, ...]
    top_ids: Int[Tensor, "row 2 k"]
    top_logprobs: Float[Tensor, "row 2 k"]
    k: int

    def by_text(self) -> pd.DataFrame:
        """Mean over each text's tokens of every numeric column, with the number of tokens."""
        grouped = self.tokens.groupby(["source", "text"], sort=False)
        means = grouped[_NUMERIC].mean()
        return means.assign(
            n_tokens=grouped.size(), max_kl=grouped["kl_ft_base"].max()
        ).reset_index()

    def summary(self, *, seed: int = 0) -> pd.DataFrame:
        """Means by source with 95 % intervals that resample whole texts.

        Returns:
            One row a source and metric: estimate, low, high, n_texts, n_tokens.
        """
        rows = []
        for source, part in self.tokens.groupby("source", sort=False):
            for metric in _NUMERIC:
                found: Interval = bootstrap_mean(
                    part[metric].to_numpy(float), clusters=part["text"].to_numpy(), seed=seed
                )
                rows.append(
                    {
                        "source": source,
                        "metric": metric,
                        "estimate": found.estimate,
                        "low": found.low,
                        "high": found.high,
                        "n_texts": part["text"].nunique(),
                        "n_tokens": len(part),
                    }
                )
        return pd.DataFrame(rows)

    def promoted(self, n: int = 20) -> pd.DataFrame:
        """Tokens that gained the most probability mass on average."""
        return self.vocabulary.nlargest(n, "mean_probability_change")

    def demoted(self, n: int = 20) -> pd.DataFrame:
        """Tokens that lost the most probability mass on average."""
        return self.vocabulary.nsmallest(n, "mean_probability_change")


_NUMERIC = [
    "kl_ft_base", "kl_base_ft", "js", "delta_logprob", "rank_move", "entropy_change",
    "top1_flip", "top_overlap",
]  # fmt: skip


class _Mining:
    """Running counts over the vocabulary; memory does not grow with the number of tokens."""

    def __init__(self) -> None:
        self.n = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, n: int, sums: dict[str, Tensor]) -> None:
        """Count the tokens of a batch, see `modeldiff.divergence.compared`."""
        self.n += n
        known = self.sums or {name: torch.zeros_like(one) for name, one in sums.items()}
        self.sums = {name: known[name] + one for name, one in sums.items()}

    def table(self, tokenizer: Any) -> pd.DataFrame:
        vocab = len(self.sums["promoted"])
        names = token_names(tokenizer, range(min(n_ids(tokenizer), vocab)))
        names += [f"<unused {i}>" for i in range(len(names), vocab)]
        return pd.DataFrame(
            {
                "token_id": range(vocab),
                "token": names[:vocab],
                "n_promoted": self.sums["promoted"].numpy(),
                "n_demoted": self.sums["demoted"].numpy(),
                "mean_log_ratio": (self.sums["log_ratio"] / self.n).numpy(),
                "mean_probability_change": (self.sums["moved"] / self.n).numpy(),
                "share_promoted": (self.sums["positive"] / self.n).numpy(),
                "n_positions": self.n,
            }
        )


def output_diff(
    sides: Sides,
    items: "Sequence[Any] | Mapping[str, Sequence[Any]]",
    *,
    on: "str | Mask" = "all",
    k: int = 10,
    max_tokens: int = 4096,
    budget: int = 256 << 20,
    progress: Progress = False,
    cancel: Event | None = None,
) -> OutputDiff:
    """Compare both sides' predictions of every token of some texts.

    Distributions are compared in float32 a block of tokens at a time; no tensor of all tokens by
    the whole vocabulary ever exists, for either model.

    Args:
        sides: The pair.
        items: Texts, chats, completions; or lists of them by source, such as
            ``{"on-policy base": [...], "on-policy finetuned": [...]}``: which model wrote the
            text changes the answer, so sources are kept apart in every summary.
        on: Which *predicted* tokens to compare.
        k: Size of the top lists, also for promoted and demoted tokens.
        max_tokens: Budget of a batch, padding included.
        budget: Bytes for the temporaries of a block.
        progress: Where to report.
        cancel: Event that stops between batches.

    Raises:
        MaskError: If no token is compared.
        MismatchError: If ``k`` is below 1 or above the size of the vocabulary, or a comparison is
            not finite.
        Cancelled: If the event is set.
    """
    check_k(k, sides.config.get_text_config().vocab_size)
    named = items if isinstance(items, Mapping) else {"texts": items}
    texts = tuple(text for several in named.values() for text in as_texts(sides, several))
    sources = [name for name, several in named.items() for _ in several]
    parts: list[dict[str, Tensor]] = []
    mining = _Mining()
    for place, came, block, sums in _compared(
        sides, texts, on, k, max_tokens, budget, progress, cancel
    ):
        mining.add(len(came), sums)
        parts.append(place | _columns(came, block))
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    check_finite(columns["kl_ft_base"], "comparisons of predictions")
    order = np.lexsort((columns["position"].numpy(), columns["text"].numpy()))
    columns = {name: column[order] for name, column in columns.items()}
    return OutputDiff(
        top_ids=columns.pop("top_ids"),
        top_logprobs=columns.pop("top_logprobs"),
        tokens=_token_table(columns, texts, sources),
        vocabulary=mining.table(sides.tokenizer),
        texts=texts,
        k=k,
    )


_Compared = tuple[dict[str, Tensor], Tensor, dict[str, Tensor], dict[str, Tensor]]


def _compared(
    sides: Sides,
    texts: tuple[Text, ...],
    on: "str | Mask",
    k: int,
    max_tokens: int,
    budget: int,
    progress: Progress,
    cancel: Event | None,
) -> Iterator[_Compared]:
    """Yield place, token, comparison and sums over the vocabulary, batch by batch."""

    def work(part: Planned) -> _Compared:
        row, column, came = predictors(part)
        if sides.kind == "remote":
            from modeldiff.remote_runs import outputs_compared

            block, sums = outputs_compared(
                sides, part.batch, row, column, came, k, budget, cancel=cancel
            )
        else:
            block, sums = _compared_here(sides, part.batch, row, column, came, k, budget)
        return {"text": part.text_index, "position": part.position}, came, block, sums

    for _, compared_part in planned(
        sides, texts, work, what="output_diff", on=on, max_tokens=max_tokens,
        progress=progress, cancel=cancel,
    ):  # fmt: skip
        yield compared_part


def predictors(part: Planned) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns that predict a part's kept tokens, and these tokens."""
    row, column = part.keep.nonzero(as_tuple=True)
    return row, column - 1, part.batch.ids[part.keep]


@torch.no_grad()
def _compared_here(
    sides: Sides, batch: Batch, row: Tensor, column: Tensor, came: Tensor, k: int, budget: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    run = run_pair(sides, batch, final=True)
    assert run.final is not None
    base, tuned = (final[row.to(final.device), column.to(final.device)] for final in run.final)
    one, other = (unembedding(sides.root(side), sides.site_map) for side in SIDES)
    return compared(base, tuned, one, other, came, k, budget)


def _columns(came: Tensor, block: dict[str, Tensor]) -> dict[str, Tensor]:
    both = block["top_ids"][:, 0, :, None] == block["top_ids"][:, 1, None, :]
    pairs = {
        f"{name}_{side}": block[name][:, index]
        for name in ("logprob", "rank", "entropy")
        for index, side in enumerate(("base", "ft"))
    }
    return {
        "token_id": came,
        "kl_ft_base": block["kl_fb"],
        "kl_base_ft": block["kl_bf"],
        "js": block["js"],
        **pairs,
        "top1_base": block["top_ids"][:, 0, 0],
        "top1_ft": block["top_ids"][:, 1, 0],
        "top_overlap": both.any(-1).float().mean(-1),
        "top_ids": block["top_ids"],
        "top_logprobs": block["top_logprobs"],
    }


def _token_table(
    columns: dict[str, Tensor], texts: tuple[Text, ...], sources: list[str]
) -> pd.DataFrame:
    places = list(zip(columns["text"].tolist(), columns["position"].tolist(), strict=True))
    table = pd.DataFrame({name: column.numpy() for name, column in columns.items()})
    table.insert(0, "source", [sources[text] for text, _ in places])
    table.insert(4, "token", [texts[text].pieces[position] for text, position in places])
    table.insert(5, "role", [texts[text].roles[position] for text, position in places])
    return table.assign(
        delta_logprob=table["logprob_ft"] - table["logprob_base"],
        rank_move=table["rank_base"] - table["rank_ft"],
        entropy_change=table["entropy_ft"] - table["entropy_base"],
        top1_flip=table["top1_base"] != table["top1_ft"],
    )
