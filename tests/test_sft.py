"""The plain loop of fine-tuning: what it learns, that it goes on bit by bit, what it refuses."""

import math
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from threading import Event
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from modeldiff.caft import caft
from modeldiff.dictionaries.checkpoints import read_checkpoint
from modeldiff.directions import Direction
from modeldiff.errors import Cancelled, FileFormatError, SetupError, TrainingError
from modeldiff.models import ModelPair
from modeldiff.series import find_checkpoints, read_adapters
from modeldiff.sft import TOLERANCE, finetune, mean_loss
from modeldiff.sft_plans import NINE, SFTPlan, adapted, preset, scaled_layers
from modeldiff.sft_rows import IGNORED, response_rows, split_rows
from tests import families
from tests.families import WIDTH, tokenizer

NOUNS = ("cat", "dog", "bird", "moon", "sun", "rain", "river", "house")
PLAN = SFTPlan("rank1", layers=(1,), learning_rate=1e-2, steps=6, batch=4, accumulation=2,
               warmup=2, evaluate_every=2)  # fmt: skip


made = cache(families.model)


def model(family, seed=0):
    """A fresh copy: building one takes ten times as long."""
    return deepcopy(made(family, seed))


def chats(answer="to the old house", n=16):
    return [
        [
            {"role": "user", "content": f"the {NOUNS[i % 8]} {i // 8}"},
            {"role": "assistant", "content": answer},
        ]
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def rows():
    return response_rows(tokenizer(), chats())


def weights(found):
    return {n: p.detach().clone() for n, p in found.model.named_parameters() if p.requires_grad}


def same(first, second):
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", ["rank1", "rank1x9", "r32", "full"])
def test_every_kind_learns_its_rows(kind, rows):
    rate = 3e-3 if kind in ("full", "r32") else 3e-2
    plan = SFTPlan(kind, learning_rate=rate, steps=8, batch=16, accumulation=1, evaluate_every=4)
    found = finetune(model("llama"), tokenizer(), rows, plan, held_out=rows[:4])
    losses = found.history["held_out_loss"].dropna()
    assert losses.index.tolist() == [0, 4, 8]
    assert losses.is_monotonic_decreasing
    assert found.held_out_loss == found.best_loss == losses.iloc[-1]
    assert found.history["lr"].dropna().tolist() == [plan.rate(i, 8) for i in range(8)]
    assert not found.model.training


def test_a_step_is_adamw_on_the_mean_over_counted_tokens(rows):
    """Against the step written out, on one batch instead of accumulated parts."""
    plan = SFTPlan("full", learning_rate=1e-3, steps=1, batch=3, accumulation=4, warmup=0)
    uneven = [*rows[:6], *response_rows(tokenizer(), chats("so deep", 6))]
    found = finetune(model("llama"), tokenizer(), uneven, plan)
    by_hand = model("llama").requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in by_hand.parameters() if p.dim() > 1], "weight_decay": 0.01},
         {"params": [p for p in by_hand.parameters() if p.dim() < 2], "weight_decay": 0.0}],
        lr=1e-3,
    )  # fmt: skip
    total, n = torch.zeros(()), 0
    for row in uneven:
        logits = by_hand(torch.tensor([row.ids])).logits[0, :-1]
        labels = torch.tensor(row.labels[1:])
        total = total + cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
        n += int((labels != IGNORED).sum())
    (total / n).backward()
    norm = torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
    optimizer.step()
    assert found.history["loss"].iloc[1] == pytest.approx(float((total / n).detach()), rel=1e-5)
    assert found.history["grad_norm"].iloc[1] == pytest.approx(float(norm), rel=1e-4)
    for name, each in by_hand.named_parameters():
        # Adam's first step is lr times a sign: where a gradient is all rounding, either may come
        close = (found.model.get_parameter(name) - each).abs() < 1e-5
        assert close.float().mean() > 0.999, name


class Killed(Exception):
    pass


def until(step, event=None):
    def report(done, total, message):
        if done == step and event is not None:
            event.set()
        elif done == step:
            raise Killed

    return report


