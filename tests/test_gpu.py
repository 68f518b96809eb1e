"""The same numbers on a CUDA device as on the CPU; ``pytest -m gpu`` where there is one."""

import pytest
import torch

from modeldiff import embedded
from modeldiff.batch_size import fitted, known_limit
from modeldiff.directions import Direction
from modeldiff.edit_effects import effects
from modeldiff.errors import SetupError
from modeldiff.harvesting import harvest
from modeldiff.host_copies import one_behind
from modeldiff.interventions import Ablate, Cell, Plan, Replace, ScaleAdapter, Steer
from modeldiff.lora import adapter_modules
from modeldiff.models import ModelPair
from modeldiff.placement import is_quantized
from modeldiff.sites import Site
from tests.families import model, peft_model, tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TEXTS = ["the cat sat on the mat", "a small bird sang of rain and sun over", "why"]
SITE = Site("resid_post", 2)


def pairs(device):
    peft = peft_model().to(device)
    return {
        "adapter": ModelPair.of(peft, None, tokenizer()),
        "two": ModelPair.of(model("llama").to(device), model("llama", 1).to(device), tokenizer()),
        "apart": ModelPair.of(model("llama").to(device), model("llama", 1), tokenizer()),
    }


@pytest.fixture(scope="module", params=["adapter", "two", "apart"])
def both(request):
    """The same pair on the CPU and on the GPU."""
    torch.backends.cuda.matmul.allow_tf32 = False
    return pairs("cpu")[request.param], pairs("cuda")[request.param]


def direction():
    return Direction.of(torch.randn(32, generator=torch.Generator().manual_seed(0)), SITE, "d")


