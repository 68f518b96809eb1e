"""Which model has each latent: a class, and the evidence it rests on.

No class rests on decoder norms alone. A latent that one decoder writes and the other does not is a
*candidate*; latent scaling then asks the other model's activations, and what it finds there says
whether the latent is exclusive, or an artefact of how the dictionary was trained.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from modeldiff.dictionaries.models import Dictionary
from modeldiff.dictionaries.scaling import TARGETS, Scaling, model_names
from modeldiff.errors import MismatchError

Class = Literal["base-only", "shared", "finetuned-only", "decoupled", "shrunk", "dead", "other"]
CLASSES: tuple[Class, ...] = get_args(Class)


@dataclass(frozen=True)
class Thresholds:
    """Where classes begin.

    Args:
        exclusive_norm: A latent is a candidate if the heavier model's share of the two decoder
            norms is above this.
        nu_error: An exclusive latent's nu_error is below this.
        nu_reconstruction: An exclusive latent's nu_reconstruction is below this.
        low: A nu below this is not believed.
        high: A nu above this is not believed.
        shared_cosine: Cosine of the two decoders of a shared latent, at least.
        min_active: With fewer active rows no nu is believed.
    """

    exclusive_norm: float = 0.9
    nu_error: float = 0.2
    nu_reconstruction: float = 0.5
    low: float = -0.1
    high: float = 2.0
    shared_cosine: float = 0.5
    min_active: int = 10


def classify(
    dictionary: Dictionary,
    scaling: Scaling,
    *,
    thresholds: Thresholds = Thresholds(),
    models: tuple[int, int] = (0, 1),
) -> pd.DataFrame:
    """Name the class of every latent of a crosscoder.

    The direction is the decoder of the model in which it is heavier, and nu compares the lighter
    model with it. A candidate (see `Thresholds`) is

    * ``finetuned-only`` or ``base-only`` if both nus are low: the other model lacks it;
    * ``shrunk`` if nu_error is not: what the other model's reconstruction leaves out has it,
      its decoder was made too small (complete shrinkage);
    * ``decoupled`` if only nu_reconstruction is not: other latents write it for that model.

    A latent that is no candidate is ``shared`` if the lighter model has it (nu_error not low) and
    the two decoders agree. ``dead`` latents never fired in the rows of ``scaling``; ``other`` is
    what the thresholds leave open: a nu outside ``low`` to ``high``, too few active rows, decoders
    that disagree, or a norm and a nu that contradict each other.

    Args:
        dictionary: A crosscoder.
        scaling: Its latent scaling, from `modeldiff.dictionaries.scaling.latent_scaling`.
        thresholds: Where classes begin; the defaults are the source's for the nus.
        models: Which two models, the base first.

    Returns:
        One row a latent: latent, class, relative_decoder_norm (0 base alone, 1 fine-tune alone),
        decoder_cosine, heavier, nu_error, nu_reconstruction, beta_<target>_base and
        beta_<target>_finetuned (along the heavier decoder), n_active, firing_rate,
        mean_activation, max_activation. Dead latents have NaN for what cannot be known.

    Raises:
        MismatchError: If the dictionary sees one model, or the scaling is of another dictionary.

    Source:
        Minder et al. 2025, 2504.02922 (nu thresholds, complete shrinkage, latent decoupling);
        Lindsey et al. 2024, Sparse Crosscoders (relative decoder norms).
    """
    _check(dictionary, scaling, models)
    W = dictionary.W_dec.detach()[:, list(models)].double()
    norms = W.norm(dim=2)
    share = norms[:, 1] / norms.sum(1)
    cosine = (W[:, 0] * W[:, 1]).sum(1) / norms.prod(1)
    heavier = (share >= 0.5).long()
    columns: dict[str, Tensor] = {
        "relative_decoder_norm": share,
        "decoder_cosine": cosine,
        **_betas(scaling, models, heavier),
        "n_active": scaling.n_active,
        "firing_rate": scaling.n_active.double() / max(1, scaling.n_rows),
        "mean_activation": scaling.mean,
        "max_activation": scaling.peak,
    }
    table = pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})
    names = [model_names(max(models) + 1)[m] for m in models]
    table.insert(2, "heavier", np.array(names)[heavier.cpu().numpy()])
    table.insert(0, "class", _classes(table, thresholds))
    table.insert(0, "latent", np.arange(len(table)))
    return table


def counts(table: pd.DataFrame) -> pd.Series:
    """How many latents each class has, in the order of `CLASSES`, zeros included."""
    return table["class"].value_counts().reindex(list(CLASSES), fill_value=0)


def _betas(scaling: Scaling, models: tuple[int, int], heavier: Tensor) -> dict[str, Tensor]:
    """Betas of both models along the heavier one's decoder, and lighter / heavier."""
    index = torch.tensor(models, device=heavier.device)
    along, found, rows = index[heavier], {}, torch.arange(len(heavier), device=heavier.device)
    both = {target: scaling.beta(target)[rows, along][:, list(models)] for target in TARGETS}
    for target in TARGETS[::-1]:
        if target != "activation":
            found[f"nu_{target}"] = both[target][rows, 1 - heavier] / both[target][rows, heavier]
    for target, beta in both.items():
        found |= {f"beta_{target}_base": beta[:, 0], f"beta_{target}_finetuned": beta[:, 1]}
    return found


def _classes(table: pd.DataFrame, at: Thresholds) -> np.ndarray:
    share, error = table["relative_decoder_norm"], table["nu_error"]
    rec, cosine = table["nu_reconstruction"], table["decoder_cosine"]
    enough = table["n_active"] >= at.min_active
    candidate = np.maximum(share, 1 - share) > at.exclusive_norm
    known = enough & error.between(at.low, at.high)
    both = known & rec.between(at.low, at.high)
    own = np.where(share >= 0.5, "finetuned-only", "base-only")
    low = error < at.nu_error
    rules = [
        (table["n_active"] == 0, "dead"),
        (candidate & known & ~low, "shrunk"),
        (candidate & both & low & (rec >= at.nu_reconstruction), "decoupled"),
        (candidate & both & low, own),
        (~candidate & known & ~low & (cosine >= at.shared_cosine), "shared"),
    ]
    return np.select([rule for rule, _ in rules], [name for _, name in rules], "other")


def _check(dictionary: Dictionary, scaling: Scaling, models: tuple[int, int]) -> None:
    n_latents, n_models, _ = dictionary.W_dec.shape
    if not dictionary.config.is_crosscoder or not 0 <= min(models) <= max(models) < n_models:
        raise MismatchError(
            f"models {models} of a dictionary on {n_models}: classes compare two models of a "
            "crosscoder. For a dictionary on one model read nu_activation of its scaling."
        )
    if scaling.beta_error.shape != (n_latents, n_models, n_models):
        raise MismatchError(
            f"a scaling of {tuple(scaling.beta_error.shape)} betas for {n_latents} latents of "
            f"{n_models} models: it is of another dictionary. Run latent_scaling on this one."
        )
