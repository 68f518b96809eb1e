"""The algebra of edits, as properties; the order of plans; keys; and edits of whole models."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeldiff.batching import make_batch
from modeldiff.directions import Direction
from modeldiff.editing import Editor, Group
from modeldiff.errors import InterventionError, SiteError
from modeldiff.interventions import (
    Ablate,
    Clamp,
    Plan,
    Replace,
    ScaleAdapter,
    ScaleAlong,
    Shape,
    Steer,
    as_plan,
    moved,
    site_kinds,
)
from modeldiff.masks import Positions, Regex
from modeldiff.sites import Site
from modeldiff.tokens import render
from tests.families import N_LAYERS, WIDTH, tokenizer

SHAPE = Shape(N_LAYERS, WIDTH, (Site("lora", 1, "mlp.down_proj"), Site("lora", 2, "mlp.down_proj")))
TEXTS = ["the cat sat on", "a small bird sang of rain and sun over", "why"]
SITE = Site("resid_post", 1)


def direction(seed=0, site: Site | str = SITE, width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    return Direction.of(torch.randn(width, generator=generator), site, f"d{seed}")


def acts(seed=0, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(3, 5, WIDTH, generator=generator) * scale).to(dtype)


def applied(edit, h, other=None):
    """Apply an edit as the editor does, and check that its inputs are left alone."""
    kept, vectors = h.clone(), edit.vectors()
    kept_vectors = vectors.clone()
    out = edit.apply(h, vectors, other)
    assert torch.equal(h, kept), "the activations that came in were modified"
    assert torch.equal(vectors, kept_vectors)
    assert out.shape == h.shape
    assert out.dtype == torch.float32
    return out


SEEDS = st.integers(0, 10_000)
SCALES = st.sampled_from([1e-2, 1.0, 1e3])
FACTORS = st.floats(-10, 10)
quick = settings(max_examples=25, deadline=None)


# ---------------------------------------------------------------- the algebra


@quick
@given(seed=SEEDS, scale=SCALES)
def test_scaling_by_one_changes_nothing(seed, scale):
    h = acts(seed, scale)
    assert torch.equal(applied(ScaleAlong(direction(seed + 1), 1.0), h), h)


@quick
@given(seed=SEEDS, scale=SCALES)
def test_after_ablation_nothing_is_left_along_the_direction(seed, scale):
    d, h = direction(seed), acts(seed + 1, scale)
    out = applied(Ablate(d), h)
    assert ((out @ d.unit).abs() < 1e-5 * h.norm(dim=-1)).all()
    rest = h - (h @ d.unit)[..., None] * d.unit
    torch.testing.assert_close(out, rest, atol=1e-5 * scale, rtol=1e-5)


@quick
@given(seed=SEEDS, scale=SCALES)
def test_ablation_is_idempotent_and_is_scaling_by_zero(seed, scale):
    d, h = direction(seed), acts(seed + 1, scale)
    once = applied(Ablate(d), h)
    torch.testing.assert_close(applied(Ablate(d), once), once, atol=1e-5 * scale, rtol=1e-5)
    zero = applied(ScaleAlong(d, 0.0), h)
    torch.testing.assert_close(zero, once, atol=1e-5 * scale, rtol=1e-5)


@quick
@given(seed=SEEDS, cosine=st.floats(-0.99, 0.99))
def test_directions_that_are_not_orthogonal_are_ablated_together(seed, cosine):
    """One after the other would leave a component along the first."""
    a, noise = direction(seed), direction(seed + 1)
    orthogonal = noise.unit - (noise.unit @ a.unit) * a.unit
    mixed = cosine * a.unit + (1 - cosine**2) ** 0.5 * orthogonal / orthogonal.norm()
    b = Direction.of(mixed, SITE, "b")
    h = acts(seed + 2)
    out = applied(Ablate([a, b]), h)
    bound = 1e-5 * h.norm(dim=-1)
    assert ((out @ a.unit).abs() < bound).all()
    assert ((out @ b.unit).abs() < bound / (1 - cosine**2) ** 0.5 * 2).all()
    torch.testing.assert_close(applied(Ablate([b, a]), h), out, atol=1e-4, rtol=1e-4)
    third = acts(seed + 3)[0, 0]
    third = third - Ablate([a, b]).basis.T @ (Ablate([a, b]).basis @ third)
    torch.testing.assert_close(out @ third, h @ third, atol=1e-3, rtol=1e-4)


@quick
@given(seed=SEEDS, value=FACTORS)
def test_clamping_sets_the_component_and_nothing_else(seed, value):
    d, h = direction(seed), acts(seed + 1)
    out = applied(Clamp(d, value), h)
    torch.testing.assert_close(out @ d.unit, torch.full(h.shape[:2], value), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(applied(Ablate(d), out), applied(Ablate(d), h), atol=1e-4, rtol=1e-4)


@quick
@given(seed=SEEDS, factor=FACTORS)
def test_scaling_multiplies_the_component(seed, factor):
    d, h = direction(seed), acts(seed + 1)
    out = applied(ScaleAlong(d, factor), h)
    torch.testing.assert_close(out @ d.unit, factor * (h @ d.unit), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out - applied(Ablate(d), out), (out @ d.unit)[..., None] * d.unit,
                               atol=1e-4, rtol=1e-4)  # fmt: skip


@quick
@given(seed=SEEDS, coefficient=FACTORS)
def test_steering_adds_the_raw_length(seed, coefficient):
    d, h = direction(seed), acts(seed + 1)
    torch.testing.assert_close(
        applied(Steer(d, coefficient), h), h + coefficient * d.vector, atol=1e-4, rtol=1e-4
    )
    there = applied(Steer(d, coefficient), h)
    torch.testing.assert_close(applied(Steer(d, -coefficient), there), h, atol=1e-4, rtol=1e-4)


@quick
@given(seed=SEEDS)
def test_replacing_along_a_direction_takes_that_component_alone(seed):
    d, h, other = direction(seed), acts(seed + 1), acts(seed + 2)
    kept = other.clone()
    out = applied(Replace("resid_post.1", "base", along=d), h, other)
    torch.testing.assert_close(out @ d.unit, other @ d.unit, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(applied(Ablate(d), out), applied(Ablate(d), h), atol=1e-5, rtol=1e-4)
    assert torch.equal(applied(Replace("resid_post.1", "base"), h, other), other)
    assert torch.equal(other, kept)
    with pytest.raises(InterventionError, match="no activations to copy"):
        Replace("resid_post.1", "base").apply(h, torch.empty(0, 0), None)


def test_replacing_channels_takes_those_alone():
    h, other = acts(0), acts(1)
    out = Replace("z.1", channels=(3, 7)).apply(h, torch.empty(0, 0), other)
    assert torch.equal(out[..., 3:7], other[..., 3:7])
    assert torch.equal(out[..., :3], h[..., :3])
    assert torch.equal(out[..., 7:], h[..., 7:])
    whole = Replace("z.1", channels=(0, h.shape[-1])).apply(h, torch.empty(0, 0), other)
    assert torch.equal(whole, other)


@pytest.mark.parametrize("wrong", [(3, 3), (5, 2), (-1, 2), (False, 1)])
def test_channels_that_are_no_range_are_refused(wrong):
    with pytest.raises(InterventionError, match="one after the last"):
        Replace("z.1", channels=wrong)


@pytest.mark.parametrize("wrong", [(), (1,), (1, 2, 3), (0.0, 2.0)])
def test_channels_that_are_no_two_numbers_are_refused(wrong):
    with pytest.raises((InterventionError, TypeError)):  # the latter where types are checked
        Replace("z.1", channels=wrong)


def test_channels_beside_a_direction_are_refused():
    with pytest.raises(InterventionError, match="not both"):
        Replace(SITE, along=direction(), channels=(0, 4))


@pytest.mark.parametrize("engine", ["hooks", "nnsight"])
@pytest.mark.parametrize("by_tensor", [False, True])
def test_channels_that_do_not_exist_are_refused(family_pairs, engine, by_tensor):
    """A slice that reaches too far would be cut in silence."""
    pair = family_pairs["llama"]
    source = pair.run(TEXTS, side="base", reads=SITE).acts[SITE] if by_tensor else "base"
    with pytest.raises(InterventionError, match=f"channels 0 to {WIDTH - 1}"):
        pair.run(TEXTS, do=Replace(SITE, source, channels=(8, WIDTH + 1)), engine=engine)


def test_a_copy_from_the_other_model_is_no_view_of_it():
    """Someone who writes to what comes out must not write to the other model's activations."""
    other = acts(1)
    out = Replace("resid_post.1", "base").apply(acts(0), torch.empty(0, 0), other)
    assert out.data_ptr() != other.data_ptr()


