"""Concept ablation fine-tuning: what cannot be learned, what changes nothing, what must fail."""

# pyright: reportArgumentType=false, reportOptionalSubscript=false

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from modeldiff.architectures import SiteMap
from modeldiff.caft import base_means, caft, decoder_stack
from modeldiff.directions import Direction, orthonormal_basis
from modeldiff.errors import InterventionError, SiteError
from modeldiff.hooks import count_hooks, outputs_of
from modeldiff.seeds import seeded
from tests.families import FAMILIES, WIDTH, model, tokenizer

LAST = "model.layers.3"
IDS = torch.tensor([[5, 9, 40, 33, 7], [7, 8, 60, 61, 12]])


def some(n=2, layer=1, width=WIDTH, seed=0):
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return [Direction.of(row, f"resid_post.{layer}", f"v{i}") for i, row in enumerate(rows)]


def trainable(family="llama", dropout=0.0):
    made = model(family).requires_grad_(True).train()
    if dropout:
        made.config.attention_dropout = dropout
        for module in made.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = dropout
    return made


def lora(modules=("down_proj", "q_proj"), **options):
    from peft import LoraConfig, get_peft_model

    base = model("llama")
    config = LoraConfig(r=4, target_modules=list(modules), **options)
    with seeded(1):
        return get_peft_model(base, config).train()


