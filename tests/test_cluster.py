"""Harvests by many workers: the single process's store, byte for byte, whoever dies meanwhile."""

# pyright: reportArgumentType=false

import os
import signal
from pathlib import Path
from random import Random
from threading import Event
from types import SimpleNamespace

import pytest
import torch

from modeldiff import cluster, cluster_harvest
from modeldiff.cli import OK, WRONG, main
from modeldiff.cli_cluster import texts_in
from modeldiff.cluster import ATTEMPTS, Job, connected, done_by, n_workers, resources
from modeldiff.cluster_harvest import Harvester, PairSpec, harvest_on
from modeldiff.dictionaries.configs import TrainConfig
from modeldiff.dictionaries.models import Dictionary, crosscoder
from modeldiff.dictionaries.training import train
from modeldiff.errors import Cancelled, FileFormatError, MismatchError, SetupError, StoreError
from modeldiff.harvesting import harvest
from modeldiff.store_places import Place, fetched
from modeldiff.stores import ActivationStore
from modeldiff.tokens import Completion
from tests.families import tokenizer
from tests.planted import planted_peft

SITES = ("resid_post.1", "mlp_act.0")
TEXTS = [f"{'the cat sat on the mat and ' * (1 + i % 4)}the dog {i} ran" for i in range(24)]
OPTIONS = {"rows_per_shard": 40, "max_tokens": 120}


def unlike(n):
    """Texts no two of which begin alike: equal rows would tie in the choice of latents."""
    words, draw = ["cat", "dog", "mat", "bird", "moon", "rain", "small", "round"], Random(0)
    return [" ".join(draw.choices(words, k=24)) for _ in range(n)]


def content(folder):
    """Every file of a folder by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*")
            if p.is_file()}  # fmt: skip


def held(address):
    """Every file at an address by name."""
    import fsspec

    system, root = fsspec.core.url_to_fs(address)
    return {path.removeprefix(root).lstrip("/"): system.cat_file(path)
            for path in system.find(root)}  # fmt: skip


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """The planted pair as folders, as workers load it."""
    folder = tmp_path_factory.mktemp("pair")
    peft, _ = planted_peft()
    peft.save_pretrained(folder / "adapters")
    peft.unload().save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    return PairSpec(str(folder / "base"), adapter=str(folder / "adapters" / "tuned"), device="cpu")


@pytest.fixture(scope="module")
def whole(spec, tmp_path_factory):
    """The single process's files."""
    folder = tmp_path_factory.mktemp("whole")
    harvest(spec.load(), TEXTS, SITES, folder, **OPTIONS)
    return content(folder)


@pytest.fixture(scope="module")
def ray():
    """A cluster of this machine, for all tests of this file."""
    with connected("local") as found:  # a part of the extra dev: where it is missing, they fail
        yield found
    assert not found.is_initialized()


def test_alone_it_is_the_harvest_to_a_folder_and_to_an_address(spec, whole, tmp_path):
    manifest = harvest_on(spec, iter(TEXTS), SITES, tmp_path / "a", **OPTIONS)
    assert content(tmp_path / "a") == whole
    assert manifest["complete"]
    assert len(manifest["shards"]) > 4
    harvest_on(spec, iter(TEXTS), SITES, "memory://alone/run/", **OPTIONS)
    assert held("memory://alone/run") == whole
    store = fetched("memory://alone/run", tmp_path / "b")
    store.verify()
    assert content(tmp_path / "b") == {n: x for n, x in whole.items() if "receipts" not in n}
    assert len(fetched("memory://alone/run", tmp_path / "b")) == len(store)


def test_a_stopped_harvest_goes_on_at_its_address(spec, whole, tmp_path):
    stop, seen = Event(), []

    def after_two(done, total, message):
        seen.append(done)
        if len(seen) == 2:
            stop.set()

    out = "memory://stopped/run"
    with pytest.raises(Cancelled) as stopped:
        harvest_on(spec, TEXTS, SITES, out, progress=after_two, cancel=stop, **OPTIONS)
    assert stopped.value.partial == out
    with pytest.raises(FileFormatError, match="not finished"):
        fetched(out, tmp_path)
    n_shards = sum("receipts" in name for name in held(out))
    assert n_shards == 2
    place = Place(out, tmp_path)
    place._system[0].pipe_file(f"{place._system[1]}/receipts/.00009.bin.{'0' * 32}", b"left over")
    again = []
    harvest_on(spec, TEXTS, SITES, out, progress=lambda *each: again.append(each), **OPTIONS)
    assert held(out) == whole
    assert len(again) == sum("receipts" in name for name in whole) - 2