# ---------------------------------------------------------------- the editor


def edited(plan, h, where_texts=TEXTS, site=SITE, others=None):
    batch = make_batch([render(tokenizer(), text) for text in where_texts], 0, "left")
    group = Group((0, len(batch.texts)), as_plan(plan), SHAPE, others=others or {})
    editor = Editor(batch, (group,))
    out = editor.at(site, h)
    editor.check_fired()
    return out, batch


def padded_acts(dtype=torch.float32, width=WIDTH):
    batch = make_batch([render(tokenizer(), text) for text in TEXTS], 0, "left")
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*batch.ids.shape, width, generator=generator).to(dtype) * 10


def test_arithmetic_on_bfloat16_is_done_in_float32():
    h = padded_acts(torch.bfloat16)
    d = direction()
    for edit in (Ablate(d, None), Clamp(d, 3.0), ScaleAlong(d, -2.5), Steer(d, 0.37)):
        out, _ = edited(edit, h.clone())
        truth = edit.apply(h.float(), edit.vectors(), None).bfloat16()
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, truth)
    once, _ = edited(Ablate(d, None), h)
    in_bfloat16 = h - (h @ d.unit.bfloat16())[..., None] * d.unit.bfloat16()
    left, worse = (x.float() @ d.unit for x in (once, in_bfloat16))
    assert left.abs().mean() < worse.abs().mean()


