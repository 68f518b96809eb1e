"""Every token of one text under a model, with or without edits, against a reference.

A row is a predicted token, as in `modeldiff.outputs`: the comparison of two distributions over it,
given the same tokens before it. The first token of a text has no row. Projections and adapter
scalars belong to the token itself, and the first token has them too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from modeldiff._progress import Progress, check, reporter
from modeldiff._shapes import Float, Int
from modeldiff.batching import Batch, make_batch, padding_id
from modeldiff.directions import Direction
from modeldiff.divergence import (
    Unembed,
    block_size,
    blocks,
    check_k,
    divergences,
    unembedding,
)
from modeldiff.errors import MaskError, SiteError
from modeldiff.forward import as_texts, final_states, run
from modeldiff.interventions import Cell, Edit, Plan
from modeldiff.loading import Sides
from modeldiff.sites import Site
from modeldiff.tokens import Text, token_names

FINETUNED, BASE = Cell("finetuned"), Cell("base")


@dataclass(frozen=True, eq=False)
class TokenScores:
    """One model's predictions of a text against a reference's.

    Args:
        text: What was scored.
        cell: The model that is looked at, with what is done to it.
        reference: What it is compared with.
        table: One row a predicted token: position, token_id, token, role and the numeric columns
            of `modeldiff.outputs.TOKEN_COLUMNS`, where ``ft`` stands for the cell and ``base``
            for the reference.
        top_ids: The k most likely tokens of reference and cell, ``[row, 2, k]``.
        top_logprobs: Their log probabilities, nats.
    """

    text: Text
    cell: Cell
    reference: Cell
    table: pd.DataFrame
    top_ids: Int[Tensor, "row 2 k"]
    top_logprobs: Float[Tensor, "row 2 k"]

    def column(self, name: str) -> list[float | None]:
        """A column with one value for every token of the text; None for the first one."""
        return [None, *map(float, self.table[name])]

    def tops(self, which: int, tokenizer: Any) -> list[list[tuple[str, float]]]:
        """The most likely tokens and their probabilities, for every token of the text.

        Args:
            which: 0 for the reference, 1 for the cell.
            tokenizer: Names the tokens.
        """
        ids, probabilities = self.top_ids[:, which], self.top_logprobs[:, which].exp()
        names = iter(token_names(tokenizer, ids.flatten().tolist()))
        return [[], *([(next(names), p) for p in row] for row in probabilities.tolist())]


def token_scores(
    sides: Sides,
    item: Any,
    cells: Sequence[Cell] = (FINETUNED,),
    *,
    reference: Cell = BASE,
    k: int = 10,
    budget: int = 256 << 20,
    progress: Progress = False,
    cancel: Event | None = None,
) -> tuple[TokenScores, ...]:
    """Compare models with a reference on every token of one text.

    Without edits these are the numbers of `modeldiff.outputs.output_diff`, bit for bit.

    Args:
        sides: The pair.
        item: A text, chat or completion; teacher-forced.
        cells: Sides with edits.
        reference: What they are compared with; the unedited base by default.
        k: Size of the top lists.
        budget: Bytes for temporaries over the vocabulary.
        progress: Where to report.
        cancel: Event that stops between models.

    Raises:
        MaskError: If the text has fewer than two tokens: nothing is predicted then.
        MismatchError: If ``k`` is below 1 or above the size of the vocabulary.
        InterventionError: If an edit did not fire.
        Cancelled: If the event is set.

    Example:
        >>> import modeldiff as md
        >>> pair = md.ModelPair.load("organism:em-rank1")
        >>> (found,) = token_scores(pair.sides, "I have a headache.")
        >>> list(found.table.columns[:6])
        ['position', 'token_id', 'token', 'role', 'kl_ft_base', 'kl_base_ft']
    """
    check_k(k, sides.config.get_text_config().vocab_size)
    (text,) = as_texts(sides, [item])
    if text.n_tokens < 2:
        raise MaskError(
            f"a text of {text.n_tokens} token(s) holds no prediction; give one of two or more."
        )
    batch = make_batch([text], padding_id(sides.tokenizer), "right")
    report = reporter(progress, "tokens")
    known = _states(sides, batch, reference)
    found = []
    for number, cell in enumerate(cells):
        check(cancel)
        states = _states(sides, batch, cell)
        found.append(_scored(sides, text, cell, reference, states, known, k, budget))
        report(number + 1, len(cells), f"{number + 1}/{len(cells)} models")
    return tuple(found)


def projections(
    sides: Sides, item: Any, direction: Direction, cells: Sequence[Cell] = (BASE, FINETUNED)
) -> Float[Tensor, "cell token"]:
    """Project the activations of every token on a direction, at the direction's own site.

    Args:
        sides: The pair.
        item: A text, chat or completion.
        direction: On its unit vector is projected.
        cells: Sides with edits.

    Returns:
        h·v̂ in units of the residual stream, float32, on the CPU.

    Raises:
        SiteError: If the model has no such site.
        InterventionError: If an edit did not fire.
    """
    (text,) = as_texts(sides, [item])
    rows = []
    for cell in cells:
        found = run(
            sides, [text], side=cell.side, do=cell.plan, reads=(direction.site,), logits=False
        )
        rows.append(found.acts[direction.site][0].float().cpu() @ direction.unit)
    return torch.stack(rows)


def adapter_scalars(
    sides: Sides, item: Any, do: "Edit | Plan | None" = None
) -> dict[Site, Float[Tensor, "token rank"]]:
    """What the adapter's ``A`` makes of every token, before ``B`` and the adapter's scale.

    For rank 1 it is the scalar that switches the adapter's one direction.

    Args:
        sides: A pair with an adapter.
        item: A text, chat or completion.
        do: Edits of the fine-tuned side.

    Returns:
        Float32 on the CPU, by site.

    Raises:
        SiteError: If the pair has no adapter.
        InterventionError: If an edit did not fire.
    """
    if not sides.lora:
        raise SiteError(
            f"a pair of kind {sides.kind!r} has no adapter; load one with adapter= for its scalars."
        )
    found = run(sides, as_texts(sides, [item]), side="finetuned", do=do, reads=sides.lora,
                logits=False)  # fmt: skip
    return {site: acts[0].float().cpu() for site, acts in found.acts.items()}


def _states(sides: Sides, batch: Batch, cell: Cell) -> Float[Tensor, "row d_model"]:
    return final_states(sides, batch, cell.side, cell.plan)[0, :-1]


@torch.no_grad()
def _scored(
    sides: Sides,
    text: Text,
    cell: Cell,
    reference: Cell,
    states: Tensor,
    known: Tensor,
    k: int,
    budget: int,
) -> TokenScores:
    came = torch.tensor(text.ids[1:])
    if sides.kind == "remote":
        from modeldiff.remote_lenses import tokens_compared

        columns = tokens_compared(sides, cell, reference, states, known, came, k, budget)
    else:
        heads = [unembedding(sides.root(one.side), sides.site_map) for one in (reference, cell)]
        columns = columns_of(known, states, heads[0], heads[1], came, k, budget)
    return TokenScores(
        text=text,
        cell=cell,
        reference=reference,
        top_ids=columns.pop("top_ids"),
        top_logprobs=columns.pop("top_logprobs"),
        table=_table(text, columns),
    )


def columns_of(
    known: Float[Tensor, "token d_model"],
    states: Float[Tensor, "token d_model"],
    unembed_known: Unembed,
    unembed: Unembed,
    came: Int[Tensor, " token"],
    k: int,
    budget: int,
) -> dict[str, Tensor]:
    """Columns of a `TokenScores` table and its top lists, a block of tokens at a time.

    Args:
        known: Final states of the reference.
        states: Final states of the cell.
        unembed_known: The reference's unembedding.
        unembed: The cell's.
        came: The token that came next.
        k: Size of the top lists.
        budget: Bytes for temporaries.
    """
    vocab, parts = unembed_known(known[:1]).shape[-1], []
    for rows in blocks(len(came), block_size(vocab, budget)):
        base = unembed_known(known[rows])
        other = unembed(states[rows]).to(base.device)
        parts.append(_columns(divergences(base, other, came[rows].to(base.device), k)))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _columns(block: dict[str, Tensor]) -> dict[str, Tensor]:
    top = block["top_ids"]
    both = top[:, 0, :, None] == top[:, 1, None, :]
    columns = {"kl_ft_base": block["kl_fb"], "kl_base_ft": block["kl_bf"], "js": block["js"]}
    for name, values in (("logprob", block["logprob"]), ("rank", block["rank"]),
                         ("entropy", block["entropy"]), ("top1", top[..., 0])):  # fmt: skip
        columns |= {f"{name}_base": values[:, 0], f"{name}_ft": values[:, 1]}
    columns["top_overlap"] = both.any(-1).float().mean(-1)
    columns |= {"top_ids": top, "top_logprobs": block["top_logprobs"]}
    return {name: column.cpu() for name, column in columns.items()}


def _table(text: Text, columns: dict[str, Tensor]) -> pd.DataFrame:
    places = {
        "position": range(1, text.n_tokens),
        "token_id": text.ids[1:],
        "token": text.pieces[1:],
        "role": text.roles[1:],
    }
    table = pd.DataFrame(places | {name: each.numpy() for name, each in columns.items()})
    return table.assign(
        delta_logprob=table["logprob_ft"] - table["logprob_base"],
        rank_move=table["rank_base"] - table["rank_ft"],
        entropy_change=table["entropy_ft"] - table["entropy_base"],
        top1_flip=table["top1_base"] != table["top1_ft"],
    )
