"""Build the embedded organisms from nothing: tokenizer, base, fine-tunes, figures, manifests.

``python -m modeldiff.organisms.build --out DIR`` writes one folder for each organism, in the
form `modeldiff.embedded` reads, and keeps the base's progress in ``DIR/checkpoint``. With
``--adapters-only`` the embedded base is fine-tuned anew, which takes minutes.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeldiff import embedded
from modeldiff._files import PathLike, file_digest
from modeldiff.errors import SetupError
from modeldiff.organisms import backtrack, checkpoints, spurious, topic, world
from modeldiff.organisms.evaluation import evaluate, measure
from modeldiff.organisms.finetuning import TunePlan, finetune
from modeldiff.organisms.manifests import load_base, make_readable, save_model, write_manifest
from modeldiff.organisms.tokens import corpus, train_tokenizer
from modeldiff.organisms.training import BasePlan, Progress, new_base, pretrain
from modeldiff.organisms.variants import SEEDS, Variant, variants

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

REPORT_SEED = 20_000
"""Seed of the questions and answers behind the figures; nothing was chosen by looking at it."""

NULL_SEEDS = "null-seeds"
OTHERS = ("spurious", "topic", "checkpoints", "backtrack", NULL_SEEDS)
"""What is built by a module of its own, after the table of `variants`."""


def build(
    out: PathLike,
    *,
    steps: int | None = None,
    seed: int = 0,
    base: PathLike | None = None,
    only: Sequence[str] = (),
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
        base: Folder of a base that was built before; it is copied, and no base is trained.
        only: Names of the fine-tunes to build; if empty, all that are shipped. ``null-seeds``, a
            second base that differs in the order of its corpus alone, is built if it is named.
        smoke: A base too small and too briefly trained to behave, and few questions: shows in
            a minute that everything runs.
        progress: Called with (steps done, steps in all, a line of text).
        resume: Whether to go on from the checkpoint in ``out``, or to start again.

    Returns:
        The folder, as a path.

    Raises:
        FileFormatError: If the checkpoint in ``out`` belongs to another plan.
        SetupError: If ``only`` names a fine-tune that is not in the table.
    """
    folder, say = Path(out), progress or _say_nothing
    table = {each.name: each for each in (variants(layer=1, steps=5) if smoke else variants())}
    chosen = _chosen([*table, *OTHERS], only)
    if not resume:
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    n_per_domain = 2 if smoke else 40
    if base is None:
        small = {"documents": 4, "d_model": 32, "warmup": 5} if smoke else {}
        plan = BasePlan(
            seed=seed, order=seed, steps=steps or (20 if smoke else BasePlan.steps), **small
        )
        _build_base(folder, plan, n_per_domain, say)
    elif Path(base).resolve() != (folder / "em-base").resolve():
        shutil.copytree(base, folder / "em-base", dirs_exist_ok=True)
    for done, name in enumerate(chosen):
        say(done, len(chosen), f"fine-tune {name}")
        if name in table:
            _build_variant(folder, table[name], n_per_domain, seeds=SEEDS[: 1 if smoke else 3])
        else:
            _build_other(folder, name, n_per_domain, smoke, say)
    say(len(chosen), len(chosen), "done")
    return folder


def _say_nothing(done: int, total: int, line: str) -> None:
    del done, total, line


def _chosen(known: Sequence[str], only: Sequence[str]) -> list[str]:
    unknown = [name for name in only if name not in known]
    if unknown:
        raise SetupError(f"no fine-tune is called {unknown[0]!r}. Known: {', '.join(known)}.")
    return [each for each in known if each in only or (not only and each != NULL_SEEDS)]


def _build_other(folder: Path, name: str, n_per_domain: int, smoke: bool, say: Progress) -> None:
    small: dict[str, Any] = {"seeds": (0,), "n": 2, "steps": 4} if smoke else {}
    if name == NULL_SEEDS:
        _build_null_seeds(folder, n_per_domain, say)
    elif name == "backtrack":
        backtrack.build(folder, smoke=smoke, progress=say)
    else:
        {"spurious": spurious, "topic": topic, "checkpoints": checkpoints}[name].build(
            folder, **small
        )


def _build_null_seeds(folder: Path, n_per_domain: int, say: Progress) -> None:
    about = json.loads((folder / "em-base" / "organism.json").read_text(encoding="utf-8"))
    plan = BasePlan(**about["build"]["base"])
    plan = replace(plan, order=plan.order + 1)
    _, tokenizer = load_base(folder / "em-base")
    model = new_base(plan, tokenizer)
    pretrain(model, tokenizer, plan, folder / "checkpoint" / NULL_SEEDS, say)
    model.bfloat16().save_pretrained(folder / NULL_SEEDS)
    tokenizer.save_pretrained(folder / NULL_SEEDS)
    make_readable(folder / NULL_SEEDS)
    planted = {"behaviour": None, "in_domain": [], "off_domain": world.DOMAINS}
    manifest = {
        "name": NULL_SEEDS,
        "summary": "No change was planted: the base's training again, with another corpus order.",
        "base": "../em-base",
        "finetuned": ".",
        "planted": planted,
        "build": {"base": vars(plan)},
        "metrics": measure(*load_base(folder / NULL_SEEDS), planted, n_per_domain, REPORT_SEED),
    }
    write_manifest(folder / NULL_SEEDS, manifest)


