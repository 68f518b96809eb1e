"""Concept ablation fine-tuning: train a model while it cannot use some directions.

`caft` is a context manager around any training loop. It puts plain forward hooks on decoder layers,
so that Hugging Face's Trainer, TRL, PEFT, mixed precision and gradient checkpointing work as they
do without it. When the block ends the model is an ordinary one: what it learned meanwhile cannot
have been learned through the directions at these layers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modeldiff._progress import Progress
from modeldiff._shapes import Float
from modeldiff.activations import stream
from modeldiff.architectures import SiteMap, site_map_of
from modeldiff.caft_modes import Mode, ablations
from modeldiff.caft_monitor import CaftMonitor, Stack
from modeldiff.directions import Direction
from modeldiff.errors import InterventionError
from modeldiff.masks import Mask
from modeldiff.models import ModelPair
from modeldiff.moments import Moments
from modeldiff.sites import Site

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


@contextmanager
def caft(
    model: nn.Module,
    directions: Sequence[Direction] | Mapping[int, Sequence[Direction]],
    layers: Sequence[int] | None = None,
    *,
    mode: Mode = "project",
    means: Mapping[int, Float[Tensor, " d_model"]] | None = None,
    coefficient: float = 1.0,
    site_map: SiteMap | None = None,
    probe: Callable[[], Any] | None = None,
) -> Iterator[CaftMonitor]:
    """Ablate directions in every forward and backward pass of a model inside the block.

    All tokens are ablated, at the output of decoder layers, with a float32 orthonormal basis Q of
    the directions' span at each layer. Modes:

    - "project": h - QᵀQ h, and the same for the gradient (concept ablation fine-tuning).
    - "mean": the component along the span becomes that of the base's mean instead of zero, which
      may lie far from where activations are.
    - "forward": the value alone; the gradient passes as if nothing had been done.
    - "backward": the gradient alone; the model computes what it always computes.
    - "steer": h + coefficient · (sum of the directions), unit times scale each (preventative
      steering).

    Gradients of what writes to these layers are orthogonal to the span. Updates by plain gradient
    descent are too; those of Adam, which rescales every weight by itself, need not be.

    Args:
        model: What is trained: a causal language model, also wrapped by PEFT, accelerate or
            distributed training; before or after it is wrapped.
        directions: By layer; or all of them, see ``layers``. Nothing changes where there are none:
            the training is then the plain one, to the bit.
        layers: Where the span of all directions is ablated; None for each at its own layer.
        mode: What is done, see above.
        means: Mean activations of the base by layer, for "mean"; see `base_means`.
        coefficient: For "steer".
        site_map: For families that are not in `modeldiff.architectures.FAMILIES`.
        probe: Runs the model once, for models that do not take ``input_ids`` alone.

    Yields:
        The monitor: norms by step and layer.

    Raises:
        InterventionError: Before the block if a layer does not exist or does not fire, a width is
            wrong, or mode, layers and means do not go together; after it if a layer did not fire in
            every forward pass that was trained on, or an activation was not finite.
        SiteError: If the family of models is not known.

    Source:
        Casademunt et al. 2025 (concept ablation fine-tuning), 2507.16795; "steer" is preventative
        steering, Chen et al. 2025 (persona vectors), 2507.21509.

    Example:
        >>> from modeldiff.models import ModelPair
        >>> model = ModelPair.load("organism:em-rank1").sides.roots[0]
        >>> v = Direction.of(torch.ones(model.config.hidden_size), "resid_post.3", "ones")
        >>> with torch.no_grad(), caft(model, [v]) as monitor:
        ...     _ = model(input_ids=torch.tensor([[5, 6, 7]]))
        >>> monitor.layers
        (3,)
    """
    found = ablations(directions, layers, mode, means, coefficient)
    stack = decoder_stack(model, site_map) if found else Stack(model, ())
    missing = [layer for layer in found if not 0 <= layer < len(stack.layers)]
    if missing:
        raise InterventionError(
            f"layers {missing} asked for, the model has 0 to {len(stack.layers) - 1}. Nothing was "
            "run."
        )
    monitor = CaftMonitor(stack, found, lambda: _probed(model, probe))
    with monitor.hooked():
        monitor.verify()
        yield monitor
    monitor.check_fired()


def decoder_stack(model: nn.Module, site_map: SiteMap | None = None) -> Stack:
    """Find the decoder layers of a model, whatever it is wrapped in.

    Raises:
        InterventionError: If there are none, or several modules could be meant.
        SiteError: If the family of models is not known.
    """
    wanted = (site_map or _family(model)).layers
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and f".{_unwrapped(name)}".endswith(f".{wanted}")
    ]
    if len(names) != 1:
        raise InterventionError(
            f"{len(names)} modules of {type(model).__name__} could be the decoder layers "
            f"{wanted!r}: {', '.join(names[:5]) or 'none'}. Pass a site_map= with the path that "
            "print(model) shows."
        )
    layers = model.get_submodule(names[0])
    return Stack(model.get_submodule(names[0].rpartition(".")[0]), tuple(layers.children()))


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _family(model: nn.Module) -> SiteMap:
    with_config = (m for m in model.modules() if hasattr(m, "config"))
    typed = (m for m in with_config if isinstance(getattr(m.config, "model_type", None), str))
    return site_map_of(next(typed, model))


def _probed(model: nn.Module, probe: Callable[[], Any] | None) -> None:
    """Run one token in eval mode, so that no dropout draws; put every mode back."""
    training = [module for module in model.modules() if module.training]
    device = next(model.parameters()).device
    kept = [device] if device.type == "cuda" else []
    model.eval()
    try:
        with torch.random.fork_rng(kept):
            if probe is None:
                model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
            else:
                probe()
    finally:
        for module in training:
            module.training = True


def base_means(
    pair: ModelPair,
    items: Sequence[Any],
    layers: Sequence[int],
    *,
    on: "str | Mask" = "all",
    skip_first: int = 1,
    progress: Progress = False,
) -> dict[int, Float[Tensor, " d_model"]]:
    """Mean activations of the base after decoder layers, for mode "mean".

    Args:
        pair: Base and fine-tune; the base is read.
        items: Texts that are like those trained on.
        layers: After which layers.
        on: Tokens that count.
        skip_first: Positions left out at the start of each text.
        progress: Where to report.

    Returns:
        Float32 means by layer.

    Raises:
        MaskError: If no token counts.
        SiteError: If there is no such layer.
    """
    sites = {layer: Site("resid_post", layer) for layer in layers}
    sums: dict[int, Moments] = {}
    for part in stream(
        pair.sides, pair.texts(items), tuple(sorted(sites.values())), on=on,
        skip_first=skip_first, progress=progress,
    ):  # fmt: skip
        for layer, site in sites.items():
            new = Moments.of(part.rows(part.run.base, site))
            sums[layer] = sums[layer].merged(new) if layer in sums else new
    return {layer: found.mean.float().cpu() for layer, found in sums.items()}
