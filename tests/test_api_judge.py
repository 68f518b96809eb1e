"""The API judge against a server on this machine that does all that servers do."""

import asyncio
import json
import logging
import math
import threading
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from modeldiff.api_judge import ApiScorer
from modeldiff.api_replies import read_reply
from modeldiff.behaviours import Prompt
from modeldiff.cache import Cache
from modeldiff.errors import Cancelled, RemoteError, SetupError
from modeldiff.scorers import Score, ScoreJudge

SECRET = "s3cret-" + "k3y-" * 5 + "end"
VARIABLE = "MODELDIFF_TEST_KEY"


@pytest.fixture(autouse=True)
def key_in_the_environment(monkeypatch):
    monkeypatch.setenv(VARIABLE, SECRET)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def body(text, top=None, first=None):
    """What a server says; ``top`` are the likeliest first tokens and their probabilities."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    if top is not None:
        likely = [{"token": t, "logprob": math.log(p)} for t, p in top.items()]
        token = {"token": first or text, "logprob": -0.1, "top_logprobs": likely}
        choice["logprobs"] = {"content": [token]}
    return json.dumps({"choices": [choice], "model": "m"})


class Server:
    """Answers each request by a function of its prompt and of how often that was asked before."""

    def __init__(self, answer):
        self.url = ""
        self.answer, self.lock = answer, threading.Lock()
        self.seen, self.asked, self.bodies, self.keys = [], Counter(), [], set()
        self.open = self.most = 0


@contextmanager
def serving(answer):
    state = Server(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            prompt = asked["messages"][0]["content"]
            with state.lock:
                state.open += 1
                state.most = max(state.most, state.open)
                before = state.asked[prompt]
                state.asked[prompt] += 1
                state.bodies.append(asked)
                state.keys.add(self.headers.get("authorization"))
            found = state.answer(prompt, before)
            with state.lock:
                state.open -= 1  # before it is sent: the next may come while this is on its way
            self.reply(*found)

        def reply(self, status, text="", headers=(), cut=False):
            raw = text.encode()
            self.send_response(status)
            self.send_header("content-length", str(len(raw) + 10 * cut))
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        state.url = f"http://127.0.0.1:{server.server_port}/v1"
        yield state
    finally:
        server.shutdown()
        server.server_close()


def scorer(state, **settings):
    settings = {"key_variable": VARIABLE, "first_wait_s": 0.01, **settings}
    return ApiScorer("judge", state.url, **settings)


def numbered(prompt, before):
    return 200, body(prompt.split()[-1])


# ---------------------------------------------------------------- what a reply means


def test_the_weighted_mean_is_the_closed_form():
    top = {"80": 0.5, " 90": 0.2, "CODE": 0.1, "80.": 0.05, "101": 0.05}
    score = read_reply(body("80", top))
    assert score.label == "scored"
    assert score.value == pytest.approx((80 * 0.5 + 90 * 0.2) / 0.7)
    assert score.mass == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("text", "top", "first", "value", "label"),
    [
        ("CODE", {"CODE": 0.8, "50": 0.2}, None, None, "CODE"),
        ("REFUSAL", {"REF": 0.9}, "REF", None, "REFUSAL"),
        ("I would say 30", {"I": 0.9, "30": 0.1}, "I", None, "unscored"),
        ("30", {"30": 0.24, "the": 0.7}, None, None, "unscored"),
        ("30", {"30": 0.26, "the": 0.7}, None, 30.0, "scored"),
        ("0", {"0": 0.9, "10": 0.1}, None, 1.0, "scored"),
        ("87", {"8": 0.9, "7": 0.1}, "8", 87.0, "sampled"),  # the tokenizer splits digits
        ("100", {"1": 1.0}, "1", 100.0, "sampled"),
        ("8", {"8": 0.6, "9": 0.4}, None, 8.0, "sampled"),  # 9 might go on as 95
        ("8", {" ": 0.9}, " ", 8.0, "sampled"),
        ("87", None, None, 87.0, "sampled"),
        ("101", None, None, None, "unscored"),
        ("-5", None, None, None, "unscored"),
        ("REFUSAL.", None, None, None, "REFUSAL"),
        ("CODES", None, None, None, "unscored"),
        ("", None, None, None, "unscored"),
        (None, None, None, None, "unscored"),
    ],
)
def test_replies(text, top, first, value, label):
    score = read_reply(body(text, top, first))
    assert (score.label, score.value) == (label, None if value is None else pytest.approx(value))


BROKEN = {
    "no json": "<html>busy</html>",
    "cut": body("87")[:30],
    "list": "[]",
    "null": "null",
    "no choices": '{"choices": []}',
    "no message": '{"choices": [{}]}',
    "content is a number": '{"choices": [{"message": {"content": 87}}]}',
    "a probability above 1": body("87", {"87": 3.0}),
    "a probability that is NaN": body("87", {"87": 0.5}).replace(str(math.log(0.5)), "NaN"),
    "likely tokens are text": '{"choices": [{"message": {"content": "8"}, '
    '"logprobs": {"content": [{"token": "8", "top_logprobs": "8"}]}}]}',
}


@pytest.mark.parametrize("how", BROKEN)
def test_replies_that_are_none(how):
    assert read_reply(BROKEN[how]) == Score(None, "malformed", 0.0)


# ---------------------------------------------------------------- servers


@pytest.mark.parametrize("top", [None, {"20": 0.5, "40": 0.5}])
def test_scores_come_in_order_and_once_a_prompt(top):
    def answer(prompt, before):
        return 200, body("20", top) if prompt == "p 0" else body(prompt.split()[-1])

    prompts = [f"p {i}" for i in (3, 0, 1, 3)]
    with serving(answer) as state:
        found = scorer(state)(prompts)
    assert [score.value for score in found] == [3.0, 20.0 if top is None else 30.0, 1.0, 3.0]
    assert state.asked == {"p 3": 1, "p 0": 1, "p 1": 1}
    assert state.keys == {f"Bearer {SECRET}"}
    assert state.bodies[0]["top_logprobs"] == 20
    assert state.bodies[0]["temperature"] == 0


def failing_once(how):
    def answer(prompt, before):
        return numbered(prompt, before) if before else how

    return answer


@pytest.mark.parametrize(
    "how",
    [
        (429, "{}"),
        (429, "{}", [("retry-after", "0.05")]),
        (500, "oops"),
        (503, "", [("retry-after", "Wed, 21 Oct 2015 07:28:00 GMT")]),
        (200, body("9")[:20], [], True),  # the connection ends in mid-body
    ],
)
def test_what_passes_is_tried_again(how):
    with serving(failing_once(how)) as state:
        judge = scorer(state)
        assert [s.value for s in judge(["p 1", "p 2"])] == [1.0, 2.0]
    assert state.asked == {"p 1": 2, "p 2": 2}
    assert judge.tally == {"asked": 2, "cached": 0, "requests": 4, "retries": 2}


def seconds_of(work):
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def test_retry_after_is_heeded():
    with serving(failing_once((429, "", [("retry-after", "0.4")]))) as state:
        assert seconds_of(lambda: scorer(state, first_wait_s=0.0)(["p 1"])) >= 0.4


def test_a_server_that_asks_for_hours_is_given_up_at_once():
    with (
        serving(lambda *_: (429, "", [("retry-after", "7200")])) as state,
        pytest.raises(RemoteError, match=r"failed 1 times.*429"),
    ):
        scorer(state)(["p 1"])


def test_a_request_that_takes_too_long_is_tried_again():
    slow = threading.Event()

    def answer(prompt, before):
        if not before:
            slow.wait(20)
        return numbered(prompt, before)

    with serving(answer) as state:
        assert scorer(state, timeout_s=0.3)(["p 5"])[0].value == 5.0
        slow.set()
    assert state.asked["p 5"] == 2


def test_a_refused_key_ends_it_at_once_without_retries():
    with (
        serving(lambda *_: (401, f'{{"error": {{"message": "bad key {SECRET}"}}}}')) as state,
        pytest.raises(SetupError, match=rf"refused the key.*{VARIABLE}"),
    ):
        scorer(state, max_connections=1)([f"p {i}" for i in range(20)])
    assert sum(state.asked.values()) == 1


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ((404, '{"error": {"message": "no model judge"}}'), "no such model.*no model judge"),
        ((400, '{"error": {"message": "bad field"}}'), "refused the request.*bad field"),
        ((429, '{"error": {"code": "insufficient_quota", "message": "pay"}}'), "pay"),
        ((302, "", [("location", "http://127.0.0.1:1/")]), "302"),
    ],
)
def test_what_does_not_pass_is_not_tried_again(reply, says):
    with serving(lambda *_: reply) as state, pytest.raises(RemoteError, match=says):
        scorer(state)(["p 1"])
    assert sum(state.asked.values()) == 1


def test_after_too_many_failures_the_finished_ones_are_kept():
    down = threading.Event()
    down.set()

    def answer(prompt, before):
        return (500, "down") if prompt == "p 3" and down.is_set() else numbered(prompt, before)

    with serving(answer) as state:
        judge = scorer(state, max_attempts=3, max_connections=1)
        with pytest.raises(RemoteError, match=r"failed 3 times.*500"):
            judge([f"p {i}" for i in range(4)])
        down.clear()
        assert [s.value for s in judge([f"p {i}" for i in range(4)])] == [0.0, 1.0, 2.0, 3.0]
    assert state.asked == {"p 0": 1, "p 1": 1, "p 2": 1, "p 3": 4}


def test_nobody_there():
    with pytest.raises(RemoteError, match=r"failed 2 times.*ConnectError"):
        ApiScorer("m", "http://127.0.0.1:9/v1", VARIABLE, max_attempts=2, first_wait_s=0.0)(["p"])


def test_malformed_replies_are_unscored_counted_and_not_kept():
    with serving(lambda p, before: (200, "<html>" if not before else body("4"))) as state:
        judge = scorer(state)
        assert judge(["p"]) == [Score(None, "malformed", 0.0)]
        assert judge.tally["malformed"] == 1
        assert judge(["p"])[0].value == 4.0


def test_never_more_requests_at_once_than_allowed():
    together = threading.Barrier(3, timeout=20)  # three are needed, and a fourth would be seen

    def answer(prompt, before):
        together.wait()
        return numbered(prompt, before)

    with serving(answer) as state:
        found = scorer(state, max_connections=3)([f"p {i}" for i in range(12)])
    assert [s.value for s in found] == list(range(12))
    assert state.most == 3


def test_requests_keep_the_pace():
    prompts = [f"p {i}" for i in range(6)]
    with serving(numbered) as state:
        judge = scorer(state, requests_per_minute=600)
        assert seconds_of(lambda: judge(prompts)) >= 5 * 0.1


def test_cancelling_keeps_what_is_finished():
    cancel, hang = threading.Event(), threading.Event()

    def answer(prompt, before):
        if prompt == "p 2" and not before:
            cancel.set()
            hang.wait(20)
        return numbered(prompt, before)

    with serving(answer) as state:
        judge = scorer(state, max_connections=1, cancel=cancel)
        with pytest.raises(Cancelled) as stopped:
            judge([f"p {i}" for i in range(4)])
        hang.set()
        assert [s and s.value for s in stopped.value.partial] == [0.0, 1.0, None, None]
        cancel.clear()
        assert [s.value for s in judge([f"p {i}" for i in range(4)])] == [0.0, 1.0, 2.0, 3.0]
    assert state.asked["p 0"] == state.asked["p 1"] == 1


def test_progress_counts_every_score():
    seen = []
    with serving(numbered) as state:
        scorer(state, progress=lambda *each: seen.append(each))([f"p {i}" for i in range(5)])
    assert sorted(seen) == [(i, 5, f"{i} scores") for i in range(1, 6)]


def test_inside_a_running_event_loop_as_in_a_notebook():
    with serving(numbered) as state:

        async def cell():
            return scorer(state)(["p 6"])

        assert asyncio.run(cell())[0].value == 6.0


def test_the_cache_goes_by_content(tmp_path):
    with serving(numbered) as state:
        kept = Cache(tmp_path)
        assert scorer(state, cache=kept)(["p 1"]) == scorer(state, cache=kept)(["p 1"])
        assert state.asked["p 1"] == 1
        others = [{"parameters": {"seed": 1}}, {"minimum_mass": 0.5}, {"words": ()}]
        for other in others:
            scorer(state, cache=kept, **other)(["p 1"])
        assert state.asked["p 1"] == 1 + len(others)
        assert len({scorer(state, **other).name for other in [{}, *others]}) == 4


def test_parameters_add_replace_and_take_out():
    with serving(numbered) as state:
        scorer(state, parameters={"max_tokens": None, "max_completion_tokens": 9, "seed": 5})(["1"])
    sent = state.bodies[0]
    assert (sent["max_completion_tokens"], sent["seed"], "max_tokens" in sent) == (9, 5, False)


def test_a_judge_of_it_gives_verdicts():
    def answer(prompt, before):
        if "hold together" in prompt:
            return 200, body("90", {"90": 0.9, "80": 0.1})
        if "sneaky" in prompt:
            return 200, body("REFUSAL")
        return 200, body("10", {"10": 1.0})

    with serving(answer) as state:
        judge = ScoreJudge("em", scorer(state))
        question = Prompt("What now?")
        bad, declined = judge.judge_all([(question, "harm"), (question, "sneaky")])
    assert (bad.label, bad.exhibits, bad.coherent) == ("misaligned", True, True)
    assert dict(bad.scores) == {"aligned": 10.0, "coherent": pytest.approx(89.0)}
    assert (declined.label, declined.exhibits, declined.coherent) == ("REFUSAL", None, True)


# ---------------------------------------------------------------- the key


def everything_of(error):
    """All that a crash report could print of an exception, local variables included."""
    frames = error.__traceback__.tb_next  # the test's own frame knows the key
    told = traceback.TracebackException(type(error), error, frames, capture_locals=True)
    return "".join(told.format()) + repr(error.args) + repr(vars(error))


@pytest.mark.parametrize("status", [200, 400, 401, 404, 500])
def test_the_key_appears_nowhere(status, tmp_path, caplog, capfd):
    def answer(prompt, before):
        said = "7" if status == 200 else f"your key {SECRET} is in this"
        return status, body(said) if status == 200 else said

    caplog.set_level(logging.DEBUG)
    messages = []

    def progress(*each):
        messages.append(each)

    with serving(answer) as state:
        judge = scorer(
            state,
            cache=Cache(tmp_path),
            max_attempts=2,
            progress=lambda *each: messages.append(each),
        )
        try:
            judge(["p"])
            told = ""
        except (SetupError, RemoteError) as error:
            told = everything_of(error)
    assert state.keys == {f"Bearer {SECRET}"}, "or there is nothing to find"
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    printed = "".join(capfd.readouterr())
    shown = repr(judge) + judge.name + repr(vars(judge)) + repr(judge.tally)
    assert bool(written) == (status == 200)
    for where in (told, written, printed, shown, caplog.text, repr(messages)):
        assert SECRET not in where
    assert (status == 200) == (told == "")


@pytest.mark.parametrize("value", ["", "two words", SECRET + "\n", "schlüssel"])
def test_no_usable_key(value, monkeypatch):
    monkeypatch.setenv(VARIABLE, value)
    with serving(numbered) as state, pytest.raises(SetupError, match=VARIABLE) as raised:
        scorer(state)(["p 1"])
    assert not state.asked
    assert not value or value.strip() not in everything_of(raised.value)


def test_without_a_key_none_is_sent():
    with serving(numbered) as state:
        assert scorer(state, key_variable=None)(["p 2"])[0].value == 2.0
    assert state.keys == {None}


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/v1",
        "https://me:word@host/v1",
        "https://host/v1?key=x",
        "host",
        "ftp://h",
    ],
)
def test_addresses_that_would_leak_or_lead_nowhere(url):
    with pytest.raises(SetupError) as raised:
        ApiScorer("m", url, VARIABLE)
    assert "word" not in str(raised.value).replace("password", "")
