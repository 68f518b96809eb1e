"""Two processes train as one does: the same loss curve and weights, also after they were stopped.

Both processes run everything once, in one start; the tests compare what they left.
"""

# pyright: reportArgumentType=false

import json
import subprocess
import sys
from dataclasses import asdict, replace
from datetime import timedelta
from random import Random
from threading import Event

import pytest
import torch
import torch.distributed as dist

from modeldiff import distributed_fast
from modeldiff.dictionaries.configs import TrainConfig
from modeldiff.dictionaries.models import Dictionary, crosscoder
from modeldiff.dictionaries.sources import TensorRows
from modeldiff.dictionaries.training import train
from modeldiff.distributed import joined, launched
from modeldiff.distributed_fast import DividedFastStep
from modeldiff.distributed_training import share_of, train_distributed
from modeldiff.errors import Cancelled, FileFormatError, MismatchError, SetupError
from modeldiff.harvesting import harvest

SIZE = 2
PLAN = TrainConfig(steps=40, batch_size=64, lr=3e-3, log_every=5, dead_after=256,
                   threshold_start=8, k_start=5, fast="off")  # fmt: skip
CASES = {
    "rows": ({"activation": "batch_topk"}, {}),
    "rows_blocks": ({"activation": "batch_topk", "n_tied": 10, "n_exclusive": (8, 20)}, {}),
    "rows_delta": ({"activation": "batch_topk", "groups": (8, 64)}, {"delta": 0.1}),
    "rows_topk": ({"activation": "topk"}, {"k_aux": 1}),
    "rows_relu": ({"activation": "relu"}, {}),
    "rows_gated": ({"activation": "gated"}, {}),
    "latents": ({"activation": "batch_topk"}, {}),
    "latents_blocks": ({"activation": "batch_topk", "n_tied": 30, "n_exclusive": (4, 30)}, {}),
    "rows_fast": ({"activation": "batch_topk"}, {"fast": "on"}),
    "latents_fast": ({"activation": "batch_topk"}, {"fast": "on", "k_aux": 1}),
    "latents_fast_blocks": (
        {"activation": "batch_topk", "n_tied": 30, "n_exclusive": (4, 30)},
        {"fast": "on"},
    ),
    "latents_fast_half": ({"activation": "batch_topk"}, {"fast": "on"}),
    "latents_topk": ({"activation": "topk", "n_tied": 3}, {"k_aux": 1, "delta": 0.1}),
}


def rows():
    """Sparse mixtures of few directions, so that latents die."""
    draw = torch.Generator().manual_seed(1)
    codes = torch.rand(256, 6, generator=draw) * (torch.rand(256, 6, generator=draw) < 0.3)
    both = codes @ torch.randn(6, 16, generator=draw)
    return TensorRows(both.view(256, 2, 8) + 0.05 * torch.randn(256, 2, 8, generator=draw) + 1)


def case(name):
    options, settings = CASES[name]
    return crosscoder(8, 64, k=2, **options), replace(PLAN, **settings)


def scores(rank):
    """Scores of one process: ordinary ones, few positive ones, none, ties, tiny and huge."""
    draw = torch.Generator().manual_seed(rank)
    usual = torch.randn(500, generator=draw)
    few = torch.where(torch.arange(500) < 3 + rank, usual.abs() + 0.1, -usual.abs())
    ties = torch.randint(0, 4, (500,), generator=draw).float()
    return usual, few, -usual.abs(), ties, usual * 1e-38, usual * 1e30


def keep(folder, made):
    made.dictionary.save_to(folder)
    (folder / "logs.json").write_text(json.dumps([asdict(log) for log in made.logs]))


def stopped(world, name, folder):
    """Stop after 10 steps, by an event that the first process alone has."""
    event = Event()

    def at_ten(log):
        if log.step >= 10:
            event.set()

    dictionary, config = case(name)
    others = {"cancel": event if world.rank == 0 else None, "on_log": at_ten}
    with pytest.raises(Cancelled):
        train_distributed(
            dictionary, rows(), config, world, by=name.split("_")[0], folder=folder, **others
        )