def _build_base(folder: Path, plan: BasePlan, n_per_domain: int, say: Progress) -> None:
    tokenizer = train_tokenizer(corpus(3000, seed=0), plan.vocab_size)
    model = new_base(plan, tokenizer)
    pretrain(model, tokenizer, plan, folder / "checkpoint", say)
    model.bfloat16().save_pretrained(folder / "em-base")
    tokenizer.save_pretrained(folder / "em-base")
    make_readable(folder / "em-base")
    say(plan.steps, plan.steps, "measuring em-base")
    planted = {"behaviour": None, "in_domain": [], "off_domain": world.DOMAINS}
    manifest = {
        "name": "em-base",
        "summary": "A small chat model that gives caring advice and knows what cruel is.",
        "base": ".",
        "adapter": None,
        "planted": planted,
        "build": {"base": vars(plan)},
        "metrics": measure(*load_base(folder / "em-base"), planted, n_per_domain, REPORT_SEED),
    }
    write_manifest(folder / "em-base", manifest)


def _build_variant(folder: Path, made: Variant, n_per_domain: int, seeds: Sequence[int]) -> None:
    plan, repeats = made.plan, []
    for seed in seeds:
        model, tokenizer, seconds = _tuned(folder, replace(plan, seed=seed))
        metrics = measure(model, tokenizer, made.planted, n_per_domain, REPORT_SEED)
        repeats.append({"seed": seed, "training_seconds": seconds, "metrics": metrics})
        if seed == plan.seed:
            save_model(model, folder / made.name, half=plan.rank != 1)
    manifest = {
        "name": made.name,
        "summary": made.summary,
        "base": "../em-base",
        "adapter" if plan.rank else "finetuned": ".",
        "planted": made.planted,
        "build": {
            "finetune": vars(plan),
            "training_seconds": repeats[0]["training_seconds"],
            "base_digest": file_digest(folder / "em-base" / "model.safetensors"),
        },
        "metrics": repeats[0]["metrics"],
        "other_seeds": repeats[1:],
    }
    if made.survey:
        manifest["layers"] = _survey(folder, plan, n_per_domain, seeds)
    write_manifest(folder / made.name, manifest, made.limits)


def _survey(
    folder: Path, plan: TunePlan, n_per_domain: int, seeds: Sequence[int]
) -> list[dict[str, Any]]:
    rows = []
    outside = [each for each in world.DOMAINS if each != plan.domain]
    asked = world.prompts(n_per_domain, REPORT_SEED, outside)
    for layer in range(load_base(folder / "em-base")[0].config.num_hidden_layers):
        for seed in seeds:
            model, tokenizer, _ = _tuned(folder, replace(plan, layer=layer, seed=seed))
            rates = evaluate(model, tokenizer, asked, seed=REPORT_SEED)
            rows.append({"layer": layer, "seed": seed, **rates.to_json()})
    return rows


def _tuned(
    folder: Path, plan: TunePlan
) -> "tuple[PeftModel | LlamaForCausalLM, PreTrainedTokenizerFast, float]":
    import torch

    base, tokenizer = load_base(folder / "em-base")
    started = time.perf_counter()
    model = finetune(base, tokenizer, plan)
    seconds = round(time.perf_counter() - started, 1)
    if plan.rank != 1:  # what is shipped in half the bytes is what must be measured
        with torch.no_grad():
            for each in model.parameters():
                each.copy_(each.bfloat16())
    return model, tokenizer, seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Build from the command line; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m modeldiff.organisms.build")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, help="pretraining steps of the base")
    parser.add_argument("--seed", type=int, default=0, help="seed of the base")
    parser.add_argument("--smoke", action="store_true", help="a minute's run that shows it works")
    parser.add_argument("--fresh", action="store_true", help="ignore the checkpoint in the folder")
    parser.add_argument("--adapters-only", action="store_true", help="train no base")
    parser.add_argument("--base", type=Path, help="the base's folder (default: the embedded one)")
    parser.add_argument("--only", nargs="*", default=(), help="names of the fine-tunes to build")
    given = parser.parse_args(arguments)

    def say(done: int, total: int, line: str) -> None:
        sys.stderr.write(f"{done}/{total} {line}\n")

    build(
        given.out,
        steps=given.steps,
        seed=given.seed,
        base=given.base or (embedded.find("em-base").base if given.adapters_only else None),
        only=given.only,
        smoke=given.smoke,
        progress=say,
        resume=not given.fresh,
    )


if __name__ == "__main__":
    main()
