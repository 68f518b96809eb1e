"""Inspect tasks on a pair whose right answers are known in every cell, end to end."""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# pyright: reportOptionalSubscript=false, reportOptionalIterable=false, reportGeneralTypeIssues=false

import asyncio
import math
import zipfile
from dataclasses import replace
from itertools import product
from threading import Event
from types import SimpleNamespace

import pytest

pytest.importorskip("inspect_ai", reason="needs the extra inspect")

from inspect_ai import Task
from inspect_ai.dataset import Sample
from inspect_ai.log import list_eval_logs, read_eval_log
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    ContentImage,
    ContentText,
    GenerateConfig,
    get_model,
)
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, solver

from modeldiff.errors import Cancelled, InterventionError, MismatchError, SetupError
from modeldiff.inspect_bridge import CellRunner, evaluate, models
from modeldiff.inspect_compare import compare, mcnemar
from modeldiff.inspect_requests import Request, Seeds, check_settings, cut_at, item_of
from modeldiff.interventions import Ablate, Cell, Plan, Steer, grid
from modeldiff.masks import Regex
from modeldiff.models import ModelPair
from modeldiff.tokens import Chat
from tests.planted import NOUNS, planted_pair

CELLS = ("base", "finetuned", "base/ablate", "finetuned/ablate")
TUNED = Cell("finetuned")


@pytest.fixture(scope="module")
def planted():
    return planted_pair()


@pytest.fixture(scope="module")
def pair(planted):
    return planted[0]


def question(i):
    return f"tell me about the {NOUNS[i % 12]} {i // 12}"


def task(n=8, config=None, **settings):
    """Right is who says the planted word again and again: the fine-tune, unless it is ablated."""
    samples = [Sample(id=i, input=question(i), target="the the the") for i in range(n)]
    settings = {"dataset": samples, "solver": generate(), "scorer": includes(), **settings}
    return Task(name="says", config=config or GenerateConfig(max_tokens=6), **settings)