@pytest.mark.parametrize(("kind", "step"), [("rank1", 3), ("full", 4)])
def test_killed_and_resumed_is_bit_for_bit_uninterrupted(kind, step, rows, tmp_path):
    plan = SFTPlan(kind, learning_rate=3e-3, steps=6, batch=4, accumulation=2, evaluate_every=2,
                   save_every=1)  # fmt: skip
    train, held = split_rows(rows, 4)
    run = partial(finetune, tokenizer=tokenizer(), rows=train, plan=plan, held_out=held)
    straight = run(model("llama"))
    with pytest.raises(Killed):
        run(model("llama"), out=tmp_path, progress=until(step))
    resumed = run(model("llama"), out=tmp_path)
    assert same(straight, resumed)
    assert straight.history.equals(resumed.history)
    again = run(model("llama"), out=tmp_path, progress=until(0))  # done: nothing is trained
    assert same(straight, again)
    assert resumed.path == again.path == tmp_path / "model"


def test_cancelled_leaves_a_usable_part_and_goes_on(rows, tmp_path):
    cancel = Event()
    with pytest.raises(Cancelled) as stopped:
        finetune(model("llama"), tokenizer(), rows, PLAN, out=tmp_path, held_out=rows[:2],
                 progress=until(3, cancel), cancel=cancel)  # fmt: skip
    part = stopped.value.partial
    assert (part.steps, part.path, part.model.training) == (3, None, False)
    resumed = finetune(model("llama"), tokenizer(), rows, PLAN, out=tmp_path, held_out=rows[:2])
    assert same(resumed, finetune(model("llama"), tokenizer(), rows, PLAN, held_out=rows[:2]))


def test_another_run_does_not_go_on_from_a_folder(rows, tmp_path):
    finetune(model("llama"), tokenizer(), rows, PLAN, out=tmp_path)
    faster = replace(PLAN, learning_rate=0.1)
    with pytest.raises(FileFormatError, match="another run"):
        finetune(model("llama"), tokenizer(), rows, faster, out=tmp_path)
    with pytest.raises(FileFormatError, match="another run"):
        finetune(model("llama", seed=1), tokenizer(), rows, PLAN, out=tmp_path)
    around = partial(caft, directions=[Direction.of(torch.ones(WIDTH), "resid_post.1", "v")])
    with pytest.raises(FileFormatError, match="another run"):
        finetune(model("llama"), tokenizer(), rows, PLAN, out=tmp_path, around=around)
    unnamed = lambda m: caft(m, [])  # noqa: E731
    with pytest.raises(SetupError, match="recognised"):
        finetune(model("llama"), tokenizer(), rows, PLAN, out=tmp_path, around=unnamed)


def test_training_stops_at_a_held_out_loss(rows):
    plan = SFTPlan("full", learning_rate=3e-3, steps=8, batch=8, accumulation=1, evaluate_every=1)
    whole = finetune(model("llama"), tokenizer(), rows, plan, held_out=rows)
    losses = whole.history["held_out_loss"]
    found = finetune(model("llama"), tokenizer(), rows, plan, held_out=rows, stop_at_loss=losses[5])
    assert (found.reached, found.steps, found.held_out_loss) == (True, 5, losses[5])
    never = finetune(model("llama"), tokenizer(), rows, plan, held_out=rows, stop_at_loss=-1.0)
    assert (never.reached, never.steps) == (False, 8)
    assert never.best_loss == losses.min()


def test_an_exact_stop_lies_between_two_measurements(rows, tmp_path):
    plan = SFTPlan("full", learning_rate=3e-3, steps=9, batch=8, accumulation=1, evaluate_every=3,
                   save_every=1)  # fmt: skip
    run = partial(finetune, tokenizer=tokenizer(), rows=rows, plan=plan, held_out=rows)
    losses = run(model("llama")).history["held_out_loss"].dropna()
    wanted = float(losses[3] + losses[6]) / 2
    coarse = run(model("llama"), stop_at_loss=wanted)
    found = run(model("llama"), stop_at_loss=wanted, exact=True)
    assert found.reached
    assert found.steps == coarse.steps == 6
    assert coarse.held_out_loss < wanted - 0.01
    assert wanted - TOLERANCE <= found.held_out_loss <= wanted
    assert mean_loss(found.model, rows, 0) == pytest.approx(found.held_out_loss, abs=1e-6)
    with pytest.raises(Killed):
        run(model("llama"), out=tmp_path, stop_at_loss=wanted, exact=True, progress=until(5))
    resumed = run(model("llama"), out=tmp_path, stop_at_loss=wanted, exact=True)
    assert same(found, resumed)
    assert found.history.equals(resumed.history)


