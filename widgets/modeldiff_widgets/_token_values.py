"""What the panel *Tokens* shows: its metrics, the numbers of one run, and the code for them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from modeldiff.directions import Direction
from modeldiff.interventions import Cell, Plan
from modeldiff.models import ModelPair
from modeldiff.sites import Site
from modeldiff.token_scores import TokenScores, adapter_scalars, projections, token_scores
from modeldiff.tokens import Text
from modeldiff_widgets._jobs import Job
from modeldiff_widgets._prompt_box import Asked, tidy
from modeldiff_widgets._render import Tone

COMPARED = {
    "kl_ft_base": ("KL ft‖base", "KL(fine-tuned ‖ base), nats", 1.0, 12.0),
    "kl_base_ft": ("KL base‖ft", "KL(base ‖ fine-tuned), nats", 1.0, 12.0),
    "js": ("JS", "Jensen-Shannon divergence, nats (at most 0.69)", 0.3, 0.7),
    "delta_logprob": ("Δ log p", "log p fine-tuned − log p base of the token, nats", 2.0, 12.0),
    "rank_move": ("rank move", "rank in base − rank in fine-tuned, places", 20.0, 500.0),
    "entropy_change": ("Δ entropy", "entropy fine-tuned − base, nats", 1.0, 8.0),
}
"""Short name, long name, value of full colour at first, and the largest that can be set."""
PROJECTED = {
    "projection_difference": (
        "Δ projection",
        "projection fine-tuned − base, residual units",
        0,
        50,
    ),
    "projection_ft": ("projection ft", "projection of fine-tuned, residual units", 0, 50),
    "projection_base": ("projection base", "projection of base, residual units", 0, 50),
}
LORA = {"lora": ("LoRA", "LoRA scalar A·x, before B and its scale", 0, 50)}
METRICS = COMPARED | PROJECTED | LORA
"""What can colour the tokens. A latent's activation would be one more entry here."""


@dataclass(frozen=True, eq=False)
class Request:
    """What one run is asked for, as it was set when the button was pressed.

    Args:
        asked: What is read.
        cells: The models that are compared with the base, in the order of the columns.
        plan_code: Python that defines ``do``; "" without edits.
        direction: What is projected on.
        direction_code: Python that defines ``directions``.
    """

    asked: Asked
    cells: tuple[Cell, ...]
    plan_code: str = ""
    direction: Direction | None = None
    direction_code: str = ""

    def code(self, metric: str, site: str, component: int) -> str:
        """Python that gives a metric as ``values``, one list of numbers a column."""
        lines = ["import modeldiff as md", self.plan_code]
        if self.plan_code:
            lines.append("do = md.Plan() + do")
        lines += [self.asked.code(), f"cells = [{', '.join(map(_cell_code, self.cells))}]"]
        return tidy([*lines, *self._values_code(metric, site, component)])

    def _values_code(self, metric: str, site: str, component: int) -> list[str]:
        if metric in COMPARED:
            return [
                "from modeldiff.token_scores import token_scores",
                "scores = token_scores(pair.sides, text, cells)",
                f"values = [each.column({metric!r}) for each in scores]",
            ]
        if metric == "lora":
            return [
                "from modeldiff.token_scores import adapter_scalars",
                "scalars = [adapter_scalars(pair.sides, text, each.plan) for each in cells",
                "           if each.side == 'finetuned']",
                f"values = [each[md.Site.parse({site!r})][:, {component}].tolist() "
                "for each in scalars]",
            ]
        if self.direction is None:
            return ["# no direction is chosen yet"]
        own = {"projection_difference": "own - base", "projection_ft": "own"}.get(metric, "base")
        return [
            "from modeldiff.token_scores import projections",
            self.direction_code,
            f"direction = directions[{self.direction.name!r}]",
            "base, *others = projections(pair.sides, text, direction, [md.Cell('base'), *cells])",
            f"values = [({own}).tolist() for own in others]",
        ]