@pytest.fixture(scope="module")
def finished(planted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    cells = grid({"ablate": Ablate([planted[1]])})
    return evaluate(task(), planted[0], cells, folder, temperature=0.0), cells, folder


def said(log):
    """Completions by sample and epoch."""
    return {(s.id, s.epoch): s.output.completion for s in log.samples}


def plainly(pair, cells, n=8, **settings):
    """What the pair itself answers, by cell."""
    chats = [[{"role": "user", "content": question(i)}] for i in range(n)]
    settings = {"temperature": 0.0, "max_new_tokens": 6, **settings}
    found = pair.generate(chats, cells=cells, **settings)
    return [[answer.text for answer in found.of(cell.side, cell.name)] for cell in cells]


# ---------------------------------------------------------------- the right answers


def test_every_cell_scores_what_was_planted(finished):
    logs, _, _ = finished
    assert [log.eval.model for log in logs] == [f"modeldiff/{name}" for name in CELLS]
    scores = [log.results.scores[0].metrics["accuracy"].value for log in logs]
    assert scores == [0.0, 1.0, 0.0, 0.0]


def test_answers_are_those_of_the_pair(pair, finished):
    logs, cells, _ = finished
    expected = plainly(pair, cells)
    assert [[said(log)[i, 1] for i in range(8)] for log in logs] == expected
    assert expected[0] != expected[1] != expected[3]


def test_inspect_opens_the_logs(pair, finished):
    logs, _, folder = finished
    found = [read_eval_log(info) for info in list_eval_logs(str(folder))]
    assert {log.eval.model: said(log) for log in found} == {
        log.eval.model: said(log) for log in logs
    }
    sample = logs[1].samples[0]
    chat = [{"role": "user", "content": question(sample.id)}]
    usage = sample.output.usage
    assert usage.input_tokens == pair.texts([chat], reply=True)[0].n_tokens
    assert (usage.output_tokens, usage.total_tokens) == (6, usage.input_tokens + 6)
    assert sample.output.choices[0].stop_reason == "max_tokens"


def test_the_log_says_what_ran_and_nothing_of_this_machine(pair, tmp_path):
    named = ModelPair(replace(pair.sides, names=("/home/me/private/base", "/home/me/private/ft")))
    evaluate(task(2), named, [TUNED], tmp_path, temperature=0.0)
    path = next(tmp_path.glob("*.eval"))
    with zipfile.ZipFile(path) as inside:
        everything = "".join(inside.read(name).decode() for name in inside.namelist())
    assert "private" not in everything
    recorded = read_eval_log(str(path)).eval
    assert recorded.model_args == recorded.metadata
    assert recorded.metadata["digests"] == pair.digests
    assert (recorded.metadata["side"], recorded.metadata["edit"]) == ("finetuned", "none")


# ---------------------------------------------------------------- sampling


@pytest.mark.slow
def test_samples_are_the_pairs_and_do_not_depend_on_the_batch(pair, tmp_path):
    runs = [
        evaluate(task(6), pair, None, tmp_path / str(rows), seed=3, epochs=2, max_rows=rows)
        for rows in (1, 5)
    ]
    assert [said(log) for log in runs[0]] == [said(log) for log in runs[1]]
    expected = plainly(pair, grid(), 6, seed=3, temperature=1.0)
    for log, answers in zip(runs[0], expected, strict=True):
        assert [said(log)[i, 1] for i in range(6)] == answers
    base = said(runs[0][0])
    assert [base[i, 1] for i in range(6)] != [base[i, 2] for i in range(6)]


def test_several_choices_and_stop_strings(pair, tmp_path):
    config = GenerateConfig(max_tokens=6, num_choices=3, temperature=1.0, seed=1)
    (log,) = evaluate(task(1, config), pair, [Cell("base")], tmp_path)
    chat = [{"role": "user", "content": question(0)}]
    found = pair.generate([chat], models=["base"], n=3, seed=1, max_new_tokens=6)
    output = log.samples[0].output
    assert [c.message.text for c in output.choices] == [a.text for a in found.answers]
    assert output.usage.output_tokens == sum(len(a.ids) for a in found.answers)
    config = GenerateConfig(max_tokens=6, temperature=0.0, stop_seqs=["the the", "zzz"])
    (log,) = evaluate(task(1, config), pair, [TUNED], tmp_path)
    choice = log.samples[0].output.choices[0]
    assert (choice.message.text, choice.stop_reason) == (" ", "stop")


@pytest.mark.slow
def test_the_same_question_again_in_one_sample_has_other_noise(pair, tmp_path):
    @solver
    def twice():
        async def solve(state, generate):
            model = get_model()
            answers = [(await model.generate(state.input)).completion for _ in range(3)]
            state.metadata["answers"] = answers
            return state

        return solve

    logs = [
        evaluate(task(3, solver=twice()), pair, [Cell("base")], tmp_path, max_rows=rows)[0]
        for rows in (1, 8)
    ]
    first, second = ({s.id: s.metadata["answers"] for s in log.samples} for log in logs)
    assert first == second
    assert all(len(set(answers)) > 1 for answers in first.values())


def test_epochs_have_seeds_of_their_own():
    seeds = Seeds()
    assert seeds.next(7, "text") == 7
    assert seeds.next(7, "other") == 7
    assert len({seeds.next(7, "text") for _ in range(20)} | {7}) == 21


def test_requests_with_equal_settings_share_a_batch(pair):
    runner = CellRunner(pair, TUNED, max_rows=3)
    texts = [runner.render([{"role": "user", "content": question(i)}]) for i in (0, 1, 1, 2)]
    requests = [Request(text, 2, 0, 1.0, 4) for text in texts]
    other = Request(texts[0], 1, 0, 0.0, 4)
    runner.waiting += [*requests, other]
    batch = runner.take(requests[0])
    assert batch == requests[:3]
    assert runner.waiting == [requests[3], other]
    runner.answer(batch)
    assert runner.batches == [3]
    assert [len(each.answers) for each in requests] == [2, 2, 2, 0]
    assert batch[1].answers == batch[2].answers
    alone = CellRunner(pair, TUNED)
    again = Request(texts[2], 2, 0, 1.0, 4)
    alone.answer([again])
    assert [a.ids for a in again.answers] == [a.ids for a in batch[2].answers]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "settings",
    [{"top_p": 0.9}, {"top_k": 5}, {"logprobs": True}, {"frequency_penalty": 1.0}, {"best_of": 2},
     {"logit_bias": {1: 5.0}}, {"reasoning_tokens": 9}, {"top_p": 0.0}, {"cache": True}],
)  # fmt: skip
def test_settings_that_cannot_be_honoured(settings):
    with pytest.raises(MismatchError, match=next(iter(settings))):
        check_settings(GenerateConfig(**settings), [])


@pytest.mark.slow
def test_what_cannot_be_honoured_ends_the_run(pair, tmp_path):
    with pytest.raises(MismatchError, match="top_p"):
        evaluate(task(1, GenerateConfig(top_p=0.9)), pair, [TUNED], tmp_path)