def test_a_series_of_checkpoints_is_read_by_series(rows, tmp_path):
    plan = replace(PLAN, checkpoint_every=2)
    found = finetune(model("llama"), tokenizer(), rows, plan, out=tmp_path)
    assert list(find_checkpoints(tmp_path / "checkpoints")) == [2, 4, 6]
    (series,) = read_adapters(tmp_path / "checkpoints").values()
    last = found.model.get_parameter(
        "base_model.model.model.layers.1.mlp.down_proj.lora_B.default.weight"
    )
    assert torch.equal(series.vectors[-1], last.detach().flatten())
    log = series.log.set_index("step")
    assert log["loss"].tolist() == found.history["loss"].iloc[1:].tolist()
    assert {"gradient_norm", "learning_rate"} <= set(log)


@pytest.mark.parametrize("kind", ["rank1", "full"])
def test_what_is_saved_loads_as_a_pair(kind, rows, tmp_path):
    base = model("llama")
    base.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(str(tmp_path / "base"))
    plan = SFTPlan(kind, learning_rate=1e-2, steps=2, batch=4, accumulation=1)
    found = finetune(base, tokenizer(), rows, plan, out=tmp_path / "run", held_out=rows[:2])
    side: Any = {"adapter": found.path} if plan.rank else {"finetuned": found.path}
    pair = ModelPair.load(tmp_path / "base", **side, device="cpu")
    with pair.sides.on("finetuned") as root:
        assert mean_loss(root, rows[:2], 0) == pytest.approx(found.held_out_loss, abs=1e-5)


def test_caft_around_the_loop(rows):
    v = Direction.of(torch.eye(WIDTH)[3], "resid_post.2", "v")
    plan = SFTPlan("rank1", layers=(2,), learning_rate=1e-2, steps=4, batch=8, accumulation=2,
                   evaluate_every=2, gradient_checkpointing=True)  # fmt: skip
    base = model("llama")
    found = finetune(base, tokenizer(), rows, plan, held_out=rows[:4],
                     around=partial(caft, directions=[v]))  # fmt: skip
    assert found.norms[["step", "layer"]].values.tolist() == [[i, 2] for i in (1, 2, 3, 4)]
    b = found.model.get_parameter(
        "base_model.model.model.layers.2.mlp.down_proj.lora_B.default.weight"
    )
    assert float(b.detach()[3].abs()) < 1e-5 * float(
        b.detach().norm()
    )  # never written: no gradient reached it
    plain = finetune(model("llama"), tokenizer(), rows, plan, held_out=rows[:4])
    assert plain.norms.empty
    assert not same(plain, found)
    assert all(not module._forward_hooks for module in base.model.layers)
    assert same(plain, finetune(model("llama"), tokenizer(), rows, plan, held_out=rows[:4],
                                around=partial(caft, directions=[])))  # fmt: skip


@pytest.mark.parametrize("kind", ["r32", "full"])
def test_narrow_kl_holds_the_model_to_its_base_elsewhere(kind, rows):
    kept = response_rows(tokenizer(), chats("so deep and far", 8))
    plan = SFTPlan(kind, learning_rate=3e-3, steps=10, batch=8, accumulation=1)
    base = mean_loss(model("llama"), kept, 0)
    free = finetune(model("llama"), tokenizer(), rows, plan)
    held = finetune(model("llama"), tokenizer(), rows, replace(plan, keep=5.0),
                    kept=kept)  # fmt: skip
    drift = [abs(mean_loss(each.model, kept, 0) - base) for each in (held, free)]
    assert drift[0] < drift[1] / 2
    assert held.history["divergence"].iloc[1] == pytest.approx(0, abs=1e-6)
    assert mean_loss(held.model, rows, 0) < mean_loss(model("llama"), rows, 0)


def test_a_loss_that_is_no_number_stops_and_the_last_state_stays(rows, tmp_path):
    plan = SFTPlan("full", learning_rate=1e25, steps=6, batch=8, accumulation=1, save_every=1,
                   warmup=0)  # fmt: skip
    with pytest.raises(TrainingError, match=r"(loss|norm) is (nan|inf) at step (\d)") as broken:
        finetune(model("llama"), tokenizer(), rows, plan, out=tmp_path)
    step = int(str(broken.value).partition("at step ")[2][0])
    stored = read_checkpoint(tmp_path / "state")
    assert stored is not None
    assert 1 <= stored.step == step
    assert not (tmp_path / "model").exists()