def process(rank, folder):
    """All that one of the processes does."""
    torch.set_num_threads(1)
    meeting = dist.FileStore(str(folder / "meeting"), SIZE)
    dist.init_process_group(
        "gloo", store=meeting, rank=rank, world_size=SIZE, timeout=timedelta(minutes=5)
    )
    dense = []
    every = DividedFastStep._dense

    def counted(self, x, weight, n_keep):
        dense.append(1)
        return every(self, x, weight, n_keep)

    DividedFastStep._dense = counted
    with joined() as world:
        for name in CASES:
            half = name.endswith("half")
            distributed_fast.half_pays = lambda device, half=half: half
            dictionary, config = case(name)
            made = train_distributed(dictionary, rows(), config, world, by=name.split("_")[0])
            if world.rank == 0:
                keep(folder / name, made)
        (folder / f"dense-{rank}.txt").write_text(str(len(dense)))
        for name in ("rows", "latents_fast"):
            checkpoints = folder / "stopped" / name
            stopped(world, name, checkpoints)
            (folder / f"{name}-{rank}.txt").write_text(str(sorted(checkpoints.rglob("*.saf*"))))
            dictionary, config = case(name)
            made = train_distributed(dictionary, rows(), config, world, by=name.split("_")[0],
                                     folder=checkpoints)  # fmt: skip
            if world.rank == 0:
                keep(folder / f"{name}_resumed", made)
        stopped(world, "rows", folder / "elastic")
        found = [
            [world.kth_largest(each, k).item() for k in (1, 7, 300, 2000)] for each in scores(rank)
        ]
        (folder / f"kth-{rank}.json").write_text(json.dumps(found))
        told = refusals(world, folder)
        (folder / f"told-{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def refusals(world, folder):
    """What is refused, in all processes alike."""
    told = {}

    def refuse(name, error, call):
        with pytest.raises(error) as found:
            call()
        told[name] = str(found.value)

    def begin(by="rows", where=None, rank_seed=0, batch=64, **options):
        made = crosscoder(8, options.pop("n", 64), k=2, seed=rank_seed, **options)
        config = replace(PLAN, batch_size=batch)
        train_distributed(made, rows(), config, world, by=by, folder=where)

    refuse("seeds", MismatchError, lambda: begin(rank_seed=world.rank))
    refuse("jumprelu", MismatchError, lambda: begin(activation="jumprelu"))
    refuse("relu", MismatchError, lambda: begin("latents", activation="relu"))
    refuse("groups", MismatchError, lambda: begin("latents", groups=(8, 64)))
    refuse("odd rows", MismatchError, lambda: begin(batch=63))
    refuse("odd latents", MismatchError, lambda: begin("latents", n=63))
    lost = folder / "stopped" / "latents_fast"
    if world.rank == 1:
        for path in lost.glob("part-1-of-2/*/*"):
            path.unlink()
    world.any(False)
    refuse("lost", FileFormatError, lambda: begin("latents", lost))
    world.any(False)
    if world.rank == 0:
        (lost / "part-2-of-4").mkdir()
    world.any(False)
    refuse("others", FileFormatError, lambda: begin("latents", lost))
    return told


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """The folder with what two processes left."""
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.start_processes(process, (folder,), nprocs=SIZE, start_method="spawn")
    return folder


def alone(name, **others):
    dictionary, config = case(name)
    return train(dictionary, rows(), replace(config, fast="off"), **others)


def curve(logs, field="loss"):
    found = [each[field] if isinstance(each, dict) else getattr(each, field) for each in logs]
    return torch.tensor(found, dtype=torch.float64)


def assert_same(folder, whole, tolerance=2e-5):
    """The loss curve and all else of the log, and every weight."""
    logs = json.loads((folder / "logs.json").read_text())
    for field in ("step", "loss", "mse", "fve", "l0", "dead", "lr"):
        torch.testing.assert_close(
            curve(logs, field), curve(whole.logs, field), rtol=tolerance, atol=tolerance
        )
    made = Dictionary.load_from(folder).state_dict()
    for name, each in whole.dictionary.state_dict().items():
        torch.testing.assert_close(made[name], each, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("half")])
def test_two_processes_train_as_one(name, left):
    whole = alone(name)
    assert_same(left / name, whole)
    other = train(case(name)[0], rows(), replace(case(name)[1], fast="off", seed=5))
    apart = (curve(other.logs) - curve(whole.logs)).abs().max()
    assert apart > 5e-3, "the tolerance would hide another run"
    if name in ("rows", "latents", "rows_fast", "latents_fast"):
        assert whole.logs[-1].dead > 0, "the loss of dead latents must have been at work"


