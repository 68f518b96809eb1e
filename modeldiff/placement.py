"""Where a model's weights lie, and in what precision: devices, offloading, 8 and 4 bits.

A model larger than one GPU is spread by a device map over GPUs, memory and disk; accelerate brings
offloaded weights when a module runs, so whoever reads a weight must ask `dense_weight`. A quantised
base is smaller and rounded: it runs, and an adapter runs on it, but its weights are codes, on which
no arithmetic of weights means anything.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modeldiff.errors import MismatchError, SetupError

Quantization = Literal["8bit", "4bit"]
DeviceMap = str | torch.device | Mapping[str, Any]


def placement_options(
    device: DeviceMap | None,
    device_map: DeviceMap | None,
    dtype: torch.dtype | None,
    quantization: Quantization | None,
) -> dict[str, Any]:
    """What ``from_pretrained`` is told about devices and precision.

    Args:
        device: A device or a map.
        device_map: The same; one of the two.
        dtype: Of weights that are not quantised.
        quantization: Bits of the base's linear layers.

    Raises:
        MismatchError: If both maps are given, or no such quantization exists.
        SetupError: If bitsandbytes is missing.

    Example:
        >>> placement_options("cpu", None, None, None)
        {'device_map': 'cpu', 'dtype': torch.float32}
    """
    if device is not None and device_map is not None:
        raise MismatchError(
            f"device={device!r} and device_map={device_map!r} say the same thing: give one."
        )
    where = device or device_map or ("cuda" if torch.cuda.is_available() else "cpu")
    if quantization is None:
        return {
            "device_map": where,
            "dtype": dtype or (torch.float32 if _all_here(where) else "auto"),
        }
    dtype = dtype or torch.bfloat16
    found = quantization_config(quantization, dtype)
    return {"device_map": where, "dtype": dtype, "quantization_config": found}


def _all_here(where: DeviceMap) -> bool:
    """Whether nothing lies on an accelerator."""
    if isinstance(where, Mapping):
        return all(str(each) in ("cpu", "disk") for each in where.values())
    automatic = str(where) in ("auto", "balanced", "balanced_low_0", "sequential")
    return str(where) == "cpu" or (automatic and not torch.cuda.is_available())


def quantization_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    """Settings of transformers for a base of 8 or 4 bits, multiplied in ``dtype``.

    8 bits are LLM.int8 (a scale a row, outliers in 16 bits), 4 bits are NF4 with scales that are
    themselves quantised.

    Raises:
        MismatchError: If no such quantization exists.
        SetupError: If bitsandbytes is missing.
    """
    if quantization not in ("8bit", "4bit"):
        raise MismatchError(f"quantization={quantization!r}: it is '8bit', '4bit' or None.")
    if find_spec("bitsandbytes") is None:
        raise SetupError(
            f"quantization={quantization!r} needs bitsandbytes: "
            "pip install 'modeldiff-lab[quant]'. Or load the base in bfloat16, over several "
            "devices with device_map='auto' if it does not fit on one."
        )
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def check_quantization(
    quantization: Quantization | None, *, adapter: bool, remote: bool
) -> list[str]:
    """List why a pair cannot have a quantised base; empty if it can."""
    if quantization is None:
        return []
    problems = []
    if not adapter:
        problems.append(
            "two whole models are each rounded on their own, and the rounding differs by more "
            "than many fine-tunes: give an adapter (weight_extraction.extract_adapter makes one "
            "of a whole fine-tune)"
        )
    if remote:
        problems.append("a server has its own weights")
    return problems


def is_quantized(root: nn.Module) -> bool:
    """Whether a model's weights are codes of few bits."""
    config = getattr(root, "config", None)
    return bool(
        getattr(root, "is_quantized", False)
        or getattr(config, "quantization_config", None)
        or any(type(p).__name__ in ("Int8Params", "Params4bit") for p in root.parameters())
    )


def refuse_quantized(root: nn.Module, what: str) -> None:
    """Verify that weights are numbers on which one can calculate.

    Raises:
        MismatchError: If they are quantised.
    """
    if is_quantized(root):
        raise MismatchError(
            f"{what} works on the weights themselves, and those of this model are quantised: "
            "codes whose rounding is larger than what is looked for. Load it without "
            "quantization= (on the CPU, or with device_map='auto', if it is too large), or give "
            "the folders of the original files where they can be streamed."
        )


def is_offloaded(module: nn.Module) -> bool:
    """Whether a module's own weights come from memory or disk each time it runs."""
    return bool(getattr(getattr(module, "_hf_hook", None), "offload", False))


@contextmanager
def brought(module: nn.Module) -> Iterator[None]:
    """Bring a module's own offloaded weights inside the block; without effect on others."""
    if not is_offloaded(module):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


@torch.no_grad()
def dense_weight(module: nn.Module) -> Tensor:
    """A module's weight as numbers: brought if it is offloaded, decoded if it is quantised."""
    with brought(module):
        if type(module.weight).__name__ in ("Int8Params", "Params4bit"):
            from peft.utils.integrations import dequantize_module_weight

            kept = module.weight
            try:
                return dequantize_module_weight(module).detach()
            finally:
                module.weight = kept  # on a CPU peft puts a copy there that has lost its scales
        return module.weight.detach()  # pyright: ignore[reportReturnType, reportCallIssue]


def real_values(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The state dict's tensors by name, sorted; offloaded ones are brought one module at a time."""
    for name, tensor in sorted(root.state_dict().items()):
        if not tensor.is_meta:
            yield name, tensor
            continue
        path, _, own = name.rpartition(".")
        module = root.get_submodule(path)
        with brought(module):
            yield name, getattr(module, own).detach()


def land_adapter(peft: nn.Module, name: str) -> None:
    """Give an adapter on offloaded layers room on the device where these run.

    PEFT makes its tensors where the base's weights are, which for offloaded ones is nowhere:
    whatever is then loaded into them is lost without a word.

    Args:
        peft: PEFT's wrapper, with the adapter added and not yet loaded.
        name: Of the adapter.
    """
    for module in peft.modules():
        base = getattr(module, "base_layer", None)
        if base is None or not is_offloaded(base):
            continue
        for part in ("lora_A", "lora_B"):
            inner = getattr(module, part)[name]
            if inner.weight.is_meta:
                dtype = inner.weight.dtype
                inner.to_empty(device=base._hf_hook.execution_device).to(dtype)


def lost_tensors(root: nn.Module, adapter: str) -> list[str]:
    """Names of an adapter's tensors that hold nothing."""
    return [
        name
        for name, parameter in root.named_parameters()
        if parameter.is_meta and ".lora_" in name and adapter in name.split(".")
    ]


def input_device(root: nn.Module) -> torch.device:
    """Device on which a model takes its inputs; ``meta`` if its weights are on a server."""
    device = next(root.parameters()).device
    if device.type != "meta" or not hasattr(root, "hf_device_map"):
        return device
    return next((p.device for p in root.parameters() if not p.is_meta), torch.device("cpu"))
