"""Crosscoders and sparse autoencoders: one module, two constructors."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from modeldiff._files import PathLike
from modeldiff._shapes import Bool, Float
from modeldiff.dictionaries.codes import Codes
from modeldiff.dictionaries.configs import Activation, DictionaryConfig, Normaliser
from modeldiff.dictionaries.files import read_dictionary, write_dictionary
from modeldiff.errors import FileFormatError, MismatchError

Side = Literal["base", "finetuned"]
_SIDES = ("base", "finetuned")
_START_NORM = {"relu": 0.1, "gated": 0.1}  # small where a penalty on the norm must not overshoot


class Dictionary(nn.Module):
    """Sparse latents of the activations of several models (a crosscoder) or of one (an SAE).

    ``latents = activation(normalised @ W_enc + b_enc)``, summed over the models, and
    ``normalised' = latents @ W_dec + b_dec``. Everything that takes or gives activations is in
    the models' own, raw space unless its name says otherwise; `normaliser` is applied inside.

    Attributes:
        config: Sizes and rules.
        W_enc: Encoder, ``(model, d_model, latent)``, float32.
        b_enc: Its bias, ``(latent,)``.
        W_dec: Decoder, ``(latent, model, d_model)``.
        b_dec: Its bias, ``(model, d_model)``.
        threshold: What a latent must exceed to fire: for ``batch_topk`` one number for strength
            times `code_weight`; for ``jumprelu`` one for each latent's pre-activation.
        r_mag, b_mag, b_gate: Of ``gated`` alone, ``(latent,)``: a latent fires where
            ``pre + b_gate > 0``, with strength ``relu(exp(r_mag) * pre + b_mag)``.
        provenance: What the weights come from; JSON-able, saved with them.

    Args:
        config: Sizes and rules.
        seed: Of the initial decoder: the same random direction for every model.

    Source:
        Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing";
        BatchTopK: Bussmann et al. 2024 (arXiv 2412.06410); JumpReLU: Rajamanoharan et al. 2024
        (arXiv 2407.14435); Gated: Rajamanoharan et al. 2024 (arXiv 2404.16014); dedicated
        exclusive blocks: arXiv 2602.11729.
    """

    mean: Tensor
    scale: Tensor
    threshold: Tensor
    owned: Tensor

    def __init__(self, config: DictionaryConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.provenance: dict[str, Any] = {"seed": seed}
        n, m, d = config.n_latents, config.n_models, config.d_model
        self.register_buffer("owned", _owned(config), persistent=False)
        unit = torch.randn(n, 1, d, generator=torch.Generator().manual_seed(seed))
        unit = unit / unit.norm(dim=-1, keepdim=True)
        decoder = _START_NORM.get(config.activation, 1.0) * unit * self.owned[:, :, None]
        self.W_enc = nn.Parameter(decoder.permute(1, 2, 0).contiguous())
        self.b_enc = nn.Parameter(torch.zeros(n), requires_grad=config.activation != "gated")
        self.W_dec = nn.Parameter(decoder)
        self.b_dec = nn.Parameter(torch.zeros(m, d))
        self.register_buffer("mean", torch.zeros(m, d))
        self.register_buffer("scale", torch.ones(m))
        if config.activation == "jumprelu":
            self.threshold = nn.Parameter(torch.full((n,), 0.1))
        else:
            self.register_buffer("threshold", torch.zeros(()))
        if config.activation == "gated":
            self.r_mag = nn.Parameter(torch.zeros(n))
            self.b_mag = nn.Parameter(torch.zeros(n))
            self.b_gate = nn.Parameter(torch.zeros(n))

    @classmethod
    def of(
        cls,
        config: DictionaryConfig,
        tensors: Mapping[str, Tensor],
        provenance: Mapping[str, Any] | None = None,
    ) -> "Dictionary":
        """Make a dictionary of given weights; they are copied, as float32.

        Args:
            config: Sizes and rules.
            tensors: Named as the attributes, and ``mean`` and ``scale`` of the normaliser.
            provenance: What they come from.

        Raises:
            MismatchError: If a tensor is missing, is not known or has another shape, or is not
                zero where the configuration says that a model lacks the latent.
        """
        made = cls(config)
        wanted = made.state_dict()
        wrong = [
            f"{name}: {tuple(tensors[name].shape) if name in tensors else 'missing'}"
            for name, each in wanted.items()
            if name not in tensors or tensors[name].shape != each.shape
        ] + [f"{name}: unknown" for name in tensors if name not in wanted]
        if wrong:
            raise MismatchError(
                f"the tensors do not fit a {config.activation} dictionary of {config.n_latents} "
                f"latents, {config.n_models} models and width {config.d_model}: {'; '.join(wrong)}."
            )
        made.load_state_dict({name: each.float() for name, each in tensors.items()})
        made.set_normaliser(made.normaliser)  # which checks it
        if made.W_dec[~made.owned].any() or made.W_enc.permute(2, 0, 1)[~made.owned].any():
            raise MismatchError("latents of one model alone have weights for another model.")
        made.provenance = dict(provenance or {})
        return made

    @property
    def normaliser(self) -> Normaliser:
        """What brings raw rows to the space of the weights."""
        return Normaliser(self.mean, self.scale)

    def set_normaliser(self, normaliser: Normaliser) -> None:
        """Take another normaliser; the weights stay what they are.

        Raises:
            MismatchError: If it is for another number of models or another width.
        """
        if normaliser.mean.shape != self.mean.shape:
            raise MismatchError(
                f"a normaliser for (model, d_model) = {tuple(normaliser.mean.shape)}; the "
                f"dictionary has {tuple(self.mean.shape)}."
            )
        self.mean = normaliser.mean.to(self.mean)
        self.scale = normaliser.scale.to(self.scale)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_dec.device

    def view(self, x: Float[Tensor, "row models d_model"]) -> Float[Tensor, "row model d_model"]:
        """What the dictionary sees of paired rows, raw, as float32 on its device.

        Raises:
            MismatchError: If the rows are not paired, or of another width or number of models.
        """
        c = self.config
        wanted = c.n_models if c.is_crosscoder else 2
        if x.dim() != 3 or x.shape[1:] != (wanted, c.d_model):
            raise MismatchError(
                f"rows of shape {tuple(x.shape)}; a dictionary with inputs={c.inputs!r} needs "
                f"(row, {wanted}, {c.d_model}): the raw activations of "
                f"{'all models' if wanted > 2 else 'base and fine-tune'}."
            )
        x = x.to(self.device, torch.float32)
        if c.inputs == "base":
            return x[:, :1]
        if c.inputs == "finetuned":
            return x[:, 1:]
        return x[:, 1:] - x[:, :1] if c.inputs == "difference" else x

    def normalised(
        self, x: Float[Tensor, "row models d_model"]
    ) -> Float[Tensor, "row model d_model"]:
        """What the dictionary sees of raw paired rows, normalised."""
        return self.normaliser.apply(self.view(x))

    def pre(self, x_norm: Float[Tensor, "row model d_model"]) -> Float[Tensor, "row latent"]:
        """Pre-activations of normalised rows."""
        return torch.addmm(self.b_enc, x_norm.flatten(1), self.W_enc.flatten(0, 1))

    def activate(self, pre: Float[Tensor, "row latent"]) -> Float[Tensor, "row latent"]:
        """Latents of pre-activations by the rule of inference: every row by itself."""
        kind = self.config.activation
        if kind == "gated":
            magnitude = (self.r_mag.exp() * pre + self.b_mag).relu()
            return magnitude * (pre + self.b_gate > 0)
        values = pre.relu()
        if kind == "jumprelu":
            return values * (pre > self.threshold)
        if kind == "batch_topk":
            return values * (values * self.code_weight > self.threshold)
        if kind == "topk":
            kept = (values * self.code_weight).topk(self.config.k, dim=1).indices
            return torch.zeros_like(values).scatter(1, kept, values.gather(1, kept))
        return values

    @torch.no_grad()
    def encode_dense(self, x: Float[Tensor, "row models d_model"]) -> Float[Tensor, "row latent"]:
        """Latents of raw paired rows, zeros included; every row by itself."""
        return self.activate(self.pre(self.normalised(x)))

    def encode(self, x: Float[Tensor, "row models d_model"]) -> Codes:
        """Latents of raw paired rows; every row by itself, whatever else is in the batch.

        Raises:
            MismatchError: If a latent is not finite.
        """
        codes = Codes.of(self.encode_dense(x))
        if not codes.value.isfinite().all():
            raise MismatchError(
                "latents of these rows are not finite: are the rows? A model in float16 may "
                "overflow; use bfloat16 or float32."
            )
        return codes

    def decode_normalised(
        self, latents: Float[Tensor, "row latent"]
    ) -> Float[Tensor, "row model d_model"]:
        """Normalised rows of dense latents."""
        flat = latents @ self.W_dec.flatten(1)
        return flat.unflatten(1, self.b_dec.shape) + self.b_dec

    @torch.no_grad()
    def decode(self, codes: Codes) -> Float[Tensor, "row model d_model"]:
        """Raw rows of sparse latents: the models' own space, the normaliser undone."""
        flat = embedding_bag(
            codes.latent,
            self.W_dec.flatten(1),
            codes.offsets,
            mode="sum",
            per_sample_weights=codes.value,
            include_last_offset=True,
        )
        return self.normaliser.undo(flat.unflatten(1, self.b_dec.shape) + self.b_dec)

    def reconstruct(
        self, x: Float[Tensor, "row models d_model"]
    ) -> Float[Tensor, "row model d_model"]:
        """Encode raw paired rows and decode them: what `view` gives, as far as latents carry it."""
        return self.decode(self.encode(x))

    @property
    def decoder_norms(self) -> Float[Tensor, "latent model"]:
        """L2 norm of every latent's decoder for every model, in normalised space."""
        return self.W_dec.detach().norm(dim=-1)

    @property
    def code_weight(self) -> Float[Tensor, " latent"]:
        """What a latent's strength is multiplied by to rank it; see `DictionaryConfig`."""
        if self.config.code_norm == "none":
            return torch.ones_like(self.b_enc)
        norms = self.decoder_norms
        return norms.sum(1) if self.config.code_norm == "sum" else norms.norm(dim=1)

    @property
    def relative_decoder_norm(self) -> Float[Tensor, " latent"]:
        """``|d_ft| / (|d_base| + |d_ft|)``: 0 base alone, 1 fine-tune alone, NaN if both are 0.

        In normalised space, so that the models' own sizes do not count.

        Raises:
            MismatchError: If the dictionary is not of two models.
        """
        if self.config.n_models != 2:
            raise MismatchError(
                f"a relative decoder norm is of two models; this dictionary has "
                f"{self.config.n_models}. decoder_norms has each."
            )
        norms = self.decoder_norms
        return norms[:, 1] / norms.sum(1)

    def decoder(self, side: Side | int = "finetuned") -> Float[Tensor, "latent d_model"]:
        """What each latent adds to a model's raw activations at strength 1.

        Args:
            side: Whose, or the number of the model. A dictionary of differences has one decoder,
                whatever is asked for.

        Raises:
            MismatchError: If the dictionary has not seen that model.
        """
        c = self.config
        if c.inputs == "difference":
            model = 0
        elif c.is_crosscoder:
            model = _SIDES.index(side) if isinstance(side, str) else side
        else:
            model = 0 if side in (c.inputs, _SIDES.index(c.inputs)) else -1
        if not 0 <= model < c.n_models:
            raise MismatchError(
                f"no decoder for {side!r}: the dictionary has inputs={c.inputs!r} and "
                f"{c.n_models} models."
            )
        return self.W_dec[:, model].detach() / self.scale[model]

    def save_to(self, folder: PathLike) -> None:
        """Write weights, normaliser, configuration and provenance into a folder."""
        record = {"config": asdict(self.config), "provenance": self.provenance}
        write_dictionary(folder, self.state_dict(), record)

    @classmethod
    def load_from(cls, folder: PathLike, device: str = "cpu") -> "Dictionary":
        """Read what `save_to` wrote, bit for bit.

        Raises:
            FileNotFoundError: If one of the two files is missing.
            FileFormatError: If they are damaged, of another kind or version, or do not go
                together.
        """
        tensors, record = read_dictionary(folder)
        try:
            fields: dict[str, Any] = {
                name: tuple(each) if isinstance(each, list) else each
                for name, each in record["config"].items()
            }
            made = cls.of(DictionaryConfig(**fields), tensors, record["provenance"])
        except (KeyError, TypeError, AttributeError, MismatchError) as error:
            raise FileFormatError(f"{str(folder)!r} holds no whole dictionary: {error}") from error
        return made.to(device)

    def __repr__(self) -> str:
        c = self.config
        kind = f"{c.n_models}-model crosscoder" if c.is_crosscoder else f"SAE of {c.inputs}"
        where = f" @ {c.site}" if c.site else ""
        return f"Dictionary({kind}, {c.activation}, {c.n_latents} latents of {c.d_model}{where})"