def test_a_damaged_shard_is_made_again_and_others_are_not(spec, whole):
    out, made = "memory://damaged/run", []
    harvest_on(spec, TEXTS, SITES, out, **OPTIONS)
    system, root = Place(out, Path())._system
    system.pipe_file(f"{root}/{SITES[0]}/00001.bin", b"short")
    harvest_on(spec, TEXTS, SITES, out, progress=lambda *each: made.append(each), **OPTIONS)
    assert len(made) == 1
    assert held(out) == whole


def test_other_texts_and_other_files_are_refused(spec, tmp_path, monkeypatch):
    harvest_on(spec, TEXTS[:3], SITES, "memory://other/run", **OPTIONS)
    before = held("memory://other/run")
    with pytest.raises(MismatchError, match="another harvest"):
        harvest_on(spec, TEXTS[:4], SITES, "memory://other/run", **OPTIONS)
    assert held("memory://other/run") == before
    system, root = Place("memory://foreign/run", tmp_path)._system
    system.pipe_file(f"{root}/thesis.txt", b"mine")
    with pytest.raises(FileFormatError, match=r"thesis\.txt"):
        harvest_on(spec, TEXTS, SITES, "memory://foreign/run", **OPTIONS)
    with pytest.raises(SetupError, match="nonsense"):
        harvest_on(spec, TEXTS, SITES, "nonsense://a/b", **OPTIONS)

    def without_credentials(*given, **options):
        raise type("NoCredentialsError", (Exception,), {})("unable to locate them")

    monkeypatch.setattr(type(system), "info", without_credentials)
    with pytest.raises(SetupError, match=r"cannot be reached: unable .*NoCredentialsError"):
        harvest_on(spec, TEXTS, SITES, "memory://other/run", **OPTIONS)
    monkeypatch.undo()
    harvest_on(spec, TEXTS[:2], SITES, tmp_path / "two", **OPTIONS)
    with pytest.raises(FileFormatError, match="another store"):
        fetched("memory://other/run", tmp_path / "two")


def test_a_worker_with_other_models_is_refused(spec, monkeypatch, tmp_path):
    planned = cluster_harvest.planned

    def of_others(tokenizer, digests, *rest):
        return planned(tokenizer, {**digests, "base": "another"}, *rest)

    monkeypatch.setattr(cluster_harvest, "planned", of_others)
    with pytest.raises(MismatchError, match=r"other models .*'base'"):
        harvest_on(spec, TEXTS, SITES, tmp_path, **OPTIONS)


def test_a_shard_that_is_not_where_it_should_be_stops_it(spec, monkeypatch, tmp_path):
    monkeypatch.setattr(cluster_harvest.Harvester, "make", lambda *arguments: None)
    with pytest.raises(StoreError, match="do all machines see"):
        harvest_on(spec, TEXTS, SITES, tmp_path, **OPTIONS)


