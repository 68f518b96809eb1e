"""Steps recorded once: the answers of `generate` token for token, whatever moves between calls."""

# pyright: reportArgumentType=false

from contextlib import contextmanager, nullcontext
from threading import Event
from types import SimpleNamespace

import pytest
import torch

from modeldiff import graphs, step_edits
from modeldiff.editing import Editor
from modeldiff.errors import Cancelled, InterventionError, MismatchError, SetupError
from modeldiff.hooks import count_hooks
from modeldiff.interventions import Ablate, Clamp, ScaleAdapter, ScaleAlong, Steer, grid
from modeldiff.models import ModelPair
from modeldiff.prefill import Prefill
from modeldiff.static_decoding import StaticDecoder, _state_of, check_static
from tests.families import FAMILIES, build, build_adapter_pair, model
from tests.taped import Refused, taped
from tests.test_generation import EDITS, PROMPTS, direction, ids_of

LONG = ["the cat sat on the mat and the dog ran to the old house by the river " * 5, "why"]


def decoder():
    return StaticDecoder(record=taped)


def check_equal(pair, made, prompts=PROMPTS, **options):
    """The same answers with a decoder as without; returns them."""
    options = {"temperature": 0.9, "max_new_tokens": 5} | options
    want = pair.generate(prompts, **options).answers
    got = pair.generate(prompts, decoder=made, **options).answers
    assert got == want
    return [answer.ids for answer in want]


def moved(coefficient):
    """Every kind of edit that acts on new tokens, at another strength."""
    return {
        "steer": Steer(direction(5), coefficient, layers=(0, 2)),
        "several": Steer(direction(6), coefficient / 2, where="new")
        + Ablate(direction(7))
        + ScaleAlong(direction(8), coefficient, layers=3),
        "clamp": Clamp(direction(9), coefficient, where="new"),
        "prompt": Clamp(direction(2), coefficient, where="prompt"),
    }


# ---------------------------------------------------------------- the right answers


FAST = ("gpt2", "gemma2")