def test_only_selected_tokens_change_and_the_input_is_left_alone():
    h = padded_acts()
    kept = h.clone()
    out, batch = edited(Steer(direction(), where=Regex("cat|rain")), h)
    changed = (out != h).any(-1)
    pieces = [
        [
            piece
            for piece, hit in zip(text.pieces, row[-text.n_tokens :].tolist(), strict=True)
            if hit
        ]
        for text, row in zip(batch.texts, changed, strict=True)
    ]
    assert pieces == [[" cat"], [" rain"], []]
    assert torch.equal(h, kept)
    assert not changed[batch.attention_mask == 0].any()


def test_the_order_of_a_plan_is_respected():
    h, d = padded_acts(), direction()
    clamp_last, _ = edited(Steer(d, 2.0) + Clamp(d, 1.0), h)
    steer_last, _ = edited(Clamp(d, 1.0) + Steer(d, 2.0), h)
    one = torch.ones(h.shape[:2])
    torch.testing.assert_close(clamp_last @ d.unit, one, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(steer_last @ d.unit, one + 2 * d.scale, atol=1e-4, rtol=1e-4)
    assert len(Steer(d) + Clamp(d, 1.0) + (Ablate(d) + Steer(d))) == 4
    plan = Steer(d) + (Clamp(d, 1.0) + Ablate(d))
    assert [type(edit).__name__ for edit in plan.edits] == ["Steer", "Clamp", "Ablate"]


def test_the_order_matters_in_a_model_too(family_pairs):
    pair, d = family_pairs["llama"], direction()
    read = {}
    for name, plan in (("ac", Steer(d) + Clamp(d, 1.0)), ("ca", Clamp(d, 1.0) + Steer(d))):
        for engine in ("hooks", "nnsight"):
            run = pair.run(TEXTS, do=plan, reads=SITE, logits=False, engine=engine)
            read[name, engine] = run.acts[SITE][:, -1] @ d.unit
    for engine in ("hooks", "nnsight"):
        torch.testing.assert_close(read["ac", engine], torch.ones(3), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            read["ca", engine], torch.ones(3) + d.scale, atol=1e-4, rtol=1e-4
        )


def test_a_layer_named_twice_is_edited_once():
    h, d = padded_acts(), direction()
    twice, _ = edited(Steer(d, 1.0, layers=(1, 1)), h)
    once, _ = edited(Steer(d, 1.0, layers=1), h)
    assert torch.equal(twice, once)


@pytest.mark.parametrize("shape", [(1, -1), (3, 1), (1, 1), (2, -1), (3, -2)])
def test_a_tensor_that_does_not_fit_the_batch_is_refused(family_pairs, shape):
    """Broadcasting would change the number of rows in silence."""
    pair = family_pairs["llama"]
    whole = pair.run(TEXTS, reads=SITE).acts[SITE]
    rows, tokens = shape[0], shape[1] if shape[1] > 0 else whole.shape[1] + 1 + shape[1]
    with pytest.raises(InterventionError, match=r"shape"):
        pair.run(TEXTS, do=Replace(SITE, whole[:rows, :tokens]))


def test_a_tensor_of_the_same_batch_is_put_in(family_pairs):
    pair = family_pairs["llama"]
    base = pair.run(TEXTS, side="base", reads=SITE).acts[SITE]
    by_tensor = pair.run(TEXTS, do=Replace(SITE, base), reads=SITE)
    by_name = pair.run(TEXTS, do=Replace(SITE, "base"))
    assert torch.equal(by_tensor.logits, by_name.logits)
    assert torch.equal(by_tensor.acts[SITE], base)


# ---------------------------------------------------------------- where an edit acts


def test_sites_of_edits():
    d = direction()
    assert Steer(d).sites(SHAPE) == (SITE,)
    assert Steer(d, layers=3).sites(SHAPE) == (Site("resid_post", 3),)
    assert [s.layer for s in Ablate(d).sites(SHAPE)] == [0, 1, 2, 3]
    assert Ablate(d, layers=None).sites(SHAPE) == (SITE,)
    assert ScaleAdapter(0.0).sites(SHAPE) == SHAPE.lora
    assert ScaleAdapter(0.0, layers=2).sites(SHAPE) == SHAPE.lora[1:]
    plan = Steer(d) + ScaleAdapter(0.0) + Replace("z.2")
    assert site_kinds(plan, SHAPE) == {"resid_post", "lora", "z"}


@pytest.mark.ill_typed
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: Steer(d, layers=4), r"layers \[4\] asked for, the model has 0 to 3"),
        (lambda d: Clamp(d, 1.0, layers=(0, -1)), r"layers \[-1\]"),
        (lambda d: Ablate(d, layers=()), "none"),
        (lambda d: Ablate(d, layers="al"), r"layers \['a', 'l'\]"),  # pyright: ignore
        (lambda d: Replace(("resid_post.1", "mlp_out.7")), r"mlp_out\.7"),
        (lambda d: ScaleAdapter(0.0, layers=0), r"matches no adapted module.*1\.mlp\.down_proj"),
        (lambda d: ScaleAdapter(0.0, modules=("mlp.up_proj",)), "matches no adapted module"),
    ],
)
def test_edits_that_have_no_site_are_errors(make, words):
    with pytest.raises(InterventionError, match=words):
        make(direction()).sites(SHAPE)