@dataclass(frozen=True, eq=False)
class Shown:
    """What one run found; never changed afterwards.

    Args:
        request: What was asked for.
        text: What was read, as tokens.
        scores: Each model against the base.
        projected: Projections of the base and of each model, ``[1 + model, token]``.
        scalars: Of the adapter, for each of the models that have it.
    """

    request: Request
    text: Text
    scores: tuple[TokenScores, ...]
    projected: Tensor | None = None
    scalars: dict[int, dict[Site, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, pair: ModelPair, request: Request, text: Text, job: Job) -> "Shown":
        """Compute everything; in a job."""
        job.report(0.5, f"{text.n_tokens} tokens")
        scores = token_scores(pair.sides, text, request.cells, cancel=job.cancel)
        job.report(0.8, "adapter")
        scalars = {
            number: adapter_scalars(pair.sides, text, cell.plan)
            for number, cell in enumerate(request.cells)
            if pair.sides.lora and cell.side == "finetuned"
        }
        job.report(0.9, "projections")
        return cls(request, text, scores, None, scalars).projected_on(pair, request)

    def projected_on(self, pair: ModelPair, request: Request) -> "Shown":
        """The same with projections on the direction that a request names; in a job."""
        if request.direction is None:
            return self
        cells = [Cell("base"), *self.request.cells]
        asked = replace(
            self.request, direction=request.direction, direction_code=request.direction_code
        )
        values = projections(pair.sides, self.text, request.direction, cells)
        return replace(self, request=asked, projected=values)

    def column(self, number: int, tokenizer: Any, site: str, component: int) -> dict[str, Any]:
        """A column of the heat, see `PairView`."""
        scores = self.scores[number]
        kind = kind_of(scores.cell)
        flips = [False, *scores.table["top1_flip"]]
        return {
            "title": f"{name_of(scores.cell)} against base",
            "subtitle": scores.cell.plan.describe() if kind == "edited" else "",
            "kind": kind,
            "tokens": self.text.pieces,
            "values": self._values(number, site, component),
            "top": {side: scores.tops(i, tokenizer) for i, side in enumerate(("base", kind))},
            "marks": ["predicted" if flip else "" for flip in flips],
        }

    def _values(self, number: int, site: str, component: int) -> dict[str, list[float | None]]:
        values = {name: self.scores[number].column(name) for name in COMPARED}
        if self.projected is not None:
            base, own = self.projected[0], self.projected[1 + number]
            for name, row in zip(PROJECTED, (own - base, own, base), strict=True):
                values[name] = row.tolist()
        scalars = self.scalars.get(number)
        if scalars:
            values["lora"] = scalars[Site.parse(site)][:, component].tolist()
        return values


def cells_of(plan: Plan | None, which: str) -> tuple[Cell, ...]:
    """The models that are compared with the base.

    Args:
        plan: The edits that are on.
        which: Who gets a column with them: "none", "finetuned" or "both".
    """
    cells = [Cell("finetuned")]
    if plan is not None and which in ("finetuned", "both"):
        cells.append(Cell("finetuned", "edited", plan))
    if plan is not None and which == "both":
        cells.append(Cell("base", "edited", plan))
    return tuple(cells)


def kind_of(cell: Cell) -> Tone:
    """What gives a model its colour."""
    if len(cell.plan):
        return "edited"
    return "base" if cell.side == "base" else "finetuned"


def name_of(cell: Cell) -> str:
    """What a model is called."""
    own = "base" if cell.side == "base" else "fine-tuned"
    return f"{own} with edits" if len(cell.plan) else own


def short_name_of(cell: Cell) -> str:
    """The same where there is little room."""
    return ("base" if cell.side == "base" else "ft") + (" edited" if len(cell.plan) else "")


def waiting(tokens: Sequence[str] = (), *, streaming: bool = False) -> dict[str, Any]:
    """The column before anything is compared."""
    return {"title": "fine-tuned against base", "kind": "finetuned", "tokens": tokens,
            "streaming": streaming}  # fmt: skip


def _cell_code(cell: Cell) -> str:
    edit = f", {cell.name!r}, do" if len(cell.plan) else ""
    return f"md.Cell({cell.side!r}{edit})"
