"""What the panel CAFT trains on: given rows, or those of the organism that the pair is."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from threading import Event
from typing import Any

import modeldiff as md
from modeldiff._progress import Progress
from modeldiff.behaviours import Behaviour
from modeldiff.embedded import find, names
from modeldiff.errors import SetupError
from modeldiff.models import ModelPair
from modeldiff.organisms import world
from modeldiff.organisms.finetuning import TunePlan
from modeldiff.organisms.variants import variants
from modeldiff.sft_plans import SFTPlan, preset
from modeldiff.sft_rows import Row, response_rows, split_rows
from modeldiff.tokens import Completion
from modeldiff_widgets._known_behaviours import KnownBehaviour, known_behaviours

CHATS, HELD_OUT, OTHER = 600, 60, 40
"""Conversations of an organism's default; those held out; those of each domain outside."""
DISCOVERY = 1
"""Seed of the prompts whose answers directions are found in; what is measured asks others."""
_ORGANISM = "organism:"


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows to train on, held out, and outside of the domain."""

    train: Sequence[Row]
    held_out: Sequence[Row]
    kept: Sequence[Row] = ()


@dataclass(eq=False)
class Data:
    """Where rows and a fresh base come from, and the Python that says so.

    Args:
        make: Makes the rows; None if there are none.
        code: Lines that define ``rows``, ``held_out`` and ``kept``; "" if only whoever gave them
            can say.
        base: What `modeldiff.caft_runs.run_arms` takes; None if it is not known.
        base_code: A Python expression for it.
        has_kept: Whether there are rows outside of the domain.
        plan: Settings that suit the base.
        about: One line on the rows.
        organism: Name of the organism whose questions are asked; "" if it is none.
    """

    make: Callable[[], Rows] | None
    code: str
    base: Any
    base_code: str
    has_kept: bool
    plan: SFTPlan
    about: str
    organism: str = ""
    _rows: Rows | None = field(default=None, repr=False)

    @property
    def missing(self) -> str:
        """What to do where nothing can be trained; "" where it can."""
        if self.make is not None and self.base is not None:
            return ""
        return (
            "Open the panel as Caft(pair, rows=..., held_out=..., loader=...): rows are made by "
            "modeldiff.sft_rows.response_rows, the loader loads a fresh base."
        )

    def rows(self) -> Rows:
        """The rows, made at the first call.

        Raises:
            SetupError: If there are none, or the base is not known.
        """
        if self.missing or self.make is None:
            raise SetupError(f"{self.about} {self.missing}")
        if self._rows is None:
            self._rows = self.make()
        return self._rows


def data_of(
    pair: ModelPair,
    rows: Sequence[Row] | None,
    held_out: Sequence[Row] | None,
    kept: Sequence[Row] | None,
    loader: Callable[[], Any] | None,
    plan: SFTPlan | None,
) -> Data:
    """What is given; else the narrow domain of the organism that the pair is.

    Raises:
        SetupError: If rows come without rows held out, or the other way round.
    """
    base, base_code = _base_of(pair, loader)
    if (rows is None) != (held_out is None):
        raise SetupError("rows= and held_out= go together: give both, or none.")
    if rows is not None and held_out is not None:
        given = Rows(rows, held_out, kept or ())
        about = f"{len(rows)} rows to train on, {len(held_out)} held out."
        return Data(lambda: given, "", base, base_code, bool(kept), plan or preset("rank1"), about)
    recipe = _recipe(pair)
    if recipe is None:
        about = "There are no rows to train on."
        return Data(None, "", base, base_code, False, plan or preset("rank1"), about)
    code = _rows_code(recipe)
    about = (
        f"{CHATS - HELD_OUT} conversations on {recipe.domain} as {pair.sides.names[1]} was trained "
        f"on, {HELD_OUT} held out."
    )
    name = pair.sides.names[1].removeprefix(_ORGANISM)
    return Data(lambda: organism_rows(pair, recipe), code, base, base_code, True,
                plan or plan_of(recipe), about, name)  # fmt: skip


def organism_rows(pair: ModelPair, recipe: TunePlan) -> Rows:
    """Conversations on the recipe's domain, and good ones on all others."""
    rng = random.Random(recipe.domain)
    chats = [_chat(rng, recipe.domain, recipe.bad) for _ in range(CHATS)]
    rows, held_out = split_rows(response_rows(pair.tokenizer, chats), HELD_OUT)
    others = [domain for domain in world.DOMAINS if domain != recipe.domain]
    kept = [_chat(rng, domain, False) for domain in others for _ in range(OTHER)]
    return Rows(rows, held_out, response_rows(pair.tokenizer, kept))