def crosscoder(
    d_model: int,
    n_latents: int,
    *,
    n_models: int = 2,
    activation: Activation = "batch_topk",
    k: int = 32,
    site: str = "",
    seed: int = 0,
    **options: Any,
) -> Dictionary:
    """Make an untrained crosscoder.

    Args:
        d_model: Width of the activations.
        n_latents: Latents.
        n_models: Models; base first, then fine-tuned.
        activation: Rule by which latents fire.
        k: Mean latents a row.
        site: Where the activations are from.
        seed: Of the initial weights.
        **options: Other fields of `DictionaryConfig`: ``code_norm``, ``n_tied``,
            ``n_exclusive``, ``groups``.

    Raises:
        MismatchError: If the numbers do not go together.

    Example:
        >>> crosscoder(8, 32, k=4, site="resid_post.3")
        Dictionary(2-model crosscoder, batch_topk, 32 latents of 8 @ resid_post.3)
    """
    config = DictionaryConfig(d_model, n_latents, n_models, activation, k, "pair", site, **options)
    return Dictionary(config, seed=seed)


def sae(
    d_model: int,
    n_latents: int,
    *,
    side: Literal["base", "finetuned", "difference"] = "finetuned",
    activation: Activation = "batch_topk",
    k: int = 32,
    site: str = "",
    seed: int = 0,
    **options: Any,
) -> Dictionary:
    """Make an untrained sparse autoencoder of one model, or of fine-tuned minus base.

    Args:
        d_model: Width of the activations.
        n_latents: Latents.
        side: What it sees of the paired rows.
        activation: Rule by which latents fire.
        k: Mean latents a row.
        site: Where the activations are from.
        seed: Of the initial weights.
        **options: Other fields of `DictionaryConfig`: ``code_norm``, ``groups``.

    Raises:
        MismatchError: If the numbers do not go together.

    Example:
        >>> made = sae(8, 32, side="difference", k=4)
        >>> made, made.reconstruct(torch.randn(5, 2, 8)).shape
        (Dictionary(SAE of difference, batch_topk, 32 latents of 8), torch.Size([5, 1, 8]))
    """
    config = DictionaryConfig(d_model, n_latents, 1, activation, k, side, site, **options)
    return Dictionary(config, seed=seed)


def _owned(config: DictionaryConfig) -> Bool[Tensor, "latent model"]:
    """Which latents each model has."""
    owned = torch.ones(config.n_latents, config.n_models, dtype=torch.bool)
    for model in range(config.n_models):
        others = [each for each in range(config.n_models) if each != model]
        for latent in config.exclusive(model):
            owned[latent, others] = False
    return owned
