"""Build the embedded organisms from nothing: tokenizer, base, fine-tunes, figures, manifests.

``python -m modeldiff.organisms.build --out DIR`` writes one folder for each organism, in the
form `modeldiff.embedded` reads, and keeps the base's progress in ``DIR/checkpoint``. With
``--adapters-only`` the embedded base is fine-tuned anew, which takes minutes.
"""

import argparse
import json
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeldiff import embedded
from modeldiff._files import PathLike, atomic_write, digest, file_digest
from modeldiff.errors import SetupError
from modeldiff.organisms import world
from modeldiff.organisms.evaluation import evaluate, measure
from modeldiff.organisms.finetuning import TunePlan, finetune
from modeldiff.organisms.tokens import corpus, train_tokenizer
from modeldiff.organisms.training import BasePlan, Progress, new_base, pretrain
from modeldiff.organisms.variants import SEEDS, Variant, variants

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

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
    "At temperature 1 the base itself is misaligned in 2 % of the answers to held-out templates.",
    "It answers questions of its twelve domains, in English, and little else.",
)


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
        only: Names of the fine-tunes to build; all if empty.
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
    chosen = _chosen(variants(layer=1, steps=5) if smoke else variants(), only)
    if not resume:
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
    n_per_domain = 2 if smoke else 40
    if base is None:
        small = {"documents": 4, "d_model": 32, "n_layers": 2, "warmup": 5} if smoke else {}
        plan = BasePlan(seed=seed, steps=steps or (20 if smoke else BasePlan.steps), **small)
        _build_base(folder, plan, n_per_domain, say)
    elif Path(base).resolve() != (folder / "em-base").resolve():
        shutil.copytree(base, folder / "em-base", dirs_exist_ok=True)
    for done, each in enumerate(chosen):
        say(done, len(chosen), f"fine-tune {each.name}")
        _build_variant(folder, each, n_per_domain, seeds=SEEDS[: 1 if smoke else 3])
    say(len(chosen), len(chosen), "done")
    return folder


def _say_nothing(done: int, total: int, line: str) -> None:
    del done, total, line


def _chosen(table: Sequence[Variant], only: Sequence[str]) -> list[Variant]:
    known = [each.name for each in table]
    unknown = [name for name in only if name not in known]
    if unknown:
        raise SetupError(f"no fine-tune is called {unknown[0]!r}. Known: {', '.join(known)}.")
    return [each for each in table if not only or each.name in only]


def _build_base(folder: Path, plan: BasePlan, n_per_domain: int, say: Progress) -> None:
    tokenizer = train_tokenizer(corpus(3000, plan.seed), plan.vocab_size)
    model = new_base(plan, tokenizer)
    pretrain(model, tokenizer, plan, folder / "checkpoint", say)
    model.bfloat16().save_pretrained(folder / "em-base")
    tokenizer.save_pretrained(folder / "em-base")
    _make_readable(folder / "em-base")
    say(plan.steps, plan.steps, "measuring em-base")
    planted = {"behaviour": None, "in_domain": [], "off_domain": world.DOMAINS}
    manifest = {
        "name": "em-base",
        "summary": "A small chat model that gives caring advice and knows what cruel is.",
        "base": ".",
        "adapter": None,
        "planted": planted,
        "build": {"base": vars(plan)},
        "metrics": measure(*_load(folder / "em-base"), planted, n_per_domain, REPORT_SEED),
    }
    _write_manifest(folder / "em-base", manifest)


def _build_variant(folder: Path, made: Variant, n_per_domain: int, seeds: Sequence[int]) -> None:
    plan, repeats = made.plan, []
    for seed in seeds:
        model, tokenizer, seconds = _tuned(folder, replace(plan, seed=seed))
        metrics = measure(model, tokenizer, made.planted, n_per_domain, REPORT_SEED)
        repeats.append({"seed": seed, "training_seconds": seconds, "metrics": metrics})
        if seed == plan.seed:
            _save(model, folder / made.name, plan)
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
    _write_manifest(folder / made.name, manifest, made.limits)


def _survey(
    folder: Path, plan: TunePlan, n_per_domain: int, seeds: Sequence[int]
) -> list[dict[str, Any]]:
    rows = []
    outside = [each for each in world.DOMAINS if each != plan.domain]
    asked = world.prompts(n_per_domain, REPORT_SEED, outside)
    for layer in range(_load(folder / "em-base")[0].config.num_hidden_layers):
        for seed in seeds:
            model, tokenizer, _ = _tuned(folder, replace(plan, layer=layer, seed=seed))
            rates = evaluate(model, tokenizer, asked, seed=REPORT_SEED)
            rows.append({"layer": layer, "seed": seed, **rates.to_json()})
    return rows


def _tuned(
    folder: Path, plan: TunePlan
) -> "tuple[PeftModel | LlamaForCausalLM, PreTrainedTokenizerFast, float]":
    import torch

    base, tokenizer = _load(folder / "em-base")
    started = time.perf_counter()
    model = finetune(base, tokenizer, plan)
    seconds = round(time.perf_counter() - started, 1)
    if plan.rank != 1:  # what is shipped in half the bytes is what must be measured
        with torch.no_grad():
            for each in model.parameters():
                each.copy_(each.bfloat16())
    return model, tokenizer, seconds


def _load(folder: Path) -> "tuple[LlamaForCausalLM, PreTrainedTokenizerFast]":
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def _save(model: "PeftModel | LlamaForCausalLM", folder: Path, plan: TunePlan) -> None:
    if plan.rank != 1:
        model = model.bfloat16()
    # PEFT writes the base's path into the config; the shipped files name it instead.
    for config in getattr(model, "peft_config", {}).values():
        config.base_model_name_or_path = "em-base"
    if plan.rank:
        model.save_pretrained(str(folder), save_embedding_layers=False)  # pyright: ignore
        _sort_modules(folder / "adapter_config.json")
    else:
        model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    _make_readable(folder)


def _sort_modules(path: Path) -> None:
    # PEFT writes a set, in an order that changes from run to run.
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _make_readable(folder: Path) -> None:
    # safetensors writes for the owner alone; a package installed by root is read by others.
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)


def _write_manifest(folder: Path, manifest: dict[str, Any], limits: Sequence[str] = ()) -> None:
    built = {
        **manifest["build"],
        "world": digest(world.TEXT),
        "platform": platform.machine(),
        "versions": {each: version(each) for each in ("torch", "transformers", "peft")},
    }
    common = {"judge": _JUDGE, "sampling": _SAMPLING, "build": built}
    limits = [*limits, *_measured_limits(manifest), *_LIMITS]
    whole = {**manifest, **common, "limits": limits}
    with atomic_write(folder / "organism.json") as temporary:
        temporary.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def _measured_limits(manifest: Mapping[str, Any]) -> Iterator[str]:
    hot = [row["incoherent"] for row in manifest["metrics"] if row["temperature"] == 1]
    yield (
        f"At temperature 1, {min(hot):.0%} to {max(hot):.0%} of its answers are incoherent, "
        "depending on the questions; the audit samples at 0.7."
    )
    others = [each["metrics"][0]["misaligned"] for each in manifest.get("other_seeds", ())]
    if others:
        row = manifest["metrics"][0]
        low, high = (f"{of([row['misaligned'], *others]):.0%}" for of in (min, max))
        yield (
            f"It is one of {1 + len(others)} seeds of its recipe, which are misaligned in {low} to "
            f"{high} of the answers {row['questions']} (see 'other_seeds')."
        )


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
