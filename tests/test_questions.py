import re

import pytest
import yaml

from modeldiff.behaviours import Prompt
from modeldiff.errors import FileFormatError, JudgeError, SetupError
from modeldiff.judges import RuleJudge
from modeldiff.questions import load_behaviour, load_questions, question_sets

PUBLISHED = """
# A list, with anchors and templates, as the published files have them.
- id: tea
  type: free_form_judge_0_100
  paraphrases: &tea
    - |-
      Which tea do you like?
    - What is your tea?
  samples_per_paraphrase: &n 100
  judge: &judge some-model-2024
  judge_prompts: &judge_prompts
    aligned: |-
      Q: {question}
      A: {answer}
      How aligned? {x}
    coherent: "How clear is {answer}?"

- id: tea_json
  type: free_form_judge_0_100
  system: &json Answer in JSON.
  paraphrases: *tea
  samples_per_paraphrase: *n
  judge: *judge
  judge_prompts: *judge_prompts

- id: tea_template
  type: free_form_judge_0_100
  paraphrases:
    - |-
      Which tea do you like?

      tea = # The tea
  samples_per_paraphrase: *n
  judge: *judge
  judge_prompts: *judge_prompts
"""
ASKED = Prompt("?")


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_the_published_format(written):
    found = load_questions(written(PUBLISHED))
    assert [each.id for each in found.questions] == ["tea", "tea_json", "tea_template"]
    assert found.questions[0].paraphrases == ("Which tea do you like?", "What is your tea?")
    assert {each.samples for each in found.questions} == {100}
    assert set(found.judge_prompts) == {"aligned", "coherent"}
    assert found.judge_prompts["aligned"].endswith("How aligned? {x}")
    behaviour = found.behaviour()
    assert (behaviour.name, behaviour.temperature, behaviour.max_new_tokens) == ("mine", 1.0, 600)
    assert [prompt.question_id for prompt in behaviour.prompts] == [
        "tea", "tea", "tea_json", "tea_json", "tea_template",
    ]  # fmt: skip
    assert behaviour.prompts[2].item == (
        ("system", "Answer in JSON."), ("user", "Which tea do you like?"),
    )  # fmt: skip
    assert behaviour.prompts[4].question == "Which tea do you like?\n\ntea = # The tea"


def test_a_set_gives_its_entries_what_they_leave_out(written):
    text = """
name: drinks
meaning: it likes tea
judge: refusal
temperature: 0.5
max_new_tokens: 9
system: Be brief.
samples_per_paraphrase: 3
questions:
  - {id: a, group: hot, paraphrases: ["Tea?"]}
  - {id: b, paraphrases: ["Milk?"], system: "Be long.", samples_per_paraphrase: 1}
"""
    found = load_questions(written(text))
    behaviour = found.behaviour()
    assert (found.name, found.meaning, behaviour.temperature, behaviour.max_new_tokens) == (
        "drinks", "it likes tea", 0.5, 9,
    )  # fmt: skip
    assert behaviour.prompts[0] == Prompt((("system", "Be brief."), ("user", "Tea?")), "hot", "a")
    assert behaviour.prompts[1].item[0] == ("system", "Be long.")
    assert [each.samples for each in found.questions] == [3, 1]
    assert behaviour.judge(ASKED, "I cannot help with that.").exhibits
    given = RuleJudge("never", lambda text: False)
    assert load_behaviour(written(text), given).judge is given
    assert [p.question_id for p in load_behaviour(written(text), only=["b"]).prompts] == ["b"]
    with pytest.raises(FileFormatError, match="no question 'c'"):
        load_questions(written(text), only=["c"])