def test_without_ray_it_says_what_to_install(spec, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(SetupError, match=r"modeldiff-lab\[cluster\]"):
        harvest_on(spec, TEXTS, SITES, tmp_path, cluster="auto", **OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_workers_are_hired_as_the_gpus_suffice_for():
    def of(gpus):
        return SimpleNamespace(cluster_resources=lambda: {"GPU": float(gpus)} if gpus else {})

    assert [n_workers(of(gpus), None, each) for gpus, each in ((8, 1), (8, 3), (0, 3))] == [8, 2, 2]
    assert resources(of(8), 3) == {"num_gpus": 3}
    assert resources(of(0), 3) == {"num_cpus": 1}
    for gpus, wanted, each in ((2, None, 3), (8, 0, 1), (8, None, 0)):
        with pytest.raises(SetupError, match="1 or more"):
            n_workers(of(gpus), wanted, each)


def starting(failures):
    """A Ray whose processes come up after some failures."""
    said = []

    def init(**options):
        said.append("up")
        if said.count("up") <= len(failures):
            raise failures[said.count("up") - 1]

    return SimpleNamespace(init=init, shutdown=lambda: said.append("down"), said=said,
                           is_initialized=lambda: False)  # fmt: skip


def test_a_start_that_is_too_slow_is_tried_again(monkeypatch):
    slow, before = Exception("The current node timed out during startup."), os.environ.copy()
    for failures in ([], [slow], [slow, slow]):
        found = starting(failures)
        monkeypatch.setattr(cluster, "_ray", lambda found=found: found)
        with connected("local"):
            stub = Path(os.environ["PYTHONPATH"].split(os.pathsep)[0])
            assert "ImportError" in (stub / "rfc3987_syntax.py").read_text()
        assert os.environ == before
        assert found.said.count("down") == len(failures) + 1
    monkeypatch.setattr(cluster, "_ray", lambda: starting([slow] * 9))
    with pytest.raises(SetupError, match=r"4 tries .*timed out.*raylet\.err"), connected("local"):
        pass
    monkeypatch.setattr(cluster, "_ray", lambda: starting([ValueError("no address")]))
    with pytest.raises(SetupError, match="no Ray cluster answers"), connected("local"):
        pass
    monkeypatch.setattr(cluster, "_ray", lambda: starting([KeyError("ours")]))
    with pytest.raises(KeyError), connected("local"):
        pass


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"])
def test_an_address_where_nobody_listens_is_refused_at_once(monkeypatch, address):
    found = starting([])
    monkeypatch.setattr(cluster, "_ray", lambda: found)
    with pytest.raises(SetupError, match="no Ray cluster answers"), connected(address):
        pass
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(SetupError, match="no Ray cluster answers"), connected("auto"):
        pass
    assert found.said == [], "Ray would wait for ten minutes, and exit"


def doomed(deaths):
    """A harvester that is killed once with half of a shard written, once before a receipt."""

    class Doomed(Harvester):
        def make(self, address, plan, shard, texts):
            from modeldiff import harvesting

            def die(*arguments):
                os.kill(os.getpid(), signal.SIGKILL)

            def half(*arguments):
                yield next(rows(*arguments))
                die()

            rows, death = harvesting.paired_rows, deaths / str(shard.number)
            if shard.number in (1, 3) and not death.exists():
                death.touch()
                if shard.number == 1:
                    harvesting.paired_rows = half
                else:
                    harvesting.write_receipt = die
            Harvester.make(self, address, plan, shard, texts)

    return Doomed


@pytest.mark.slow
def test_two_workers_make_the_single_process_store_also_where_some_are_killed(
    ray, spec, whole, tmp_path, monkeypatch
):
    deaths, out = tmp_path / "deaths", f"file://{tmp_path}/run"
    deaths.mkdir()
    team, kind = cluster_harvest._team, doomed(deaths)
    monkeypatch.setattr(
        cluster_harvest,
        "_team",
        lambda where, size, hired, *rest: team(where, size, (kind, hired[1]), *rest),
    )
    harvest_on(spec, iter(TEXTS), SITES, out, cluster="auto", workers=2, **OPTIONS)
    assert {path.name for path in deaths.iterdir()} == {"1", "3"}
    assert held(out) == content(tmp_path / "run") == whole
    ActivationStore.open(tmp_path / "run").verify()


def deadly():
    """A class of workers, made in a function: they need not import this file."""

    class Deadly:
        def die(self):
            os.kill(os.getpid(), signal.SIGKILL)

        def refuse(self):
            from modeldiff.errors import MismatchError

            raise MismatchError("not this one")

        def add(self, a, b):
            return a + b

    return Deadly


@pytest.mark.slow
def test_a_job_that_kills_every_worker_ends_it_and_an_error_is_its_own(ray):
    hired, idle = [], []
    remote = ray.remote(num_cpus=0)(deadly())

    def hire():
        hired.append(remote.remote())
        return hired[-1]

    with pytest.raises(SetupError, match=f"{ATTEMPTS} workers died over job seven"):
        list(done_by(ray, hire, idle, iter([Job("job seven", "die", tuple)]), 1))
    assert len(hired) == ATTEMPTS
    with pytest.raises(MismatchError, match="not this one"):
        list(done_by(ray, hire, idle, iter([Job("no", "refuse", tuple)]), 1))
    jobs = [Job(str(i), "add", lambda i=i: (i, 1)) for i in range(5)]
    found = {job.name: value for job, value in done_by(ray, hire, idle, iter(jobs), 1)}
    assert found == {str(i): i + 1 for i in range(5)}


def options_of(spec, tmp_path):
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS) + "\n", encoding="utf-8")
    return [spec.base, "--adapter", spec.adapter, "--device", "cpu", "--quiet", "--texts",
            str(tmp_path / "texts.txt"), "--rows-per-shard", "40", "--max-tokens", "120",
            "--sites", *SITES]  # fmt: skip


