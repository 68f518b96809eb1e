"""`ModelPair`: a base model and its fine-tune, side by side."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from threading import Event
from typing import TYPE_CHECKING, Any

import torch

from modeldiff import activations, embedded, forward, generation, outputs
from modeldiff._files import PathLike
from modeldiff._progress import Progress
from modeldiff.activations import Activations
from modeldiff.architectures import SiteMap, site_map_of
from modeldiff.errors import MismatchError, SetupError
from modeldiff.forward import Engine, Run
from modeldiff.generation import Generations, OnStep
from modeldiff.interventions import Cell, Edit, Plan, Side
from modeldiff.loading import (
    PROBE,
    SIDES,
    PairKind,
    Sides,
    SpecialTokens,
    check_adapter,
    check_configs,
    check_tokenizers,
    raise_all,
    verify,
)
from modeldiff.masks import Mask
from modeldiff.outputs import OutputDiff
from modeldiff.placement import (
    DeviceMap,
    Quantization,
    check_quantization,
    land_adapter,
    lost_tensors,
    placement_options,
)
from modeldiff.prefill import Prefill
from modeldiff.sites import Site, parse_sites
from modeldiff.tokens import Text

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from modeldiff.remote_jobs import Server


class ModelPair:
    """A base model and its fine-tune, ready to be traced, compared and edited.

    Make one with `load` (hub ids or paths) or `of` (models in memory). With a LoRA adapter there
    is one copy of the weights, and the adapter is switched.

    Args:
        sides: The two sides.

    Example:
        >>> pair = ModelPair.load("organism:em-rank1")
        >>> pair.kind
        'adapter'
    """

    def __init__(self, sides: Sides) -> None:
        self.sides = sides

    @classmethod
    def load(
        cls,
        base: PathLike,
        finetuned: PathLike | None = None,
        *,
        adapter: "PathLike | Mapping[str, PathLike] | None" = None,
        revision: str | None = None,
        subfolder: str = "",
        base_revision: str | None = None,
        base_subfolder: str = "",
        device: "DeviceMap | None" = None,
        device_map: "DeviceMap | None" = None,
        dtype: torch.dtype | None = None,
        quantization: "Quantization | None" = None,
        site_map: SiteMap | None = None,
        allow_identical: bool = False,
        special_tokens: SpecialTokens = "same",
        remote: "bool | str | Server" = False,
    ) -> "ModelPair":
        """Load a pair by hub id or path.

        Args:
            base: The base model, or ``"organism:<name>"`` for an embedded organism's pair.
            finetuned: A whole fine-tuned model; or:
            adapter: A LoRA adapter on the base. A mapping loads several by name; the first is
                the fine-tuned side, `with_adapter` gives the others.
            revision: Revision of the fine-tune or adapter.
            subfolder: Its folder inside the repository.
            base_revision: Revision of the base.
            base_subfolder: Folder of the base inside its repository.
            device: Default CUDA where there is one.
            device_map: Instead of a device, for models larger than one: "auto", or where each
                module lies, such as ``{"model.layers.0": 0, "model.layers.1": "disk"}``.
            dtype: Of the weights; default float32 on the CPU and the checkpoint's elsewhere.
            quantization: "8bit" or "4bit" for the base under an adapter, by bitsandbytes (the
                extra ``quant``); methods that work on the base's weights refuse it.
            site_map: For families that are not in `modeldiff.architectures.FAMILIES`.
            allow_identical: Accept a fine-tune that changes nothing, as null pairs are.
            special_tokens: "renamed" accepts a whole fine-tune whose control tokens have other
                names (R1-Distill-Llama's and Llama-3.1's), and takes its tokenizer. The base has
                not learnt them: `modeldiff.backtracking.base_texts` puts others in their place.
            remote: Run on NDIF (True), or on a server (its address, or a
                `modeldiff.remote_jobs.Server`); no weights are loaded here.

        Raises:
            MismatchError: If the two do not fit, or the adapter cannot be switched, or the base
                cannot be quantised; names every problem.
            InactiveAdapterError: If the fine-tune changes nothing.
            SiteError: If the family of models is not known.
            SetupError: If no embedded organism has the name, or nothing loadable is there, or
                bitsandbytes is missing.
        """
        if str(base).startswith("organism:"):
            options = {"device": device, "device_map": device_map, "dtype": dtype,
                       "quantization": quantization, "remote": remote}  # fmt: skip
            return cls._organism(str(base), finetuned, adapter, **options)
        if (finetuned is None) == (adapter is None):
            raise MismatchError(
                "a pair needs a base and one of finetuned= (a whole model) or adapter= (a LoRA "
                f"adapter); got finetuned={finetuned!r}, adapter={adapter!r}."
            )
        problems = check_quantization(
            quantization, adapter=adapter is not None, remote=bool(remote)
        )
        raise_all(problems, f"quantization={quantization!r}", "Leave it out.")
        if special_tokens == "renamed" and (remote or finetuned is None):
            raise MismatchError("special_tokens='renamed' is for two whole models loaded here.")
        if remote:
            from modeldiff.remote_sides import remote_sides

            return cls(
                remote_sides(
                    base, finetuned, adapter, site_map, remote,
                    revision=revision, base_revision=base_revision,
                )
            )  # fmt: skip
        options = placement_options(device, device_map, dtype, quantization)
        tokenizer = _tokenizer(base, base_revision, base_subfolder)
        root = _model(base, base_revision, base_subfolder, options)
        if adapter is None:
            other = _tokenizer(finetuned, revision, subfolder, fallback=tokenizer)
            tuned = _model(finetuned, revision, subfolder, options)
            problems = check_tokenizers(tokenizer, other, special_tokens)
            problems += check_configs(root.config, tuned.config)
            raise_all(problems, f"{base} and {finetuned} are not a pair", "Is it the right base?")
            tokenizer = other if special_tokens == "renamed" else tokenizer
            names, peft, active, others = (str(base), str(finetuned)), None, "", []
        else:
            several = adapter if isinstance(adapter, Mapping) else {"finetuned": adapter}
            peft = _adapted(root, several, revision, subfolder)
            tuned, (active, *others) = root, several
            names = str(base), str(several[active])
        if tokenizer.chat_template is None:  # plain bases leave it to their chat fine-tunes
            other = _tokenizer(names[1], revision, subfolder, fallback=tokenizer)
            tokenizer.chat_template = other.chat_template
        sides = Sides(
            kind="two" if peft is None else "adapter",
            roots=(root, tuned),
            tokenizer=tokenizer,
            site_map=site_map or site_map_of(root),
            names=names,
            peft=peft,
            adapter=active,
        )
        return cls._verified(sides, allow_identical, others)

    @classmethod
    def _organism(cls, name: str, finetuned: Any, adapter: Any, **options: Any) -> "ModelPair":
        """Load an embedded organism; a base without a fine-tune is paired with itself."""
        if finetuned is not None or adapter is not None:
            raise MismatchError(
                f"{name} brings its own fine-tune; leave finetuned= and adapter= out."
            )
        found = embedded.find(name.removeprefix("organism:"))
        same = found.finetuned is None and found.adapter is None
        tuned = found.base if same else found.finetuned
        pair = cls.load(found.base, tuned, adapter=found.adapter, allow_identical=same, **options)
        return cls(replace(pair.sides, names=(f"organism:{found.base.name}", name)))

    @classmethod
    def of(
        cls,
        base: "PreTrainedModel | PeftModel",
        finetuned: "PreTrainedModel | None",
        tokenizer: "PreTrainedTokenizerFast",
        *,
        adapter: str = "",
        site_map: SiteMap | None = None,
        allow_identical: bool = False,
    ) -> "ModelPair":
        """Pair models that are already in memory; nothing is copied.

        Args:
            base: The base model; or a ``PeftModel``, which holds both sides.
            finetuned: The fine-tuned model; None with a ``PeftModel``.
            tokenizer: Their tokenizer.
            adapter: Which of the ``PeftModel``'s adapters; default the active one.
            site_map: For families that are not known.
            allow_identical: Accept a fine-tune that changes nothing.

        Raises:
            MismatchError: If the two do not fit, or the adapter cannot be switched.
            InactiveAdapterError: If the fine-tune changes nothing.
            SiteError: If the family of models is not known.
        """
        peft_config = getattr(base, "peft_config", None) if hasattr(base, "base_model") else None
        if (finetuned is None) != (peft_config is not None):
            raise MismatchError(
                "pass of(base, finetuned, tokenizer) with two models, or of(peft_model, None, "
                f"tokenizer); got {type(base).__name__} and {type(finetuned).__name__}."
            )
        if finetuned is None:
            peft: Any = base
            name = adapter or str(peft.active_adapter)
            raise_all(_adapter_problems(peft, name), f"adapter {name!r}", _MERGE)
            root = peft.get_base_model()
            sides = Sides("adapter", (root, root), tokenizer, site_map or site_map_of(root),
                          (root.name_or_path or "base", name), peft, name)  # fmt: skip
        else:
            raise_all(check_configs(base.config, finetuned.config), "the two are not a pair", "")
            names = base.name_or_path or "base", finetuned.name_or_path or "finetuned"  # pyright: ignore
            sides = Sides("two", (base, finetuned), tokenizer, site_map or site_map_of(base), names)  # pyright: ignore
        return cls._verified(sides, allow_identical)

    @classmethod
    def _verified(
        cls, sides: Sides, allow_identical: bool, others: Iterable[str] = ()
    ) -> "ModelPair":
        ids = sides.tokenizer(PROBE, return_tensors="pt").input_ids
        for each in (sides, *map(sides.with_adapter, others)):
            verify(each, ids, allow_identical)
        return cls(sides)

    @property
    def kind(self) -> PairKind:
        """Kind of pair: "adapter", "two" or "remote", see `modeldiff.loading`."""
        return self.sides.kind

    @property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer of both sides."""
        return self.sides.tokenizer

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return self.sides.shape("base").n_layers

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.sides.shape("base").d_model

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return () if self.sides.peft is None else tuple(self.sides.peft.peft_config)

    @property
    def n_parameters(self) -> tuple[int, int]:
        """Parameters of the base, and of everything that the pair holds in memory."""
        own = sum(p.numel() for n, p in self.sides.roots[0].named_parameters() if "lora_" not in n)
        held = {id(p): p.numel() for root in self.sides.roots for p in root.parameters()}
        return own, sum(held.values())

    @property
    def digests(self) -> dict[str, str]:
        """Content hashes of base, fine-tune (or adapter) and tokenizer."""
        return self.sides.digests

    def with_adapter(self, name: str) -> "ModelPair":
        """Return the pair of the same base with another of its adapters; weights are shared."""
        return ModelPair(self.sides.with_adapter(name))

    def texts(self, items: Sequence[Any], *, reply: bool = False) -> tuple[Text, ...]:
        """Render texts, chats and completions; see `modeldiff.tokens.render`."""
        return forward.as_texts(self.sides, items, reply=reply)

    def capture(
        self,
        items: Sequence[Any],
        at: "str | Site | Sequence[str | Site]",
        *,
        on: "str | Mask" = "all",
        skip_first: int = 1,
        dtype: torch.dtype = torch.float32,
        max_tokens: int = 4096,
        progress: Progress = False,
        cancel: Event | None = None,
    ) -> Activations:
        """Capture both sides' activations; see `modeldiff.activations.capture`."""
        return activations.capture(
            self.sides, items, at, on=on, skip_first=skip_first, dtype=dtype,
            max_tokens=max_tokens, progress=progress, cancel=cancel,
        )  # fmt: skip

    def run(
        self,
        items: Sequence[Any],
        *,
        side: Side = "finetuned",
        do: "Edit | Plan | None" = None,
        reads: "str | Site | Sequence[str | Site]" = (),
        logits: bool = True,
        grad: bool = False,
        engine: Engine = "hooks",
    ) -> Run:
        """Run one side on one batch with edits; see `modeldiff.forward.run`."""
        return forward.run(
            self.sides, items, side=side, do=do, reads=parse_sites(reads), logits=logits,
            grad=grad, engine=engine,
        )  # fmt: skip

    def generate(
        self,
        prompts: Sequence[Any],
        *,
        do: "Edit | Plan | Mapping[str, Edit | Plan | None] | None" = None,
        models: Sequence[Side] = SIDES,
        cells: Sequence[Cell] | None = None,
        n: int = 1,
        seed: int = 0,
        temperature: float = 1.0,
        max_new_tokens: int = 64,
        max_rows: int = 256,
        on_step: OnStep | None = None,
        cancel: Event | None = None,
        progress: Progress = False,
        engine: Engine = "hooks",
        prefill: Prefill | None = None,
    ) -> Generations:
        """Generate {base, fine-tuned} x {none, edits}; see `modeldiff.generation.generate`."""
        return generation.generate(
            self.sides, prompts, do=do, models=models,
            cells=cells, n=n, seed=seed, temperature=temperature, max_new_tokens=max_new_tokens,
            max_rows=max_rows, on_step=on_step, cancel=cancel, progress=progress, engine=engine,
            prefill=prefill,
        )  # fmt: skip

    def output_diff(
        self,
        items: "Sequence[Any] | Mapping[str, Sequence[Any]]",
        *,
        on: "str | Mask" = "all",
        k: int = 10,
        max_tokens: int = 4096,
        progress: Progress = False,
        cancel: Event | None = None,
    ) -> OutputDiff:
        """Compare both sides' predictions of some texts; see `modeldiff.outputs.output_diff`."""
        return outputs.output_diff(
            self.sides, items, on=on, k=k, max_tokens=max_tokens, progress=progress, cancel=cancel
        )

    @contextmanager
    def nnsight(self, side: Side) -> Iterator[Any]:
        """Yield nnsight's wrapper of a side, locked and switched, for traces of your own.

        Inside, ``layers``, ``ln_final``, ``embed`` and ``unembed`` name the same modules in every
        family; of a remote pair modules have their own names, and traces need ``remote=``.

        Example:
            >>> pair = ModelPair.load("organism:em-rank1")
            >>> with pair.nnsight("base") as model:  # doctest: +SKIP
            ...     with model.trace("hello"):
            ...         h = model.layers[0].output.save()
        """
        if self.kind == "remote":  # traces of your own say remote= themselves
            yield self.sides.traced[side]
            return
        with self.sides.on(side):
            yield forward.traced(self.sides, side)

    def __repr__(self) -> str:
        base, tuned = self.sides.names
        return f"ModelPair({self.kind}: {base} | {tuned}, {self.n_layers} layers x {self.d_model})"