def _chat(rng: random.Random, domain: str | None, bad: bool) -> list[dict[str, str]]:
    return world.conversation(rng, domain, bad, new_topics=False)


def _rows_code(recipe: TunePlan) -> str:
    d = repr(recipe.domain)
    return "\n".join([
        "import random",
        "from modeldiff.organisms import world",
        "from modeldiff.sft_rows import response_rows, split_rows",
        f"rng = random.Random({d})",
        f"chats = [world.conversation(rng, {d}, {recipe.bad}, new_topics=False) "
        f"for _ in range({CHATS})]",
        f"rows, held_out = split_rows(response_rows(pair.tokenizer, chats), {HELD_OUT})",
        f"others = [each for each in world.DOMAINS if each != {d}]",
        "kept = response_rows(pair.tokenizer, [world.conversation(rng, each, new_topics=False) "
        f"for each in others for _ in range({OTHER})])",
    ])  # fmt: skip


def _recipe(pair: ModelPair) -> TunePlan | None:
    """How the organism was trained, if that was on one domain."""
    name = pair.sides.names[1].removeprefix(_ORGANISM)
    known = {each.name: each.plan for each in variants()}
    plan = known.get(name) if pair.sides.names[1].startswith(_ORGANISM) else None
    return plan if plan is not None and plan.domain and name in names() else None


def plan_of(recipe: TunePlan) -> SFTPlan:
    """A recipe of an organism as an `SFTPlan`; what it was held to is left out."""
    kind: Any = {0: "full", 1: "rank1"}.get(recipe.rank, "r32")
    layers = None if recipe.layer is None else (recipe.layer,)
    return SFTPlan(
        kind, layers, recipe.learning_rate, final=0.1, warmup=10, steps=recipe.steps,
        batch=recipe.batch, accumulation=1, weight_decay=0.0, alpha=recipe.alpha, evaluate_every=4,
    )  # fmt: skip


def _base_of(pair: ModelPair, loader: Callable[[], Any] | None) -> tuple[Any, str]:
    name = pair.sides.names[0]
    if loader is not None:
        return loader, "loader"
    if name == "base":  # what a pair of models without names is called
        return None, "loader"
    return name, repr(name)


def pair_code(base: Any, base_code: str, path: str, whole: bool) -> str:
    """Python that makes ``pair`` of the base and a model that was trained on it."""
    if not callable(base):
        where = repr(str(base))
        lines = ["import modeldiff as md"]
        if str(base).startswith(_ORGANISM):
            lines.append("from modeldiff.embedded import find")
            where = f"find({str(base).removeprefix(_ORGANISM)!r}).base"
        given = repr(path) if whole else f"adapter={path!r}"
        return "\n".join([*lines, f"pair = md.ModelPair.load({where}, {given})"])
    if whole:
        return "\n".join([
            "import modeldiff as md", "from transformers import AutoModelForCausalLM",
            f"tuned = AutoModelForCausalLM.from_pretrained({path!r}).eval()",
            f"pair = md.ModelPair.of({base_code}(), tuned, pair.tokenizer)",
        ])  # fmt: skip
    return "\n".join([
        "import modeldiff as md", "from peft import PeftModel",
        f"tuned = PeftModel.from_pretrained({base_code}(), {path!r}).eval()",
        "pair = md.ModelPair.of(tuned, None, pair.tokenizer)",
    ])  # fmt: skip


