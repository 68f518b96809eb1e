"""TRL's trainer against the plain loop: the same rows, plan and losses."""

import random
from dataclasses import replace
from functools import partial
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch

from modeldiff.caft import caft
from modeldiff.directions import Direction
from modeldiff.errors import Cancelled, FileFormatError, SetupError, TrainingError
from modeldiff.series import find_checkpoints
from modeldiff.sft import finetune
from modeldiff.sft_plans import SFTPlan
from modeldiff.sft_rows import response_rows
from modeldiff.sft_trl import trl_finetune
from tests.families import WIDTH, tokenizer
from tests.test_sft import PLAN, Killed, chats, model, same, until, weights

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def rows():
    return [*response_rows(tokenizer(), chats()), *response_rows(tokenizer(), chats("so deep", 5))]


def numpy_state():
    state: Any = np.random.get_state()  # noqa: NPY002
    return state[1].tolist()


def close(first, second):
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    # Adam turns a gradient that is all rounding into a step of either sign: most, not all
    shares = [((a[n] - b[n]).abs() < 1e-4).float().mean() for n in a]
    return min(shares) > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rank1", "r32", "full"])
def test_the_losses_are_those_of_the_plain_loop(kind, rows, tmp_path):
    plan = SFTPlan(kind, learning_rate=3e-3, steps=6, batch=3, accumulation=2, evaluate_every=2,
                   checkpoint_every=3)  # fmt: skip
    plain = finetune(model("llama"), tokenizer(), rows, plan, held_out=rows[:4])
    found = trl_finetune(model("llama"), tokenizer(), rows, plan, held_out=rows[:4], out=tmp_path)
    a, b = plain.history.drop(columns="divergence"), found.history.drop(columns="divergence")
    assert a["step"].tolist() == b["step"].tolist()
    assert np.allclose(a, b, rtol=2e-4, atol=1e-4, equal_nan=True)
    assert close(plain, found)
    assert found.path == tmp_path / "model"
    if plan.rank:
        assert list(find_checkpoints(tmp_path / "checkpoints")) == [3, 6]


@pytest.mark.slow
def test_caft_works_under_the_trainer(rows):
    v = Direction.of(torch.eye(WIDTH)[3], "resid_post.1", "v")
    around = partial(caft, directions=[v])
    plain = finetune(model("llama"), tokenizer(), rows, PLAN, held_out=rows[:4], around=around)
    base = model("llama")
    found = trl_finetune(base, tokenizer(), rows, PLAN, held_out=rows[:4], around=around)
    assert np.allclose(plain.norms, found.norms, rtol=1e-4)
    assert np.allclose(plain.history["loss"][1:], found.history["loss"][1:], atol=2e-4)
    (b,) = (w for name, w in weights(found).items() if "lora_B" in name)
    assert float(b[3].abs()) < 1e-5 * float(b.norm())
    assert all(not module._forward_hooks for module in base.model.layers)


@pytest.mark.slow
def test_the_trainer_stops_when_asked_and_leaves_things_as_they_were(rows):
    cancel, base = Event(), model("llama")
    states = random.getstate(), numpy_state(), torch.get_rng_state()
    with pytest.raises(Cancelled) as stopped:
        trl_finetune(base, tokenizer(), rows, PLAN, progress=until(3, cancel), cancel=cancel)
    assert stopped.value.partial.steps == 3
    assert "forward" not in vars(base)
    assert random.getstate() == states[0]
    assert numpy_state() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    goal = finetune(model("llama"), tokenizer(), rows, PLAN, held_out=rows[:4])
    target = goal.history["held_out_loss"][4] + 1e-4
    found = trl_finetune(model("llama"), tokenizer(), rows, PLAN, held_out=rows[:4],
                         stop_at_loss=target)  # fmt: skip
    assert (found.reached, found.steps) == (True, 4)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "family"), [("rank1", "llama"), ("full", "gpt2")])
def test_stopped_and_resumed_is_bit_for_bit_uninterrupted(kind, family, rows, tmp_path):
    """GPT-2 drops out at random while it is trained."""
    plan = SFTPlan(kind, learning_rate=3e-3, steps=6, batch=3, accumulation=2, evaluate_every=4,
                   save_every=2, checkpoint_every=5)  # fmt: skip
    around = partial(caft, directions=[Direction.of(torch.eye(WIDTH)[3], "resid_post.1", "v")])
    train = partial(trl_finetune, tokenizer=tokenizer(), rows=rows, plan=plan, held_out=rows[:4],
                    around=around)  # fmt: skip
    whole = train(model(family), out=tmp_path / "whole")
    for step in (3, 5):
        cancel = Event()
        with pytest.raises(Cancelled):
            train(model(family), out=tmp_path / "cut", progress=until(step, cancel), cancel=cancel)
    with pytest.raises(Killed):  # between two states
        train(model(family), out=tmp_path / "cut", progress=until(6))
    cut = train(model(family), out=tmp_path / "cut")
    assert same(whole, cut)
    assert whole.history.equals(cut.history)
    assert whole.norms.equals(cut.norms)
    assert [cut.steps, cut.path] == [6, tmp_path / "cut" / "model"]
    files = [{str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
             for root in (tmp_path / "whole", tmp_path / "cut")]  # fmt: skip
    for each in files:  # the order of a header's fields is not kept
        assert each.pop("state/checkpoint.safetensors")
    assert files[0] == files[1]
    assert train(model(family), out=tmp_path / "cut").history.equals(cut.history)  # is done
    other = replace(plan, learning_rate=1e-3)
    with pytest.raises(FileFormatError, match="another run"):
        trl_finetune(model(family), tokenizer(), rows, other, out=tmp_path / "cut")
    with pytest.raises(FileFormatError, match="another run"):  # nor the plain loop's
        finetune(model(family), tokenizer(), rows, plan, out=tmp_path / "cut")


@pytest.mark.slow
def test_the_trainer_fails_closed(rows):
    plan = replace(PLAN, keep=1.0)
    with pytest.raises(SetupError, match="kept"):
        trl_finetune(model("llama"), tokenizer(), rows, plan)
    with pytest.raises(SetupError, match="the plan says"):
        trl_finetune(model("llama"), tokenizer(), rows, PLAN, max_steps=3)
    broken = model("llama")
    broken.lm_head.weight.data[5] = float("nan")
    with pytest.raises(TrainingError, match="loss is nan"):
        trl_finetune(broken, tokenizer(), rows, PLAN)
