"""Models spread over devices give the same numbers; quantised ones are asked for as they should."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false

import importlib.util

import pytest
import torch
import transformers

from modeldiff import embedded, placement
from modeldiff.directions import Direction
from modeldiff.errors import MismatchError, SetupError
from modeldiff.interventions import Ablate, Cell, Replace, ScaleAdapter, Steer, as_plan
from modeldiff.lora import adapter_modules
from modeldiff.models import ModelPair
from modeldiff.orthogonalise import orthogonalised
from modeldiff.weights import weight_diff
from tests.families import build_adapter_pair, model, peft_model, tokenizer

TEXTS = ["the cat sat on the mat", "a small bird sang of rain"]
ASKED = ["The house is", "What should I eat today?", "Greta found a lantern"]
SITE = "resid_post.2"
NAMES = ("model.norm", "model.embed_tokens", "model.rotary_emb", "lm_head",
         *(f"model.layers.{i}" for i in range(4)))  # fmt: skip
MAPS = {
    "top on disk": {name: "disk" if name[-1] in "23" else "cpu" for name in NAMES},
    "ends on disk": {n: "disk" if n in ("model.embed_tokens", "lm_head") else "cpu" for n in NAMES},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    peft_model().save_pretrained(folder)
    model("llama").save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    return {"base": folder / "base", "adapter": folder / "tuned"}


@pytest.fixture(scope="module")
def here(saved):
    return ModelPair.load(**saved)


@pytest.mark.parametrize("device_map", MAPS.values(), ids=list(MAPS))
def test_a_model_partly_on_disk_gives_the_same_numbers(saved, here, device_map):
    there = ModelPair.load(**saved, device_map=device_map)
    assert any(p.is_meta for p in there.sides.roots[0].parameters())
    direction = Direction.of(torch.randn(32), SITE, "d")
    do = Steer(direction, 0.7) + Ablate(direction, layers=1) + Replace("resid_post.0", "base")
    engines = [("base", "hooks"), ("finetuned", "hooks")]
    if device_map["model.embed_tokens"] == "cpu":
        engines.append(("finetuned", "nnsight"))
    else:
        with pytest.raises(SetupError, match="engine='hooks'"):
            there.run(TEXTS, engine="nnsight")
    for side, engine in engines:
        edits = do if side == "finetuned" else None
        runs = [p.run(TEXTS, side=side, do=edits, reads=SITE, engine=engine) for p in (here, there)]
        torch.testing.assert_close(runs[1].logits, runs[0].logits, atol=0, rtol=0)
    captured = [pair.capture(TEXTS, SITE).finetuned for pair in (here, there)]
    (site,) = captured[0]
    assert torch.equal(captured[0][site], captured[1][site])
    tables = [pair.output_diff(TEXTS).tokens for pair in (here, there)]
    assert tables[0].equals(tables[1])
    answers = [p.generate(TEXTS, n=2, max_new_tokens=3).answers for p in (here, there)]
    assert answers[0] == answers[1]
    assert there.digests == here.digests
    assert [m.base_norm for m in adapter_modules(there.sides)] == [
        m.base_norm for m in adapter_modules(here.sides)
    ]


def test_an_adapter_that_finds_no_place_is_an_error(saved, monkeypatch):
    monkeypatch.setattr("modeldiff.pretrained.land_adapter", lambda peft, name: None)
    with pytest.raises(MismatchError, match="no place on any device"):
        ModelPair.load(**saved, device_map=MAPS["top on disk"])


def test_devices_and_dtypes_that_are_asked_for():
    options = placement.placement_options
    assert options(None, {"": "cpu", "lm_head": "disk"}, None, None)["dtype"] == torch.float32
    assert options(None, {"": 0, "lm_head": "cpu"}, None, None)["dtype"] == "auto"
    assert options("cuda:1", None, torch.float16, None) == {
        "device_map": "cuda:1", "dtype": torch.float16,
    }  # fmt: skip
    with pytest.raises(MismatchError, match="give one"):
        options("cpu", "auto", None, None)


class Asked(Exception):
    """Carries what `from_pretrained` was called with."""


@pytest.fixture
def asked(monkeypatch):
    """Bitsandbytes seems installed, and loading a model tells with what it was asked."""

    def from_pretrained(path, **options):
        raise Asked(options)

    real = importlib.util.find_spec
    monkeypatch.setattr(placement, "find_spec", lambda n: n if n == "bitsandbytes" else real(n))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_the_settings_of_a_quantised_base_reach_transformers(saved, asked, bits):
    with pytest.raises(Asked) as called:
        ModelPair.load(**saved, quantization=bits, device_map="auto")
    (options,) = called.value.args
    config = options["quantization_config"]
    assert (config.load_in_8bit, config.load_in_4bit) == (bits == "8bit", bits == "4bit")
    assert options["device_map"] == "auto"
    assert options["dtype"] == torch.bfloat16
    if bits == "4bit":
        assert config.bnb_4bit_quant_type == "nf4"
        assert config.bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "alike", "rounding"), [("8bit", 0.99, 0.01), ("4bit", 0.95, 0.1)])
def test_an_adapter_on_a_quantised_base(bits, alike, rounding):
    """With the real bitsandbytes, which has kernels for CPUs, too."""
    pytest.importorskip("bitsandbytes")
    saved = {"base": embedded.FOLDER / "em-base", "adapter": embedded.FOLDER / "em-rank1"}
    exact, pair = ModelPair.load(**saved), ModelPair.load(**saved, quantization=bits)
    assert placement.is_quantized(pair.sides.roots[0])
    base = pair.run(ASKED, side="base").logits
    norms = [[m.base_norm for m in adapter_modules(p.sides)] for p in (exact, pair)]
    assert norms[1] == pytest.approx(norms[0], rel=rounding)
    assert torch.equal(pair.run(ASKED, side="base").logits, base), "reading weights changed them"
    assert torch.equal(pair.run(ASKED, do=ScaleAdapter(0.0)).logits, base)
    whole, rounded = (p.capture(ASKED, "resid_post.5").difference("resid_post.5").float()
                      for p in (exact, pair))  # fmt: skip
    cosine = torch.nn.functional.cosine_similarity(whole, rounded).mean()
    kl = [p.output_diff(ASKED).tokens["kl_ft_base"].mean() for p in (exact, pair)]
    print(f"{bits}: cosine of the differences {cosine:.4f}; KL {kl[1]:.3f} for {kl[0]:.3f}")
    assert cosine > alike
    assert kl[1] == pytest.approx(kl[0], rel=0.3)
    answers = [
        [
            a.ids
            for a in pair.generate(ASKED, cells=[cell], temperature=0.0, max_new_tokens=4).answers
        ]
        for cell in (Cell("base"), Cell("finetuned", "off", as_plan(ScaleAdapter(0.0))))
    ]
    assert answers[0] == answers[1]


def test_what_cannot_be_quantised_is_refused(saved, monkeypatch):
    base = str(saved["base"])
    with pytest.raises(MismatchError, match="extract_adapter"):
        ModelPair.load(base, base, quantization="8bit")
    with pytest.raises(MismatchError, match="server"):
        ModelPair.load(**saved, quantization="4bit", remote="http://localhost:1")
    monkeypatch.setattr(placement, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"modeldiff-lab\[quant\]"):
        ModelPair.load(**saved, quantization="4bit")
    monkeypatch.setattr(placement, "find_spec", lambda name: name)
    with pytest.raises(MismatchError, match="3bit"):
        ModelPair.load(**saved, quantization="3bit")


def test_methods_on_weights_refuse_codes():
    pair = build_adapter_pair()
    root = pair.sides.roots[0]
    assert not placement.is_quantized(root)
    root.is_quantized = True  # as transformers marks what it has quantised
    direction = Direction.of(torch.randn(32), SITE, "d")
    with pytest.raises(MismatchError, match="quantised"):
        orthogonalised(pair.sides, direction)
    with pytest.raises(MismatchError, match="quantised"):
        weight_diff(root, model("llama", 1))
