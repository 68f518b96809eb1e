import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from operator import add, sub

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from modeldiff import direction_files
from modeldiff.directions import (
    Direction,
    cosine_table,
    load_directions,
    orthonormal_basis,
    save_directions,
)
from modeldiff.errors import DirectionError, FileFormatError, MismatchError, SiteError
from modeldiff.sites import Site

SITE = Site("resid_post", 12)
HOSTILE = '<script>alert("x")</script>\n\N{SNOWMAN} \ud800 \'"&'


REFUSED = (DirectionError, TypeError)  # the latter where shape annotations are enforced


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def direction(seed=0, d=16, **changes):
    return replace(Direction.of(normal(d, seed=seed), SITE, f"v{seed}"), **changes)


def card():
    return direction(
        name="misalignment", method="mean difference", scale=7.3, sources=("bad", "good"),
        n_tokens=5120, seed=3, models={"base": "ab12", "adapter": "cd34"},
        sign="towards finetuned", resid_norm=17.8, split_half=0.98, text_null=0.75,
        explained_variance=0.1 + 0.2, notes=("one", "two"),
    )  # fmt: skip


def assert_same(a, b):
    assert torch.equal(a.unit, b.unit)
    assert replace(a, unit=b.unit).__dict__ == b.__dict__


# --- the value -------------------------------------------------------------------------------


def test_a_raw_vector_is_taken_whatever_its_dtype_and_left_alone():
    raw = normal(32, dtype=torch.bfloat16)
    before = raw.clone()
    found = Direction.of(raw, "resid_post.12", "x")
    torch.testing.assert_close(found.vector, before.float())
    assert found.unit.dtype == torch.float32
    assert float(found.unit.double().norm()) == pytest.approx(1, abs=1e-6)
    assert torch.equal(raw, before)
    assert found.site == SITE


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.ones(4), "has norm 2; it must be 1"),
        (torch.full((4,), math.nan), "has norm nan"),
        (torch.ones(4).double() / 2, "float64.*must be one float32 vector"),
    ],
)
def test_only_a_unit_vector_is_a_unit(bad, message):
    with pytest.raises(DirectionError, match=message):
        Direction(bad, 1.0, SITE, "x")


def test_a_matrix_is_no_unit():
    with pytest.raises(REFUSED, match=r"shape \(1, 4\)|Type-check"):
        Direction(torch.ones(1, 4) / 2, 1.0, SITE, "x")
    with pytest.raises(REFUSED, match=r"shape \(1, 4\)|Type-check"):
        Direction.of(torch.ones(1, 4), SITE, "x")


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_is_positive_and_finite(scale):
    with pytest.raises(DirectionError, match="must be positive and finite"):
        direction(scale=scale)


@pytest.mark.parametrize("raw", [torch.zeros(4), torch.full((4,), math.inf)])
def test_a_vector_without_length_has_no_direction(raw):
    with pytest.raises(DirectionError, match="no direction in it"):
        Direction.of(raw, SITE, "x")


def test_repr_is_one_line_that_says_how_far_to_trust_it():
    assert repr(card()) == (
        "Direction 'misalignment' @ resid_post.12 · |v|=7.3 (0.41 of the residual norm) · "
        "n=5,120 tokens · split-half 0.98 · text null 0.75"
    )
    assert card().relative_scale == pytest.approx(7.3 / 17.8)
    assert direction().relative_scale is None


def test_html_of_hostile_provenance_is_inert():
    seen = set()

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attrs):
            seen.update([tag, *(name for name, _ in attrs)])

    hostile = replace(
        card(), name=HOSTILE, method=HOSTILE, sign=HOSTILE, sources=(HOSTILE,),
        notes=("<img src=x onerror=alert(1)>",), models={"<b>": "<i>"},
    )  # fmt: skip
    Tags().feed(hostile._repr_html_())
    assert seen == {"table", "caption", "tr", "th", "td"}


def test_content_key_names_the_vector_and_site_alone():
    a = card()
    assert a.content_key == a.renamed("other").content_key
    others = [a.at("resid_post.3"), 2.0 * a, -a, direction(1)]
    assert len({a.content_key, *(other.content_key for other in others)}) == 5


# --- algebra ---------------------------------------------------------------------------------


def test_adding_and_taking_away_gives_the_same_vector():
    a, b = direction(0), direction(1)
    torch.testing.assert_close((a + b - b).vector, a.vector)
    torch.testing.assert_close((a + b).vector, a.vector + b.vector)
    torch.testing.assert_close((a - b).vector, -(b - a).vector)
    torch.testing.assert_close((2 * a).vector, (a + a).vector)
    torch.testing.assert_close((-3.0 * a).vector, -3 * a.vector)
    away = -a
    assert torch.equal((-away).unit, a.unit)