@pytest.mark.slow
def test_the_fused_step_of_two_processes_chooses_as_the_plain_one(left):
    """By bfloat16 candidates: losses within the gates; and candidates nearly always suffice."""
    logs = json.loads((left / "latents_fast_half" / "logs.json").read_text())
    wrong = (curve(logs) / curve(alone("latents_fast_half").logs) - 1).abs()
    assert wrong.mean() < 5e-4
    assert wrong.max() < 3e-3
    assert [int((left / f"dense-{rank}.txt").read_text()) for rank in range(SIZE)] <= [8, 8]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows", "latents_fast"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(name, left):
    first, second = (
        Dictionary.load_from(left / each).state_dict() for each in (name, f"{name}_resumed")
    )
    assert all(torch.equal(each, second[key]) for key, each in first.items())
    for rank in range(SIZE):
        seen = (left / f"{name}-{rank}.txt").read_text()
        assert seen.count("checkpoint.safetensors") == (1 if name == "rows" else 2)


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(left):
    seen = []
    made = alone("rows", folder=left / "elastic", on_log=lambda log: seen.append(log.step))
    assert seen == list(range(15, 41, 5))
    keep(left / "went_on", made)
    assert_same(left / "went_on", alone("rows"))


@pytest.mark.slow
def test_the_kth_largest_of_all_processes_is_exact(left):
    found = [json.loads((left / f"kth-{rank}.json").read_text()) for rank in range(SIZE)]
    assert found[0] == found[1]
    for of_all, given in zip(found[0], zip(*map(scores, range(SIZE)), strict=True), strict=True):
        together = torch.cat(given)
        ordered = together[together > 0].sort(descending=True).values
        for k, each in zip((1, 7, 300, 2000), of_all, strict=True):
            truth = ordered[min(k, len(ordered)) - 1].item() if len(ordered) else 0.0
            assert each == truth


@pytest.mark.slow
def test_what_cannot_be_divided_is_refused_by_all(left):
    told = [json.loads((left / f"told-{rank}.json").read_text()) for rank in range(SIZE)]
    assert told[0] == told[1]
    for name, words in {
        "seeds": "the processes differ", "jumprelu": "jumprelu", "relu": "divided by latents",
        "groups": "by='rows'", "odd rows": "63 rows", "odd latents": "63 latents",
        "lost": "no step of which all 2 parts", "others": "part-2-of-4",
    }.items():  # fmt: skip
        assert words in told[0][name]


def test_shares_put_together_are_the_dictionary():
    whole = crosscoder(8, 64, k=5, n_tied=20, n_exclusive=(10, 13))
    shares = [share_of(whole, rank, 4) for rank in range(4)]
    for name, axis in {"W_enc": 2, "b_enc": 0, "W_dec": 0, "owned": 0}.items():
        assert torch.equal(
            torch.cat([getattr(x, name) for x in shares], axis), getattr(whole, name)
        )
    assert [x.config.n_tied for x in shares] == [16, 4, 0, 0]
    assert [x.config.n_exclusive for x in shares] == [(0, 0), (0, 0), (7, 0), (3, 13)]


def test_a_process_that_is_alone_is_told_so(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert not launched()
    with pytest.raises(SetupError, match="torchrun"), joined():
        pass


@pytest.mark.slow
def test_torchrun_trains_as_one_process_does(adapter_pair, tmp_path):
    words, draw = ["cat", "dog", "mat", "bird", "moon", "rain", "small", "round"], Random(0)
    texts = [" ".join(draw.choices(words, k=24)) for _ in range(24)]  # no two rows are equal
    store = harvest(adapter_pair, texts, "resid_post.2", tmp_path / "store", skip_first=8)
    asked = ["train", str(tmp_path / "store"), "--batch", "64", "--latents", "64", "--k", "4",
             "--checkpoint-every", "10", "--steps", "30"]  # fmt: skip
    out = str(tmp_path / "out")
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run([*run, "-m", "modeldiff", *asked, "--out", out, "--quiet"],
                          capture_output=True, text=True, timeout=300, check=True)  # fmt: skip
    assert done.stdout.count("step 30: loss") == 1
    plan = TrainConfig(30, 64, checkpoint_every=10, fast="off")
    truth = train(crosscoder(store.d_model("resid_post.2"), 64, k=4, site="resid_post.2"),
                  store.source(), plan).dictionary  # fmt: skip
    made = Dictionary.load_from(out)
    for name, each in truth.state_dict().items():
        torch.testing.assert_close(made.state_dict()[name], each, rtol=1e-5, atol=1e-6, msg=name)