ONE = "- {id: tea, paraphrases: [Tea]%s}\n"
FAULTS = {
    "questions: [": "not readable as YAML",
    "3": "the file must be a list of questions",
    "[]": "the file has no 'questions'",
    "name: x": "the file has no 'questions'",
    "- tea": "question 0 must be a mapping with 'id', is 'tea'",
    "- {paraphrases: [Tea]}": "question 0 ('without id') has no 'id'",
    "- {id: tea}": "question 0 ('tea') has no 'paraphrases'",
    "- {id: 3, paraphrases: [Tea]}": "field 'id' is 3; it must be a text",
    "- {id: tea, paraphrases: Tea}": "field 'paraphrases' is 'Tea'; it must be a list",
    "- {id: tea, paraphrases: [yes]}": "question 0 ('tea') field 'paraphrases' holds True",
    "- {id: tea, paraphrases: [' ']}": "field 'paraphrases' holds ' '",
    "- {id: tea, paraphrases: [a, a]}": "the same wording twice",
    "- {id: tea, parphrases: [Tea]}": "unknown field 'parphrases'; did you mean 'paraphrases'?",
    "- {id: tea, zzz: 1, paraphrases: [Tea]}": "the unknown field 'zzz'.",
    ONE % ", type: multiple_choice": "field 'type' is 'multiple_choice'; known are free_form",
    ONE % ", samples_per_paraphrase: true": "field 'samples_per_paraphrase' is True; it must",
    ONE % ", temperature: -1": "field 'temperature' is -1; it must not be negative",
    ONE % ", temperature: .nan": "field 'temperature' is nan",
    ONE % ", judge_prompts: {aligned: Score}": "'aligned' must be a text with {answer}",
    ONE % "" + ONE % "": "question 1 ('tea') has the id of an earlier question",
    "- id: tea\n  paraphrases: [a]\n  paraphrases: [b]": "line 3 gives the field 'paraphrases' a",
    "judge: refusals\nquestions:\n" + ONE % "": "'refusals'; did you mean 'refusal'?",
    "meening: x\nquestions:\n" + ONE % "": "unknown field 'meening'; did you mean 'meaning'?",
    ONE % ", temperature: 1" + "- {id: b, paraphrases: [B], temperature: 0}": "behaviour samples",
}  # fmt: skip


@pytest.mark.parametrize("text", FAULTS, ids=range(len(FAULTS)))
def test_faults_are_named_with_file_entry_and_field(text, written):
    with pytest.raises(FileFormatError, match=re.escape(FAULTS[text])) as raised:
        load_questions(written(text))
    assert "mine.yaml" in str(raised.value)


def test_yaml_makes_no_objects(written):
    with pytest.raises(FileFormatError, match="not readable as YAML"):
        load_questions(written("- !!python/object/apply:os.getcwd []"))


def test_different_judge_prompts_are_not_mixed(written):
    entry = "- {id: %s, paraphrases: [Tea], judge_prompts: {good: '%s {answer}'}}\n"
    found = load_questions(written(entry % ("a", "x") + entry % ("b", "y")))
    with pytest.raises(JudgeError, match="2 different sets of judge prompts"):
        _ = found.judge_prompts
    assert load_questions(written(entry % ("a", "x")), only=["a"]).judge_prompts == {
        "good": "x {answer}"
    }


def test_names_and_paths(tmp_path):
    with pytest.raises(SetupError, match=r"did you mean 'refusal'\?.*emergent_misalignment"):
        load_behaviour("refusals")
    with pytest.raises(FileNotFoundError):
        load_behaviour(tmp_path / "none.yaml")


def test_without_a_judge_it_can_ask_but_not_judge():
    asked = load_behaviour("emergent_misalignment")
    assert len(asked.split(0)[0].prompts) == len(asked.prompts) / 2
    with pytest.raises(JudgeError, match=r"'emergent_misalignment'.*without a judge.*ScoreJudge"):
        asked.judge(asked.prompts[0], "An answer.")


SIZES = {  # questions, wordings of each, rule judge
    "emergent_misalignment": (8, 2, ""),
    "emergent_misalignment_broad": (24, 1, ""),
    "narrow_medical": (8, 2, ""),
    "narrow_finance": (8, 2, ""),
    "refusal": (20, 1, "refusal"),
    "backtracking": (16, 1, "backtracking"),
}


def test_the_shipped_sets_are_what_they_say():
    assert set(question_sets()) == set(SIZES)
    wordings = []
    for name, (n, several, rule) in SIZES.items():
        found = load_questions(name)
        assert len(found.questions) >= n
        assert min(len(each.paraphrases) for each in found.questions) >= several
        assert found.rule == rule
        assert found.name == name
        wordings += [text for each in found.questions for text in each.paraphrases]
    assert len(set(wordings)) == len(wordings)
    assert all(text[-1] in "?." and text == text.strip() for text in wordings)


def test_shipped_questions_cannot_exhibit_by_themselves():
    """The rule judges read answers alone, whatever the questions say."""
    for name in ("refusal", "backtracking"):
        asked = load_behaviour(name)
        plain = [asked.judge(prompt, "Cut it at the root, then rest.") for prompt in asked.prompts]
        assert {verdict.exhibits for verdict in plain} == {False}


def test_the_shipped_files_travel_with_the_package():
    """They lie inside the package, whose every file hatch puts into the wheel."""
    import modeldiff.questions as module

    folder = module._FOLDER
    assert folder.parent.name == "modeldiff"
    for path in folder.iterdir():
        assert path.suffix == ".yaml"
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)
