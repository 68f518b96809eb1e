"""Loading the two sides of a pair, checking that they fit, and switching between them.

Three kinds: ``adapter`` (one copy of the weights, a LoRA adapter switched on and off), ``two`` (two
full models) and ``remote`` (nothing loaded here; both sides live on a server).
"""

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from modeldiff._files import digest
from modeldiff.architectures import SiteMap, adapted_modules, module_at
from modeldiff.errors import (
    InactiveAdapterError,
    MaskError,
    MismatchError,
    RemoteError,
    SiteError,
)
from modeldiff.hooks import first, hidden_argument, recorded
from modeldiff.interventions import Shape, Side
from modeldiff.placement import input_device, real_values
from modeldiff.sites import Site

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PairKind = Literal["adapter", "two", "remote"]
SIDES: tuple[Side, Side] = ("base", "finetuned")
PROBE = "The quick brown fox jumps over the lazy dog."
_LOCKS: "weakref.WeakKeyDictionary[nn.Module, threading.RLock]" = weakref.WeakKeyDictionary()


def lock_of(root: nn.Module) -> threading.RLock:
    """Return the one re-entrant lock of a module tree, whichever pairs share it."""
    return _LOCKS.setdefault(root, threading.RLock())


@dataclass(frozen=True, eq=False)
class Sides:
    """Both sides of a pair, ready to run.

    Args:
        kind: See the module's docstring.
        roots: Causal language models (base, finetuned); the same object for ``adapter``, without
            PEFT's wrapper, so that module paths are those of the plain model.
        tokenizer: Fast tokenizer shared by both sides.
        site_map: Where the sites are.
        names: What the sides were loaded from, for tables and reports.
        peft: PEFT's wrapper, for ``adapter``.
        adapter: Name of the adapter that is the fine-tuned side.
        remote: The `modeldiff.remote_jobs.Server` of ``remote`` pairs.
    """

    kind: PairKind
    roots: "tuple[PreTrainedModel, PreTrainedModel]"
    tokenizer: "PreTrainedTokenizerFast"
    site_map: SiteMap
    names: tuple[str, str]
    peft: "PeftModel | None" = None
    adapter: str = ""
    remote: Any = False
    traced: dict[str, Any] = field(default_factory=dict, repr=False)
    """nnsight's wrappers by side, made when first needed."""
    _digested: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    """State of the weights when they were last hashed, and the hashes."""

    @property
    def config(self) -> Any:
        """The base's Hugging Face configuration."""
        return self.roots[0].config

    @cached_property
    def lora(self) -> tuple[Site, ...]:
        """The ``lora`` sites of the active adapter."""
        if not self.adapter:
            return ()
        return adapted_modules(self.roots[1], self.site_map, self.adapter)

    @cached_property
    def longest(self) -> int | None:
        """Tokens of the longest text that has positions; None where they are not learned."""
        if self.kind == "remote":
            return None
        text = self.config.get_text_config()
        limit = getattr(text, "max_position_embeddings", None)
        learned = (
            module.num_embeddings - limit in range(8)  # some families keep two rows more
            for name, module in self.roots[0].named_modules()
            if limit and isinstance(module, nn.Embedding) and name != self.site_map.embed
        )
        return limit if any(learned) else None

    def check_lengths(self, n_tokens: Iterable[int], new: int = 0) -> None:
        """Verify that texts of these lengths can be run, and go on for some new tokens.

        Raises:
            MaskError: If one has more tokens than a model with learned positions has of these.
        """
        limit = self.longest
        wrong = [(i, n) for i, n in enumerate(n_tokens) if limit is not None and n + new > limit]
        if wrong:
            index, n = wrong[0]
            raise MaskError(
                f"text {index} has {n} tokens{f' and {new} new ones' if new else ''}, and "
                f"{self.names[0]} has learned positions for {limit} ({len(wrong)} texts are too "
                "long). Cut it, or leave it out."
            )

    @property
    def first_changed(self) -> int:
        """First layer in which the sides can differ; 0 unless they share weights."""
        return self.lora[0].layer if self.lora else 0

    def shape(self, side: Side) -> Shape:
        """What an edit must know of a side."""
        text = self.config.get_text_config()
        lora = self.lora if side == "finetuned" else ()
        return Shape(text.num_hidden_layers, text.hidden_size, lora)

    def root(self, side: Side) -> "PreTrainedModel":
        """The side's causal language model."""
        return self.roots[SIDES.index(side)]

    def adapter_of(self, side: Side) -> str:
        """Name of the side's active adapter, or nothing."""
        return self.adapter if side == "finetuned" else ""

    @contextmanager
    def on(self, side: Side) -> "Iterator[PreTrainedModel]":
        """Hold the lock and switch to a side; its model is in eval mode inside the block.

        Everything is as it was after the block, also after an exception: which adapter is on,
        which parameters require grad, train or eval mode.
        """
        if side not in SIDES:
            raise MismatchError(f"side {side!r}: it is 'base' or 'finetuned'.")
        if self.kind == "remote":
            raise RemoteError(
                "this needs the model's layers, and they are on a server. A remote pair can "
                "capture, run, generate, compare outputs, be patched, read through lenses, "
                "surveyed and audited; for the rest load the pair here."
            )
        root = self.root(side)
        with lock_of(root), _evaluating(root):
            if self.peft is None:
                yield root
            else:
                with _switched(self.peft, self.adapter if side == "finetuned" else None):
                    yield root

    @property
    def digests(self) -> dict[str, str]:
        """Content hashes of ``base`` and ``finetuned`` (adapter pairs: of the adapter).

        Hashed again where weights were changed in place since. Of remote models only the names
        can be hashed.
        """
        if self.kind == "remote":
            first, second = (digest("remote", name) for name in self.names)
            return {"base": first, "finetuned": second, "tokenizer": _vocabulary(self.tokenizer)}
        state = self._state()
        if self._digested.get("state") != state:
            self._digested.update(state=state, found=self._hashed())
        return dict(self._digested["found"])

    def _state(self) -> list[Any]:
        """What changes when weights, scales, or the chat template do; weights are not read."""
        versions = [(id(p), _version(p)) for root in self.roots for p in root.parameters()]
        return [versions, self._scales(), self.tokenizer.chat_template, len(self.tokenizer)]

    def _scales(self) -> list[float]:
        paths = [f"{self.site_map.layer(site.layer)}.{site.module}" for site in self.lora]
        found = [module_at(self.roots[1], path).scaling for path in paths]
        return [float(each[self.adapter]) for each in found]  # pyright: ignore

    def _hashed(self) -> dict[str, str]:
        base, finetuned = self.roots
        found = {
            "base": _model_digest(base),
            "tokenizer": digest(_vocabulary(self.tokenizer), self.tokenizer.chat_template or ""),
        }
        if self.peft is None:
            return {**found, "finetuned": _model_digest(finetuned)}
        tensors = _tensors_digest(finetuned, self.adapter)
        return {**found, "finetuned": digest(tensors, self._scales())}

    def with_adapter(self, name: str) -> "Sides":
        """Return the pair with another of its adapters as the fine-tuned side; weights shared.

        Raises:
            MismatchError: If no adapter of this name is loaded.
        """
        have = [] if self.peft is None else list(self.peft.peft_config)
        if name not in have:
            raise MismatchError(f"no adapter {name!r}; this pair has {have or 'none'}.")
        return replace(self, adapter=name, names=(self.names[0], name), traced=self.traced)


