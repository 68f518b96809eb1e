"""Dictionaries that other packages trained, read without those packages.

| layout | files | what |
| --- | --- | --- |
| ``dictionary_learning`` | ``ae.pt``/``model.safetensors``, ``config.json`` | crosscoders, SAEs |
| ``saelens`` | ``sae_weights.safetensors``, ``cfg.json`` | SAEs |
| ``gemma_scope`` | ``params.npz`` | JumpReLU SAEs |
| ``sparsify`` | ``sae.safetensors``, ``cfg.json`` | TopK SAEs |
| ``crosscode`` | ``model.pt``, ``model_cfg.yaml`` | crosscoders, one hookpoint |
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from modeldiff._files import PathLike, file_digest
from modeldiff.dictionaries import readers_layouts as layouts
from modeldiff.dictionaries.configs import DictionaryConfig, Inputs, Normaliser
from modeldiff.dictionaries.models import Dictionary
from modeldiff.dictionaries.readers_files import read_settings, read_tensors
from modeldiff.dictionaries.readers_layouts import Weights
from modeldiff.errors import FileFormatError, MismatchError

Layout = Literal[
    "auto", "modeldiff", "dictionary_learning", "saelens", "gemma_scope", "sparsify", "crosscode"
]
_READERS: Mapping[str, Callable[..., Weights]] = {
    "dictionary_learning": layouts.dictionary_learning, "saelens": layouts.saelens,
    "gemma_scope": layouts.gemma_scope, "sparsify": layouts.sparsify,
    "crosscode": layouts.crosscode,
}  # fmt: skip
_FILES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("saelens", "sae_weights.safetensors", ("cfg.json",)),
    ("sparsify", "sae.safetensors", ("cfg.json",)),
    ("gemma_scope", "params.npz", ()),
    ("crosscode", "model.pt", ("model_cfg.yaml",)),
    ("dictionary_learning", "ae.pt", ("config.json",)),
    ("dictionary_learning", "model.safetensors", ("config.json",)),
)
_OPTIONAL = {"gemma_scope", "dictionary_learning"}  # whose settings may be missing or given


def read(
    path: PathLike,
    format: Layout = "auto",
    *,
    device: str | torch.device = "cpu",
    side: Literal["base", "finetuned", "difference"] = "finetuned",
    site: str | None = None,
    order: Sequence[int] | None = None,
    normaliser: Normaliser | None = None,
    threshold: float | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Dictionary:
    """Read a dictionary of any layout that is known; see the table above.

    The relative decoder norm of what comes back is ours, whatever the other package's sign: 0 is
    base-only, 1 is fine-tuned-only.

    Args:
        path: A folder, or the file of the weights; settings are looked for beside it.
        format: The layout; "auto" goes by the names of the files and their tensors.
        device: Where the dictionary goes.
        side: What a dictionary of one model sees.
        site: Where it was trained, as "resid_post.13"; default what the file says.
        order: Which of the file's models is our base, which our fine-tune; default ``(0, 1)``.
        normaliser: In place of what the file holds; needed where it should hold one and does not.
            ``Normaliser.identity(n_models, d_model)`` says that raw activations were used.
        threshold: Of batch_topk, where the file holds none.
        settings: In place of, or added to, the file of settings.

    Raises:
        FileNotFoundError: If there is nothing at ``path``.
        FileFormatError: If the layout is unknown, the file is damaged or would run code, tensors
            are missing, or a normaliser or threshold that it needs is not there.
        MismatchError: If what is given does not fit its shapes.

    Example:
        >>> read("gemma-scope-2b-pt-res/layer_12/params.npz",
        ...      site="resid_post.12")  # doctest: +SKIP
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"there is no file or folder {str(place)!r}.")
    if format == "modeldiff" or (format == "auto" and (place / "dictionary.json").is_file()):
        return Dictionary.load_from(place, device=str(device))
    name, file, said = _found(place, format)
    said = {**(read_settings(said) if said else {}), **(settings or {})}
    weights = _ordered(_float(_weights(name, read_tensors(file, device), said)), order)
    if threshold is not None:
        weights = replace(weights, threshold=torch.tensor(threshold, device=device))
    source = {"layout": name, "file": file.name, "digest": file_digest(file), "settings": said}
    return _dictionary(weights, normaliser, side, site or weights.site, source)


def _weights(name: str, tensors: dict[str, Tensor], settings: dict[str, Any]) -> Weights:
    try:
        return _READERS[name](tensors, settings)
    except FileFormatError:
        raise
    except (RuntimeError, ValueError, IndexError, KeyError) as error:  # of another kind
        shapes = {each: tuple(tensor.shape) for each, tensor in sorted(tensors.items())}
        raise FileFormatError(
            f"the tensors do not go together as {name!r} ({error}): {shapes}."
        ) from error


