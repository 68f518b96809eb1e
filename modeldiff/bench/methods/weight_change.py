"""Which weights changed and what their change writes: adapters as they are, else the difference."""

from collections.abc import Sequence

from modeldiff.architectures import SiteMap
from modeldiff.bench.ablation import ablation_row
from modeldiff.bench.cases import Budget, Case
from modeldiff.bench.scores import Row, cosine_row, decided, no_truth, recall_at_k
from modeldiff.directions import Direction
from modeldiff.lora import adapter_modules, write_directions
from modeldiff.weights import weight_diff

TITLE = "`adapter_modules`, `weight_diff`: the change of the weights, by singular vectors"
ALPHA = 0.05
RANK = 4

Change = tuple[int, float, Direction | None]
"""Layer, relative norm, and the first direction written to the residual stream."""


def measure(case: Case, budget: Budget, seed: int) -> list[Row]:
    """Score the layers ranked by relative change, and the directions that they write."""
    changes = _of_adapter(case) if case.pair.kind == "adapter" else _of_weights(case, seed)
    some = decided("some weight differs", any(size > 0 for _, size, _ in changes),
                   case.truth.changed, alpha=0)  # fmt: skip
    strongest: dict[int, tuple[float, Direction]] = {}
    for layer, size, direction in changes:
        if direction is not None and size > strongest.get(layer, (0.0, None))[0]:
            strongest[layer] = size, direction
    found = {layer: direction for layer, (_, direction) in strongest.items()}
    return [some, _recalled(case, changes), cosine_row(found, case.truth.direction),
            ablation_row(case, budget, seed, found)]  # fmt: skip


def _recalled(case: Case, changes: Sequence[Change]) -> Row:
    what = "recall of the changed layers, by relative change"
    if case.truth.layers is None:
        return no_truth(what, "no layer is the changed one")
    sizes: dict[int, float] = {}
    for layer, size, _ in changes:
        sizes[layer] = max(size, sizes.get(layer, 0.0))
    recall = recall_at_k(sorted(sizes, key=lambda layer: -sizes[layer]), case.truth.layers)
    return Row(what, "1", recall.estimate, recall.low, recall.high, recall.n,
               found=recall.estimate == 1)  # fmt: skip


def _of_adapter(case: Case) -> list[Change]:
    rows: list[Change] = []
    for module in adapter_modules(case.pair.sides):
        size = module.svd.norm / module.base_norm
        written = size > 0 and module.write_at is not None
        direction = write_directions(module, 1)[0] if written else None
        rows.append((module.site.layer, size, direction and _in_stream(direction)))
    return rows


def _of_weights(case: Case, seed: int) -> list[Change]:
    sides = case.pair.sides
    seen = weight_diff(*sides.roots, rank=RANK, seed=seed, cancel=case.cancel)
    rows: list[Change] = []
    for row in seen.changed().itertuples():
        name, layer = str(row.name), int(row.layer)  # pyright: ignore[reportArgumentType]
        if layer < 0:
            continue
        direction = None
        if name in seen.spectra and _writes(sides.site_map, name):
            low_rank = seen.spectra[name]
            vector = low_rank.left[:, 0] * low_rank.singular[0]
            direction = Direction.of(vector, f"resid_post.{layer}", f"{name} write 0")
        rows.append((layer, float(row.relative), direction))  # pyright: ignore[reportArgumentType]
    return rows


def _writes(site_map: SiteMap, name: str) -> bool:
    """Whether a weight writes to the residual stream."""
    return name.removesuffix(".weight").endswith((site_map.down_proj, site_map.o_proj))


def _in_stream(direction: Direction) -> Direction:
    """The same where it has been added to the residual stream."""
    return direction.at(f"resid_post.{direction.site.layer}")