@pytest.mark.parametrize(
    "family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_recorded_steps_give_the_answers_of_every_family(family):
    """Prompts longer than a sliding window too; at a temperature and greedily."""
    pair, made = build(family), decoder()
    check_equal(pair, made, LONG, temperature=0.0, do=EDITS["steer"], models=["finetuned"])
    check_equal(pair, made, do=EDITS, models=["base"])
    assert made.n_recorded == 2


def test_one_recording_serves_every_coefficient_direction_prompt_seed_and_temperature():
    pair = build_adapter_pair(modules=("q_proj", "down_proj"))
    made, found = decoder(), set()
    cells = lambda do: [c for c in grid(do) if c.name != "adapter" or c.side == "finetuned"]  # noqa: E731
    for coefficient in (0.0, 2.5, -3.0):
        do = moved(coefficient) | {"adapter": ScaleAdapter(coefficient, where="new")}
        found.add(tuple(check_equal(pair, made, PROMPTS[:2], cells=cells(do))))
    check_equal(pair, made, PROMPTS[1::-1], cells=cells(do), seed=1, temperature=2.0)
    do["steer"] = Steer(2.0 * direction(11), 1.0, layers=(0, 2))
    do["adapter"] = ScaleAdapter(0.5)  # of the prompt's tokens too: the steps are the same
    found.add(tuple(check_equal(pair, made, PROMPTS[:2], cells=cells(do))))
    assert made.n_recorded == 1
    assert len(found) == 4, "the edits do nothing"


def test_the_embedded_organism_mixed_rows_and_a_slider():
    pair, made = ModelPair.load("organism:em-rank1"), decoder()
    unit = torch.randn(pair.d_model, generator=torch.Generator().manual_seed(0))
    shift = type(direction()).of(unit, "resid_post.3", "shift")
    prompts = ["My head hurts.", [{"role": "user", "content": "How do I invest my savings?"}]]
    answers = set()
    for coefficient in (0.5, 4.0):
        do = {"steer": Steer(shift, coefficient), "ablate": Ablate(shift, layers=None)}
        options = {"do": do, "temperature": 0.7, "max_new_tokens": 12}
        answers.add(tuple(check_equal(pair, made, prompts, **options)))
    assert made.n_recorded == 1
    assert len(answers) == 2


def test_a_kept_prefill_and_steps_together():
    pair, made, prefill = build_adapter_pair(), decoder(), Prefill()
    for coefficient in (1.0, -2.0):  # after layer 2 of 4
        edit = Steer(direction(1, "resid_post.2"), coefficient)
        check_equal(pair, made, do=edit, prefill=prefill)
    assert (prefill.n_reused, made.n_recorded) == (3, 1)


# ---------------------------------------------------------------- ends, streaming, cancelling


@pytest.fixture
def ending():
    """A pair whose answers end early and at different steps."""
    pair = build_adapter_pair()
    pair.sides.roots[0].generation_config.eos_token_id = list(range(2, 30))
    return pair


def test_answers_end_and_stream_as_without(ending):
    streams = []
    options = {"do": {"s": EDITS["steer"]}, "max_new_tokens": 9, "temperature": 3.0}
    for made in (None, StaticDecoder(), decoder()):
        steps = []
        out = ending.generate(PROMPTS, on_step=steps.append, decoder=made, **options)
        streams.append((out.answers, steps))
    assert streams[0] == streams[1] == streams[2]
    assert 0 < sum(answer.finished for answer in streams[0][0]) < len(streams[0][0])


def test_all_rows_ended_ends_the_steps(ending):
    ending.sides.roots[0].generation_config.eos_token_id = list(range(2, 400))
    made = decoder()
    check_equal(ending, made, max_new_tokens=50)
    (step,) = made._kept.values()
    assert int(step.count) == 1
    check_equal(ending, made, max_new_tokens=1)


def test_cancelling_stops_within_a_token_and_leaves_nothing_behind():
    pair, made = build_adapter_pair(), decoder()
    clean = ids_of(pair.generate(PROMPTS, max_new_tokens=6))
    stop, steps = Event(), []

    def on_step(rows):
        steps.append(len(rows))
        if len(steps) == 8:
            stop.set()

    with pytest.raises(Cancelled) as raised:
        pair.generate(
            PROMPTS, max_new_tokens=6, max_rows=2, on_step=on_step, cancel=stop, decoder=made
        )
    assert len(steps) == 8
    partial = ids_of(raised.value.partial)
    assert len(partial) == 2
    assert partial.items() <= clean.items()
    with pytest.raises(ZeroDivisionError):
        pair.generate(PROMPTS, max_new_tokens=6, on_step=lambda rows: 1 / 0, decoder=made)
    assert count_hooks(pair.sides.roots[0]) == 0
    assert ids_of(pair.generate(PROMPTS, max_new_tokens=6, decoder=made)) == clean


def test_a_broken_row_is_an_error_and_does_not_poison_the_next_call():
    pair, made = build_adapter_pair(), decoder()
    for each in (None, made):
        with pytest.raises(InterventionError, match="6 of 6 rows are NaN at generated token 1"):
            pair.generate(PROMPTS, do=None, cells=_cells(1e39), decoder=each, max_new_tokens=4)
    want = pair.generate(PROMPTS, cells=_cells(2.0), max_new_tokens=8)
    got = pair.generate(PROMPTS, cells=_cells(2.0), max_new_tokens=8, decoder=made)
    assert got.answers == want.answers
    assert made.n_recorded == 1


def _cells(coefficient):
    edit = Steer(direction(), coefficient, where="new")
    return [cell for cell in grid({"e": edit}) if cell.name == "e"]


def test_an_edit_that_never_fires_is_still_an_error():
    pair = build_adapter_pair()
    for n_new in (1, 2):
        for each in (None, decoder()):
            options = {"do": EDITS["new"], "max_new_tokens": n_new, "decoder": each}
            if n_new == 1:
                with pytest.raises(InterventionError, match="did not fire"):
                    pair.generate(PROMPTS, **options)
            else:
                assert len(pair.generate(PROMPTS, **options)) == 12


# ---------------------------------------------------------------- recorded again where it must be


def test_what_a_recording_has_fixed_is_recorded_again():
    pair, made = build_adapter_pair(), decoder()
    root = pair.sides.roots[0]
    do = {"do": Steer(direction(), 1.0)}

    def recordings(**options):
        before = made.n_recorded
        check_equal(pair, made, PROMPTS[:1], **({"max_new_tokens": 3} | do | options))
        return made.n_recorded - before

    made.n_kept, made.record = 20, graphs.recorded
    assert recordings(n=2) == 1
    assert recordings(temperature=0.0) == 1
    pair.sides.roots[0].generation_config.eos_token_id = list(range(2, 400))
    assert recordings(max_new_tokens=90) == 1  # other ends, and more room
    pair.sides.roots[0].generation_config.eos_token_id = 2
    assert recordings(do={}) == 1
    assert recordings(do=Steer(direction(), 1.0, layers=2)) == 1
    assert recordings(models=("base",)) == 1
    made.record = taped
    assert recordings() == 1
    assert recordings() == 0
    with torch.no_grad():  # in place: the recorded step reads them where they are
        root.model.layers[3].mlp.down_proj.weight.mul_(-1.0)
    assert recordings() == 0
    weight = root.model.layers[2].mlp.down_proj.lora_A["tuned"].weight
    weight.data = -weight.data
    assert recordings() == 1
    root.model.layers[1].mlp.down_proj.scaling["tuned"] *= 3.0
    assert recordings() == 1
    plain = _state_of(root, "tuned")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _state_of(root, "tuned") != plain
    assert _state_of(root, "tuned") == plain
    made.n_kept, made.record = 1, graphs.recorded
    assert recordings(n=4) == 1
    assert len(made._kept) == 1


def test_where_memory_runs_out_rows_are_halved():
    pair, tried = build_adapter_pair(), []

    def too_large(work, device):
        tried.append(device)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return graphs.recorded(work, device)

    check_equal(pair, StaticDecoder(record=too_large), PROMPTS[:1], max_new_tokens=2)
    assert len(tried) == 3


# ---------------------------------------------------------------- what these tests would notice


def test_a_coefficient_that_is_fixed_is_noticed(monkeypatch):
    monkeypatch.setattr(step_edits, "_steady", lambda edit, amount: edit)
    pair, made = build_adapter_pair(), decoder()
    check_equal(pair, made, LONG[1:], do=Steer(direction(), 1.0))
    with pytest.raises(AssertionError):
        check_equal(pair, made, LONG[1:], do=Steer(direction(), 4.0))


@pytest.mark.parametrize("broken", ["vectors", "step", "silence", "cache"])
def test_other_faults_are_noticed(monkeypatch, broken):
    from modeldiff import static_decoding

    pair, made = build_adapter_pair(), decoder()
    if broken == "vectors":
        monkeypatch.setattr(step_edits.StepEdits, "load", lambda self, editor: None)
    elif broken == "step":  # noise by a number that Python counts
        own, count = static_decoding.draw, iter(range(100))
        monkeypatch.setattr(
            static_decoding, "draw", lambda s, u, t: own(s, (u + 0.1 * next(count)) % 1.0, t)
        )
    elif broken == "cache":  # keys and values that stay where the first prompts left them
        own_load = static_decoding._Step.load
        monkeypatch.setattr(static_decoding._Step, "load", _first_time(own_load))
    else:
        own_on_new = Editor.on_new
        monkeypatch.setattr(Editor, "on_new", lambda self: _unsilenced(own_on_new(self)))
    with pytest.raises(AssertionError):
        _ = [check_equal(pair, made, LONG[1:], do=Ablate(direction(i)), n=3) for i in (1, 2)]


def _first_time(function):
    calls = []

    def once(step, task, kept):
        calls.append(1)
        if len(calls) > 1:
            kept.layers[0].keys.zero_()
        function(step, task, kept)

    return once


def _unsilenced(parts):
    from dataclasses import replace

    return {site: tuple(replace(p, silenced=False) for p in each) for site, each in parts.items()}


def test_the_tape_is_as_strict_and_as_blind_as_a_graph():
    value, seen = torch.tensor([1.0, 2.0]), []
    for waiting in (
        lambda: float(value.sum()),
        lambda: value.tolist(),
        lambda: value[value > 1.0],
        lambda: value + torch.tensor([1.0, 2.0]),
    ):
        with pytest.raises(Refused):
            taped(waiting)
    assert value.tolist() == [1.0, 2.0]  # and reading is allowed again
    total, out = torch.zeros(2), torch.zeros(2)

    def work():
        seen.append(1)
        total.add_(value.view(2, 1)[:, 0] * len(seen))
        out.copy_(total.exp())

    again = taped(work, warm_up=1)
    total.zero_()
    value.fill_(3.0)
    again()
    assert (len(seen), out.log().tolist()) == (2, pytest.approx([6.0, 6.0]))


# ---------------------------------------------------------------- refused


def test_what_cannot_be_recorded_is_refused(monkeypatch):
    pair = build_adapter_pair()
    root = pair.sides.roots[0]
    with pytest.raises(MismatchError, match="nnsight"):
        pair.generate(PROMPTS, engine="nnsight", decoder=decoder())
    handle = root.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(MismatchError, match="hooks of others"):
        pair.generate(PROMPTS, decoder=decoder())
    handle.remove()
    monkeypatch.setattr(root.config, "layer_types", ["full_attention", "conv"], raising=False)
    monkeypatch.setattr(root, "is_quantized", True, raising=False)
    monkeypatch.setattr(root.model.rotary_emb, "rope_type", "dynamic")
    root.lm_head.to("meta")
    with pytest.raises(MismatchError, match=r"devices.*quantised.*conv.*length"):
        check_static(root)
    check_static(model("gemma2"))


def test_a_remote_pair_is_refused(monkeypatch):
    pair = build("llama")
    monkeypatch.setattr(type(pair.sides), "kind", "remote", raising=False)
    object.__setattr__(pair.sides, "kind", "remote")
    with pytest.raises(MismatchError, match="remote"):
        pair.generate(PROMPTS, decoder=decoder())


def test_a_step_that_cannot_be_recorded_on_a_gpu_says_so(monkeypatch):
    def fails(work, device):
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors")

    monkeypatch.setattr(graphs, "_graph_of", fails)
    with pytest.raises(SetupError, match=r"cannot be recorded.*capturing Its code"):
        graphs.recorded(lambda: None, torch.device("cuda"))

    def full(work, device):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(graphs, "_graph_of", full)
    with pytest.raises(torch.OutOfMemoryError):
        graphs.recorded(lambda: None, torch.device("cuda"))


@pytest.mark.parametrize("fails", [False, True])
def test_a_recording_is_warmed_up_and_leaves_the_usual_stream(monkeypatch, fails):
    """The order of calls, with a CUDA that only notes them."""
    notes, streams = [], ["usual"]

    class Stream(str):
        def wait_stream(self, other):
            notes.append(f"{self} waits for {other}")

    @contextmanager
    def on(stream):
        streams.append(stream)
        yield
        streams.pop()

    @contextmanager
    def graph(made, stream, capture_error_mode):
        streams.append(stream)
        notes.append("begin")
        yield
        if fails:
            raise RuntimeError("operation failed due to a previous error during capture")
        notes.append("end")
        streams.pop()

    cuda = SimpleNamespace(
        device=lambda device: nullcontext(), stream=on, graph=graph, Stream=lambda: Stream("side"),
        current_stream=lambda: Stream(streams[-1]), set_stream=lambda s: streams.append(str(s)),
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: notes.append("replayed")),
    )  # fmt: skip
    monkeypatch.setattr(graphs.torch, "cuda", cuda)
    outcome = pytest.raises(SetupError, match="previous error") if fails else nullcontext()
    with outcome:
        graphs.recorded(lambda: notes.append(f"on {streams[-1]}"), torch.device("cuda"))()
    first = ["side waits for usual", *["on side"] * 3, "begin", "on side"]
    assert notes == first + ([] if fails else ["end", "usual waits for side", "replayed"])
    assert streams[-1] == "usual"
    assert not graphs._ONE_AT_A_TIME.locked()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_graphs_on_a_gpu(family):
    """Real graphs: a slider, ends, streaming; and what was recorded stays right."""
    torch.backends.cuda.matmul.allow_tf32 = False
    pair = build(family) if family != "llama" else build_adapter_pair()
    for root in {id(root): root for root in pair.sides.roots}.values():
        root.to("cuda")
    made = StaticDecoder()
    for coefficient in (0.0, 1.0, -3.0, 1.0):
        check_equal(pair, made, do=moved(coefficient))
    assert made.n_recorded == (1 if family == "llama" else 2)
