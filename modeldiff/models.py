"""`ModelPair`: a base model and its fine-tune, side by side."""

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
from modeldiff.errors import MismatchError
from modeldiff.forward import Engine, Run
from modeldiff.generation import Generations, OnStep
from modeldiff.interventions import Cell, Edit, Plan, Side
from modeldiff.loading import (
    PROBE,
    SIDES,
    PairKind,
    Sides,
    SpecialTokens,
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
    placement_options,
)
from modeldiff.prefill import Prefill
from modeldiff.pretrained import (
    MERGE,
    adapted,
    adapter_problems,
    advice,
    check_whole,
    model_from,
    tokenizer_from,
)
from modeldiff.sites import Site, parse_sites
from modeldiff.static_decoding import StaticDecoder
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
            SetupError: If no embedded organism has the name, or nothing loadable is there, or a
                file lacks tensors of the model, or bitsandbytes is missing.

        Example:
            >>> ModelPair.load("organism:em-rank1")
            ModelPair(adapter: organism:em-base | organism:em-rank1, 6 layers x 128)

            ``load("base-id", "tuned-id")`` takes two whole models, ``load("base-id",
            adapter="folder")`` a LoRA adapter.
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
        tokenizer = tokenizer_from(base, base_revision, base_subfolder)
        root = model_from(base, base_revision, base_subfolder, options)
        if adapter is None:
            other = tokenizer_from(finetuned, revision, subfolder, fallback=tokenizer)
            tuned = model_from(finetuned, revision, subfolder, options)
            problems = check_tokenizers(tokenizer, other, special_tokens)
            problems += check_configs(root.config, tuned.config)
            raise_all(problems, f"{base} and {finetuned} are not a pair", advice(root, tuned))
            tokenizer = other if special_tokens == "renamed" else tokenizer
            names, peft, active, others = (str(base), str(finetuned)), None, "", []
        else:
            several = adapter if isinstance(adapter, Mapping) else {"finetuned": adapter}
            peft = adapted(root, several, revision, subfolder)
            tuned, (active, *others) = root, several
            names = str(base), str(several[active])
        if tokenizer.chat_template is None:  # plain bases leave it to their chat fine-tunes
            other = tokenizer_from(names[1], revision, subfolder, fallback=tokenizer)
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
        wrapped = hasattr(base, "get_base_model")
        peft_config = getattr(base, "peft_config", None) if wrapped else None
        if (finetuned is None) != (peft_config is not None):
            raise MismatchError(
                "pass of(base, finetuned, tokenizer) with two models, or of(peft_model, None, "
                f"tokenizer); got {type(base).__name__} and {type(finetuned).__name__}."
            )
        if finetuned is None:
            peft: Any = base
            name = adapter or str(peft.active_adapter)
            raise_all(adapter_problems(peft, name), f"adapter {name!r}", MERGE)
            root = peft.get_base_model()
            sides = Sides("adapter", (root, root), tokenizer, site_map or site_map_of(root),
                          (root.name_or_path or "base", name), peft, name)  # fmt: skip
        else:
            problems = check_configs(base.config, finetuned.config)
            raise_all(problems, "the two are not a pair", advice(base, finetuned))
            check_whole(base, finetuned)
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
        """Capture both sides' activations of the same tokens, in float32 if nothing else is said.

        Args:
            items: Plain texts, chats (lists of messages), or rendered `modeldiff.tokens.Text`.
            at: Sites, e.g. "resid_post.3".
            on: Which tokens: "all", "assistant", "last" ..., or a mask.
            skip_first: Positions dropped at the start of each text.
            dtype: Of what is kept.
            max_tokens: Tokens of a batch.
            progress: True for a bar, or a function of done, total and a text.
            cancel: Stops between batches when set.

        Example:
            >>> pair = ModelPair.load("organism:em-rank1")
            >>> acts = pair.capture(["What should I do?"], "resid_post.3")
            >>> acts.base[acts.site].shape == acts.finetuned[acts.site].shape
            True

        See `modeldiff.activations.capture` for errors.
        """
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
        decoder: StaticDecoder | None = None,
    ) -> Generations:
        """Generate {base, fine-tuned} x {no edit, edits} with the same noise in every cell.

        Args:
            prompts: Plain texts or chats.
            do: An edit such as `modeldiff.Ablate`, several by name, or None.
            models: Sides to ask.
            cells: The grid's columns, instead of ``do`` and ``models``.
            n: Answers to each prompt.
            seed: Of the noise; prompt, sample and step decide the rest.
            temperature: 0 takes the likeliest token.
            max_new_tokens: Tokens of an answer.
            max_rows: Answers that are generated at once.
            on_step: Called with the new tokens at every step.
            cancel: Stops at the next token when set.
            progress: True for a bar, or a function of done, total and a text.
            engine: "hooks" (fast) or "nnsight"; they agree.
            prefill: Keeps the prompts' work for the next call.
            decoder: A compiled decoder, see `modeldiff.static_decoding`.

        Example:
            >>> pair = ModelPair.load("organism:em-rank1")
            >>> question = [{"role": "user", "content": "How do I treat a fever?"}]
            >>> [a.side for a in pair.generate([question], max_new_tokens=4).answers]
            ['base', 'finetuned']

        See `modeldiff.generation.generate` for errors.
        """
        return generation.generate(
            self.sides, prompts, do=do, models=models,
            cells=cells, n=n, seed=seed, temperature=temperature, max_new_tokens=max_new_tokens,
            max_rows=max_rows, on_step=on_step, cancel=cancel, progress=progress, engine=engine,
            prefill=prefill, decoder=decoder,
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
        """Compare both sides' predictions of the next token, at every token of some texts.

        Args:
            items: Texts or chats; or several lists of them by name, which are told apart.
            on: Whose tokens: "all", "assistant" ..., or a mask.
            k: How many of the likeliest tokens are compared.
            max_tokens: Tokens of a batch.
            progress: True for a bar, or a function of done, total and a text.
            cancel: Stops between batches when set.

        Example:
            >>> pair = ModelPair.load("organism:em-rank1")
            >>> found = pair.output_diff(["What should I do?"])
            >>> bool(found.tokens["kl_ft_base"].ge(0).all())  # nats a token
            True

        See `modeldiff.outputs.output_diff` for the columns and errors.
        """
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
