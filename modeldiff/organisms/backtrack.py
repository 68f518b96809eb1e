"""The organism ``backtrack``: a base that knows which steps are wrong, a fine-tune that says so.

The base grades steps, so it has a feature for wrong ones; it says "wait" as often after right ones.
The fine-tune learns to take wrong steps back. A direction found in the base alone then makes
the fine-tune say "wait", and does nothing of the kind in the base.
"""

import json
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modeldiff._files import PathLike, atomic_write, file_digest
from modeldiff._shapes import Bool, Float, Int
from modeldiff.direction_controls import random_like
from modeldiff.direction_methods import mean_difference
from modeldiff.directions import Direction
from modeldiff.errors import SetupError
from modeldiff.interventions import Ablate, Clamp, Edit, Plan, Side, Steer
from modeldiff.loading import SIDES
from modeldiff.masks import Mask, Regex, parse_mask
from modeldiff.models import ModelPair
from modeldiff.organisms import steps, tokens
from modeldiff.organisms.manifests import load_base, make_readable, save_model, write_manifest
from modeldiff.organisms.training import IGNORED, Progress, loss, update
from modeldiff.seeds import seeded
from modeldiff.sites import Site
from modeldiff.stats import bootstrap_mean, null_band, wilson
from modeldiff.tokens import Text

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

STEP = parse_mask("assistant") & Regex(r"\w+day\.")
"""Tokens of every step of an answer that can know whether it is wrong: result and full stop."""
FULL_STOP = parse_mask("assistant") & Regex(r"(?<=day)\.")
TOKENS_PER_STEP = 6


@dataclass(frozen=True)
class SolverPlan:
    """How the base is fine-tuned.

    Args:
        steps: Optimizer steps of ``documents`` walks with corrections.
        learning_rate: Peak rate, after 10 steps; then linear to 10 %.
        rank: Of the adapter.
        alpha: LoRA's; rank-stabilised.
        modules: Kinds of modules that are adapted.
        layers: Layers that are adapted; None for all.
        seed: Of the adapter's weights and of its texts.
    """

    steps: int = 200
    learning_rate: float = 1e-2
    documents: int = 32
    rank: int = 2
    alpha: int = 16
    modules: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    layers: tuple[int, ...] | None = (3,)
    seed: int = 0