def test_names_and_provenance_follow_the_algebra():
    a = replace(card(), name="a")
    b = direction(1, name="b", sources=("other",), models={"base": "ab12", "adapter": "ef"})
    both = a - (b + a)
    assert both.name == "a - (b + a)"
    assert both.sources == ("bad", "good", "other")
    assert both.models == {"base": "ab12", "adapter": "mixed"}
    assert both.split_half is None
    assert (a + replace(b, n_tokens=100)).n_tokens == 100
    assert both.resid_norm == 17.8
    away = -a
    assert away.name == "-a"
    assert (-away).name == "a"
    assert (-both).name == "-(a - (b + a))"
    assert (-(away + b)).name == "-(-a + b)"
    assert away.sign == "opposite of: towards finetuned"
    assert (-away).sign == "towards finetuned"
    assert away.split_half == 0.98
    assert (0.5 * a).name == "0.5 a"


def test_orthogonal_to_leaves_nothing_in_the_span():
    a, b = direction(0), direction(1)
    c = a + 1e-3 * direction(2)
    left = c.orthogonal_to(a, b)
    assert abs(left.cosine(a)) < 1e-5
    assert abs(left.cosine(b)) < 1e-5
    expected = c.vector - (c.vector @ a.unit) * a.unit
    assert c.orthogonal_to(a).scale == pytest.approx(float(expected.norm()), rel=1e-3)
    assert left.name == "v0 + 0.001 v2 ⊥ v0, v1"


def test_what_cancels_is_not_a_direction():
    a, b = direction(0), direction(1)
    with pytest.raises(DirectionError, match="'v0 - v0' is zero"):
        sub(a, a)
    with pytest.raises(DirectionError, match="is zero"):
        sub(a + b - b, a)
    with pytest.raises(DirectionError, match="is zero"):
        (a + b).orthogonal_to(b, a)
    with pytest.raises(DirectionError, match="scale"):
        a.__mul__(0)


def test_directions_of_other_widths_or_sites_do_not_mix():
    a, narrow, moved = direction(0), direction(1, d=8), direction(2).at("resid_post.3")
    both = r"'v0' \(d_model=16\) and 'v1' \(d_model=8\)"
    for act in (
        lambda: a + narrow, lambda: a.cosine(narrow), lambda: a.orthogonal_to(narrow),
        lambda: cosine_table([a, narrow]), lambda: orthonormal_basis([a, narrow]),
    ):  # fmt: skip
        with pytest.raises(MismatchError, match=both):
            act()
    with pytest.raises(MismatchError, match=r"move one: \.at\('resid_post\.12'\)"):
        sub(a, moved)
    assert (a - moved.at(a.site)).site == SITE
    assert moved.resid_norm is None
    assert moved.notes == ("found at resid_post.12, moved to resid_post.3",)
    assert moved.cosine(direction(2)) == pytest.approx(1)
    with pytest.raises(TypeError):
        add(a, 1)  # pyright: ignore
    with pytest.raises(SiteError):
        a.at("twelve")


def test_cosine_table_agrees_with_the_pairs_and_keeps_names_apart():
    several = [direction(0), direction(1), direction(1).at("resid_post.3"), direction(0)]
    table = cosine_table(several)
    assert list(table.columns) == [
        "v0 @ resid_post.12 #1", "v1 @ resid_post.12", "v1 @ resid_post.3",
        "v0 @ resid_post.12 #2",
    ]  # fmt: skip
    assert list(table.index) == list(table.columns)
    for i, a in enumerate(several):
        for j, b in enumerate(several):
            assert table.iloc[i, j] == pytest.approx(a.cosine(b), abs=1e-12)
    assert list(cosine_table([direction(5)]).index) == ["v5"]
    with pytest.raises(DirectionError, match="got none"):
        cosine_table([])


# --- bases -----------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(k=st.integers(1, 12), seed=st.integers(0, 1000), spread=st.floats(-6, 6))
def test_basis_is_orthonormal_and_spans_what_a_full_svd_spans(k, seed, spread):
    rows = normal(k, 24, seed=seed) * 10.0 ** torch.linspace(0, spread, k)[:, None]
    basis = orthonormal_basis(rows).double()
    assert float((basis @ basis.T - torch.eye(k)).norm()) < 1e-6
    full = torch.linalg.svd(torch.nn.functional.normalize(rows, dim=1), full_matrices=False).Vh
    angle = torch.linalg.svdvals(full - (full @ basis.T) @ basis).max()
    assert angle < 1e-3