def _found(place: Path, format: str) -> tuple[str, Path, Path | None]:
    """Layout, file of weights, file of settings."""
    folder = place if place.is_dir() else place.parent
    for name, file, beside in _FILES:
        here = place.is_dir() or place.name == file
        if format in ("auto", name) and here and (folder / file).is_file():
            present = [folder / each for each in beside if (folder / each).is_file()]
            if present or name in _OPTIONAL:
                return name, folder / file, next(iter(present), None)
    if place.is_file() and format in _READERS:
        return format, place, _beside(place)
    if place.is_file() and format == "auto" and place.suffix in (".pt", ".pth"):
        return "dictionary_learning", place, _beside(place)
    if place.is_file() and format == "auto" and place.suffix == ".npz":
        return "gemma_scope", place, None
    seen = sorted(each.name for each in folder.iterdir())[:12] if place.is_dir() else [place.name]
    known = "; ".join(" + ".join((file, *beside)) for _, file, beside in _FILES)
    raise FileFormatError(
        f"{str(place)!r} has no layout that is known"
        f"{'' if format == 'auto' else f' as {format!r}'}: seen {seen}. Known are {known}."
    )


def _beside(file: Path) -> Path | None:
    names = (f"{file.stem}.json", "config.json", "cfg.json", "model_cfg.yaml")
    return next((file.with_name(name) for name in names if file.with_name(name).is_file()), None)


def _float(weights: Weights) -> Weights:
    changed = {
        name: value.detach().float() if value.is_floating_point() else value
        for name, value in vars(weights).items()
        if isinstance(value, Tensor)
    }
    gate = {name: value.float() for name, value in weights.gate.items()}
    return replace(weights, **changed, gate=gate)


def _ordered(weights: Weights, order: Sequence[int] | None) -> Weights:
    """The file's models in our order."""
    if order is None:
        return weights
    n_models, chosen = weights.b_dec.shape[0], list(order)
    if sorted(chosen) != list(range(n_models)):
        raise MismatchError(f"order {chosen} is no order of {n_models} models.")
    return replace(
        weights, W_enc=weights.W_enc[chosen], W_dec=weights.W_dec[:, chosen],
        b_dec=weights.b_dec[chosen],
        mean=None if weights.mean is None else weights.mean[chosen],
        scale=None if weights.scale is None else weights.scale[chosen],
    )  # fmt: skip


def _dictionary(
    weights: Weights, normaliser: Normaliser | None, side: Inputs, site: str, source: dict[str, Any]
) -> Dictionary:
    n_models, d_model, n_latents = weights.W_enc.shape
    _check(weights)
    config = DictionaryConfig(
        d_model=d_model, n_latents=n_latents, n_models=n_models, activation=weights.activation,
        k=min(max(weights.k, 1), n_latents), inputs="pair" if n_models > 1 else side, site=site,
        code_norm=weights.code_norm, groups=weights.groups,
    )  # fmt: skip
    norm = _normaliser(weights, normaliser)
    shift = weights.b_dec[0] @ weights.W_enc[0] if weights.subtracts else 0.0
    tensors = {"W_enc": weights.W_enc, "W_dec": weights.W_dec, "b_enc": weights.b_enc - shift,
               "b_dec": weights.b_dec, "mean": norm.mean, "scale": norm.scale,
               **weights.gate}  # fmt: skip
    tensors["threshold"] = torch.zeros(()) if weights.threshold is None else weights.threshold
    device = weights.W_enc.device
    return Dictionary.of(config, tensors, {"read": source}).to(device)


def _normaliser(weights: Weights, given: Normaliser | None) -> Normaliser:
    n_models, d_model = weights.b_dec.shape
    if given is not None:
        if given.mean.shape != (n_models, d_model):
            raise MismatchError(
                f"the normaliser is of {tuple(given.mean.shape)}, the dictionary of "
                f"{(n_models, d_model)} (models, d_model)."
            )
        return given
    if weights.needs:
        raise FileFormatError(
            f"{weights.needs}: without it reconstructions are silently wrong. Pass "
            f"normaliser=Normaliser(mean, scale), or Normaliser.identity({n_models}, {d_model}) "
            "if it was trained on raw activations."
        )
    plain = Normaliser.identity(n_models, d_model)
    if weights.mean is None or weights.scale is None:
        return plain
    return Normaliser(weights.mean, weights.scale)


def _check(weights: Weights) -> None:
    n_models, d_model, n_latents = weights.W_enc.shape
    wanted = {
        "W_dec": (n_latents, n_models, d_model), "b_enc": (n_latents,),
        "b_dec": (n_models, d_model),
    }  # fmt: skip
    for name, shape in wanted.items():
        if tuple(getattr(weights, name).shape) != shape:
            raise FileFormatError(
                f"{name} has shape {tuple(getattr(weights, name).shape)} where W_enc of "
                f"{tuple(weights.W_enc.shape)} needs {shape}."
            )
    if weights.activation == "batch_topk" and weights.threshold is None:
        raise FileFormatError(
            "no threshold was estimated in training, so that latents of a row would depend on its "
            "batch: pass threshold=."
        )
    if weights.activation in ("topk", "batch_topk") and weights.k < 1:
        raise FileFormatError("neither tensors nor settings say k: pass settings={'k': ...}.")