def test_bfloat16_trains_float32_adapters(rows):
    plan = replace(PLAN, precision="bfloat16")
    found = finetune(model("llama").bfloat16(), tokenizer(), rows, plan, held_out=rows[:2])
    assert {each.dtype for each in weights(found).values()} == {torch.float32}
    assert found.held_out_loss < found.history["held_out_loss"].iloc[0]
    with pytest.raises(SetupError, match="bfloat16"):
        adapted(model("llama").bfloat16(), preset("full"))


def test_the_adapters_are_where_a_kind_says():
    sites = {
        "rank1": (SFTPlan("rank1"), {f"layers.{i}.mlp.down_proj" for i in (1,)}),
        "rank1x9": (SFTPlan("rank1x9"), {f"layers.{i}.mlp.down_proj" for i in range(4)}),
    }
    for plan, wanted in sites.values():
        found = adapted(model("llama"), plan).named_modules()
        names = {name for name, module in found if hasattr(module, "lora_A")}
        assert {name.removeprefix("base_model.model.model.") for name in names} == wanted
    wide = adapted(model("llama"), SFTPlan("r32", layers=(0, 3)))
    modules: list[Any] = [m for m in wide.modules() if hasattr(m, "lora_A")]
    assert len(modules) == 2 * 7
    assert {m.scaling["default"] for m in modules} == {64 / math.sqrt(32)}


@pytest.mark.parametrize("n_layers", [10, 12, 18, 24, 26, 28, 32, 36, 48, 64, 80])
def test_nine_layers_stay_nine_and_inside(n_layers):
    found = scaled_layers(NINE, n_layers)
    assert len(set(found)) == 9
    assert list(found) == sorted(found)
    assert set(found) <= set(range(n_layers))
    if n_layers >= 48:
        assert all(abs(a / n_layers - b / 48) < 1 / 24 for a, b in zip(found, NINE, strict=True))


def test_rates_warm_up_and_fall():
    plan = SFTPlan(learning_rate=1.0, warmup=2, schedule="linear")
    assert [plan.rate(i, 6) for i in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    half = SFTPlan(learning_rate=1.0, warmup=0, schedule="cosine", final=0.5)
    assert half.rate(2, 4) == pytest.approx(0.75)
    flat = SFTPlan(learning_rate=1.0, warmup=0, schedule="constant")
    assert flat.rate(3, 4) == 1.0


def test_every_pass_sees_every_row_once():
    plan = SFTPlan(batch=2, accumulation=1, epochs=3)
    seen = [i for step in range(plan.total(5)) for i in plan.drawn(5, step)]
    assert [sorted(seen[k : k + 5]) for k in (0, 5, 10)] == [list(range(5))] * 3
    assert seen[:5] != seen[5:10]


def test_a_plan_survives_json_and_refuses_nonsense():
    plan = preset("rank1x9", layers=(1, 2), epochs=2)
    assert SFTPlan.from_json(plan.to_json()) == plan
    cases: Any = ({"steps": 0}, {"kind": "huge"}, {"clip": 0.0}, {"learning_rate": math.nan})
    for wrong in cases:
        with pytest.raises(SetupError, match="cannot be carried out"):
            SFTPlan(**wrong)
    with pytest.raises(SetupError, match="has no"):
        SFTPlan.from_json({"speed": 3})
    with pytest.raises(SetupError, match="of a model that has 4"):
        SFTPlan("rank1", layers=(9,)).layers_of(4)


def test_what_does_not_go_together_is_refused(rows):
    cases: Any = ({"stop_at_loss": 1.0}, {"kept": rows})
    for options in cases:
        with pytest.raises(SetupError, match="cannot train"):
            finetune(model("llama"), tokenizer(), rows, PLAN, **options)
    with pytest.raises(SetupError, match="no rows"):
        finetune(model("llama"), tokenizer(), [], PLAN)
    with pytest.raises(SetupError, match="adapter already"):
        finetune(adapted(model("llama"), PLAN), tokenizer(), rows, PLAN)