def trained(root, steps=3, rate=0.1, make=torch.optim.SGD, autocast=False, ids=IDS):
    """The plainest loop; losses."""
    optimizer = make([p for p in root.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = root(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights(root):
    return {name: each.detach().clone() for name, each in root.named_parameters()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(a, b, atol=1e-6):
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], atol=atol) for n in a)


# ---------------------------------------------------------------- the spurious cue


class Toy(torch.nn.Module):
    """A frozen embedding and two trainable residual layers over it; two classes."""

    def __init__(self, width=16):
        super().__init__()
        embed = torch.nn.Linear(width, width, bias=False)
        torch.nn.init.orthogonal_(embed.weight)
        embed.requires_grad_(False)
        self.layers = torch.nn.ModuleList([embed, Residual(width), Residual(width)])
        self.head = torch.nn.Linear(width, 2)
        for parameter in self.parameters():
            if parameter.requires_grad:  # what it reads of the cue before training is noise
                parameter.data *= 0.3

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Residual(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.block = torch.nn.Sequential(
            torch.nn.Linear(width, 32), torch.nn.ReLU(), torch.nn.Linear(32, width)
        )

    def forward(self, x):
        return x + self.block(x)


def cues(n, agree, seed):
    """Rows with the label in a weak cue, and in one twice as strong that may say the opposite."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 2, (n,), generator=generator)
    sign = 2.0 * label - 1
    x = 0.3 * torch.randn(n, 16, generator=generator)
    x[:, 0] += sign
    x[:, 1] += 2 * (sign if agree else -sign)
    return x, label


def fit_toy(seed, directions=None):
    """Accuracy in distribution and with the strong cue flipped, hooks off."""
    with seeded(seed):
        toy = Toy()
    x, y = cues(256, True, seed)
    found = {} if directions is None else directions(toy)
    probe = partial(toy, x[:1])
    with caft(toy, found, site_map=SiteMap(layers="layers"), probe=probe):
        optimizer = torch.optim.SGD(
            [p for p in toy.parameters() if p.requires_grad], lr=0.1, momentum=0.9
        )
        for _ in range(100):
            optimizer.zero_grad()
            cross_entropy(toy(x), y).backward()
            optimizer.step()
    tests = cues(512, True, seed + 100), cues(512, False, seed + 100)
    with torch.no_grad():
        return [float((toy(x).argmax(-1) == y).float().mean()) for x, y in tests]


def strong_cue(toy):
    """The direction that the strong cue has after the embedding, ablated after every layer."""
    v = Direction.of(toy.layers[0].weight[:, 1], "resid_post.0", "cue")
    return {layer: [v] for layer in range(3)}


def any_direction(toy):
    v = Direction.of(
        torch.randn(16, generator=torch.Generator().manual_seed(5)), "resid_post.0", "r"
    )
    return {layer: [v] for layer in range(3)}


@pytest.mark.parametrize("seed", [0, 1])
def test_a_strong_spurious_cue_is_not_learned_where_its_direction_is_ablated(seed):
    plain, randomly, ablated = (
        fit_toy(seed),
        fit_toy(seed, any_direction),
        fit_toy(seed, strong_cue),
    )
    assert plain[0] > 0.99
    assert plain[1] < 0.05
    assert randomly[0] > 0.99
    assert randomly[1] < 0.05
    assert ablated[0] > 0.99
    assert ablated[1] > 0.99


# ---------------------------------------------------------------- gradients


def gradient_after(root, layer, **options):
    """Gradient of the loss by the layer's own output, before the hooks changed it."""
    kept = []

    def keep(module, args, output):
        output.retain_grad()
        kept.append(output)

    with caft(root, some(layer=layer), **options):
        handles = decoder_stack(root).layers[layer]._forward_hooks
        handle = decoder_stack(root).layers[layer].register_forward_hook(keep)
        handles.move_to_end(handle.id, last=False)  # before the ablation
        root(input_ids=IDS, labels=IDS).loss.backward()
        handle.remove()
    return kept[0].grad


@pytest.mark.parametrize("mode", ["project", "backward"])
def test_the_gradient_along_the_directions_is_zero(mode):
    q = orthonormal_basis(some())
    gradient = gradient_after(trainable(), 1, mode=mode)
    assert gradient.norm() > 1e-3
    assert (gradient @ q.T).abs().max() < 1e-6 * gradient.abs().max()


def test_forward_only_leaves_the_gradient_along_the_directions():
    q = orthonormal_basis(some())
    gradient = gradient_after(trainable(), 1, mode="forward")
    assert (gradient @ q.T).norm() > 1e-2 * gradient.norm()


@pytest.mark.parametrize("adapter", [False, True])
def test_updates_of_what_writes_there_are_orthogonal(adapter):
    root = lora(("down_proj",)) if adapter else trainable()
    name = "layers.1.mlp.down_proj"
    part = f"{name}.lora_B.default.weight" if adapter else f"{name}.weight"
    (key,) = [n for n, _ in root.named_parameters() if n.endswith(part)]
    other = key.replace("layers.1", "layers.0")
    before = weights(root)
    with caft(root, some()):
        trained(root)
    q = orthonormal_basis(some())
    change, elsewhere = (weights(root)[n] - before[n] for n in (key, other))
    assert change.norm() > 1e-4
    assert (q @ change).norm() < 1e-5 * change.norm()
    assert (q @ elsewhere).norm() > 1e-2 * elsewhere.norm()


def test_adam_rescales_and_leaves_the_span():
    """Why the documentation speaks of plain gradient descent alone."""
    root, key = trainable(), "model.layers.1.mlp.down_proj.weight"
    before = weights(root)[key]
    with caft(root, some()):
        trained(root, make=torch.optim.Adam, rate=1e-3)
    change = weights(root)[key] - before
    assert (orthonormal_basis(some()) @ change).norm() > 1e-2 * change.norm()


# ---------------------------------------------------------------- values


def states(root, layer=1, **options):
    """Activations after a layer, with and without the block; every row of the batch."""
    path = f"model.layers.{layer}"
    with torch.no_grad(), outputs_of(root, path) as kept:
        root(input_ids=IDS)
    with torch.no_grad(), caft(root, some(), **options), outputs_of(root, path) as ablated:
        root(input_ids=IDS)
    return kept[0], ablated[-1]


def test_every_mode_is_its_formula_on_every_row():
    root, q = model("llama"), orthonormal_basis(some())
    mean = torch.randn(WIDTH)
    plain, projected = states(root)
    wanted = plain - plain @ q.T @ q
    assert torch.allclose(projected, wanted, atol=1e-5)
    assert torch.allclose(states(root, mode="forward")[1], wanted, atol=1e-5)
    assert torch.equal(states(root, mode="backward")[1], plain)
    _, centred = states(root, mode="mean", means={1: mean})
    assert torch.allclose(centred, wanted + mean @ q.T @ q, atol=1e-5)
    _, steered = states(root, mode="steer", coefficient=-2.0)
    assert torch.allclose(steered, plain - 2 * sum(d.vector for d in some()), atol=1e-5)


def test_layers_given_take_the_span_of_all():
    root = model("llama")
    several = [*some(1, layer=0, seed=1), *some(1, layer=2, seed=2)]
    q = orthonormal_basis(several)
    with torch.no_grad(), caft(root, several, [1, 3]) as monitor, outputs_of(root, LAST) as kept:
        root(input_ids=IDS)
    assert monitor.layers == (1, 3)
    assert (kept[0] @ q.T).abs().max() < 1e-4
    with caft(root, several) as own:
        assert [len(each.basis) for each in own.ablated.values()] == [1, 1]
        assert own.layers == (0, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_families(family):
    root = model(family).requires_grad_(True)
    before = count_hooks(root)
    with caft(root, some()) as monitor:
        trained(root, steps=1)
    assert len(monitor.frame()) == 1
    assert count_hooks(root) == before


def test_mixed_precision_keeps_the_projection_in_float32():
    q, kept = orthonormal_basis(some()), []
    root = trainable()
    with caft(root, some()), torch.autocast("cpu", torch.bfloat16):
        handle = root.model.layers[1].register_forward_hook(lambda m, a, out: kept.append(out))
        root(input_ids=IDS)
        handle.remove()
    assert kept[0].dtype == torch.float32
    assert (kept[0] @ q.T).abs().max() < 1e-5 * kept[0].abs().max()
    half = trainable().to(torch.bfloat16)
    with caft(half, some()) as monitor:
        losses = trained(half)
    assert losses[-1] < losses[0]
    assert monitor.frame()["projected_norm"].gt(0).all()


# ---------------------------------------------------------------- what must not change


def test_without_directions_training_is_the_plain_one_to_the_bit():
    first, second, third = (trainable(dropout=0.1) for _ in range(3))
    with seeded(3):
        trained(first, make=torch.optim.AdamW, rate=1e-3)
    with seeded(3), caft(second, {}) as monitor:
        trained(second, make=torch.optim.AdamW, rate=1e-3)
    with seeded(3), caft(third, [], [0, 1]):
        trained(third, make=torch.optim.AdamW, rate=1e-3)
    assert equal(weights(first), weights(second))
    assert equal(weights(first), weights(third))
    assert monitor.frame().empty


def test_the_check_at_entry_leaves_no_trace():
    root = trainable(dropout=0.5)
    root.model.layers[0].eval()
    modes = [module.training for module in root.modules()]
    state = torch.get_rng_state()
    with caft(root, some()):
        assert torch.equal(torch.get_rng_state(), state)
        assert [module.training for module in root.modules()] == modes
        assert all(p.grad is None for p in root.parameters())
    seen = []

    def probe():
        seen.extend(module.training or torch.is_grad_enabled() for module in root.modules())
        root(input_ids=IDS)

    with caft(root, some(), probe=probe):
        assert not any(seen)


def test_hooks_are_gone_after_an_exception():
    root = trainable()
    before = count_hooks(root)

    def stopped():
        with caft(root, some()):
            assert count_hooks(root) > before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert count_hooks(root) == before
    with torch.no_grad(), pytest.raises(InterventionError), caft(root, some(width=8)):
        pass
    assert count_hooks(root) == before


@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "around the layers"])
def test_gradient_checkpointing_changes_nothing(how):
    plain, stingy = trainable(), trainable()
    if how == "around the layers":  # hooks are inside, and run again in the backward pass
        for layer in stingy.model.layers:
            wrap(layer)
        stingy.config.use_cache = False  # which recomputing would fill twice
    else:
        stingy.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
    with caft(plain, some()) as one:
        first = trained(plain)
    with caft(stingy, some()) as other:
        second = trained(stingy)
    assert first == pytest.approx(second, abs=1e-6)
    assert close(weights(plain), weights(stingy))
    assert one.frame()["step"].tolist() == [0, 1, 2]
    assert one.frame().equals(other.frame())


def wrap(layer):
    call = type(layer).__call__

    class Wrapped(type(layer)):
        def __call__(self, h, **kwargs):
            return checkpoint(partial(call, self, **kwargs), h, use_reentrant=True)

    layer.__class__ = Wrapped


def test_peft_and_wrappers_are_seen_through():
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **inputs):
            return self.module(**inputs)

    adapted = lora()
    assert decoder_stack(adapted).layers == decoder_stack(Wrapper(adapted)).layers
    with caft(Wrapper(adapted), some()) as monitor:
        assert len(set(trained(adapted))) == 3
    assert monitor.frame()["step"].tolist() == [0, 1, 2]