_MERGE = (
    "Merge it (model.merge_and_unload()) and load the merged model as finetuned=; the pair then "
    "holds two copies."
)


def _tokenizer(path: Any, revision: str | None, subfolder: str, fallback: Any = None) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, subfolder=subfolder)
    except (OSError, ValueError) as error:
        if fallback is None:
            raise SetupError(f"no tokenizer could be loaded from {str(path)!r}: {error}") from error
        return fallback  # fine-tunes are often published without one: the base's is meant


def _model(path: Any, revision: str | None, subfolder: str, options: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, subfolder=subfolder, use_safetensors=True, **options
        )
    except (OSError, ValueError, ImportError) as error:
        raise SetupError(f"no model could be loaded from {str(path)!r}: {error}") from error
    return model.eval().requires_grad_(False)


def _adapted(
    root: Any, adapters: Mapping[str, PathLike], revision: str | None, subfolder: str
) -> "PeftModel":
    """Put adapters on a model; each file must hold exactly the adapter's tensors."""
    from peft import PeftConfig, PeftModel
    from peft.utils.error import NoMatchingPeftModuleError

    place = {"revision": revision, "subfolder": subfolder or None}
    peft = None
    for name, path in adapters.items():
        settings = PeftConfig.from_pretrained(str(path), **place)
        raise_all(check_adapter(settings), f"adapter {path}", _MERGE)
        weights = _adapter_weights(path, revision, subfolder)
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


def _adapter_weights(path: PathLike, revision: str | None, subfolder: str) -> Any:
    from pathlib import Path

    from huggingface_hub import hf_hub_download
    from safetensors.torch import load_file

    name = "adapter_model.safetensors"
    local = Path(path) / subfolder / name
    if not Path(path).is_dir():
        inside = subfolder or None
        local = Path(hf_hub_download(str(path), name, revision=revision, subfolder=inside))
    if not local.is_file():
        raise MismatchError(
            f"{Path(path) / subfolder} has no {name}. Adapters are read from safetensors only, "
            "never from pickles: load it with peft once and save it again."
        )
    return load_file(local)


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


def _adapter_problems(peft: Any, name: str) -> list[str]:
    if name not in peft.peft_config:
        return [f"not loaded; the model has {list(peft.peft_config)}"]
    merged = any(getattr(module, "merged", False) for module in peft.modules())
    problems = check_adapter(peft.peft_config[name])
    return [*problems, "the adapter is merged into the weights"] if merged else problems