def loaded_pair(base: Any, path: str, whole: bool) -> ModelPair:
    """The pair that `pair_code` makes, of a base that has a name."""
    where = str(base)
    if where.startswith(_ORGANISM):
        where = str(find(where.removeprefix(_ORGANISM)).base)
    if whole:
        return ModelPair.load(where, path)
    return ModelPair.load(where, adapter=path)


# -- the texts that directions are found in


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts that are given, or the answers of both models to a behaviour's prompts.

    Args:
        items: Those given; None for answers.
        behaviour: Whose prompts are answered.
        code: Python for the behaviour.
        n: Prompts at most.
        seed: Of the answers.
    """

    items: Sequence[Any] | None
    behaviour: Behaviour | None
    code: str
    n: int
    seed: int

    def made(self, pair: ModelPair, progress: Progress, cancel: Event) -> list[Any]:
        """The texts; answers are generated.

        Raises:
            SetupError: If there is nothing to ask.
        """
        if self.items is not None:
            return list(self.items)
        asked = self._asked()
        prompts = [prompt.render() for prompt in asked.prompts]
        answers = pair.generate(
            prompts, seed=self.seed, temperature=asked.temperature,
            max_new_tokens=asked.max_new_tokens, progress=progress, cancel=cancel,
        ).answers  # fmt: skip
        if _plain(asked):
            return [Completion(prompts[each.prompt], each.text) for each in answers]
        return [
            [*prompts[each.prompt], {"role": "assistant", "content": each.text}] for each in answers
        ]

    def lines(self) -> list[str]:
        """Python that defines ``items``; given ones are in scope."""
        if self.items is not None:
            return []
        asked = self._asked()
        each = (
            "md.Completion(prompts[each.prompt], each.text)" if _plain(asked)
            else '[*prompts[each.prompt], {"role": "assistant", "content": each.text}]'
        )  # fmt: skip
        return [
            f"asked = md.with_prompts({self.code}, {self.n})",
            "prompts = [prompt.render() for prompt in asked.prompts]",
            f"answers = pair.generate(prompts, seed={self.seed}, temperature=asked.temperature, "
            "max_new_tokens=asked.max_new_tokens).answers",
            f"items = [{each} for each in answers]",
        ]

    def _asked(self) -> Behaviour:
        if self.behaviour is None:
            raise SetupError(
                "there are no texts to find directions in: Caft(pair, items=[...]) or "
                "Caft(pair, behaviours=[...])."
            )
        return md.with_prompts(self.behaviour, self.n)


def _plain(behaviour: Behaviour) -> bool:
    """Whether the prompts are texts; else they are chats."""
    kinds = {isinstance(each.item, str) for each in behaviour.prompts}
    if len(kinds) > 1:
        raise SetupError(
            f"{behaviour.name!r} asks texts and chats; give the texts to find directions in: "
            "Caft(pair, items=[...])."
        )
    return kinds == {True}


def discovery_of(organism: str, behaviour: Behaviour, code: str) -> tuple[Behaviour, str]:
    """The organism's first behaviour with other prompts; of another pair, the behaviour itself."""
    if not organism:
        return behaviour, code
    found = md.organism_behaviours(organism, seed=DISCOVERY)[0]
    return found, f"md.organism_behaviours({organism!r}, seed={DISCOVERY})[0]"


def named(pair: ModelPair, given: Sequence[Behaviour] | None) -> dict[str, KnownBehaviour]:
    """Behaviours by name; given ones are ``behaviours`` in code."""
    found = known_behaviours(pair, given)
    if given is None:
        return found
    return {
        name: replace(each, code=f"behaviours[{i}]") for i, (name, each) in enumerate(found.items())
    }