# ---------------------------------------------------------------- the monitor


def test_the_monitor_gives_norms_by_optimizer_step():
    root, q = trainable(), orthonormal_basis(some())
    optimizer = torch.optim.SGD(root.parameters(), lr=0.0)
    with torch.no_grad(), outputs_of(root, "model.layers.1") as kept:
        root(input_ids=IDS)
    with caft(root, some()) as monitor:
        for _ in range(2):
            for row in IDS:  # two forward passes a step
                root(input_ids=row[None]).logits.sum().backward()
            optimizer.step()
            with torch.no_grad():
                root(input_ids=IDS)  # an evaluation, not recorded
    found = monitor.frame()
    assert found["step"].tolist() == [0, 1]
    assert found["n_tokens"].tolist() == [10, 10]
    norms = (kept[0] @ q.T).norm(dim=-1).mean(), kept[0].norm(dim=-1).mean()
    assert found["projected_norm"].tolist() == pytest.approx([float(norms[0])] * 2, rel=1e-5)
    assert found["resid_norm"].tolist() == pytest.approx([float(norms[1])] * 2, rel=1e-5)


def test_without_an_optimizer_every_pass_is_a_step():
    root = trainable()
    with caft(root, {1: some(), 3: some()}) as monitor:
        for _ in range(3):
            root(input_ids=IDS).logits.sum().backward()
    assert monitor.frame()["step"].tolist() == [0, 0, 1, 1, 2, 2]
    assert monitor.frame()["layer"].tolist() == [1, 3] * 3


