"""What *Patch map* is asked for: parts, metric, side; and the Python that says it."""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from modeldiff.attribution import Attribution
from modeldiff.errors import InterventionError
from modeldiff.interventions import Side
from modeldiff.layer_maps import before
from modeldiff.loading import Sides
from modeldiff.masks import Positions
from modeldiff.models import ModelPair
from modeldiff.patch_runs import Component, Metric, Part, head_width
from modeldiff.patching import PatchMap, components_of, kl_to, logit_difference, onset_loss
from modeldiff.report_text import token_text, visible
from modeldiff.tokens import Text
from modeldiff_widgets._prompt_box import Asked, tidy
from modeldiff_widgets._stack import new_edit, where_of
from modeldiff_widgets.layer_map import WIDEST, place_of

PART_NAMES: dict[Part, str] = {
    "resid_post": "Residual", "attn_out": "Attention", "mlp_out": "MLP",
    "mlp_act": "Neurons", "head": "Heads", "adapter": "Adapter",
}  # fmt: skip
SIDE_NAMES: dict[Side, str] = {"base": "base", "finetuned": "fine-tune"}
OTHER: dict[Side, Side] = {"base": "finetuned", "finetuned": "base"}
ONSET, LOGITS, KL = "onset", "logits", "kl"


@dataclass(frozen=True, eq=False)
class Ask:
    """What a job was asked for; never changed afterwards.

    Args:
        asked: What is read.
        parts: Kinds of components.
        metric: `ONSET`, `LOGITS` or `KL`.
        side: The side that is patched.
        predicted: Which prediction is measured, unless by `ONSET`; see `layer_map`.
        tokens: For `LOGITS`: two texts of one token each, or none to find them.
        n_onset: For `ONSET`: how many tokens of the answer.
        estimated: Attribution patching in place of real patches.
        grad_drop: With GradDrop.
    """

    asked: Asked
    parts: tuple[Part, ...]
    metric: str
    side: Side
    predicted: str | int = WIDEST
    tokens: tuple[str, ...] = ()
    n_onset: int = 3
    estimated: bool = False
    grad_drop: bool = False

    def components(self, sides: Sides) -> tuple[Component, ...]:
        """Rows of the map, part by part."""
        return tuple(each for part in self.parts for each in components_of(sides, [part]))


@dataclass(frozen=True, eq=False)
class Task:
    """An `Ask` on its text.

    Args:
        ask: What was asked.
        whole: The text with all of its answer.
        text: The part of it that the metric depends on.
        place: How many tokens that are.
        ids: For `LOGITS`: the token that is measured, and the one it is compared with.
        names: What they say.
    """

    ask: Ask
    whole: Text
    text: Text
    place: int
    ids: tuple[int, ...] = ()
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, pair: ModelPair, ask: Ask, whole: Text) -> "Task":
        """Cut the text and find the tokens; in a job.

        Raises:
            InterventionError: If a token that was named is none.
            MaskError: If there is nothing to measure there.
        """
        if ask.metric == ONSET:
            onset_loss(whole, ask.n_onset)  # says what is missing
            place = min(whole.n_tokens, whole.n_prompt + ask.n_onset)
            return cls(ask, whole, before(whole, place), place)
        place = place_of(pair, whole, ask.predicted)
        text = before(whole, place)
        if ask.metric == KL:
            return cls(ask, whole, text, place)
        ids = named_tokens(pair, ask.tokens) if ask.tokens else moved_tokens(pair, text)
        names = tuple(token_text(str(pair.tokenizer.decode([each]))) for each in ids)
        return cls(ask, whole, text, place, ids, names)

    def metric(self, sides: Sides, text: Text | None = None) -> Metric:
        """What is measured, on this text or another one."""
        text = self.text if text is None else text
        if self.ask.metric == ONSET:
            return onset_loss(text, self.ask.n_onset)
        if self.ask.metric == LOGITS:
            return logit_difference(*self.ids)
        return kl_to(sides, text, OTHER[self.ask.side])

    @property
    def said(self) -> str:
        """What the metric is, with its unit."""
        if self.ask.metric == ONSET:
            return f"loss of the first {self.place - self.text.n_prompt} tokens of the answer, nats"
        if self.ask.metric == LOGITS:
            return "logit of {} − logit of {}".format(*map(visible, self.names))
        return f"KL(patched ‖ {SIDE_NAMES[OTHER[self.ask.side]]}), nats"

    def code(self) -> str:
        """Python that defines ``values``, ``[component, token]``, and ``found``."""
        ask = self.ask
        maker, call = {
            ONSET: ("onset_loss", f"onset_loss(text, {ask.n_onset})"),
            LOGITS: ("logit_difference", "logit_difference({}, {})".format(*self.ids or (0, 0))),
            KL: ("kl_to", f"kl_to(pair.sides, text, {OTHER[ask.side]!r})"),
        }[ask.metric]
        function = "attribute" if ask.estimated else "patch_map"
        names = sorted({"components_of", maker} | (set() if ask.estimated else {"patch_map"}))
        drop = f", grad_drop={ask.grad_drop}" if ask.estimated else ""
        every = f"[c for part in {ask.parts!r} for c in components_of(pair.sides, [part])]"
        lines = [
            "import modeldiff as md", "from modeldiff.layer_maps import before",
            f"from modeldiff.patching import {', '.join(names)}",
            "from modeldiff.attribution import attribute" if ask.estimated else "",
            ask.asked.code(), f"text = before(text, {self.place})", f"metric = {call}",
            f"components = {every}",
            f"found = {function}(pair.sides, text, metric, side={ask.side!r}, "
            f"components=components{drop})",
            f"values = found.{'estimate' if ask.estimated else 'effect'}",
        ]  # fmt: skip
        return tidy(lines)

    def ablated(self, sides: Sides, text: Text) -> Metric:
        """What ablations are measured by, on any text: other texts have no answer's onset."""
        if self.ask.metric == LOGITS:
            return self.metric(sides, text)
        return kl_to(sides, text, OTHER[self.ask.side])

    def repair_code(self, chosen: tuple[Component, ...], others: tuple[str, ...]) -> str:
        """Python that defines ``repair``, the table of ablations; after `code`."""
        other = OTHER[self.ask.side]
        maker, call = ("kl_to", f"kl_to(pair.sides, text, {other!r})")
        if self.ask.metric == LOGITS:
            maker, call = ("logit_difference", "logit_difference({}, {})".format(*self.ids))
        each = "".join(f"\n    {component!r}," for component in chosen)
        return (
            "from modeldiff.patch_runs import Component\n"
            f"from modeldiff.patching import {maker}\n"
            "from modeldiff.self_repair import ablation_table\n"
            f"ablated = ({each}\n)\ntexts = [text, *pair.texts({list(others)!r})]\n"
            f"repair = ablation_table(\n    pair.sides, texts, ablated, lambda text: {call}, "
            f"side={self.ask.side!r}\n)"
        )