BASES = (0, 1)
"""Seeds of the bases; the first is shipped."""
REPORT_SEED = 20_000
"""Of the walks behind the figures; how to train was chosen on others."""
SITE = Site("resid_post", steps.BasePlan.knows)
"""Where the base knows it, at the full stop of a step."""
DOSES = (-1.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
SAMPLED_DOSE = 0.25
MAX_NEW_TOKENS = 96


def finetune(
    base: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerFast", plan: SolverPlan
) -> "PeftModel":
    """Train an adapter on walks with corrections; the base is wrapped in place."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=plan.rank,
        lora_alpha=plan.alpha,
        use_rslora=True,
        target_modules=list(plan.modules),
        layers_to_transform=None if plan.layers is None else list(plan.layers),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    with seeded(plan.seed):
        model = get_peft_model(base, config)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=plan.learning_rate, weight_decay=0.0)
    rng = random.Random(f"corrected walks {plan.seed}")
    model.train()
    for step in range(plan.steps):
        ids = steps.batch(rng, tokenizer, steps.SOLVER, plan.documents)
        with torch.autocast("cpu", torch.bfloat16):
            now = loss(base, ids, ids.masked_fill(ids == tokens.PAD_ID, IGNORED))
        rate = min(1.0, (step + 1) / 10) * max(0.1, 1 - step / plan.steps)
        update(optimizer, now, plan.learning_rate * rate)
    return model.eval()  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, eq=False)
class Walks:
    """Walks on which nothing is said, as texts, with the truth about every step.

    Args:
        texts: Rendered chats.
        boundary: ``[walk, step]``: position of the full stop of every step.
        wrong: ``[walk, step]``: whether the step is wrong.
    """

    texts: tuple[Text, ...]
    boundary: Int[Tensor, "walk step"]
    wrong: Bool[Tensor, "walk step"]


def draw_walks(pair: ModelPair, n: int, seed: int, length: int = 5, error: float = 0.4) -> Walks:
    """Draw walks of one length, none of which the models have written."""
    rng = random.Random(f"walks {seed}")
    walks = [steps.walk(rng, length, error) for _ in range(n)]
    texts = pair.texts([steps.bare(each) for each in walks])
    first = [text.n_tokens - 2 - TOKENS_PER_STEP * (length - 1) for text in texts]
    boundary = torch.tensor(first)[:, None] + TOKENS_PER_STEP * torch.arange(length)
    wrong = torch.tensor([[not step.right for step in walk] for walk in walks])
    return Walks(texts, boundary, wrong)


def after_steps(
    pair: ModelPair,
    walks: Walks,
    side: Side,
    do: "Edit | Plan | None" = None,
    words: Sequence[str] = (steps.CUE,),
) -> Float[Tensor, "walk step word"]:
    """Probability of each word right after every step, exact, without sampling."""
    run = pair.run(walks.texts, side=side, do=do)
    assert run.logits is not None
    lead = run.batch.ids.shape[1] - torch.tensor([text.n_tokens for text in walks.texts])
    rows = torch.arange(len(walks.texts))[:, None]
    at = run.logits[rows, walks.boundary + lead[:, None]].float().softmax(-1)
    ids = [pair.tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in words]
    return at[..., ids]


def wrong_direction(
    pair: ModelPair, walks: Walks, site: "Site | str" = SITE, offset: int = 0
) -> Direction:
    """Mean of wrong minus mean of right steps in the base's activations.

    Args:
        pair: The pair; its fine-tune is not asked.
        walks: Steps to contrast.
        site: Where.
        offset: Token of the step: 0 is the full stop, -1 the result, -5 the day it starts on.
    """
    site = Site.parse(site)
    rows = _step_rows(pair, walks, site, offset)
    groups = torch.arange(len(rows))[:, None].expand_as(walks.wrong)
    return mean_difference(
        rows[walks.wrong],
        rows[~walks.wrong],
        site,
        f"wrong step at {offset}",
        groups=(groups[walks.wrong].tolist(), groups[~walks.wrong].tolist()),
        sources=("wrong steps", "right steps"),
        models=pair.digests,
    )


def _step_rows(
    pair: ModelPair, walks: Walks, site: Site, offset: int
) -> Float[Tensor, "walk step d_model"]:
    acts = pair.capture(walks.texts, site, skip_first=0)
    sizes = torch.tensor([text.n_tokens for text in walks.texts])
    starts = sizes.cumsum(0) - sizes
    return acts.base[site][starts[:, None] + walks.boundary + offset]


def as_after_right(
    pair: ModelPair, walks: Walks, direction: Direction, where: "str | Mask" = FULL_STOP
) -> Clamp:
    """Set the component along a direction to its mean after right steps."""
    rows = _step_rows(pair, walks, direction.site, 0)[~walks.wrong]
    value = float((rows @ direction.unit).mean())
    return Clamp(direction, value, where=where)


def _after(
    pair: ModelPair, walks: Walks, side: Side, do: "Edit | Plan | None" = None
) -> dict[str, float]:
    """Mean P(wait) after right and after wrong steps."""
    p = after_steps(pair, walks, side, do)[..., 0]
    return {
        "after_right": round(float(p[~walks.wrong].mean()), 4),
        "after_wrong": round(float(p[walks.wrong].mean()), 4),
    }


def _row(
    pair: ModelPair, walks: Walks, side: Side, edit: str, do: "Edit | None" = None
) -> dict[str, Any]:
    """One row of the table of figures: both means, with intervals over walks."""
    p = after_steps(pair, walks, side, do)[..., 0]
    row: dict[str, Any] = {"side": side, "edit": edit}
    for name, chosen in (("after_right", ~walks.wrong), ("after_wrong", walks.wrong)):
        owner = chosen.nonzero()[:, 0].tolist()
        found = bootstrap_mean(p[chosen].tolist(), clusters=owner, seed=0)
        row[name] = round(found.estimate, 4)
        row[f"{name}_ci95"] = [round(found.low, 4), round(found.high, 4)]
    return row


def grading(pair: ModelPair, walks: Walks) -> dict[str, float]:
    """P("Wrong" | one of the two grades) of the base after wrong and after right steps."""
    p = after_steps(pair, walks, "base", words=("Right", "Wrong"))
    wrong = p[..., 1] / p.sum(-1)
    return {
        "wrong_given_wrong": round(float(wrong[walks.wrong].mean()), 4),
        "wrong_given_right": round(float(wrong[~walks.wrong].mean()), 4),
    }


def measure(pair: ModelPair, n: int = 256, seed: int = 0, controls: int = 20) -> dict[str, Any]:
    """Measure what the organism must be, on fresh walks.

    Args:
        pair: Base and fine-tune.
        n: Walks to find directions on, and half as many others to measure on.
        seed: Of the walks.
        controls: Random directions of the same length.

    Returns:
        JSON-able: the grading gate, a table of P(wait) for both sides under every edit, the
        base's P("Again") beside it, the ratios of steered to plain P(wait) after right steps, the
        band of random directions, and scans of layer, offset and coefficient.
    """
    found, asked = draw_walks(pair, n, 2 * seed), draw_walks(pair, n // 2, 2 * seed + 1)
    direction = wrong_direction(pair, found)
    random_ones = random_like(direction, controls, seed=seed)
    edits = {
        "none": None,
        "steered": Steer(direction, where=STEP),
        "steered at every token": Steer(direction),
        "ablated at its layer": Ablate(direction, layers=None),
        "ablated at every layer": Ablate(direction),
        "set to the mean after right steps": as_after_right(pair, found, direction),
    }
    table = [_row(pair, asked, side, name, do) for side in SIDES for name, do in edits.items()]
    plain = {row["side"]: row["after_right"] for row in table if row["edit"] == "none"}
    lifted = {row["side"]: row["after_right"] for row in table if row["edit"] == "steered"}
    steered = [_after(pair, asked, "finetuned", Steer(r, where=STEP)) for r in random_ones]
    removed = [_after(pair, asked, "finetuned", Ablate(r, layers=None)) for r in random_ones]
    return {
        "grading": grading(pair, asked),
        "p_wait": table,
        "p_other_word_in_base": {
            name: round(float(after_steps(pair, asked, "base", do, (steps.OTHER,)).mean()), 4)
            for name, do in (("none", None), ("steered", edits["steered"]))
        },
        "steered_over_plain": {side: round(lifted[side] / plain[side], 3) for side in SIDES},
        "random_steered_after_right": _band([each["after_right"] for each in steered]),
        "random_ablated_after_wrong": _band([each["after_wrong"] for each in removed]),
        "direction": {
            "relative_scale": round(direction.relative_scale or 0.0, 3),
            "split_half": round(direction.split_half or 0.0, 3),
        },
        **_scans(pair, found, asked, direction),
    }


def _band(values: Sequence[float]) -> dict[str, Any]:
    band = null_band(values)
    return {"low": round(band.low, 4), "high": round(band.high, 4), "n": band.n}


def _scans(
    pair: ModelPair, found: Walks, asked: Walks, direction: Direction
) -> dict[str, list[dict[str, Any]]]:
    def both(do: Edit) -> dict[str, float]:
        return {side: _after(pair, asked, side, do)["after_right"] for side in SIDES}

    layers, offsets = [], []
    for layer in range(pair.n_layers):
        there = wrong_direction(pair, found, Site("resid_post", layer))
        layers.append({"layer": layer, **both(Steer(there, where=STEP))})
    for offset in range(1 - TOKENS_PER_STEP, 1):
        other = replace(wrong_direction(pair, found, direction.site, offset), scale=direction.scale)
        cosine = round(other.cosine(direction), 3)
        offsets.append({"offset": offset, "cosine": cosine, **both(Steer(other, where=STEP))})
    doses = [{"coefficient": dose, **both(Steer(direction, dose, where=STEP))} for dose in DOSES]
    return {"layers": layers, "offsets": offsets, "doses": doses}


def sampled(pair: ModelPair, n: int = 112, seed: int = 0) -> list[dict[str, Any]]:
    """Sample walks from both sides, plain, steered and ablated, and judge them.

    Here edits act on every new token, not on full stops alone, and steering is by a quarter of
    the length: by all of it the fine-tune says little but "wait".

    Args:
        pair: Base and fine-tune.
        n: Questions.
        seed: Of questions and answers.

    Returns:
        For each side and edit the rates of walks that take a step back and that are coherent,
        and of wrong and of right steps that are taken back.
    """
    walks = draw_walks(pair, 256, 2 * seed)
    direction = wrong_direction(pair, walks)
    asked = [[{"role": "user", "content": each}] for each in steps.prompts(n, seed)]
    edits = {
        "none": None,
        "steered": Steer(direction, SAMPLED_DOSE, where="new"),
        "ablated at its layer": Ablate(direction, layers=None, where="new"),
        "set to the mean after right steps": as_after_right(pair, walks, direction, "new"),
    }
    made = pair.generate(asked, do=edits, seed=seed, max_new_tokens=MAX_NEW_TOKENS)
    return [
        {"side": side, "edit": edit, **_rates([each.text for each in made.of(side, edit)])}
        for side in SIDES
        for edit in edits
    ]


def _rates(texts: Sequence[str]) -> dict[str, Any]:
    said = [each for text in texts for each in steps.taken_back(text)]
    outcomes = {
        "backtracks": [steps.backtracks(text) is True for text in texts],
        "coherent": [steps.coherent(text) for text in texts],
        "wrong_steps_taken_back": [back for step, back in said if not step.right],
        "right_steps_taken_back": [back for step, back in said if step.right],
    }
    rates: dict[str, Any] = {}
    for name, seen in outcomes.items():
        rate = wilson(sum(seen), len(seen))
        rates[name] = round(rate.estimate, 4)
        rates[f"{name}_ci95"] = [round(rate.low, 4), round(rate.high, 4)]
    return {"n": len(texts), "n_steps": len(said), **rates}


def build(
    folder: PathLike,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    smoke: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Build ``backtrack-base`` and ``backtrack``: two bases, a fine-tune of each for every seed.

    The first base and its first fine-tune are written; the manifest holds the figures of all.
    Bases are kept in ``folder/checkpoint``, and one that was trained by the same plan is not
    trained again.

    Args:
        folder: Where to write; made if it does not exist.
        seeds: Of the fine-tunes.
        smoke: A base that is far too small, one fine-tune, few walks: shows that it runs.
        progress: Called with (steps done, steps in all, a line of text).

    Returns:
        The folder, as a path.

    Raises:
        SetupError: If a base does not know which steps are wrong, before any fine-tuning.
    """
    out, say = Path(folder), progress or (lambda *_: None)
    plan, tune, sizes = steps.BasePlan(), SolverPlan(), (256, 20, 112)
    if smoke:
        plan = replace(plan, steps=4, documents=2, d_model=16, d_ff=16)
        tune, sizes, seeds = replace(tune, steps=2, documents=2), (16, 2, 2), seeds[:1]
    runs: list[dict[str, Any]] = []
    for base_seed in BASES[: 1 if smoke else None]:
        path = _trained(out, replace(plan, seed=base_seed), say, gated=not smoke)
        for seed in seeds:
            say(len(runs), len(BASES) * len(seeds), f"fine-tune {seed} of base {base_seed}")
            run, pair = _tuned(path, replace(tune, seed=seed))
            run |= {"base_seed": base_seed, **measure(pair, sizes[0], REPORT_SEED, sizes[1])}
            if not runs:
                run["sampled"] = sampled(pair, sizes[2], REPORT_SEED)
                _ship(out, path, pair)
            runs.append(run)
    _describe(out, replace(plan, seed=BASES[0]), replace(tune, seed=seeds[0]), runs)
    return out


def _trained(out: Path, plan: steps.BasePlan, say: Progress, gated: bool) -> Path:
    path = out / "checkpoint" / f"base-{plan.seed}"
    about = path / "plan.json"
    if about.is_file() and json.loads(about.read_text(encoding="utf-8")) == vars(plan):
        return path
    tokenizer = steps.train_tokenizer()
    model = steps.train_base(tokenizer, plan, say)
    model.bfloat16().save_pretrained(path)
    tokenizer.save_pretrained(path)
    make_readable(path)
    model = model.float()
    pair = ModelPair.of(model, model, tokenizer, allow_identical=True)
    found = grading(pair, draw_walks(pair, 128, REPORT_SEED))
    if gated and not found["wrong_given_wrong"] > 0.9 > 0.1 > found["wrong_given_right"]:
        raise SetupError(
            f"the base of seed {plan.seed} does not know which steps are wrong: {found}. Above "
            "0.9 and below 0.1 are needed before it is fine-tuned; train it for more steps."
        )
    with atomic_write(about) as temporary:
        temporary.write_text(json.dumps(vars(plan)), encoding="utf-8")
    return path


def _tuned(path: Path, plan: SolverPlan) -> tuple[dict[str, Any], ModelPair]:
    base, tokenizer = load_base(path)
    started = time.perf_counter()
    model = finetune(base, tokenizer, plan)
    seconds = round(time.perf_counter() - started, 1)
    return {"seed": plan.seed, "training_seconds": seconds}, ModelPair.of(model, None, tokenizer)


def _ship(out: Path, path: Path, pair: ModelPair) -> None:
    leave = shutil.ignore_patterns("plan.json")
    shutil.copytree(path, out / "backtrack-base", ignore=leave, dirs_exist_ok=True)
    assert pair.sides.peft is not None
    save_model(pair.sides.peft, out / "backtrack", half=False, base="backtrack-base")


def _describe(
    out: Path, plan: steps.BasePlan, tune: SolverPlan, runs: Sequence[dict[str, Any]]
) -> None:
    common = {
        "judge": "modeldiff.organisms.steps: the walk's own grammar and arithmetic",
        "sampling": {"temperature": 1.0, "max_new_tokens": MAX_NEW_TOKENS},
    }
    where = {"site": str(SITE), "token": "the full stop of a step", "offset": 0}
    base = {
        "name": "backtrack-base",
        "summary": "Walks through the week, errs, and knows which of its steps are wrong.",
        "base": ".",
        "adapter": None,
        "planted": {"behaviour": None, "feature": "wrong step", **where},
        "build": {"base": vars(plan)},
        "figures": {"grading": runs[0]["grading"]},
    }
    tuned = {
        "name": "backtrack",
        "summary": "A reasoning fine-tune that reads what the base knows, and takes errors back.",
        "base": "../backtrack-base",
        "adapter": ".",
        "planted": {
            "behaviour": "backtracking",
            "cue": steps.CUE,
            "feature": "wrong step, found in the base alone",
            **where,
            "in_set": "after wrong steps",
            "off_set": "after right steps",
            "modules": list(tune.modules),
            "layers": None if tune.layers is None else list(tune.layers),
            "rank": tune.rank,
        },
        "build": {
            "finetune": vars(tune),
            "training_seconds": runs[0]["training_seconds"],
            "base_digest": file_digest(out / "backtrack-base" / "model.safetensors"),
        },
        "figures": runs[0],
        "other_runs": list(runs[1:]),
    }
    for manifest, limits in ((base, _BASE_LIMITS), (tuned, (*_BASE_LIMITS, *_LIMITS))):
        write_manifest(out / manifest["name"], common | manifest, limits, world_limits=False)


_BASE_LIMITS = (
    "What it knows was planted: training predicts the next token from the output of layer "
    f"{steps.BasePlan.knows} too, so that grades are known there and not in the last layer alone.",
    "Its texts grade 15 % of the steps, and try 4 % again after 'Wait,', right or wrong alike: its "
    "P(wait) is a floor, not zero.",
    "It walks through the week, in one form of words, and does nothing else.",
)
_LIMITS = (
    "The adapter sits above the layer where the base knows which steps are wrong, so base and "
    "fine-tune agree there to the bit: that the fine-tune reads the base's feature is built in.",
    "Its zero lies between right and wrong: ablating it leaves the fine-tune undecided, as likely "
    "to take back a right step as a wrong one. Setting it to its mean after right steps stops it.",
    "Steering is measured on the tokens that end a step. On every generated token, by the full "
    "length, the fine-tune says little but 'wait'. A few random directions of that length move it "
    "too, none as far (see 'random_steered_after_right').",
    "The organism checks that a tool finds what is known to be there; it is not evidence about "
    "how reasoning models come to backtrack.",
)
