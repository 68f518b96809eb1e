"""Running one text again from the layer that a patch touches: what every kind of patching shares.

An unedited pass keeps every layer's input. A patch at layer l then runs layers l and above alone,
many patched copies of the text in one batch, the unedited copy among them so that rounding is the
same in both.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from modeldiff._shapes import Float
from modeldiff.architectures import module_at
from modeldiff.attention_watch import Watch, watching
from modeldiff.batch_size import fitted
from modeldiff.batching import Batch, make_batch, padding_id
from modeldiff.divergence import unembedding
from modeldiff.editing import Editor, Group
from modeldiff.errors import InterventionError, SiteError
from modeldiff.forward import check_sites, device_of, inputs_of
from modeldiff.hooks import hidden_argument, hooked, recorded, replay, stopping
from modeldiff.interventions import Plan, Replace, Side
from modeldiff.loading import Sides
from modeldiff.sites import Kind, Site
from modeldiff.tokens import Text

Part = Literal["resid_post", "attn_out", "mlp_out", "mlp_act", "head", "query", "key", "adapter"]
PARTS: tuple[Part, ...] = get_args(Part)
_KIND: dict[str, Kind] = {
    "resid_post": "resid_post",
    "attn_out": "attn_out",
    "mlp_out": "mlp_out",
    "mlp_act": "mlp_act",
    "head": "z",
    "adapter": "lora",
}


@dataclass(frozen=True)
class Component:
    """A part of a model whose activation can be exchanged.

    Args:
        part: ``head`` is one head's slice of what the attention's output projection reads;
            ``query`` and ``key`` are one head's, after rotary embeddings; ``adapter`` is what one
            adapted module's ``A`` puts out; the others are sites.
        layer: Decoder layer.
        head: Of ``head`` and ``query``; the kv head of ``key``; -1 for the others.
        module: Adapted module of ``adapter``, e.g. ``"mlp.down_proj"``.

    Raises:
        SiteError: If the part is unknown, or a head or module is missing or not wanted.

    Example:
        >>> str(Component("head", 2, head=1)), Component("head", 2, head=1).place
        ('head.2.1', 'z.2')
    """

    part: Part
    layer: int
    head: int = -1
    module: str = ""

    def __post_init__(self) -> None:
        wants_head = self.part in ("head", "query", "key")
        if (
            self.part not in PARTS
            or wants_head != (self.head >= 0)
            or (self.part == "adapter") != bool(self.module)
        ):
            raise SiteError(
                f"{self!r} is no component: parts are {', '.join(PARTS)}; head, query and key "
                "need head=, adapter needs module=, and no other part takes them."
            )

    @property
    def site(self) -> Site | None:
        """The site it is at; None for queries and keys, which have none."""
        kind = _KIND.get(self.part)
        return None if kind is None else Site(kind, self.layer, self.module)

    @property
    def place(self) -> str:
        """Name of the tensor that it is in: of its site, or ``"query.2"``."""
        return f"{self.part}.{self.layer}" if self.site is None else str(self.site)

    def __str__(self) -> str:
        end = f".{self.head}" if self.head >= 0 else f".{self.module}" if self.module else ""
        return f"{self.part}.{self.layer}{end}"


Score = Callable[[Float[Tensor, "row place vocab"]], Float[Tensor, " row"]]


@dataclass(frozen=True, eq=False)
class Metric:
    """A number read off the logits.

    Args:
        name: With its unit.
        score: From float32 logits ``[row, place, vocab]`` to one number a row, finite.
        at: The places: positions whose logits are made, from the end if negative.
        there: What a server computes in place of ``score``, see `modeldiff.remote_patching`; None
            brings it the logits of the places.
    """

    name: str
    score: Score
    at: tuple[int, ...] = (-1,)
    there: Mapping[str, Any] | None = field(default=None, repr=False)

    def __call__(self, logits: Float[Tensor, "row place vocab"]) -> Float[Tensor, " row"]:
        """Score rows of logits.

        Raises:
            InterventionError: If there is not one finite number for each row.
        """
        return self.checked(self.score(logits), len(logits))

    def checked(self, found: Float[Tensor, " row"], n_rows: int) -> Float[Tensor, " row"]:
        """Return scores if they are good.

        Raises:
            InterventionError: If there is not one finite number for each row.
        """
        if found.shape != (n_rows,) or not bool(found.isfinite().all()):
            raise InterventionError(
                f"the metric {self.name!r} gave {found.detach().flatten()[:4].tolist()} (shape "
                f"{list(found.shape)}) for {n_rows} rows; it must give one finite number a "
                "row. kl_div without log_target=True is a common cause of NaN."
            )
        return found


@dataclass(frozen=True, eq=False)
class Trace:
    """One side's unedited pass over one text.

    Args:
        side: Which.
        text: On what.
        values: Activations ``[token, width]`` by `Component.place`.
        calls: Arguments of every decoder layer, by path.
        off: Whether it is the base run with the adapter on and silenced, as patches of single
            adapter modules into the base need.
    """

    side: Side
    text: Text
    values: Mapping[str, Float[Tensor, "token width"]]
    calls: Mapping[str, Any] = field(repr=False)
    off: bool = False

    @property
    def on(self) -> Side:
        """The side whose modules run."""
        return "finetuned" if self.off else self.side


@dataclass(frozen=True, eq=False)
class Cell:
    """One patch: at these positions the component's activation becomes that of ``other``.

    Args:
        component: Where.
        positions: Token positions.
        other: The whole place ``[token, width]`` to copy from.
        move: If ``other`` is the own activation moved along one direction: how far at each token,
            and the unit vector in the component's channels. It is less to send to a server.
    """

    component: Component
    positions: tuple[int, ...]
    other: Float[Tensor, "token width"]
    move: tuple[Float[Tensor, "token one"], Float[Tensor, " _channel"]] | None = None


def places_of(components: Sequence[Component]) -> tuple[str, ...]:
    """Names of the tensors that components are in, once each."""
    return tuple(dict.fromkeys(each.place for each in components))


def places_together(
    sides: Sides, components: Sequence[Component], cells_each: int, n_tokens: int, max_tokens: int
) -> list[tuple[str, ...]]:
    """Places whose patches are measured together: one here, what fills a job on a server.

    Args:
        sides: The pair.
        components: What is patched.
        cells_each: Patches of each.
        n_tokens: Of the text.
        max_tokens: Of a batch.
    """
    found: list[list[str]] = []
    left, room = 0, max(1, max_tokens // n_tokens) if sides.kind == "remote" else 0
    for place in places_of(components):
        n = cells_each * sum(each.place == place for each in components)
        if not found or n > left:
            found.append([])
            left = room
        found[-1].append(place)
        left -= n
    return [tuple(each) for each in found]


def needs_attention(places: Sequence[str]) -> bool:
    """Whether a place is queries or keys."""
    return any(place.startswith(("query.", "key.")) for place in places)


def _sites(places: Sequence[str]) -> tuple[Site, ...]:
    return tuple(Site.parse(p) for p in places if not p.startswith(("query.", "key.")))


def _editor(
    sides: Sides, trace_on: Side, off: bool, batch: Batch, plan: Plan, reads: Any
) -> Editor:
    group = Group((0, len(batch.texts)), plan, sides.shape(trace_on), adapter_off=off)
    return Editor(batch, (group,), reads, lora=sides.lora if off else ())


def copies(sides: Sides, text: Text, n: int) -> Batch:
    """A batch of n copies of a text."""
    return make_batch([text] * n, padding_id(sides.tokenizer), "right")


@torch.no_grad()
def trace(sides: Sides, text: Text, side: Side, places: Sequence[str], *, attention: bool) -> Trace:
    """Run a side once, keep activations at places and every layer's arguments.

    Args:
        sides: The pair.
        text: What to run.
        side: "base" or "finetuned".
        places: What to keep, see `Component.place`.
        attention: Attend with the formula of `attention_watch`, as patches of queries and keys
            do; passes that are compared must agree in this.

    Raises:
        SiteError: If a place does not exist.
        RemoteError: If a place is a query's or a key's, and the weights are not here.
    """
    if sides.kind == "remote":
        from modeldiff import remote_patching

        return remote_patching.trace(sides, text, side, places)
    sites = _sites(places)
    off = side == "base" and any(site.kind == "lora" for site in sites)
    on: Side = "finetuned" if off else side
    check_sites(sites, sides.shape(on))
    batch = copies(sides, text, 1)
    editor = _editor(sides, on, off, batch, Plan(), sites)
    paths = [sides.site_map.layer(i) for i in range(sides.shape(on).n_layers)]
    with (
        sides.on(on) as root,
        hooked(root, sides.site_map, editor, sides.adapter_of(on)),
        recorded(root, paths) as calls,
        watching(root, sides.site_map, on=attention) as watch,
        stopping(root, paths[-1]),
    ):
        root(**inputs_of(batch, device_of(root)), use_cache=False)
    values = {str(site): h[0] for site, h in editor.acts.items()}
    queries = [place for place in places if place not in values]
    values.update({place: watch.value(place)[0] for place in queries})
    return Trace(side, text, values, calls, off)


def n_heads(sides: Sides, part: Part) -> int:
    """Heads of a part: kv heads for keys, else the attention heads."""
    config = sides.config.get_text_config()
    shared = getattr(config, "num_key_value_heads", None)
    return shared if part == "key" and shared else config.num_attention_heads


def head_width(sides: Sides) -> int:
    """Channels of one head in a ``z`` site."""
    config = sides.config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def columns_of(sides: Sides, component: Component, width: int) -> slice:
    """Channels of a component in its place.

    Raises:
        SiteError: If it has no such head.
    """
    if component.head < 0:
        return slice(0, width)
    n = n_heads(sides, component.part)
    if component.head >= n:
        raise SiteError(f"{component}: there are heads 0 to {n - 1}.")
    each = width // n
    return slice(component.head * each, (component.head + 1) * each)


@torch.no_grad()
def effects(
    sides: Sides,
    own: Trace,
    cells: Sequence[Cell],
    metric: Metric,
    *,
    max_tokens: int = 4096,
    prefix: bool = True,
) -> Iterator[tuple[slice, Float[Tensor, " cell"]]]:
    """Change of a metric by each patch, batch by batch; the cells must be of one place.

    Of a remote pair they may be of several, see `places_together`.

    A cell whose patch leaves the activation as it is, bit for bit, is exactly 0 and is not run.

    Args:
        sides: The pair.
        own: The side that is patched, on the text.
        cells: Patches of one place.
        metric: What is measured.
        max_tokens: Of a batch; halved where memory runs out.
        prefix: False runs the layers below too, for comparison.

    Yields:
        Which cells, and their changes in float64.
    """
    if sides.kind == "remote":
        from modeldiff import remote_patching

        yield from remote_patching.effects(sides, own, cells, metric, max_tokens=max_tokens)
        return

    def changes(some: list[int]) -> Float[Tensor, " cell"]:
        rows = torch.stack([_row(sides, own, cells[i]) for i in some])
        value = own.values[cells[0].component.place]
        moved = (rows != value).flatten(1).any(1)
        found = torch.zeros(len(rows), dtype=torch.float64)
        if bool(moved.any()):
            rows = torch.cat([value[None], rows[moved]])
            scores = metric(logits(sides, own, cells[0].component, rows, metric.at, prefix))
            scores = scores.double().cpu()
            found[moved.cpu()] = scores[1:] - scores[0]
        return found

    for some, found in fitted(
        sides.roots[0], range(len(cells)), changes, what="patches",
        width=lambda _: own.text.n_tokens, max_tokens=max_tokens,
        max_rows=max(1, max_tokens // own.text.n_tokens),
    ):  # fmt: skip
        yield slice(some[0], some[-1] + 1), found


def _row(sides: Sides, own: Trace, cell: Cell) -> Float[Tensor, "token width"]:
    value = own.values[cell.component.place]
    width = columns_of(sides, cell.component, value.shape[1])
    row, chosen = value.clone(), list(cell.positions)
    other = cell.other.to(value)
    row[chosen, width] = other[chosen, width]
    return row


def logits(
    sides: Sides,
    own: Trace,
    component: Component,
    rows: Float[Tensor, "row token width"],
    at: tuple[int, ...],
    prefix: bool = True,
    reads: tuple[Site, ...] = (),
    acts: dict[Site, Tensor] | None = None,
) -> Float[Tensor, "row place vocab"]:
    """Logits of copies of a text that hold ``rows`` at the place of a component.

    Args:
        sides: The pair.
        own: The side that is patched.
        component: Names the place.
        rows: What the place holds, whole.
        at: Positions whose logits are made.
        prefix: False runs the layers below too.
        reads: Sites of this layer or above to keep in ``acts``.
        acts: Filled with them.
    """
    batch, site = copies(sides, own.text, len(rows)), component.site
    above = component.part == "resid_post" and prefix
    plan = Plan() if site is None or above else Plan((Replace(site, rows),))
    editor = _editor(sides, own.on, own.off, batch, plan, reads)
    watch = Watch({component.place: rows} if site is None else {})
    first = component.layer + above if prefix else 0
    paths = [sides.site_map.layer(i) for i in range(first, sides.shape(own.on).n_layers)]
    calls = {path: own.calls[path] for path in paths}
    with (
        sides.on(own.on) as root,
        hooked(root, sides.site_map, editor, sides.adapter_of(own.on)),
        watching(root, sides.site_map, watch, on=site is None),
    ):
        start = hidden_argument(calls[paths[0]]) if calls else rows
        h = rows if above else start.expand(len(rows), *start.shape[1:])
        h = read_out(sides, root, replay(root, calls, h), at)
    editor.check_fired()
    if acts is not None:
        acts.update(editor.acts)
    return h


def read_out(
    sides: Sides, root: nn.Module, h: Float[Tensor, "row token d_model"], at: tuple[int, ...]
) -> Float[Tensor, "row place vocab"]:
    """Float32 logits at some positions, from the residual stream after the last layer."""
    last = module_at(root, sides.site_map.norm)(h[:, list(at)])
    return unembedding(root, sides.site_map)(last)