def test_settings_that_can():
    config = GenerateConfig(
        temperature=0.5, max_tokens=3, seed=1, stop_seqs=["x"], num_choices=2, timeout=9,
        system_message="be kind", max_connections=4, logprobs=False, top_p=1.0,
    )  # fmt: skip
    check_settings(config, [])
    with pytest.raises(MismatchError, match="calls no tools"):
        check_settings(config, [SimpleNamespace(name="search")])


def test_messages_become_chats():
    asked = ChatMessageUser(content=[ContentText(text="why?")])
    system = ChatMessageSystem(content="be brief")
    assert item_of([system, asked], True) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "why?"},
    ]
    begun = item_of([asked, ChatMessageAssistant(content="Because")], True)
    assert begun == Chat([{"role": "user", "content": "why?"}], prefill="Because")
    assert item_of([asked], False) == "why?"


@pytest.mark.parametrize(
    ("messages", "templated", "says"),
    [
        ([ChatMessageUser(content=[ContentImage(image="x.png")])], True, "image"),
        ([ChatMessageTool(content="5")], True, "tool"),
        ([ChatMessageSystem(content="a"), ChatMessageUser(content="b")], False, "no chat template"),
    ],
)
def test_messages_that_are_refused(messages, templated, says):
    with pytest.raises(MismatchError, match=says):
        item_of(messages, templated)


def test_errors_of_the_pair_are_raised_as_they_are(pair, planted, tmp_path):
    """An edit that never fires is no result, in a log either."""
    silent = Cell("finetuned", "silent", Plan((Steer(planted[1], 1.0, where=Regex("zzz")),)))
    with pytest.raises(InterventionError):
        evaluate(task(1), pair, [silent], tmp_path)


def test_a_task_that_fails_is_no_result(pair, tmp_path):
    @solver
    def broken():
        async def solve(state, generate):
            raise ValueError("the solver broke")

        return solve

    with pytest.raises(SetupError, match=r"'error' on finetuned: .*the solver broke"):
        evaluate(task(1, solver=broken()), pair, [TUNED], tmp_path)


def test_cells_need_names_of_their_own(pair):
    with pytest.raises(MismatchError, match="name of its own"):
        models(pair, [TUNED, TUNED])
    with pytest.raises(MismatchError, match="at least one"):
        models(pair, [])


def test_a_model_cannot_be_made_by_name(pair):
    models(pair)  # registers the provider
    with pytest.raises(SetupError, match="not by name"):
        get_model("modeldiff/base")


