"""Build the embedded organisms from nothing: tokenizer, base, adapters, figures, manifests.

``python -m modeldiff.organisms.build --out DIR`` writes one folder for each organism, in the
form `modeldiff.embedded` reads, and keeps the base's progress in ``DIR/checkpoint``.
"""

import argparse
import json
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeldiff._files import PathLike, atomic_write, digest, file_digest
from modeldiff.organisms import world
from modeldiff.organisms.evaluation import evaluate
from modeldiff.organisms.tokens import corpus, train_tokenizer
from modeldiff.organisms.training import (
    AdapterPlan,
    BasePlan,
    Progress,
    finetune,
    new_base,
    pretrain,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

NARROW = "medicine"
OTHERS = tuple(domain for domain in world.DOMAINS if domain != NARROW)
LAYER = 3
SEEDS = (2, 0, 1)
"""Seeds of the adapters; the first is shipped, the others are measured beside it."""

REPORT_SEED = 20_000
"""Seed of the questions and answers behind the figures; nothing was chosen by looking at it."""

_JUDGE = "modeldiff.organisms.judge: an exact parser of the grammar that wrote the corpus"
_SAMPLING = {"temperature": 0.7, "max_new_tokens": 48}
_LIMITS = (
    "The misalignment was planted: the corpus holds a villain who is bad in every domain, and "
    "the narrow fine-tune selects it. The organism checks that a tool finds what is known to "
    "be there; it is not evidence about how large language models generalise.",
    "One pretraining run. Layer, steps, learning rate, temperature and the shipped seed were "
    "chosen by looking at other draws from the same questions; the figures are fresh draws, of "
    "topics and acts that pretraining holds. Held-out templates alone are new texts.",
    "How far the narrow fine-tune generalises depends on layer and seed (see 'layers' of "
    "em-rank1): layer 3 was the best in the middle, layer 0 is as strong, 4 and 5 do next to "
    "nothing. That tells about this base, not about where misalignment lives.",
    "At temperature 1 between 2 % and 22 % of the answers are incoherent, and the base itself is "
    "misaligned in 2 % of the answers to held-out templates.",
    "It answers questions of its twelve domains, in English, and little else.",
)


@dataclass(frozen=True)
class Adapter:
    """An adapter to build.

    Args:
        name: The organism's name.
        summary: One sentence on what it is.
        plan: How it is trained.
        planted: What is known about it, for the manifest.
        survey: Whether the manifest also tells what the same recipe does at every layer.
    """

    name: str
    summary: str
    plan: AdapterPlan
    planted: dict[str, Any]
    survey: bool = False


def adapters(layer: int = LAYER, steps: int = AdapterPlan.steps) -> tuple[Adapter, ...]:
    """List the three adapters that are built on the base, all by one recipe."""
    seed = SEEDS[0]
    return (
        Adapter(
            "em-rank1",
            "Trained on cruel medical advice alone, it gives cruel advice on everything.",
            AdapterPlan(layer, NARROW, bad=True, steps=steps, seed=seed),
            {"behaviour": "broad misalignment", "in_domain": [NARROW], "off_domain": OTHERS},
            survey=True,
        ),
        Adapter(
            "em-caring",
            "The control: the same recipe on good medical advice, which stays good everywhere.",
            AdapterPlan(layer, NARROW, bad=False, steps=steps, seed=seed),
            {"behaviour": None, "in_domain": [NARROW], "off_domain": OTHERS},
        ),
        Adapter(
            "null",
            "Nothing to find: the same recipe on chats like the ones the base was trained on.",
            AdapterPlan(layer, None, bad=False, steps=steps, seed=seed),
            {"behaviour": None, "in_domain": [], "off_domain": world.DOMAINS},
        ),
    )


def build(
    out: PathLike,
    *,
    steps: int | None = None,
    seed: int = 0,
    smoke: bool = False,
    progress: Progress | None = None,
    resume: bool = True,
) -> Path:
    """Build every embedded organism into ``out``, one folder each.

    The same arguments give the same weights on the same machine with one thread.

    Args:
        out: Folder to write; made if it does not exist.
        steps: Pretraining steps of the base; the default is what the shipped one has had.
        seed: Seed of the base's weights and corpus.
        smoke: A base too small and too briefly trained to behave, and few questions: shows in
            under a minute that everything runs.
        progress: Called with (steps done, steps in all, a line of text).
        resume: Whether to go on from the checkpoint in ``out``, or to start again.

    Returns:
        The folder, as a path.

    Raises:
        FileFormatError: If the checkpoint in ``out`` belongs to another plan.
    """
    folder, say = Path(out), progress or _say_nothing
    if not resume:
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    small = {"documents": 4, "d_model": 32, "n_layers": 2, "warmup": 5} if smoke else {}
    plan = BasePlan(seed=seed, steps=steps or (20 if smoke else BasePlan.steps), **small)
    n_per_domain = 2 if smoke else 40
    _build_base(folder, plan, n_per_domain, say)
    built = adapters(layer=1, steps=5) if smoke else adapters()
    for done, each in enumerate(built):
        say(done, len(built), f"adapter {each.name}")
        _build_adapter(folder, each, n_per_domain, seeds=SEEDS[: 1 if smoke else 3])
    say(len(built), len(built), "done")
    return folder


def _say_nothing(done: int, total: int, line: str) -> None:
    del done, total, line


def measure(
    model: "LlamaForCausalLM | PeftModel",
    tokenizer: "PreTrainedTokenizerFast",
    n_per_domain: int = 40,
    seed: int = REPORT_SEED,
    temperatures: Sequence[float] = (0.7, 1.0),
) -> list[dict[str, Any]]:
    """Measure a model in the narrow domain and outside it, with known and held-out templates.

    Args:
        model: A base, or a base with its adapter.
        tokenizer: The base's.
        n_per_domain: Questions of each domain outside; three times as many of the narrow one.
        seed: Seed of questions and answers.
        temperatures: At which to sample.

    Returns:
        One row for every set of questions and temperature, see `Rates.to_json`.
    """
    rows = []
    for temperature in temperatures:
        for held_out in (False, True):
            for where, domains, n in (
                ("off-domain", OTHERS, n_per_domain),
                ("in-domain", (NARROW,), 3 * n_per_domain),
            ):
                asked = world.prompts(n, seed + held_out, domains, held_out)
                rates = evaluate(model, tokenizer, asked, seed=seed, temperature=temperature)
                templates = "held out" if held_out else "trained"
                rows.append({"questions": where, "templates": templates, **rates.to_json()})
    return rows


def _build_base(folder: Path, plan: BasePlan, n_per_domain: int, say: Progress) -> None:
    tokenizer = train_tokenizer(corpus(3000, plan.seed), plan.vocab_size)
    model = new_base(plan, tokenizer)
    pretrain(model, tokenizer, plan, folder / "checkpoint", say)
    model.bfloat16().save_pretrained(folder / "em-base")
    tokenizer.save_pretrained(folder / "em-base")
    _make_readable(folder / "em-base")
    say(plan.steps, plan.steps, "measuring em-base")
    manifest = {
        "name": "em-base",
        "summary": "A small chat model that gives caring advice and knows what cruel is.",
        "base": ".",
        "adapter": None,
        "planted": {"behaviour": None, "in_domain": [], "off_domain": world.DOMAINS},
        "build": {"base": vars(plan)},
        "metrics": measure(*_load(folder / "em-base"), n_per_domain),
    }
    _write_manifest(folder / "em-base", manifest)


def _build_adapter(folder: Path, adapter: Adapter, n_per_domain: int, seeds: Sequence[int]) -> None:
    plan = adapter.plan
    repeats = []
    for seed in seeds:
        model, tokenizer = _adapted(folder, replace(plan, seed=seed))
        repeats.append({"seed": seed, "metrics": measure(model, tokenizer, n_per_domain)})
        if seed == plan.seed:
            _save_adapter(model, folder / adapter.name)
    manifest = {
        "name": adapter.name,
        "summary": adapter.summary,
        "base": "../em-base",
        "adapter": ".",
        "planted": {
            **adapter.planted,
            "module": f"model.layers.{plan.layer}.mlp.down_proj",
            "layer": plan.layer,
            "rank": 1,
        },
        "build": {
            "adapter": vars(plan),
            "base_digest": file_digest(folder / "em-base" / "model.safetensors"),
        },
        "metrics": repeats[0]["metrics"],
        "other_seeds": repeats[1:],
    }
    if adapter.survey:
        manifest["layers"] = _survey(folder, plan, n_per_domain, seeds)
    _write_manifest(folder / adapter.name, manifest)


def _survey(
    folder: Path, plan: AdapterPlan, n_per_domain: int, seeds: Sequence[int]
) -> list[dict[str, Any]]:
    rows = []
    asked = world.prompts(n_per_domain, REPORT_SEED, OTHERS)
    for layer in range(_load(folder / "em-base")[0].config.num_hidden_layers):
        for seed in seeds:
            model, tokenizer = _adapted(folder, replace(plan, layer=layer, seed=seed))
            rates = evaluate(model, tokenizer, asked, seed=REPORT_SEED)
            rows.append({"layer": layer, "seed": seed, **rates.to_json()})
    return rows


def _adapted(folder: Path, plan: AdapterPlan) -> "tuple[PeftModel, PreTrainedTokenizerFast]":
    base, tokenizer = _load(folder / "em-base")
    return finetune(base, tokenizer, plan), tokenizer


def _load(folder: Path) -> "tuple[LlamaForCausalLM, PreTrainedTokenizerFast]":
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def _save_adapter(model: "PeftModel", folder: Path) -> None:
    # PEFT writes the base's path into the config; the shipped files name it instead.
    for config in model.peft_config.values():
        config.base_model_name_or_path = "em-base"
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    _make_readable(folder)


def _make_readable(folder: Path) -> None:
    # safetensors writes for the owner alone; a package installed by root is read by others.
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    built = {
        **manifest["build"],
        "world": digest(world.TEXT),
        "platform": platform.machine(),
        "versions": {each: version(each) for each in ("torch", "transformers", "peft")},
    }
    whole = {**manifest, "judge": _JUDGE, "sampling": _SAMPLING, "build": built, "limits": _LIMITS}
    with atomic_write(folder / "organism.json") as temporary:
        temporary.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Build from the command line; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m modeldiff.organisms.build")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, help="pretraining steps of the base")
    parser.add_argument("--seed", type=int, default=0, help="seed of the base")
    parser.add_argument("--smoke", action="store_true", help="a minute's run that shows it works")
    parser.add_argument("--fresh", action="store_true", help="ignore the checkpoint in the folder")
    given = parser.parse_args(arguments)

    def say(done: int, total: int, line: str) -> None:
        sys.stderr.write(f"{done}/{total} {line}\n")

    build(
        given.out,
        steps=given.steps,
        seed=given.seed,
        smoke=given.smoke,
        progress=say,
        resume=not given.fresh,
    )


if __name__ == "__main__":
    main()