@pytest.mark.parametrize("engine", ["hooks", "nnsight"])
def test_forward_with_edits(both, engine):
    do = Steer(direction(), 0.7) + Ablate(direction(), where="last")
    here, there = (pair.run(TEXTS, do=do, reads=SITE, engine=engine) for pair in both)
    torch.testing.assert_close(there.logits.cpu(), here.logits, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(there.acts[SITE].cpu(), here.acts[SITE], atol=1e-4, rtol=1e-3)


def test_captures_and_output_diffs(both):
    here, there = (pair.capture(TEXTS, SITE) for pair in both)
    torch.testing.assert_close(there.finetuned[SITE], here.finetuned[SITE], atol=1e-4, rtol=1e-3)
    here, there = (pair.output_diff(TEXTS).tokens["kl_ft_base"].to_numpy() for pair in both)
    torch.testing.assert_close(torch.tensor(there), torch.tensor(here), atol=1e-4, rtol=1e-3)


def test_generation_of_the_grid(both):
    do = {"steered": Steer(direction(), 2.0, where="new"), "patched": Ablate(direction())}
    here, there = (pair.generate(TEXTS, do=do, n=2, max_new_tokens=6) for pair in both)
    same = [a.ids == b.ids for a, b in zip(here.answers, there.answers, strict=True)]
    assert sum(same) >= 0.9 * len(same)  # a draw may fall between two roundings


def test_effects_and_patches(both):
    cells = [Cell("finetuned"), Cell("finetuned", "base", Plan((Replace("resid_post.3", "base"),)))]
    here, there = (effects(pair.sides, TEXTS, cells)["kl"].to_numpy() for pair in both)
    torch.testing.assert_close(torch.tensor(there), torch.tensor(here), atol=1e-4, rtol=1e-3)


def test_the_silenced_adapter_is_the_base_to_the_bit_in_bf16():
    pair = ModelPair.of(peft_model().to("cuda", torch.bfloat16), None, tokenizer())
    off = pair.run(TEXTS, do=ScaleAdapter(0.0)).logits
    base = pair.run(TEXTS, side="base").logits
    torch.testing.assert_close(off, base, atol=0, rtol=0)


def test_memory_that_runs_out_halves_the_batch():
    """A real out-of-memory error of the device, from a share of it that is too small."""
    pair = pairs("cuda")["adapter"]
    texts = ["the cat sat on the mat and the dog ran"] * 64
    root = pair.sides.roots[0]
    want = pair.capture(texts, SITE, max_tokens=200)

    def greedy(module, args, kwargs):
        if kwargs["input_ids"].numel() > 200:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")  # a pebibyte

    handle = root.register_forward_pre_hook(greedy, with_kwargs=True)
    got = pair.capture(texts, SITE, max_tokens=4096)
    handle.remove()
    torch.testing.assert_close(got.finetuned[SITE], want.finetuned[SITE], atol=1e-5, rtol=1e-4)
    assert (known_limit(root, "capture") or 4096) <= 200
    with pytest.raises(SetupError, match="on cuda:0"):
        list(fitted(root, [1], lambda _: torch.empty(1 << 50, device="cuda"), what="test",
                    width=lambda _: 1))  # fmt: skip


def test_copies_beside_the_computation_bring_what_was_computed():
    """Rows are overwritten on the device right after their copy was started."""
    draw = torch.Generator("cuda").manual_seed(0)
    wanted = []

    def computed():
        work = torch.randn(2048, 2048, generator=draw, device="cuda")
        for number in range(6):
            for _ in range(20):  # so that the copy is queued long before its rows exist
                work = torch.nn.functional.normalize(work @ work, dim=1)
            rows = {"a": work[: 100 + number].to(torch.bfloat16), "b": work[:3].double()}
            wanted.append({name: each.clone() for name, each in rows.items()})
            yield number, rows
            del rows  # its memory goes back to the allocator, and is taken again at once
            torch.zeros(4096, 2048, device="cuda").fill_(7.0)

    for number, tensors in one_behind(computed()):
        for name, each in tensors.items():
            assert each.is_pinned()
            assert torch.equal(each, wanted[number][name].cpu())


def test_a_harvest_is_that_of_the_cpu(both, tmp_path):
    here, there = (
        harvest(p, TEXTS * 5, SITE, tmp_path / str(i), dtype=torch.float32, max_tokens=32)
        for i, p in enumerate(both)
    )
    first, second = (next(s.source(SITE).in_order(100)).acts for s in (here, there))
    torch.testing.assert_close(second, first, atol=1e-4, rtol=1e-3)


def test_layers_in_memory_and_on_disk_give_the_same_numbers(tmp_path):
    """The first layers on the GPU, one in memory, one on disk; inputs and edits follow them."""
    peft_model().save_pretrained(tmp_path)
    model("llama").save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 0, "lm_head": 0,
              "model.layers.0": 0, "model.layers.1": "cpu", "model.layers.2": "disk",
              "model.layers.3": 0}  # fmt: skip
    base, adapter = tmp_path / "base", tmp_path / "tuned"
    whole = ModelPair.load(base, adapter=adapter, device="cuda", dtype=torch.float32)
    spread = ModelPair.load(base, adapter=adapter, device_map=places, dtype=torch.float32)
    do = Steer(direction(), 0.7) + Ablate(direction(), layers="all") + Replace("mlp_out.1", "base")
    found = [pair.run(TEXTS, do=do, reads=SITE) for pair in (whole, spread)]
    torch.testing.assert_close(found[1].logits, found[0].logits, atol=1e-5, rtol=1e-4)
    assert whole.digests == spread.digests
    both = whole, spread
    kl = [torch.tensor(p.output_diff(TEXTS).tokens["kl_ft_base"].to_numpy()) for p in both]
    torch.testing.assert_close(kl[1], kl[0], atol=1e-5, rtol=1e-3)
    answers = [p.generate(TEXTS, max_new_tokens=4, temperature=0.0).answers for p in both]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_an_adapter_on_a_quantised_base(bits):
    pytest.importorskip("bitsandbytes")
    base, adapter = embedded.FOLDER / "em-base", embedded.FOLDER / "em-rank1"
    whole = ModelPair.load(base, adapter=adapter)
    pair = ModelPair.load(base, adapter=adapter, quantization=bits)
    assert is_quantized(pair.sides.roots[0])
    norms = [[m.base_norm for m in adapter_modules(p.sides)] for p in (whole, pair)]
    assert norms[1] == pytest.approx(norms[0], rel=0.1)
    off = pair.run(TEXTS, do=ScaleAdapter(0.0)).logits
    torch.testing.assert_close(off, pair.run(TEXTS, side="base").logits, atol=0, rtol=0)
    site = "resid_post.5"
    exact, rounded = (p.capture(TEXTS, site).difference(site).float() for p in (whole, pair))
    assert torch.nn.functional.cosine_similarity(exact, rounded).mean() > 0.9