TRAINING = ["--site", SITES[0], "--steps", "30", "--batch", "64", "--latents", "64", "--k", "4",
            "--checkpoint-every", "10", "--quiet"]  # fmt: skip


def test_the_command_line_harvests_and_trains(spec, whole, tmp_path, capsys):
    store, out = str(tmp_path / "store"), str(tmp_path / "out")
    assert main(["harvest", *options_of(spec, tmp_path), "--out", store]) == OK
    assert content(store) == whole
    url = "memory://commands/run"
    assert main(["harvest", *options_of(spec, tmp_path), "--out", url]) == OK
    assert held(url) == whole
    capsys.readouterr()
    assert main(["train", store, "--out", out, *TRAINING]) == OK
    said = capsys.readouterr().out
    assert "step 30: loss" in said
    assert f"dictionary: {out}" in said
    made = Dictionary.load_from(out)
    truth = crosscoder(made.config.d_model, 64, k=4, site=SITES[0])
    plan = TrainConfig(30, 64, checkpoint_every=10)
    train(truth, ActivationStore.open(store).source(SITES[0]), plan)
    assert torch.equal(made.W_dec, truth.W_dec)
    copy = ["--copy", str(tmp_path / "copy")]
    assert main(["train", url, "--out", f"{out}2", *copy, *TRAINING]) == OK
    assert torch.equal(Dictionary.load_from(f"{out}2").W_dec, truth.W_dec)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["harvest", "nowhere", "x", "--out", "o"], "needs --texts"),
        (["train", "memory://commands/run", "--out", "o"], "--copy"),
        (["train", "nowhere", "--out", "o"], "no activation store"),
        (["train", "nowhere", "--out", "o", "--workers", "2"], "--cluster auto"),
        (["train", "nowhere", "--out", __file__], "is a file: give a folder"),
        (["train", "nowhere", "--out", "o", "--follow", "-1"], "above 0"),
        (
            ["harvest", "organism:null", "--texts", __file__, "--out", f"{__file__}/x", "--quiet"],
            "can be no folder",
        ),
        (["harvest", "/no/folder", "x", "--texts", __file__, "--out", "o"], "a folder that exists"),
        (
            ["harvest", "organism:null", "--texts", __file__, "--out", "o", "--skip-first", "-1"],
            "skip_first=-1",
        ),
    ],
)
def test_the_command_line_says_what_it_lacks(arguments, words, capsys):
    assert main(arguments) == WRONG
    err = capsys.readouterr().err
    assert words in err
    assert "Traceback" not in err


@pytest.mark.parametrize("line", ['{"prompt": "a"}', "[1]", "{", '"text"', '{"messages": 3}'])
def test_a_record_that_is_none_is_refused(tmp_path, line):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n' + line + "\n")
    found = texts_in(path)
    assert next(found) == Completion("a", "b")
    with pytest.raises(FileFormatError, match="line 2"):
        next(found)


@pytest.mark.slow
def test_a_training_on_the_cluster_is_the_one_of_one_process(ray, spec, tmp_path):
    store = tmp_path / "store"
    harvest(spec.load(), unlike(24), SITES, store, skip_first=8, **OPTIONS)
    out = tmp_path / "out"
    workers = ["--cluster", "auto", "--workers", "2"]
    assert main(["train", str(store), "--out", str(out), *TRAINING, *workers]) == OK
    made = Dictionary.load_from(out)
    truth = crosscoder(made.config.d_model, 64, k=4, site=SITES[0])
    plan = TrainConfig(30, 64, checkpoint_every=10, fast="off")
    train(truth, ActivationStore.open(store).source(SITES[0]), plan)
    for name, each in truth.state_dict().items():
        torch.testing.assert_close(made.state_dict()[name], each, rtol=1e-5, atol=1e-6, msg=name)
    assert made.provenance["training"]["steps_done"] == 30
