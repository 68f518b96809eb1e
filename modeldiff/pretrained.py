"""Models, tokenizers and adapters read from files: each exactly what the files hold."""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from modeldiff._files import PathLike
from modeldiff.errors import MismatchError, SetupError
from modeldiff.loading import check_adapter, raise_all
from modeldiff.placement import land_adapter, lost_tensors

if TYPE_CHECKING:
    from peft import PeftModel

MERGE = (
    "Merge it (model.merge_and_unload()) and load the merged model as finetuned=; the pair then "
    "holds two copies."
)
"""What to do with an adapter that cannot be switched."""
_WEIGHTS = "adapter_model.safetensors"
_PEFT_NAMES = {"weight", "base_layer", "lora_A", "lora_B", "embedding_A", "embedding_B"}


def tokenizer_from(path: Any, revision: str | None, subfolder: str, fallback: Any = None) -> Any:
    """Load a tokenizer, or take another where there is none.

    Raises:
        SetupError: If there is none, and no other.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, subfolder=subfolder)
    except (OSError, ValueError) as error:
        if fallback is None:
            raise SetupError(f"no tokenizer could be loaded from {str(path)!r}: {error}") from error
        return fallback  # fine-tunes are often published without one: the base's is meant


def model_from(path: Any, revision: str | None, subfolder: str, options: dict[str, Any]) -> Any:
    """Load a whole causal language model from safetensors files, frozen and in eval mode.

    Raises:
        SetupError: If nothing loadable is there, or a tensor of the model is missing or has
            another size: it would be made up at random.
        MismatchError: If it is an adapter.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, subfolder=subfolder, use_safetensors=True,
            output_loading_info=True, ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise SetupError(f"no model could be loaded from {str(path)!r}: {error}") from error
    model, found = loaded
    if getattr(model, "_hf_peft_config_loaded", False):
        raise MismatchError(
            f"{str(path)!r} is an adapter, and a whole model is needed here: pass it as adapter=."
        )
    differ = [key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]]
    if missing := sorted({*found["missing_keys"], *differ}):
        raise SetupError(
            f"{str(path)!r} lacks {len(missing)} tensors of a {type(model).__name__} of its "
            f"config.json, or has them in another size, e.g. {missing[0]}: they would be random. "
            "Download or save it again."
        )
    return model.eval().requires_grad_(False)


def advice(base: Any, finetuned: Any) -> str:
    """What to do about two models that are not a pair."""
    old, new = (getattr(each.config.get_text_config(), "vocab_size", 0) for each in
                (base, finetuned))  # fmt: skip
    if new <= old:
        return "Is it the right base?"
    return (
        f"Is it the right base? If the fine-tune only added {new - old} tokens (one to pad with, "
        f"say), save a copy of it after model.resize_token_embeddings({old}), with the base's "
        "tokenizer."
    )


def check_whole(*models: nn.Module) -> None:
    """Verify that models have no adapter inside them.

    Raises:
        MismatchError: If one has.
    """
    for model in models:
        inside = next((name for name, _ in model.named_parameters() if ".lora_" in name), "")
        if inside:
            raise MismatchError(
                f"a {type(model).__name__} of this pair has an adapter inside it ({inside}), and "
                "two whole models are needed here. Pass the PeftModel alone, as of(peft_model, "
                "None, tokenizer), or merge it (peft_model.merge_and_unload())."
            )


def check_tensors(names: Iterable[str]) -> list[str]:
    """List what an adapter's file holds beside the matrices of LoRA."""
    whole = sorted(name for name in names if ".lora_" not in name)
    if not whole:
        return []
    return [
        f"its file holds {len(whole)} whole tensors, e.g. {whole[0]}, as PEFT writes them where "
        "embeddings or the unembedding are adapted or have new tokens"
    ]


def check_names(names: Iterable[str], root: nn.Module) -> list[str]:
    """List names of adapters that PEFT could not tell from parts of a model's paths."""
    several = list(names)
    inside = {part for path, _ in root.named_modules() for part in path.split(".")}
    taken = _PEFT_NAMES | (inside if len(several) > 1 else {""})
    wrong = [name for name in several if name in taken or "." in name]
    return [f"{name!r} is empty, has a dot or is the name of a module" for name in wrong]