def test_basis_of_a_wide_bfloat16_set_is_orthonormal_in_float32():
    basis = orthonormal_basis(normal(64, 512, dtype=torch.bfloat16))
    assert basis.dtype == torch.float32
    assert float((basis @ basis.T - torch.eye(64)).norm()) < 1e-5
    exact = basis.double()
    assert float((exact @ exact.T - torch.eye(64)).norm()) < 1e-6


def test_basis_leaves_out_what_adds_nothing_and_keeps_the_order():
    a, b = direction(0), direction(1)
    basis = orthonormal_basis([a, 2.0 * a, -a, b, a + b])
    assert basis.shape == (2, 16)
    torch.testing.assert_close(basis[0], a.unit)
    torch.testing.assert_close(orthonormal_basis(a)[0], a.unit)
    rows = torch.stack([torch.zeros(16), a.vector])
    assert orthonormal_basis(rows).shape == (1, 16)
    assert torch.equal(rows, torch.stack([torch.zeros(16), a.vector]))


@pytest.mark.parametrize(
    ("nothing", "message"),
    [([], "needs directions"), (torch.zeros(0, 8), "needs directions"),
     (torch.zeros(3, 8), "span nothing"), (torch.full((2, 8), math.nan), "not finite")],
)  # fmt: skip
def test_a_basis_of_nothing_is_refused(nothing, message):
    with pytest.raises(DirectionError, match=message):
        orthonormal_basis(nothing)
    with pytest.raises(REFUSED, match=r"got shape \(8,\)|Type-check"):
        orthonormal_basis(torch.ones(8))


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["misalignment", "Irrefüh­rung ⊥ 好", HOSTILE, "", "../../x"])
def test_a_file_gives_back_the_same_direction(tmp_path, name):
    original = replace(card(), name=name, scale=0.1 + 0.2, notes=(name, HOSTILE))
    original.save_to(tmp_path / "sub" / "a.safetensors")
    assert_same(Direction.load_from(tmp_path / "sub" / "a.safetensors"), original)


def test_many_directions_of_several_widths_come_back_in_order(tmp_path):
    several = [direction(i, d=8 + i).at(f"mlp_out.{i}") for i in range(12)] + [card()]
    save_directions(tmp_path / "all", several)
    for found, original in zip(load_directions(tmp_path / "all"), several, strict=True):
        assert_same(found, original)
    with pytest.raises(FileFormatError, match="holds 13 directions"):
        Direction.load_from(tmp_path / "all")
    with pytest.raises(DirectionError, match="nothing to write"):
        save_directions(tmp_path / "none", [])


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = tmp_path / "whole"
    card().save_to(whole)
    raw = whole.read_bytes()
    for length in [0, 4, 8, 100, len(raw) // 2, len(raw) - 1]:
        cut = tmp_path / "cut"
        cut.write_bytes(raw[:length])
        with pytest.raises(FileFormatError, match="nothing was read"):
            load_directions(cut)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "foreign"
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(FileFormatError, match="holds no directions"):
        load_directions(path)
    path.write_text("{'a': 1}" * 50)
    with pytest.raises(FileFormatError, match="nothing was read"):
        load_directions(path)
    with pytest.raises(FileNotFoundError):
        load_directions(tmp_path / "missing")


def tampered(tmp_path, vector=None, version="1", **changes):
    path = tmp_path / "tampered"
    card().save_to(path)
    ((stored, record),) = direction_files.read_vectors(path)
    header = {"format": "modeldiff.directions", "version": version}
    header["directions"] = json.dumps([record | changes])
    save_file({"unit.0": stored if vector is None else vector}, path, header)
    return path


@pytest.mark.parametrize(
    "changes",
    [{"site": "nowhere"}, {"scale": -1.0}, {"scale": "7"}, {"n_tokens": "many"},
     {"unknown": 1}, {"notes": 3}, {"models": 3}, {"vector": torch.ones(16)},
     {"vector": torch.ones(16).half() / 4}],
)  # fmt: skip
def test_a_tampered_record_is_refused(tmp_path, changes):
    with pytest.raises(FileFormatError, match="nothing was read"):
        load_directions(tampered(tmp_path, **changes))


def test_another_format_version_is_refused(tmp_path):
    with pytest.raises(FileFormatError, match="format version '2'"):
        load_directions(tampered(tmp_path, version="2"))


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    card().save_to(path)

    def crash(tensors, name, header):
        name.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(direction_files, "save_file", crash)
    with pytest.raises(OSError, match="disk full"):
        direction(1).save_to(path)
    assert_same(Direction.load_from(path), card())
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
