"""What the panel *Steer and ablate* runs: an answer with edits, and a curve over a coefficient."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import modeldiff as md
from modeldiff.directions import Direction
from modeldiff.dose import Dose, dose_response
from modeldiff.errors import InterventionError
from modeldiff.generation import Answer, end_ids
from modeldiff.interventions import Plan, Side
from modeldiff.models import ModelPair
from modeldiff.tokens import Text, with_response
from modeldiff_widgets import _stack
from modeldiff_widgets._edit_rows import REACH
from modeldiff_widgets._known_behaviours import KnownBehaviour
from modeldiff_widgets._state import AuditState

NAMES = {"base": "base", "finetuned": "fine-tuned"}
_SENTINEL = 1.2345e-300  # stands for the coefficient until code is written


@dataclass(frozen=True)
class Ask:
    """One press of the button, as things were set then.

    Args:
        item: The prompt.
        side: The model that is edited.
        plans: Edits by name: "edited" and, if wanted, "random".
        settings: Of `ModelPair.generate`.
        code: Python that gives the same answers.
    """

    item: Any
    side: Side
    plans: Mapping[str, Plan]
    settings: Mapping[str, Any]
    code: str

    @classmethod
    def of(cls, state: AuditState, side: Side) -> "Ask":
        """Read the state.

        Raises:
            InterventionError: If there is nothing to ask, or an edit cannot be made.
        """
        item = state.item()
        if not item:
            raise InterventionError("there is no prompt yet: write one, then generate.")
        settings = {
            "n": 1, "seed": state.seed, "temperature": state.temperature,
            "max_new_tokens": state.max_new_tokens,
        }  # fmt: skip
        plans = state.grid()
        return cls(item, side, plans, settings, _answer_code(state, side, settings))

    @property
    def plain_key(self) -> str:
        """What the unedited answers depend on."""
        return repr((self.item, sorted(self.settings.items())))

    def columns(self) -> list[dict[str, Any]]:
        """Empty columns of the view."""
        plain = [{"title": name, "kind": side} for side, name in NAMES.items()]
        done = " + ".join(each.describe() for each in self.plans.get("edited", Plan()).edits)
        subtitles = {"edited": done, "random": "the same with random directions of that length"}
        edits = [
            {"title": f"{NAMES[self.side]}, {name}", "kind": name, "subtitle": subtitles[name]}
            for name in self.plans
        ]
        return [{**each, "tokens": [], "streaming": True} for each in (*plain, *edits)]


def _answer_code(state: AuditState, side: Side, settings: Mapping[str, Any]) -> str:
    options = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    lines = [
        state.grid_code(), f"item = {state.item_code()}",
        f"found = [pair.generate([item], {options})]",
    ]  # fmt: skip
    if not lines[0].startswith("import modeldiff"):
        lines.insert(0, "import modeldiff as md")
    if any(edit["on"] for edit in state.edits):
        lines += [
            f"cells = [md.Cell({side!r}, name, md.Plan() + plan) for name, plan in do.items()]",
            f"found.append(pair.generate([item], cells=cells, {options}))",
        ]
    lines.append("answers = {(a.side, a.edit): a.text for each in found for a in each.answers}")
    return "\n".join(lines)


def pieces_of(pair: ModelPair, prompt: Text, answer: Answer) -> list[str]:
    """The tokens of an answer as they are shown, the end token left out."""
    ends = set(end_ids(pair.sides))
    ids = [each for each in answer.ids if each not in ends]
    return list(with_response(prompt, ids, pair.tokenizer).pieces[prompt.n_tokens :])


def differing(before: Sequence[str], after: Sequence[str]) -> list[str]:
    """A mark for each token of ``after`` that ``before`` does not have in its place."""
    marks = [""] * len(after)
    matcher = difflib.SequenceMatcher(a=list(before), b=list(after), autojunk=False)
    for kind, _, _, start, stop in matcher.get_opcodes():
        if kind != "equal":
            marks[start:stop] = ["added"] * (stop - start)
    return marks


@dataclass(frozen=True)
class Curve:
    """One dose-response measurement, as things were set when it began.

    Args:
        edits: The stack; those that are on take part.
        varied: Which of them gets the coefficient.
        directions: By name.
        side: The model that is edited.
        known: The behaviour.
        coefficients: Where to measure.
        n_random: Sets of random directions.
        seed: Of sampling and of the random directions.
        header: Code that defines ``directions``.
    """

    edits: tuple[dict[str, Any], ...]
    varied: int
    directions: Mapping[str, Direction]
    side: Side
    known: KnownBehaviour
    coefficients: tuple[float, ...]
    n_random: int
    seed: int
    header: str

    @classmethod
    def of(
        cls, state: AuditState, varied: int, side: Side, known: KnownBehaviour,
        reach: float, points: int, n_random: int,
    ) -> "Curve":  # fmt: skip
        """Read the state.

        Raises:
            InterventionError: If there is no such edit, or it has no coefficient.
        """
        if not 0 <= varied < len(state.edits):
            raise InterventionError("there is no edit yet: add one, then measure.")
        edit = state.edits[varied]
        if edit["kind"] not in REACH or not edit["on"]:
            raise InterventionError(
                f"edit {varied + 1} ({edit['kind']}, {'on' if edit['on'] else 'off'}) has no "
                "coefficient to vary: choose one that is on and steers, scales or clamps."
            )
        _stack.plan_of(state.edits, state.directions)  # says what is wrong before work begins
        steps = (points - 1) // 2 or 1
        grid = tuple(round(reach * i / steps, 6) for i in range(-steps, steps + 1))
        used = _stack.used(state.edits)
        return cls(
            tuple(e for e in state.edits if e["on"]),
            sum(e["on"] for e in state.edits[:varied]),
            state.directions, side, known, grid, n_random if used else 0, state.seed,
            state.directions_code(used),
        )  # fmt: skip

    @property
    def label(self) -> str:
        """What is varied, in words."""
        edit = self.edits[self.varied]
        what = f" {edit['direction']}" if edit["direction"] else ""
        return f"{edit['kind'].replace('_', ' ')}{what}, in the {NAMES[self.side]} model"

    @property
    def unit(self) -> str:
        """What a coefficient of 1 is."""
        directed = self.edits[self.varied]["kind"] in ("steer", "clamp")
        return "× the direction's raw length" if directed else "factor"

    def measure(self, pair: ModelPair, **options: Any) -> Any:
        """Run `modeldiff.dose.dose_response`."""
        names = _stack.used(self.edits)
        swaps = [
            {
                name: md.random_like(self.directions[name], 1, seed=self._draw(j, i))[0]
                for i, name in enumerate(names)
            }
            for j in range(self.n_random)
        ]
        return dose_response(
            pair, self.known.behaviour, self._dose(self.directions), self.coefficients,
            controls=[self._dose(each) for each in swaps], side=self.side, seed=self.seed,
            **options,
        )  # fmt: skip

    def code(self) -> str:
        """Python that gives the same table as ``curve``; ``pair`` is in scope."""
        lines = ["import modeldiff as md", *_stack.imports_of(self.edits)]
        lines += [self.header] if self.header else []
        written = _stack.code_of(self._with(_SENTINEL), name="edit")
        body = written.replace(repr(_SENTINEL), "coefficient").replace("\n", "\n    ")
        chosen = ", directions=directions" if self.header else ""
        lines += [f"def dose(coefficient{chosen}):", f"    {body}", "    return edit"]
        if self.n_random:
            names = _stack.used(self.edits)
            draw = (
                f"{{n: md.random_like(directions[n], 1, seed={self.seed} + 1000 * (j + 1) + i)[0]"
            )
            lines += [
                f"swaps = [{draw} for i, n in enumerate({names!r})}} "
                f"for j in range({self.n_random})]",
                "controls = [lambda c, d=d: dose(c, d) for d in swaps]",
            ]
        else:
            lines.append("controls = []")
        return "\n".join([
            *lines,
            f"curve = md.dose_response(pair, {self.known.code}, dose, {self.coefficients!r}, "
            f"controls=controls, side={self.side!r}, seed={self.seed})",
        ])  # fmt: skip

    def _draw(self, control: int, number: int) -> int:
        return self.seed + 1000 * (control + 1) + number

    def _with(self, coefficient: float) -> list[dict[str, Any]]:
        return [
            {**edit, "coefficient": coefficient} if i == self.varied else edit
            for i, edit in enumerate(self.edits)
        ]

    def _dose(self, directions: Mapping[str, Direction]) -> Dose:
        def edited(coefficient: float) -> Plan:
            plan = _stack.plan_of(self._with(coefficient), directions)
            return Plan() if plan is None else plan

        return edited