@contextmanager
def _evaluating(root: nn.Module) -> Iterator[None]:
    training = [module for module in root.modules() if module.training]
    root.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _switched(peft: "PeftModel", adapter: str | None) -> Iterator[None]:
    """Switch one adapter on, or all off; PEFT's own toggles also flip ``requires_grad``."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in peft.modules() if isinstance(module, BaseTunerLayer)]
    before = [(layer, layer.disable_adapters, list(layer.active_adapters)) for layer in layers]
    flags = [(p, p.requires_grad) for name, p in peft.named_parameters() if "lora_" in name]
    try:
        for layer in layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for layer, disabled, active in before:
            layer._disable_adapters = disabled
            layer._active_adapter = active
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place, as PyTorch counts for its gradients."""
    return 0 if tensor.is_inference() else tensor._version


def _model_digest(root: Any) -> str:
    config = {k: v for k, v in root.config.to_dict().items() if not k.startswith("_")}
    return digest(_tensors_digest(root, ""), _stable(config))


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        skipped = {"transformers_version", "dtype", "torch_dtype", "architectures"}
        return {str(k): _stable(v) for k, v in value.items() if k not in skipped}
    if isinstance(value, list | tuple):
        return [_stable(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _tensors_digest(root: nn.Module, adapter: str) -> str:
    """Hash every value of the base's tensors, or of one adapter's.

    Each tensor is read as 32-bit integers and summed with scrambled weights modulo 2^64: a change
    shows (certainly if it is a single one) at memory speed.
    """
    parts = []
    for name, tensor in real_values(root):
        module, _, end = name.partition(".lora_")
        if bool(end) != bool(adapter) or (adapter and end.split(".")[1] != adapter):
            continue
        plain = [module.replace(".base_layer", ""), end.split(".")[0]]
        parts.append([*plain, list(tensor.shape), str(tensor.dtype), _checksum(tensor)])
    return digest(parts)


def _checksum(tensor: Tensor) -> list[int]:
    raw = tensor.detach().contiguous().flatten().view(torch.uint8)
    raw = torch.nn.functional.pad(raw, (0, -raw.numel() % 4)).view(torch.int32)
    weights = _scrambled(min(len(raw), 1 << 20), raw.device)
    return [int((block * weights[: len(block)]).sum()) for block in raw.split(1 << 20)]


def _scrambled(n: int, device: torch.device) -> Tensor:
    """Odd 64-bit weights without pattern: flipped signs or swapped values must not cancel."""
    weights = torch.arange(1, n + 1, device=device) * -7046029254386353131
    weights = (weights ^ (weights >> 29)) * -4658895280553007687
    return (weights ^ (weights >> 32)) | 1


def _vocabulary(tokenizer: Any) -> str:
    return digest(tokenizer.get_vocab())


SpecialTokens = Literal["same", "renamed"]


def check_tokenizers(first: Any, second: Any, special_tokens: SpecialTokens = "same") -> list[str]:
    """List in what two tokenizers differ; empty if ids mean the same to both.

    With ``special_tokens="renamed"`` an id that is an added token to both may have two names.
    """
    a, b = first.get_vocab(), second.get_vocab()
    moved = [token for token in a.keys() & b.keys() if a[token] != b[token]]
    both = {**a, **b}
    added = first.added_tokens_decoder.keys() & second.added_tokens_decoder.keys()
    free = added if special_tokens == "renamed" else set()
    missing = sorted(token for token in a.keys() ^ b.keys() if both[token] not in free)
    problems = []
    if moved:
        problems.append(f"{len(moved)} tokens have other ids, e.g. {moved[0]!r}")
    if missing:
        problems.append(f"{len(missing)} tokens are known to one side only, e.g. {missing[0]!r}")
        if special_tokens == "same" and all(both[token] in added for token in missing):
            problems.append("these are control tokens: special_tokens='renamed' accepts them")
    cut = [each.tokenize(PROBE, add_special_tokens=False) for each in (first, second)]
    if not problems and cut[0] != cut[1]:
        problems.append(f"they cut {PROBE!r} differently: {cut[0][:5]} and {cut[1][:5]}")
    return problems


def check_configs(base: Any, finetuned: Any) -> list[str]:
    """List the sizes in which two configurations differ."""
    names = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")
    a, b = base.get_text_config(), finetuned.get_text_config()
    return [
        f"{name} is {getattr(a, name)} in the base and {getattr(b, name)} in the fine-tune"
        for name in names
        if getattr(a, name) != getattr(b, name)
    ]


_UNSWITCHABLE = {
    "use_dora": "DoRA rescales the base's weights",
    "lora_bias": "it adds a bias outside A and B",
    "modules_to_save": "it replaces whole modules",
    "trainable_token_indices": "it replaces embeddings",
    "target_parameters": "it adapts bare parameters",
    "layer_replication": "it changes the base's layers",
    "alora_invocation_tokens": "it acts only after these tokens",
    "use_qalora": "it pools what A reads",
    "use_bdlora": "A and B are in blocks",
    "arrow_config": "it routes between adapters",
    "kasa_config": "it is not B times A",
    "monteclora_config": "it is random",
}
_HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal")


def check_adapter(settings: Any) -> list[str]:
    """List what makes a PEFT adapter unusable as a switchable side."""
    kind = getattr(settings.peft_type, "value", settings.peft_type)
    if kind != "LORA":
        return [f"adapters of type {kind} cannot be switched per row; only LORA can"]
    problems = [
        f"{name}={getattr(settings, name)!r}: {why}"
        for name, why in _UNSWITCHABLE.items()
        if getattr(settings, name, None)
    ]
    if settings.bias != "none":
        problems.append(f"bias={settings.bias!r} changes the base's biases")
    if settings.init_lora_weights not in _HARMLESS_STARTS:
        problems.append(
            f"init_lora_weights={settings.init_lora_weights!r} changes the base's weights (save "
            "it with path_initial_model_for_weight_conversion to undo that)"
        )
    return problems


def raise_all(problems: list[str], what: str, advice: str) -> None:
    """Raise one error that names every mismatch.

    Raises:
        MismatchError: If there is any.
    """
    if problems:
        raise MismatchError(f"{what}: {'; '.join(problems)}. {advice}")


def verify(sides: Sides, probe: Tensor, allow_identical: bool) -> None:
    """Run a probe on both sides: sites are where the map says, and the sides differ.

    Checks for each side that the last layer's input plus what attention and MLP add is its
    output, that the projections run, and that the unembedding of the final norm gives the logits.

    Raises:
        MismatchError: If a side's logits are not finite.
        SiteError: If the map does not describe this model, or the adapter reaches outside the
            decoder layers.
        InactiveAdapterError: If the logits are identical and ``allow_identical`` is False.
    """
    outputs = []
    for side in SIDES:
        with sides.on(side) as root, torch.no_grad():
            outputs.append(_probe(root, sides.site_map, sides.shape(side), probe).cpu())
    if not allow_identical and torch.equal(*outputs):
        what = f"adapter {sides.adapter!r}" if sides.kind == "adapter" else "the fine-tune"
        raise InactiveAdapterError(
            f"{what} ({sides.names[1]}) gives exactly the base's logits on a probe of "
            f"{probe.shape[1]} tokens: it changes nothing. Was it saved before training, or under "
            "another name? For a null pair on purpose pass allow_identical=True."
        )


def _probe(root: nn.Module, site_map: SiteMap, shape: Shape, ids: Tensor) -> Tensor:
    last = site_map.layer(shape.n_layers - 1)
    outputs: dict[str, Tensor] = {}
    watched = [last, f"{last}.{site_map.attn_write}", f"{last}.{site_map.mlp_write}", site_map.norm]
    handles = [
        module_at(root, path).register_forward_hook(
            lambda module, args, output, path=path: outputs.update({path: first(output)})
        )
        for path in watched
    ]
    entered = [last, f"{last}.{site_map.o_proj}", f"{last}.{site_map.down_proj}"]
    try:
        with recorded(root, entered) as calls:
            logits = root(input_ids=ids.to(input_device(root)), use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    _check_finite(root, logits)
    silent = [path for path in [*watched, *calls] if path not in outputs and path not in calls]
    if silent or len(calls) < 3:
        raise SiteError(f"the site map names modules that never ran: {silent or 'projections'}.")
    _check_sum(outputs, hidden_argument(calls[last]), watched)
    head = module_at(root, site_map.unembed)(outputs[site_map.norm])
    cap = getattr(root.config.get_text_config(), "final_logit_softcapping", None)  # pyright: ignore
    head = torch.tanh(head / cap) * cap if cap else head
    if not torch.allclose(head.float(), logits.float(), rtol=1e-2, atol=1e-2):
        raise SiteError(
            f"the logits of {type(root).__name__} are not {site_map.unembed}({site_map.norm}(...))"
            ": this family does something else with them, which output diffs do not know."
        )
    return logits


def _check_finite(root: nn.Module, logits: Tensor) -> None:
    if bool(logits.isfinite().all()):
        return
    broken = [name for name, p in root.named_parameters() if not bool(p.isfinite().all())]
    cause = (
        f"values of {len(broken)} weights are not finite, e.g. of {broken[0]}: the file is damaged"
        if broken
        else "the weights are finite, so it is too large for the dtype: load it in float32 or "
        "bfloat16"
    )
    name = getattr(getattr(root, "config", None), "name_or_path", "") or type(root).__name__
    raise MismatchError(f"the logits of {name} on a probe are not finite; {cause}.")


def _check_sum(outputs: dict[str, Tensor], entered: Tensor, watched: list[str]) -> None:
    layer, attention, mlp, _ = watched
    total = entered + outputs[attention] + outputs[mlp]
    error = float((total.float() - outputs[layer].float()).norm() / outputs[layer].float().norm())
    if error > 0.02:
        raise SiteError(
            f"input + {attention} + {mlp} differs from the output of {layer} by {error:.0%}: "
            "attn_write and mlp_write of the site map are not what is added to the residual stream."
        )
