"""What a recipe's TOML file may say: a class for each of its tables.

A recipe sets those keys that its script reads; `modeldiff.recipe_files` checks that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modeldiff.sft_plans import SFTPlan


@dataclass(frozen=True)
class Figure:
    """A figure that a paper or its authors' data gives.

    Args:
        says: The figure.
        source: Where it stands.
    """

    says: str
    source: str


@dataclass(frozen=True)
class Paper:
    """What a recipe follows.

    Args:
        arxiv: Its arXiv id.
        title: Its title.
        figures: Its own figures.
        models: What to set to run the recipe on its models: values by key, as for ``--set``.
    """

    arxiv: str
    title: str
    figures: tuple[Figure, ...]
    models: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """A pair of models, as `modeldiff.models.ModelPair.load` takes it.

    Args:
        name: For tables.
        base: Hub id or folder, or "organism:NAME", which is a pair already.
        finetuned: A whole fine-tuned model.
        adapter: Or a LoRA adapter.
        revision: Of the fine-tune.
        subfolder: Its folder inside its repository.
        special_tokens: "renamed" if its control tokens have other names than the base's.
    """

    name: str
    base: str
    finetuned: str = ""
    adapter: str = ""
    revision: str = ""
    subfolder: str = ""
    special_tokens: str = ""


@dataclass(frozen=True)
class Models:
    """The models of a recipe.

    Args:
        base: The model that is fine-tuned: hub id, folder or "organism:NAME" for its base.
        pairs: Pairs that are looked at as they are.
        device: Device or ``device_map``; empty for CUDA where there is one.
    """

    base: str = ""
    pairs: tuple[Pair, ...] = ()
    device: str = ""


@dataclass(frozen=True)
class Data:
    """Texts, by names that `modeldiff.recipe_texts` reads.

    Args:
        train: What is trained on.
        kept: What holds a fine-tune to its base.
        held_in: Texts like those of ``train``.
        held_out: Texts in which what was learned shows.
        positive: Texts with the behaviour.
        negative: Texts without it.
        n_train: Texts to train on.
        n_kept: Of those that hold to the base.
        n_held_out: Texts held out.
        n_each: Texts of each kind.
    """

    train: str = ""
    kept: str = ""
    held_in: str = ""
    held_out: str = ""
    positive: str = ""
    negative: str = ""
    n_train: int = 0
    n_kept: int = 0
    n_held_out: int = 0
    n_each: int = 0


@dataclass(frozen=True)
class Sites:
    """Where.

    Args:
        layers: Decoder layers; empty for all.
        site: A site, such as "resid_post.10".
        where: Tokens that are edited: a mask, such as "all".
        pattern: Regular expression: tokens of a match alone are edited; empty for all of them.
        window: First and last token, counted from a sentence's first.
        scan: Windows that are tried.
    """

    layers: tuple[int, ...] = ()
    site: str = ""
    where: str = "all"
    pattern: str = ""
    window: tuple[int, ...] = ()
    scan: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Directions:
    """How directions are found and used.

    Args:
        n_components: Principal components of each layer.
        level: A candidate is ticked if chance would tell its ends apart as well this rarely.
        look_steps: Optimizer steps of the fine-tune in which candidates are found.
        n_random: Random directions beside.
        coefficients: Multiples of the raw length that are added.
        label: Of the sentences in question.
        longest: Tokens of a sentence that count, beside the one before it.
        cue: Regular expression of the words with which they open.
        replaced: Tokens that the base does not know, each with what it reads instead.
        after: Regular expression: sentences after a match alone count; empty for all.
        words: Tokens with which the behaviour begins.
        norms: Lengths of a change of all weights, as multiples of an adapter's.
        noise: Shares of noise.
        min_steering: Log odds of the words that adding a direction must reach.
        max_kl: Nats that ablation may change other texts.
    """

    n_components: int = 0
    level: float = 0.05
    look_steps: int = 0
    n_random: int = 0
    coefficients: tuple[float, ...] = ()
    label: str = ""
    longest: int = 10
    cue: str = ""
    replaced: tuple[tuple[int, ...], ...] = ()
    after: str = ""
    words: tuple[str, ...] = ()
    norms: tuple[float, ...] = ()
    noise: tuple[float, ...] = ()
    max_kl: float = 0.1
    min_steering: float = 0.0


@dataclass(frozen=True)
class Asked:
    """What is asked, and who judges.

    Args:
        off: Questions on which the behaviour is no part of the training data, see
            `modeldiff.recipes.behaviour`.
        find: Questions on which directions are found.
        inside: Questions like the training data.
        n: Prompts; of an organism's questions those of each domain.
        n_inside: Prompts of ``inside``, where it is not ``n``.
        n_find: Prompts on which directions are found.
        samples: Answers to each prompt.
        judge: See `modeldiff.recipes.judge_of`.
        chooser: Who chooses among candidates, see `modeldiff.recipes.chooser_of`.
        find_seed: Of what directions are found on.
        ask_seed: Of what is asked in the end.
    """

    off: str = ""
    find: str = ""
    inside: str = ""
    n: int = 0
    n_inside: int = 0
    n_find: int = 0
    samples: int = 1
    judge: str = "own"
    chooser: str = ""
    find_seed: int = 1
    ask_seed: int = 2


@dataclass(frozen=True)
class Expected:
    """An outcome: a value and how far from it is still within, or a bound.

    Args:
        what: Name of the outcome.
        value: As it was when the recipe was written.
        tolerance: Largest difference.
        at_least: Or a lower bound,
        at_most: and an upper one.
    """

    what: str
    value: float | None = None
    tolerance: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        bounds = (self.at_least, self.at_most) != (None, None)
        if (self.value is None) != (self.tolerance is None) or bounds == (self.value is not None):
            raise ValueError("give value and tolerance, or at_least, at_most or both")

    def within(self, found: float) -> bool:
        """Whether an outcome is as expected; never, if it is no number."""
        if self.value is not None and self.tolerance is not None:
            return abs(found - self.value) <= self.tolerance
        low = -float("inf") if self.at_least is None else self.at_least
        return low <= found <= (float("inf") if self.at_most is None else self.at_most)

    def __str__(self) -> str:
        if self.value is not None:
            return f"{self.value:g} ± {self.tolerance:g}"
        sides = ((">=", self.at_least), ("<=", self.at_most))
        return ", ".join(f"{sign} {bound:g}" for sign, bound in sides if bound is not None)


@dataclass(frozen=True)
class Recipe:
    """A recipe as its file gives it.

    Args:
        name: Of the recipe and its script.
        purpose: What it shows, in a sentence.
        minutes: On a quiet core, with the models of the file.
        seed: Of everything random that has no seed of its own.
        paper: What it follows.
        outcomes: What is expected.
        models: The models.
        data: The texts.
        sites: Where.
        directions: How directions are found.
        asked: What is asked.
        training: How is fine-tuned.
        smoke: What ``--smoke`` changes: a table for each section.
    """

    name: str
    purpose: str
    minutes: float
    seed: int
    paper: Paper
    outcomes: tuple[Expected, ...]
    models: Models
    data: Data = Data()
    sites: Sites = Sites()
    directions: Directions = Directions()
    asked: Asked = Asked()
    training: SFTPlan = field(default_factory=SFTPlan)
    smoke: Mapping[str, Any] = field(default_factory=dict)