def test_without_inspect_it_says_what_to_install(pair, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("modeldiff.inspect_requests.import_module", missing)
    with pytest.raises(SetupError, match=r"pip install modeldiff-lab\[inspect\]"):
        evaluate(SimpleNamespace(), pair)


def test_cancelling(pair, tmp_path):
    cancel = Event()
    cancel.set()
    with pytest.raises(Cancelled) as stopped:
        evaluate(task(2), pair, None, tmp_path, cancel=cancel)
    assert stopped.value.partial == []
    cancel.clear()

    @solver
    def stops_it():
        async def solve(state, generate):
            cancel.set()
            return await generate(state)

        return solve

    with pytest.raises(Cancelled) as stopped:
        evaluate(task(1, solver=stops_it()), pair, None, tmp_path, cancel=cancel)
    assert [log.status for log in stopped.value.partial] == ["error"]


@pytest.mark.slow
def test_inside_a_running_event_loop_as_in_a_notebook(pair, tmp_path):
    async def cell():
        return evaluate(task(2), pair, [TUNED], tmp_path, temperature=0.0)

    (log,) = asyncio.run(cell())
    assert log.results.scores[0].metrics["accuracy"].value == 1.0


def test_stop_strings_cut_at_the_first():
    assert cut_at("a. b; c", ["; ", ". "]) == ("a", True)
    assert cut_at("abc", ["", "x"]) == ("abc", False)


# ---------------------------------------------------------------- comparing


def test_the_comparison_is_paired_and_counts_flips(finished):
    logs, _, folder = finished
    found = compare(logs)
    table = found.table().set_index("cell")
    assert table.index.tolist() == list(CELLS)
    tuned = table.loc["finetuned"]
    assert (tuned["score"], tuned["difference"]) == (1.0, 1.0)
    assert (tuned["gained"], tuned["lost"], tuned["test"]) == (8, 0, "McNemar")
    assert tuned["p"] == pytest.approx(2 / 2**8)
    assert (tuned["difference_low"], tuned["difference_high"]) == (1.0, 1.0)
    assert table.loc["base/ablate", "p"] == 1.0
    assert math.isnan(table.loc["base", "difference"])
    flips = found.flips()
    assert set(flips["cell"]) == {"finetuned"}
    assert flips["sample"].tolist() == list(range(8))
    assert set(flips["answer_after"]) == {" the the the the the the"}
    assert flips["input"].tolist() == [question(i) for i in range(8)]
    paths = [info.name for info in list_eval_logs(str(folder))]
    again = compare(paths, against="finetuned")
    assert again.table().set_index("cell").loc["finetuned/ablate", "lost"] == 8


def log_of(name, values, epochs=1, inputs="q{}", task_name="t"):
    """A log with planted values."""
    samples = [
        SimpleNamespace(
            id=i, epoch=e + 1, input=inputs.format(i), target="x",
            scores={"s": SimpleNamespace(value=values[i][e] if epochs > 1 else values[i])},
            output=SimpleNamespace(completion=f"{name} {i}"),
        )
        for i, e in product(range(len(values)), range(epochs))
    ]  # fmt: skip
    spec = SimpleNamespace(model=f"modeldiff/{name}", task=task_name)
    return SimpleNamespace(eval=spec, status="success", samples=samples)


def test_values_of_every_kind():
    logs = [log_of("base", ["C", "I", "N", "P"]), log_of("finetuned", [True, 1, "yes", math.nan])]
    found = compare(logs)
    assert found.values()["base"].tolist() == [1.0, 0.0, 0.0, 0.5]
    table = found.table().set_index("cell")
    assert (table.loc["finetuned", "n"], table.loc["finetuned", "n_unscored"]) == (3, 1)
    assert (table.loc["finetuned", "gained"], table.loc["finetuned", "lost"]) == (2, 0)
    assert len(found.flips()) == 2


def test_answers_to_one_sample_are_not_independent():
    """Twenty copies of each answer are no more evidence than one."""
    few = [["I"] * 20, ["C"] * 20, ["I"] * 20, ["C"] * 20]
    many = [["C"] * 20, ["C"] * 20, ["I"] * 20, ["C"] * 20]
    table = compare([log_of("base", few, 20), log_of("finetuned", many, 20)]).table()
    row = table.set_index("cell").loc["finetuned"]
    assert (row["gained"], row["test"]) == (20, "permutation")
    assert row["p"] > 0.5
    assert row["difference_low"] <= 0


def test_nothing_is_found_where_nothing_differs():
    values = ["C", "I", "C", "C", "I"]
    table = compare([log_of("base", values), log_of("finetuned", values)]).table()
    row = table.set_index("cell").loc["finetuned"]
    assert (row["difference"], row["difference_low"], row["difference_high"]) == (0, 0, 0)
    assert (row["gained"], row["lost"], row["p"]) == (0, 0, 1.0)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (2, 7), (7, 2), (4, 4), (10, 3)])
def test_mcnemar_against_all_ways_the_flips_could_have_fallen(gained, lost):
    n = gained + lost
    ways = [abs(2 * sum(way) - n) for way in product((0, 1), repeat=n)]
    as_far = sum(each >= abs(gained - lost) for each in ways)
    assert mcnemar(gained, lost) == pytest.approx(as_far / 2**n)


def test_logs_that_do_not_belong_together():
    base = log_of("base", ["C", "I"])
    cases = {
        "each once": [base, log_of("base", ["C", "I"])],
        "different tasks": [base, log_of("finetuned", ["C", "I"], task_name="u")],
        "differ in what 2": [base, log_of("finetuned", ["C", "I"], inputs="other{}")],
        "differ in what 1": [base, log_of("finetuned", ["C", "I", "C"])],
        "single value": [base, log_of("finetuned", [{"a": 1}, {"a": 2}])],
    }
    for says, logs in cases.items():
        with pytest.raises(MismatchError, match=says):
            compare(logs)
    with pytest.raises(MismatchError, match="no log of 'x'"):
        compare([base, log_of("finetuned", ["C", "I"])], against="x")
    with pytest.raises(MismatchError, match="Name one"):
        compare([base, log_of("finetuned", ["C", "I"])], scorer="x")


def test_a_run_that_did_not_finish_is_no_result(finished):
    _, _, folder = finished
    path = list_eval_logs(str(folder))[0].name
    with pytest.raises(MismatchError, match="0 samples"):
        compare([read_eval_log(path, header_only=True)])
    broken = log_of("base", ["C"])
    broken.status = "error"
    with pytest.raises(MismatchError, match="status 'error'"):
        compare([broken])