@pytest.mark.ill_typed
@pytest.mark.parametrize("do", ["steer", 1.0, [], direction()])
def test_what_is_no_edit_is_refused(do):
    with pytest.raises(InterventionError, match=f"a {type(do).__name__} is no edit"):
        as_plan(do)


def test_a_direction_of_another_width_is_refused():
    with pytest.raises(InterventionError, match=r"has width 16.*comes from another model"):
        Steer(direction(width=16)).sites(SHAPE)
    with pytest.raises(InterventionError, match=r"has width 16.*comes from another model"):
        Steer(direction(width=16).at("mlp_out.1")).sites(SHAPE)
    Steer(direction(width=16).at("mlp_act.1")).sites(SHAPE)
    with pytest.raises(InterventionError, match="needs a side with a LoRA adapter"):
        ScaleAdapter(0.0).sites(Shape(4, WIDTH))
    with pytest.raises(SiteError):
        Replace("resid_post").sites(SHAPE)


def test_ablating_needs_directions_of_one_kind():
    with pytest.raises(InterventionError, match="one kind of site"):
        Ablate([direction(), direction(1, "mlp_out.1")])
    with pytest.raises(InterventionError, match="none"):
        Ablate([])


def test_ablating_directions_of_several_layers_needs_layers():
    """Their "own layer" would be that of the first."""
    several = [direction(), direction(1, "resid_post.2")]
    with pytest.raises(InterventionError, match=r"layers"):
        Ablate(several, layers=None)
    assert len(Ablate(several).sites(SHAPE)) == 4


# ---------------------------------------------------------------- keys


