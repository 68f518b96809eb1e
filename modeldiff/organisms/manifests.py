"""Reading and writing an organism's folder: weights in a form that installs, and its manifest."""

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeldiff._files import atomic_write, digest
from modeldiff.organisms import world

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

_JUDGE = "modeldiff.organisms.judge: an exact parser of the grammar that wrote the corpus"
_SAMPLING = {"temperature": 0.7, "max_new_tokens": 48}
_LIMITS = (
    "The misalignment was planted: the corpus holds a villain who is bad in every domain, and "
    "the narrow fine-tune selects it. The organism checks that a tool finds what is known to "
    "be there; it is not evidence about how large language models generalise.",
    "Layer, steps, learning rate, temperature and the shipped seed were chosen by looking at "
    "other draws from the same questions; the figures are fresh draws. Held-out templates "
    "occur in no training text; held-out topics in no fine-tuning data, but pretraining knows "
    "them.",
    "How far the narrow fine-tune generalises depends on layer, seed and base (see 'layers' of "
    "em-rank1): on this base rank-1 adapters on layers 3 and 0 carry it (76 to 95 %), on 4 and 5 "
    "next to nothing. On bases of two other pretraining seeds the same recipe reaches 74 to 94 % "
    "on layer 0, 8 to 91 % on layer 1 and 3 to 8 % on layer 3. That tells about these bases, not "
    "about where misalignment lives.",
    "It answers questions of its twelve domains, in English, and little else.",
)


def load_base(folder: Path) -> "tuple[LlamaForCausalLM, PreTrainedTokenizerFast]":
    """Load the base of a folder in float32, and its tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def save_model(
    model: "PeftModel | LlamaForCausalLM", folder: Path, *, half: bool, base: str = "em-base"
) -> None:
    """Save an adapter, or a whole model; in bfloat16 if ``half``.

    Args:
        model: What to save.
        folder: Where; made if it does not exist.
        half: Whether to ship half of the bytes.
        base: Name of the base, for an adapter's config.
    """
    if half:
        model = model.bfloat16()
    # PEFT writes the base's path into the config; the shipped files name it instead.
    for config in getattr(model, "peft_config", {}).values():
        config.base_model_name_or_path = base
    if hasattr(model, "peft_config"):
        model.save_pretrained(str(folder), save_embedding_layers=False)  # pyright: ignore
        _sort_modules(folder / "adapter_config.json")
    else:
        model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    make_readable(folder)


def _sort_modules(path: Path) -> None:
    # PEFT writes a set, in an order that changes from run to run.
    config = json.loads(path.read_text(encoding="utf-8"))
    config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def make_readable(folder: Path) -> None:
    """Let others read the weights: safetensors writes for the owner alone."""
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)


def write_manifest(
    folder: Path, manifest: dict[str, Any], limits: Sequence[str] = (), world_limits: bool = True
) -> None:
    """Write ``organism.json`` with what all manifests hold: judge, sampling, versions, limits.

    Args:
        folder: The organism's.
        manifest: Name, summary, base, adapter or finetuned, planted, build and metrics; its own
            ``judge`` and ``sampling`` win over those of the world.
        limits: What holds of this organism alone.
        world_limits: Whether the limits of the organisms of the world hold too.
    """
    built = {
        **manifest["build"],
        "world": digest(world.TEXT),
        "platform": platform.machine(),
        "versions": {each: version(each) for each in ("torch", "transformers", "peft")},
    }
    common = {"judge": _JUDGE, "sampling": _SAMPLING}
    ours = [*_measured_limits(manifest), *_LIMITS] if world_limits else []
    whole = {**common, **manifest, "build": built, "limits": [*limits, *ours]}
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