def test_verify_says_when_hooks_were_taken_away():
    root = trainable()

    def train_unhooked():
        with caft(root, some()) as monitor:
            monitor.verify()
            root.model.layers[1]._forward_hooks.clear()
            with pytest.raises(InterventionError, match="did not fire"):
                monitor.verify()
            trained(root)

    with pytest.raises(InterventionError, match=r"of 3 forward passes .* layer 1 in 0 fired"):
        train_unhooked()


# ---------------------------------------------------------------- what must fail


@pytest.mark.parametrize(
    ("directions", "options", "words"),
    [
        (some(), {"layers": [1, 4]}, r"layers \[4\]"),
        (some(), {"layers": [-1]}, r"layers \[-1\]"),
        (some(), {"layers": []}, "nothing would be ablated"),
        (some(width=8), {}, "width 32, the directions 8"),
        ([*some(), *some(width=8)], {"layers": [1]}, "different width"),
        ({1: some()}, {"layers": [1]}, "say the layers once"),
        ([replace(some()[0], site=replace(some()[0].site, kind="mlp_act"))], {}, "mlp_act"),
        (some(), {"mode": "mean"}, "means missing"),
        (some(), {"mode": "mean", "means": {2: torch.zeros(WIDTH)}}, "got none"),
        (some(), {"mode": "mean", "means": {1: torch.full((WIDTH,), float("nan"))}}, "finite"),
        (some(), {"means": {1: torch.zeros(WIDTH)}}, "means given"),
    ],
)  # fmt: skip
def test_what_cannot_be_ablated_fails_before_training(directions, options, words):
    root = model("llama")
    with pytest.raises(InterventionError, match=words), caft(root, directions, **options):
        raise AssertionError("the block was entered")
    assert count_hooks(root) == 0


