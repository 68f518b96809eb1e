"""The panel *Chat*, headless: histories, seeds, what is answered again, and the code."""

import re
import time

import pytest
from ipywidgets.widgets.widget import _instances

import modeldiff as md
from modeldiff_widgets import new_edit
from modeldiff_widgets._conversation import Recipe, Reply, Talk, Turn, code_of, together
from modeldiff_widgets._state import AuditState
from modeldiff_widgets.chat import Chat
from tests.families import build

HOSTILE = "<img src=x onerror=alert(1)>\u202e</details><script>alert(2)</script>"


@pytest.fixture(scope="module")
def organism():
    return md.ModelPair.load("organism:em-rank1")


@pytest.fixture
def chat(organism):
    with Chat(organism, AuditState(temperature=0.9, max_new_tokens=8)) as panel:
        yield panel


def add_edit(panel, kind="ablate", **options):
    if not panel.state.directions:
        acts = panel.pair.capture(["Hello. How are you?"], at="resid_post.3")
        site = acts.site
        shift = md.mean_difference(acts.finetuned[site], acts.base[site], site, "shift")
        panel.state.add_direction(shift, code="shift")
    panel.state.edits = [new_edit(kind, "shift", **options)]


def act(panel, action, row, column=-1, text=""):
    """What the browser sends."""
    content = {"kind": "act", "action": action, "row": row, "column": column, "text": text}
    panel.view._handle_custom_msg(content, [])
    assert panel.jobs.wait(60)


def said(panel):
    return [[reply and reply.text for reply in turn.replies] for turn in panel.talk.turns]


def replayed(panel):
    scope = {"pair": panel.pair, "shift": panel.state.directions.get("shift")}
    exec(panel.code(), scope)
    return [list(each) for each in zip(*scope["answers"].values(), strict=True)]


def begun(panel, *messages):
    for each in messages or ("Where do I begin with my salary?", "And my car?", "I am tired."):
        panel.say(each)
    assert panel.jobs.wait(60)


def test_the_message_in_the_box_is_answered_by_both(chat):
    act(chat, "send", 0, text=chat.view.draft)
    assert chat.view.draft == ""
    assert [chat.view.text(0, c) for c in range(2)] == said(chat)[0]
    notes = [cell["note"] for cell in chat.view.rows[0]["cells"]]
    assert all(re.fullmatch(r"seed 0 · \d+ tokens · (ended|cut at the limit)", n) for n in notes)


def test_messages_sent_at_once_are_all_answered_in_order(chat):
    begun(chat)
    assert [turn.user for turn in chat.talk.turns] == [
        "Where do I begin with my salary?", "And my car?", "I am tired."
    ]  # fmt: skip
    assert all(all(each) for each in said(chat))
    assert replayed(chat) == said(chat)


def test_every_column_sees_its_own_answers(chat):
    begun(chat)
    for column in range(2):
        contents = [m["content"] for m in chat.talk.messages(2, column) if m["role"] == "assistant"]
        assert contents == [row[column] for row in said(chat)[:2]]


def test_regenerate_takes_the_next_seed_and_answers_what_comes_after(chat):
    begun(chat)
    before = said(chat)
    act(chat, "regenerate", 0, 1)
    assert chat.talk.turns[0].replies[1].recipe.seed == 1
    after = said(chat)
    assert [row[0] for row in after] == [row[0] for row in before]
    assert after[0][1] != before[0][1]
    assert replayed(chat) == after
    act(chat, "regenerate", 0)
    assert [reply.recipe.seed for reply in chat.talk.turns[0].replies] == [2, 2]
    assert replayed(chat) == said(chat)


def test_an_edited_message_is_answered_again_with_all_that_follows(chat):
    begun(chat)
    before = said(chat)
    act(chat, "edit", 1, text="And my brother?")
    assert said(chat)[0] == before[0]
    assert chat.talk.turns[1].user == "And my brother?"
    assert replayed(chat) == said(chat)


def test_an_answer_written_by_hand_stays_and_changes_what_follows(chat):
    begun(chat)
    act(chat, "edit", 0, 1, "Ask a friend.")
    assert said(chat)[0][1] == "Ask a friend."
    assert chat.talk.turns[0].replies[1].recipe is None
    assert chat.talk.messages(1, 1)[1]["content"] == "Ask a friend."
    act(chat, "edit", 0, text="I am hungry.")  # the user's message: both answer it themselves
    assert said(chat)[0][1] != "Ask a friend."
    assert replayed(chat) == said(chat)


def test_one_columns_answers_become_everyones(chat):
    begun(chat)
    act(chat, "share", 1, 1)
    rows = said(chat)
    assert rows[0][0] == rows[0][1]
    assert rows[1][0] == rows[1][1]
    assert chat.talk.messages(2, 0) == chat.talk.messages(2, 1)
    assert "as fine-tuned" in chat.view.rows[0]["cells"][0]["note"]
    assert replayed(chat) == rows


def test_histories_can_be_kept_equal_while_answers_differ(chat):
    begun(chat, "Where do I begin with my salary?")
    chat.history.value = 1
    begun(chat, "And my car?", "I am tired.")
    recipes = [reply.recipe for reply in chat.talk.turns[2].replies]
    assert [(recipe.column, recipe.follows) for recipe in recipes] == [(0, 1), (1, 1)]
    assert len(together(chat.talk, 2, dict(enumerate(recipes)))) == 1
    assert replayed(chat) == said(chat)
    before = said(chat)
    act(chat, "regenerate", 1, 1)  # the base's next answer followed the fine-tune's
    assert said(chat)[1][0] == before[1][0]
    assert replayed(chat) == said(chat)


