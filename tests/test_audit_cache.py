"""The audit's cache: it changes no number, misses what it must, and lets a stopped audit go on."""

from dataclasses import replace
from threading import Event
from typing import Any

import pandas as pd
import pytest
import torch

from modeldiff.audit_answers import Asker
from modeldiff.cache import Cache
from modeldiff.directions import Direction
from modeldiff.interventions import Ablate, Cell, Plan, grid
from modeldiff.models import ModelPair
from tests.families import model, tokenizer
from tests.planted import CHEAP, LAYER, TEXTS, audit_of, lora, planted_pair, planted_peft


@pytest.fixture(scope="module")
def pair():
    return planted_pair()[0]


def same(a, b):
    """Whether two reports say the same, digit for digit."""
    return bool(a.compare(b, 0.0)["within"].all()) and a.content_key == b.content_key


@pytest.mark.parametrize("wanted", [{}, {"texts": TEXTS}])
def test_the_cache_changes_nothing_and_is_hit_the_second_time(pair, tmp_path, wanted):
    first, second = audit_of(pair, tmp_path, **wanted), audit_of(pair, tmp_path, **wanted)
    reports = [one.run() for one in (first, second, audit_of(pair, **wanted))]
    assert same(reports[0], reports[1])
    assert same(reports[0], reports[2])
    assert first.cache.hits <= 2  # the unedited fine-tune is asked again for the choice
    assert (second.cache.misses, second.cache.hits > 3) == (0, True)


EDIT = Ablate(Direction.of(torch.arange(1.0, 33.0), "resid_post.2", "d"))
CELLS = (*grid(), Cell("finetuned", "edit", Plan((EDIT,))))
PROMPTS = ("the cat sat", "why was it")


def misses(pair, folder, *, seed: Any = 0, n: Any = 1, prompts=PROMPTS, cells=CELLS, **options):
    """How many cells of a question are not in the cache."""
    cache = Cache(folder)
    sampling = {"temperature": 0.8, "max_new_tokens": 4, **options}
    Asker(pair, seed, n, 64, cache).ask(prompts, cells, **sampling)
    return cache.misses


def test_every_changed_argument_misses(pair, tmp_path):
    assert misses(pair, tmp_path) == 3
    assert misses(pair, tmp_path) == 0
    for changes in (
        {"seed": 1}, {"n": 2}, {"temperature": 0.81}, {"max_new_tokens": 5},
        {"prompts": ("the cat sat", "why was he")}, {"prompts": ("why was it", "the cat sat")},
        {"prompts": ("the cat sat",)},
    ):  # fmt: skip
        assert misses(pair, tmp_path, **changes) == 3, changes
    longer = Ablate(Direction.of(torch.arange(2.0, 34.0), "resid_post.2", "d"))
    elsewhere = Ablate(EDIT.directions, layers=1)
    for edit in (longer, elsewhere):
        assert misses(pair, tmp_path, cells=[Cell("finetuned", "edit", Plan((edit,)))]) == 1
    renamed = [replace(cell, name="other") for cell in CELLS]
    assert misses(pair, tmp_path, cells=renamed) == 0


def test_other_weights_miss_and_adapters_of_one_model_do_not_collide(tmp_path):
    pair, _ = planted_pair()
    assert misses(pair, tmp_path) == 3
    peft, _ = planted_peft()
    down = peft.get_base_model().model.layers[LAYER].mlp.down_proj
    down.lora_B["tuned"].weight[5, 0] += 1e-6
    assert misses(ModelPair.of(peft, None, tokenizer()), tmp_path) == 3
    peft, _ = planted_peft()
    down = peft.get_base_model().model.layers[LAYER].mlp.down_proj
    down.scaling["tuned"] *= 2
    assert misses(ModelPair.of(peft, None, tokenizer()), tmp_path) == 3

    from peft import LoraConfig

    several = lora(model("llama"), layers=(1,))
    several.add_adapter("second", LoraConfig(r=1, lora_alpha=1, target_modules=["down_proj"],
                                             layers_to_transform=[1]))  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for name, parameter in several.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(False).copy_(torch.randn(parameter.shape, generator=generator))
    one = ModelPair.of(several, None, tokenizer(), adapter="tuned")
    two = one.with_adapter("second")
    assert misses(one, tmp_path) == misses(two, tmp_path) == 3
    settings = {"temperature": 0.0, "max_new_tokens": 4}
    for each in (one, two):
        cached = Asker(each, 0, 1, 64, Cache(tmp_path)).ask(["the cat"], grid(), **settings)
        fresh = Asker(each, 0, 1, 64, Cache()).ask(["the cat"], grid(), **settings)
        assert cached.answers == fresh.answers
    assert misses(one, tmp_path) == misses(two, tmp_path) == 0


def test_a_damaged_record_is_never_believed(pair, tmp_path):
    first = audit_of(pair, tmp_path).run()
    records = sorted(tmp_path.glob("answers/*.json"))
    for record, damage in zip(records, ("cut", "said", "empty"), strict=False):
        text = record.read_text()
        changes = {"cut": text[:-40], "empty": "", "said": text.replace("[[0, 0, [", "[[0, 0, [7,")}
        assert changes[damage] != text
        record.write_text(changes[damage])
    again = audit_of(pair, tmp_path)
    assert same(first, again.run())
    assert again.cache.misses == 3


@pytest.mark.parametrize("wanted", [{}, {"texts": TEXTS}])
def test_a_cancelled_audit_keeps_its_tables_and_resumes_to_the_same_report(pair, tmp_path, wanted):
    whole = audit_of(pair, **wanted).run()
    for stage in ("outputs", "directions", "proof"):
        cancel, folder = Event(), tmp_path / stage

        def stop(done, total, message, cancel=cancel, stage=stage):
            if message == stage:
                cancel.set()

        part = audit_of(pair, folder, **wanted).run(progress=stop, cancel=cancel)
        assert not part.complete
        assert len(part.tables) < len(whole.tables)
        assert part.findings == whole.findings[: len(part.findings)]
        finished = set(part.tables) - {"behaviour", "layers"}  # which later stages extend
        for name in finished:
            pd.testing.assert_frame_equal(part.table(name), whole.table(name))
        part.save_to(folder / "report")
        assert "report.html" in {path.name for path in (folder / "report").iterdir()}
        assert same(whole, audit_of(pair, folder, **wanted).run())


def test_cancelling_after_any_record_resumes_to_the_same_report(pair, tmp_path, monkeypatch):
    settings = replace(CHEAP, max_rows=24)  # several batches, several records
    whole = audit_of(pair, settings=settings).run()
    before, stops = Cache.put, 0
    for after in (1, 6, 20):
        cancel, folder, written = Event(), tmp_path / str(after), []

        def put(self, *arguments, written=written, cancel=cancel, after=after):
            before(self, *arguments)
            written.append(1)
            if len(written) == after:
                cancel.set()

        monkeypatch.setattr(Cache, "put", put)
        part = audit_of(pair, folder, settings=settings).run(cancel=cancel)
        monkeypatch.setattr(Cache, "put", before)
        if part.complete:
            break
        stops += 1
        resumed = audit_of(pair, folder, settings=settings)
        assert same(whole, resumed.run())
        assert resumed.cache.hits >= after
    assert stops >= 2  # the last may come after all records are written