def variants():
    d, e = direction(0), direction(1)
    tensor = torch.arange(24.0).reshape(2, 3, 4)
    return {
        "steer": Steer(d),
        "coefficient": Steer(d, 1.0000001),
        "negative": Steer(d, -1.0),
        "layers": Steer(d, layers=2),
        "all layers": Steer(d, layers="all"),
        "two layers": Steer(d, layers=(1, 2)),
        "where": Steer(d, where="new"),
        "regex": Steer(d, where=Regex("a")),
        "other regex": Steer(d, where=Regex("b")),
        "positions": Steer(d, where=Positions((1,))),
        "direction": Steer(e),
        "scale": Steer(replace(d, scale=d.scale * 2)),
        "site": Steer(replace(d, site=Site("resid_post", 2))),
        "kind": Steer(replace(d, site=Site("mlp_out", 1))),
        "ablate": Ablate(d),
        "ablate two": Ablate([d, e]),
        "ablate here": Ablate(d, None),
        "ablate new": Ablate(d, where="new"),
        "scale along": ScaleAlong(d, 1.0),
        "factor": ScaleAlong(d, 2.0),
        "clamp": Clamp(d, 1.0),
        "value": Clamp(d, 2.0),
        "replace": Replace("resid_post.1"),
        "replace site": Replace("resid_post.2"),
        "replace sites": Replace(("resid_post.1", "resid_post.2")),
        "source": Replace("resid_post.1", "finetuned"),
        "along": Replace("resid_post.1", along=d),
        "along other": Replace("resid_post.1", along=e),
        "replace where": Replace("resid_post.1", where="prompt"),
        "channels": Replace("resid_post.1", channels=(0, 4)),
        "other channels": Replace("resid_post.1", channels=(0, 5)),
        "tensor": Replace("resid_post.1", tensor),
        "other tensor": Replace("resid_post.1", tensor + 1),
        "reshaped tensor": Replace("resid_post.1", tensor.reshape(2, 4, 3)),
        "bfloat16 tensor": Replace("resid_post.1", tensor.bfloat16()),
        "adapter": ScaleAdapter(0.5),
        "adapter factor": ScaleAdapter(0.25),
        "adapter layers": ScaleAdapter(0.5, layers=1),
        "adapter modules": ScaleAdapter(0.5, modules=("mlp.down_proj",)),
        "adapter where": ScaleAdapter(0.5, where="new"),
        "none": Plan(),
        "twice": Steer(d) + Steer(d),
        "order": Steer(d) + Ablate(d),
        "other order": Ablate(d) + Steer(d),
    }


def test_every_argument_is_part_of_the_key_and_equal_plans_have_equal_keys():
    keys = {name: as_plan(edit).content_key for name, edit in variants().items()}
    again = {name: as_plan(edit).content_key for name, edit in variants().items()}
    assert keys == again
    names = {}
    for name, key in keys.items():
        assert key not in names, f"{name!r} and {names[key]!r} have one key"
        names[key] = name


@pytest.mark.ill_typed
def test_writing_an_argument_differently_does_not_change_the_key():
    d, ones = direction(), torch.ones(1, 2, 3)
    same = [
        (Steer(d, 2), Steer(d, 2.0)),
        (Steer(d, where="new"), moved(Steer(d), "new")),
        (Ablate(d, where="new"), moved(Ablate(d), "new")),
        (Ablate(d), Ablate([d])),
        (Replace("resid_post.1"), Replace((Site("resid_post", 1),))),
        (Clamp(d, 1), Clamp(d, 1.0)),
        (Steer(d, layers=(1, 2)), Steer(d, layers=range(1, 3))),  # pyright: ignore
        (Steer(d), Steer(replace(d, name="another name", n_tokens=7))),
        (Replace(SITE, ones), Replace(SITE, ones.clone().requires_grad_(True))),
        (Replace(SITE, channels=(0, 2)), Replace(SITE, "base", None, "all", (0, 2))),
    ]
    for a, b in same:
        assert as_plan(a).content_key == as_plan(b).content_key


def test_keys_of_older_versions_stay():
    key = as_plan(Replace("resid_post.1", where="prompt")).content_key
    assert key == "2d5bbfec1a70ea4e"


def test_plans_describe_themselves():
    assert Replace(("z.1", "z.2"), "finetuned", channels=(8, 16)).describe() == (
        "replace z.1[8:16], z.2[8:16] from finetuned"
    )
    d = direction()
    assert Plan().describe() == "none"
    plan = Steer(d, -1.5) + Ablate([d, direction(1)]) + Clamp(d, 2.0) + ScaleAlong(d, 3.0)
    assert plan.describe() == "steer -1.5x d0 + ablate d0, d1 + clamp d0 to 2 + scale d0 x3"
    copied = Replace("z.1", torch.ones(1, 1, 1))
    other = Replace(("z.2", "z.1"), along=d) + ScaleAdapter(0.0) + copied
    assert other.describe() == (
        "replace z.1, z.2 along d0 from base + adapter x0 + replace z.1 from another run"
    )