@dataclass(frozen=True, eq=False)
class Found:
    """A map: what was asked, and its numbers, real or estimated."""

    task: Task
    components: tuple[Component, ...]
    values: Tensor
    patches: PatchMap | None = None
    attribution: Attribution | None = None

    def strongest(self, n: int) -> list[tuple[int, int]]:
        """Rows and columns of the largest sizes, largest first; none of them is 0."""
        sizes = self.values.abs().nan_to_num(0.0).flatten()
        best = sizes.sort(descending=True, stable=True).indices[:n].tolist()
        return [divmod(each, self.values.shape[1]) for each in best if sizes[each] > 0]

    @property
    def way(self) -> float:
        """How far the sides differ in what is measured; NaN for estimates."""
        return float("nan") if self.patches is None else self.patches.target - self.patches.start

    @property
    def has_way(self) -> bool:
        """Whether shares of it say something: no cell changes more than twice as much."""
        return float(self.values.abs().nan_to_num(0.0).max()) <= 2 * abs(self.way)

    def recovered(self, row: int, column: int) -> float:
        """Share of the way to the other side; NaN for estimates and where the sides agree."""
        if self.patches is None or not self.has_way:
            return float("nan")
        return float(self.patches.recovered[row, column])


def moved_tokens(pair: ModelPair, text: Text) -> tuple[int, int]:
    """The next token whose probability the fine-tune raises most, and the one it lowers most."""
    p: dict[Side, Tensor] = {
        side: pair.run([text], side=side).logits[0, -1].double().softmax(-1)  # pyright: ignore
        for side in SIDE_NAMES
    }
    moved = p["finetuned"] - p["base"]
    return int(moved.argmax()), int(moved.argmin())


def named_tokens(pair: ModelPair, tokens: tuple[str, ...]) -> tuple[int, int]:
    """Token ids of two texts.

    Raises:
        InterventionError: If they are not two texts of one token each.
    """
    cut = [pair.tokenizer(each, add_special_tokens=False)["input_ids"] for each in tokens]
    if [len(each) for each in cut] != [1, 1]:  # pyright: ignore[reportArgumentType]
        seen = ", ".join(f"{t!r} is {len(i)} tokens" for t, i in zip(tokens, cut, strict=True))  # pyright: ignore
        raise InterventionError(
            f"{seen or 'no tokens'}: name two tokens, spaces in front included, with | between; "
            "or leave it empty for the two that move most."
        )
    return int(cut[0][0]), int(cut[1][0])  # pyright: ignore


_SITES = {"resid_post": "", "head": "z"}


def edit_of(sides: Sides, task: Task, component: Component, position: int) -> dict[str, Any] | str:
    """The same patch as an edit of the stack; where there is none, why.

    Args:
        sides: The pair.
        task: Which side is patched.
        component: What.
        position: At which token.
    """
    part, where, layers = component.part, where_of(Positions((position,))), [component.layer]
    if part in ("query", "key"):
        return (
            "queries and keys are exchanged inside the attention, after rotary embeddings, where "
            "edits have no site: choose a cell of Heads or Attention"
        )
    if part == "adapter":
        if task.ask.side == "base":
            return "in the base no adapter runs: patch the fine-tune, or choose a cell of MLP"
        modules = [component.module]
        return new_edit("adapter", layers=layers, where=where, coefficient=0.0, modules=modules)
    width = head_width(sides)
    channels = (component.head * width, (component.head + 1) * width) if part == "head" else ()
    return new_edit(
        "replace", layers=layers, where=where, site=_SITES.get(part, part),
        source=OTHER[task.ask.side], channels=channels,
    )  # fmt: skip


def repair_table(table: pd.DataFrame) -> list[list[Any]]:
    """Rows of what `ablation_table` gives, as they are shown."""
    names = ["component", "zeroed", "averaged", "resampled", "direct", "repaired", "warning"]
    shown = table[names].astype(object).where(table[names].notna(), None)
    return [[*row[:-1], row[-1] or "–"] for row in shown.to_numpy().tolist()]


def unmeasured(components: tuple[Component, ...], text: Text) -> Tensor:
    """A map whose values are not known yet."""
    return torch.full((len(components), text.n_tokens), torch.nan, dtype=torch.float64)