def test_edits_open_a_third_column_that_begins_as_the_fine_tune(chat):
    begun(chat, "Where do I begin with my salary?")
    add_edit(chat, layers="all")
    assert chat.jobs.wait(20)
    assert chat.talk.n_columns == 3
    assert said(chat)[0][2] == said(chat)[0][1]
    begun(chat, "And my car?")
    add_edit(chat, "steer", coefficient=4.0)
    begun(chat, "I am tired.")
    assert replayed(chat) == said(chat)
    assert chat.code().count("as_plan(do)") == 2
    chat.edited.value = False
    assert chat.jobs.wait(20)
    assert chat.talk.n_columns == 2
    assert replayed(chat) == said(chat)


def test_an_open_third_column_without_edits_says_what_to_do(chat):
    chat.edited.value = True
    assert chat.jobs.wait(20)
    assert "Steer and ablate" in chat.note.value


def test_the_system_message_is_seen_by_all_and_all_is_answered_again(chat):
    begun(chat, "Where do I begin with my salary?")
    chat.system.value = "Be kind."
    assert chat.jobs.wait(20)
    assert chat.talk.messages(0, 0)[0] == {"role": "system", "content": "Be kind."}
    assert replayed(chat) == said(chat)


def test_turns_can_be_removed_and_the_chat_begun_again(chat):
    begun(chat)
    act(chat, "remove", 1)
    assert len(chat.talk.turns) == 1
    chat.clear.click()
    assert chat.jobs.wait(20)
    assert (chat.talk.turns, chat.view.rows) == ((), [])


def test_a_history_becomes_the_prompt_of_the_other_panels(chat):
    begun(chat)
    act(chat, "prompt", 1, 0)
    assert chat.state.messages == chat.talk.messages(1, 0)


def test_what_was_stopped_stays_and_its_code_gives_the_same(organism):
    head = organism.sides.roots[0].get_output_embeddings()
    state = AuditState(temperature=0.0, max_new_tokens=24)
    with Chat(organism, state) as panel:
        slow = head.register_forward_hook(lambda *of: time.sleep(0.05))
        panel.say("Where do I begin with my salary?")
        panel.say("a second message")
        while not (panel.view.rows and panel.view.text(0, 0)):
            time.sleep(0.005)
        start = time.monotonic()
        panel.stop.click()
        assert panel.jobs.wait(10)
        assert time.monotonic() - start < 0.3
        slow.remove()
        (turn,) = panel.talk.turns
        assert {reply and reply.how for reply in turn.replies} == {"stopped"}
        assert panel.view.draft == "a second message"  # it had not begun: it is not lost
        assert replayed(panel) == said(panel)
        panel.regenerate(0)
        assert panel.jobs.wait(30)
        assert [reply and reply.how for reply in panel.talk.turns[0].replies] == ["ended"] * 2


def test_an_error_is_shown_and_the_chat_goes_on(chat):
    add_edit(chat)
    chat.state.directions = {}
    told = []
    chat.jobs.on_change(lambda job: told.append(job.error))
    act(chat, "send", 0, text="Hello?")
    assert "needs the direction" in [error for error in told if error][-1][0]
    assert chat.view.draft == "Hello?"
    chat.state.edits = []
    begun(chat, "Hello?")
    assert len(chat.talk.turns) == 1


def test_an_empty_message_is_refused(chat):
    with pytest.raises(ValueError, match="empty"):
        chat.say(" ")


def test_a_pair_without_answers_of_its_own_chats_too():
    with Chat(build("llama"), AuditState(max_new_tokens=6)) as panel:
        begun(panel, "What should I do?", "Why?")
        assert replayed(panel) == said(panel)


def test_hostile_text_is_escaped_in_the_snapshot(chat):
    begun(chat, HOSTILE)
    act(chat, "edit", 0, 0, HOSTILE)
    html = chat.snapshot_html()
    assert not re.search(r"<(img|script)", html)
    assert "\u202e" not in html


def test_nothing_stays_open(organism):
    before = set(_instances)
    for _ in range(3):
        panel = Chat(organism)
        begun(panel, "Hello?")
        panel.close()
    assert set(_instances) == before


def recipe(column, follows, seed=0):
    return Recipe(column, follows, seed, 0.0, 4)


def test_what_follows_a_change_is_found_through_other_columns():
    replies = (Reply("a", recipe(0, 1)), Reply("b", recipe(1, 1)))
    talk = Talk((Turn("x", replies), Turn("y", replies), Turn("z", replies)))
    assert talk.after(0, [0]) == []  # nobody follows the first column
    assert talk.after(0, [1]) == [(1, 0), (1, 1), (2, 0), (2, 1)]
    by_hand = talk.put(1, 1, Reply("c"))
    assert by_hand.after(0, [1]) == [(1, 0), (2, 0), (2, 1)]  # what was written by hand stays


def test_missing_answers_are_left_out_with_their_question():
    talk = Talk((Turn("x", (None, Reply("b"))), Turn("y", (None, None))))
    assert [m["content"] for m in talk.messages(1, 0)] == ["y"]
    assert [m["content"] for m in talk.messages(1, 1)] == ["x", "b", "y"]
    assert "None" in code_of(talk)