def adapted(
    root: Any, adapters: Mapping[str, PathLike], revision: str | None, subfolder: str
) -> "PeftModel":
    """Put adapters on a model; each file must hold exactly the adapter's tensors.

    Raises:
        MismatchError: If an adapter does not fit or cannot be switched, or its name is taken.
        SetupError: If there is no adapter.
    """
    from peft import PeftModel
    from peft.utils.error import NoMatchingPeftModuleError

    if not adapters:
        raise MismatchError("adapter={}: there is no adapter in it; give {name: path}.")
    raise_all(check_names(adapters, root), "names of adapters", "Take other names.")
    peft = None
    for name, path in adapters.items():
        settings = _settings(path, revision, subfolder)
        raise_all(check_adapter(settings), f"adapter {path}", MERGE)
        weights = _weights(path, revision, subfolder)
        raise_all(check_tensors(weights), f"adapter {path}", MERGE)
        try:
            with warnings.catch_warnings():  # peft 0.21 reads a name that transformers renamed
                warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
                if peft is None:
                    peft = PeftModel(root, settings, adapter_name=name)
                else:
                    peft.add_adapter(name, settings)
        except NoMatchingPeftModuleError as error:
            raise MismatchError(
                f"adapter {path} does not fit the base: {error} Is it the right base?"
            ) from error
        _land(peft, name, weights, path)
    assert peft is not None
    return peft.eval().requires_grad_(False)


def _settings(path: PathLike, revision: str | None, subfolder: str) -> Any:
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(str(path), revision=revision, subfolder=subfolder or None)
    except ValueError as error:
        raise SetupError(
            f"no adapter could be loaded from {str(path)!r}: {error}. A whole fine-tuned model is "
            "passed as finetuned=."
        ) from error


def _weights(path: PathLike, revision: str | None, subfolder: str) -> Any:
    from huggingface_hub import hf_hub_download
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    local = Path(path) / subfolder / _WEIGHTS
    if not Path(path).is_dir():
        inside = subfolder or None
        local = Path(hf_hub_download(str(path), _WEIGHTS, revision=revision, subfolder=inside))
    if not local.is_file():
        raise MismatchError(
            f"{Path(path) / subfolder} has no {_WEIGHTS}. Adapters are read from safetensors only, "
            "never from pickles: load it with peft once and save it again."
        )
    try:
        return load_file(local)
    except SafetensorError as error:
        raise SetupError(f"{local}: {error}. Download or save it again.") from error


def _land(peft: "PeftModel", name: str, weights: dict[str, Any], path: PathLike) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    wanted = get_peft_model_state_dict(peft, adapter_name=name, save_embedding_layers=False)
    sizes = {k: (list(weights[k].shape), list(v.shape)) for k, v in wanted.items() if k in weights}
    differ = [f"{k} is {a} and must be {b}" for k, (a, b) in sorted(sizes.items()) if a != b]
    missing, foreign = sorted(wanted.keys() - weights), sorted(weights.keys() - wanted)
    problems = [f"{len(keys)} tensors {what}, e.g. {keys[0]}" for keys, what in
                ((missing, "are missing"), (foreign, "have no place in the model"),
                 (differ, "have another size")) if keys]  # fmt: skip
    raise_all(problems, f"adapter {path} does not fit the base", "Is it the right base?")
    land_adapter(peft, name)
    set_peft_model_state_dict(peft, weights, adapter_name=name)
    lost = [f"{each} has no place on any device" for each in lost_tensors(peft, name)]
    raise_all(lost[:5], f"adapter {path}", "Give a device_map that keeps its layers off the disk.")


def adapter_problems(peft: Any, name: str) -> list[str]:
    """List why an adapter of a ``PeftModel`` cannot be switched."""
    if name not in peft.peft_config:
        return [f"not loaded; the model has {list(peft.peft_config)}"]
    merged = any(getattr(module, "merged", False) for module in peft.modules())
    problems = check_adapter(peft.peft_config[name])
    return [*problems, "the adapter is merged into the weights"] if merged else problems