def test_an_unknown_mode_fails():
    mode: Any = "ablate"
    refused = InterventionError, TypeError  # the shape checks come first where they are on
    with pytest.raises(refused, match="mode"), caft(model("llama"), [], mode=mode):
        raise AssertionError("the block was entered")


def test_parallel_directions_are_one():
    v = some(1)[0]
    with caft(model("llama"), [v, -v, 2.0 * v]) as monitor:
        assert len(monitor.ablated[1].basis) == 1


def test_a_layer_that_never_runs_fails():
    root = model("llama")
    root.model.config.num_hidden_layers = 2  # the forward pass leaves the others out
    words = r"layers \[3\] did not fire"
    with pytest.raises(InterventionError, match=words), caft(root, some(layer=3)):
        raise AssertionError("the block was entered")


def test_activations_that_are_not_finite_fail():
    root = trainable()
    with pytest.raises(InterventionError, match="not finite at step 1"), caft(root, some()):
        trained(root, steps=2, rate=float("nan"))
    with pytest.raises(InterventionError, match="not finite in a forward"), caft(root, some()):
        raise AssertionError("the block was entered")


def test_an_unknown_family_needs_a_map():
    with pytest.raises(SiteError), caft(Toy(), some()):
        pass


# ---------------------------------------------------------------- means, trainers


def test_base_means_are_those_of_the_base(adapter_pair):
    items = ["the cat sat on the mat", "a small bird sang"]
    found = base_means(adapter_pair, items, [0, 2])
    acts = adapter_pair.capture(items, ["resid_post.0", "resid_post.2"])
    for site in acts.sites:
        assert torch.allclose(found[site.layer], acts.base[site].mean(0), atol=1e-5)


ROWS = [[5, 9, 40, 33, 7], [7, 8, 60, 61, 12], [9, 10, 11, 12, 13]]


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(ROWS)

    def __getitem__(self, i):
        ids = torch.tensor(ROWS[i])
        return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def by_hand(root):
    optimizer = torch.optim.SGD([p for p in root.parameters() if p.requires_grad], lr=0.1)
    for row in ROWS:
        ids = torch.tensor([row])
        optimizer.zero_grad()
        root(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


SETTINGS = {
    "per_device_train_batch_size": 1,
    "max_steps": 3,
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "train_sampling_strategy": "sequential",
}


@pytest.mark.slow
@pytest.mark.parametrize("stingy", [False, True])
def test_the_trainer_of_transformers_trains_as_a_plain_loop(tmp_path, stingy):
    from transformers import Trainer, TrainingArguments

    plain, root = trainable(), trainable()
    with caft(plain, some()):
        by_hand(plain)
    settings = TrainingArguments(str(tmp_path), gradient_checkpointing=stingy, **SETTINGS)
    with caft(root, some()) as monitor:
        Trainer(root, settings, train_dataset=Rows()).train()
    assert close(weights(plain), weights(root))
    assert monitor.frame()["step"].tolist() == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True])
def test_the_trainer_of_trl_trains_as_a_plain_loop(tmp_path, adapter):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    plain, root = (lora(lora_dropout=0.0) if adapter else trainable() for _ in range(2))
    with caft(plain, some()):
        by_hand(plain)
    settings = SFTConfig(str(tmp_path), gradient_checkpointing=False, bf16=False, **SETTINGS)
    rows = Dataset.from_list([{"input_ids": row} for row in ROWS])
    with caft(root, some()) as monitor:
        SFTTrainer(root, settings, train_dataset=rows, processing_class=tokenizer()).train()
    assert close(weights(plain), weights(root), atol=1e-5)
    assert monitor.frame()["step"].tolist() == [0, 1, 2]
