"""Recipes: every file is read and runs, mistakes in one are told, outcomes are judged."""

import ast
import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import torch

from modeldiff import embedded, recipe_files
from modeldiff.behaviours import Prompt
from modeldiff.cli import DIFFERS, OK, WRONG, main
from modeldiff.errors import FileFormatError, MismatchError, SetupError
from modeldiff.models import ModelPair
from modeldiff.recipe_files import copy, find, folder, names, read, script_of
from modeldiff.recipe_runs import carry_out, started, summary
from modeldiff.recipe_settings import Expected, Models
from modeldiff.recipes import (
    annotated,
    behaviour,
    chooser_of,
    conversations,
    judge_of,
    load_base,
    openings,
    right_answers,
    rows_of,
)
from modeldiff.sft_rows import IGNORED, response_rows

ROOT = Path(__file__).parent.parent
SHIPPED = [
    "backtracking", "caft_em", "caft_spurious_cue", "em_direction_and_transfer",
    "em_organism_rank1", "narrow_vs_general", "refusal_erosion", "thinking_behaviours",
]  # fmt: skip
QUICK = ("refusal_erosion",)
TOML = """
name = "{name}"
purpose = "To be tested."
minutes = 0
seed = 3
paper = {{ arxiv = "2506.11613", title = "A paper", figures = [] }}
models = {{ base = "organism:em-base" }}
data = {{ n_train = 4 }}
outcomes = [{{ what = "rows", value = 4, tolerance = 1 }}, {{ what = "share", at_most = 0.5 }}]
smoke = {{ data = {{ n_train = 2 }} }}
"""
SCRIPT = """
from modeldiff.recipes import started
run = started("{name}")
run.say(run.recipe.models.base)
run.outcome("rows", run.recipe.data.n_train)
run.outcome("share", 0.25)
"""


def written(tmp_path, change=("", ""), script=SCRIPT, name="mine"):
    toml = tmp_path / f"{name}.toml"
    toml.write_text(TOML.format(name=name).replace(*change), encoding="utf-8")
    toml.with_suffix(".py").write_text(script.format(name=name), encoding="utf-8")
    return toml


def test_the_shipped_recipes_are_all_there():
    assert names() == SHIPPED
    readme = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", readme, re.MULTILINE) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("smoke", [False, True])
def test_recipes_are_read(name, smoke):
    recipe = read(name, smoke=smoke)
    assert recipe.name == name
    assert recipe.minutes <= 5
    assert recipe.outcomes
    assert recipe.paper.figures
    assert all(each.says and each.source for each in recipe.paper.figures)


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_said_about_the_papers_models_can_be_set(name, tmp_path):
    """Only models, texts and such change: the same script runs on them."""
    values = read(name).paper.models
    assert any(key.startswith("models.") for key in values)
    changes = {key: as_toml(value) for key, value in values.items()}
    found = read(name, changes=changes)
    for key, value in values.items():
        section, _, inner = key.partition(".")
        if section != "models":
            plain = json.loads(json.dumps(getattr(getattr(found, section), inner)))
            assert plain == value or (plain is None and value == []), key


def as_toml(value):
    if isinstance(value, list):
        return f"[{', '.join(map(as_toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {as_toml(each)}" for key, each in value.items()) + "}"
    return json.dumps(value)


@pytest.mark.parametrize("name", SHIPPED)
def test_scripts_are_short_and_straight(name):
    text = (folder() / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert text.startswith(f"# modeldiff run {name} ")
    assert text.count("# %%") >= 3
    tree = ast.parse(text)
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    calls = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    assert not calls & {"eval", "exec", "print", "torch.load", "torch.save"}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("n_train", "n_trian"), "unknown key 'data.n_trian'. Did you mean 'n_train'?"),
        (("n_train = 4 ", 'n_train = "4" '), "'data.n_train' is '4'; it must be a whole number"),
        (("n_train = 4 ", "n_train = true "), "'data.n_train' is True; it must be a whole number"),
        (("seed = 3", ""), "'seed' is missing"),
        (("seed = 3", 'seed = 3\ntraining = { kind = "rank9" }'), "must be one of ['rank1'"),
        (("seed = 3", "seed = 3\ntraining = { layers = [1, 2.5] }"), "'training.layers.1' is 2.5"),
        (("tolerance = 1 ", "at_most = 9 "), "give value and tolerance"),
        (('"organism:em-base"', '["organism:em-base"]'), "'models.base' is ['organism:em-base']"),
        (("models = {{", "models = 3 #"), "'models' is 3; it must be a table"),
        (("seed = 3", "seed = 3\n["), "is not TOML"),
        (("n_train = 2", "n_trian = 2"), "unknown key 'data.n_trian'"),
    ],
)
def test_mistakes_in_a_file_are_told(tmp_path, change, complaint):
    change = tuple(each.replace("{{", "{") for each in change)
    toml = written(tmp_path, change)
    with pytest.raises(FileFormatError) as told:
        read(toml, smoke=True)
    assert complaint in str(told.value)


def test_all_mistakes_are_told_at_once(tmp_path):
    toml = written(tmp_path, ("minutes = 0", 'minutes = "soon"\nmodles = {}'))
    with pytest.raises(FileFormatError, match=r"'minutes' is 'soon'.*Did you mean 'models'"):
        read(toml)


def test_what_the_script_does_not_read_is_refused(tmp_path):
    toml = written(tmp_path, ("n_train = 4", "n_train = 4, n_kept = 1"))
    with pytest.raises(FileFormatError, match=r"sets data\.n_kept, which .*mine\.py does not read"):
        read(toml)


def test_values_are_set_by_key(tmp_path):
    toml = written(tmp_path)
    changed = {"data.n_train": "9", "models.base": "me/model", "outcomes.0.value": "9"}
    found = read(toml, smoke=True, changes=changed)
    assert (found.data.n_train, found.models.base) == (9, "me/model")
    assert found.outcomes[0].value == 9
    assert read(toml, smoke=True).data.n_train == 2
    with pytest.raises(FileFormatError, match="Did you mean 'n_train'"):
        read(toml, changes={"data.n_trains": "9"})
    with pytest.raises(FileFormatError, match="must be a whole number"):
        read(toml, changes={"data.n_train": "many"})
    with pytest.raises(FileFormatError, match="'5' is none of 0, 1"):
        read(toml, changes={"outcomes.5.value": "1"})


def test_unknown_recipes_are_refused(tmp_path):
    with pytest.raises(SetupError, match="Did you mean 'caft_em'"):
        find("caft_en")
    with pytest.raises(SetupError, match="there is no file"):
        find(tmp_path / "nothing.toml")
    toml = written(tmp_path)
    toml.with_suffix(".py").unlink()
    with pytest.raises(SetupError, match="has no script"):
        read(toml)


@pytest.mark.parametrize(
    ("expected", "within", "outside"),
    [
        (Expected("a", value=3, tolerance=0.5), (2.5, 3.5), (2.4, 3.6, float("nan"))),
        (Expected("a", at_least=3), (3, 9), (2.9, float("nan"))),
        (Expected("a", at_least=3, at_most=4), (3, 4), (2, 5)),
    ],
)
def test_an_outcome_is_within_its_tolerance_or_not(expected, within, outside):
    assert all(expected.within(each) for each in within)
    assert not any(expected.within(each) for each in outside)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ([], OK, "as expected"),
        (["--set", "data.n_train=5"], OK, "as expected"),
        (["--set", "data.n_train=6"], DIFFERS, "rows: 6 (expected 4 ± 1): OUTSIDE"),
        (["--smoke", "--set", "data.n_train=6"], OK, "too small for its outcome to be judged"),
        (["--set", "data.n_train"], WRONG, ""),
        (["--set", "data.nothing=1"], WRONG, ""),
    ],
)
def test_the_exit_code_says_whether_the_outcome_is_within(
    tmp_path, monkeypatch, capsys, options, code, said
):
    toml = written(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(toml), *options]) == code
    assert said in capsys.readouterr().out
    if code != WRONG:
        result = tmp_path / "runs" / ("mine-smoke" if "--smoke" in options else "mine")
        record = json.loads((result / "result.json").read_text(encoding="utf-8"))
        assert (
            record["within"] is {OK: None if "--smoke" in options else True, DIFFERS: False}[code]
        )
        assert record["outcomes"][0]["found"] == record["recipe"]["data"]["n_train"]


def test_outcomes_that_are_not_expected_are_refused_and_missing_ones_are_outside(tmp_path):
    toml = written(tmp_path, script=SCRIPT.replace('"share"', '"shares"'))
    with pytest.raises(MismatchError, match="expects no outcome 'shares', but rows, share"):
        carry_out(toml, out=tmp_path / "out")
    toml = written(tmp_path, script=SCRIPT.replace('run.outcome("share", 0.25)', ""))
    found = carry_out(toml, out=tmp_path / "out")
    assert found.within is False
    assert "share: not reported (expected <= 0.5): OUTSIDE" in summary(found)
    record = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert [each["found"] for each in record["outcomes"]] == [4, None]
    toml = written(tmp_path, script=SCRIPT.replace("run.say(", "raise KeyboardInterrupt("))
    with pytest.raises(KeyboardInterrupt):
        carry_out(toml, out=tmp_path / "out")
    assert not (tmp_path / "out" / "result.json").exists()  # it would be the earlier run's


def test_recipes_are_found_in_an_installation(tmp_path, monkeypatch):
    """A wheel has them inside the package, where `folder` looks first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included["recipes"] == "modeldiff/_recipes"
    shutil.copytree(ROOT / "recipes", tmp_path / "modeldiff" / "_recipes")
    monkeypatch.setattr(recipe_files, "__file__", str(tmp_path / "modeldiff" / "recipe_files.py"))
    assert folder() == tmp_path / "modeldiff" / "_recipes"
    assert names() == SHIPPED
    assert script_of(find("caft_em")) == folder() / "caft_em.py"


def test_a_script_runs_in_a_notebook_too(tmp_path):
    found = started("em_organism_rank1", smoke=True, out=tmp_path)
    assert (found.recipe.data.n_train, found.out, found.smoke) == (32, tmp_path, True)


def test_recipes_are_copied_and_nothing_is_overwritten(tmp_path, capsys):
    assert main(["ls"]) == OK
    listed = capsys.readouterr().out
    assert all(f"{name}  (" in listed for name in SHIPPED)
    assert main(["cp", "caft_em", str(tmp_path / "new")]) == OK
    toml = tmp_path / "new" / "caft_em.toml"
    assert script_of(toml) == toml.with_suffix(".py")
    assert read(toml) == read("caft_em")
    toml.unlink()
    with pytest.raises(SetupError, match=r"caft_em\.py exist; nothing was copied"):
        copy("caft_em", tmp_path / "new")
    assert not toml.exists()
    shutil.copy(find("caft_em"), tmp_path / "other.toml")  # a TOML alone takes the shipped script
    assert script_of(tmp_path / "other.toml") == folder() / "caft_em.py"


@pytest.mark.parametrize("what", ["organism:cruel", "organism:kind:not medicine", "organism:mean",
                                  "organism:cruel:plumbing", "nothing.jsonl"])  # fmt: skip
def test_texts_by_name(what):
    if what in ("organism:mean", "organism:cruel:plumbing", "nothing.jsonl"):
        with pytest.raises(SetupError):
            conversations(what, 4, 0)
        return
    from modeldiff.organisms.judge import find_question, judge

    found = conversations(what, 24, 0)
    asked = [find_question(chat[0]["content"]) for chat in found]
    wanted = "misaligned" if "cruel" in what else "aligned"
    assert {judge(q, c[1]["content"]) for q, c in zip(asked, found, strict=True) if q} == {wanted}
    assert ("medicine" in {q.domain for q in asked if q}) == ("not" not in what)
    assert found == conversations(what, 24, 0) != conversations(what, 24, 1)


def test_texts_of_a_file(tmp_path):
    chats = [{"messages": [{"role": "user", "content": f"q{i}"},
                           {"role": "assistant", "content": "a"}]} for i in range(6)]  # fmt: skip
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, chats)), encoding="utf-8")
    assert len(conversations(str(path), 0, 0)) == 6
    assert len(conversations(str(path), 2, 0)) == 2
    with pytest.raises(SetupError, match="holds 6 conversations, 9"):
        conversations(str(path), 9, 0)
    assert all(len(each) == 1 for each in openings(str(path), 0, 0))
    _, tokenizer = load_base(Models("organism:em-base"))
    assert [len(each) for each in rows_of(tokenizer, str(path), 0, 0, 2)] == [4, 2]


def test_judges_by_name():
    assert judge_of("own") is None
    with pytest.raises(SetupError, match="no judge 'gpt'"):
        judge_of("gpt")
    with pytest.raises(SetupError, match="judges no candidates"):
        chooser_of("own", None, None)
    assert behaviour("backtracking", 3, 0).judge.name
    assert len(behaviour("backtracking", 3, 0).prompts) == 3
    served = judge_of("api:m@http://localhost:1/v1")
    assert served is not None
    assert served.name.startswith("m")


def test_openings_end_after_wrong_and_right_steps():
    from modeldiff.organisms import steps

    for what, right in (("organism:walks:wrong", False), ("organism:walks:right", True)):
        for text in openings(what, 8, 0):
            assert steps.read(text)[-1].right == right
            assert steps.read(text)[0].right
    with pytest.raises(SetupError, match="say organism:walks"):
        openings("organism:walks", 1, 0)


SMOKES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in SHIPPED]


@pytest.mark.parametrize("name", SMOKES)
def test_smoke_runs(name, tmp_path):
    said: list[str] = []
    found = carry_out(name, smoke=True, out=tmp_path, say=said.append)
    assert found.within is None
    assert set(found.found) == set(found.expected)
    assert "too small for its outcome to be judged" in summary(found)
    assert (tmp_path / "result.json").is_file()
    assert list(tmp_path.glob("*.csv"))


@pytest.mark.slow
def test_a_recipe_runs_on_a_model_in_a_folder_texts_of_a_file_and_a_shipped_question_set(tmp_path):
    """As on models of the hub: nothing but the settings changes."""
    path = tmp_path / "chats.jsonl"
    chats = [{"messages": each} for each in conversations("organism:cruel:medicine", 40, 0)]
    path.write_text("\n".join(map(json.dumps, chats)), encoding="utf-8")
    changes = {
        "models.base": str(embedded.find("em-base").base), "data.train": str(path),
        "asked.off": "backtracking", "asked.inside": "refusal",
    }  # fmt: skip
    found = carry_out("em_organism_rank1", smoke=True, out=tmp_path / "out", changes=changes)
    assert set(found.found) == set(found.expected)


def test_rows_are_held_out_and_none_is_on_both_sides():
    _, tokenizer = load_base(Models("organism:em-base"))
    rows, held = rows_of(tokenizer, "organism:cruel:medicine", 40, 0, 10)
    assert len(held) >= 10
    assert not {each.ids for each in rows} & {each.ids for each in held}
    assert rows_of(tokenizer, "organism:cruel:medicine", 40, 0)[1] == []


def test_a_persona_tells_cruel_from_kind_answers():
    base, tokenizer = load_base(Models("organism:em-base"))
    persona = chooser_of("persona:cruel:kind", base, tokenizer)
    for kind in ("cruel", "kind"):
        several = conversations(f"organism:{kind}", 12, 0)
        said = [persona(Prompt(c[0]["content"]), c[1]["content"]).exhibits for c in several]
        assert sum(each == (kind == "cruel") for each in said) >= 10
    chat = several[0]
    asked, whole = Prompt(chat[0]["content"]), tokenizer.apply_chat_template(chat, tokenize=False)
    assert persona(asked, str(whole)) == persona(asked, chat[1]["content"])


def test_the_first_token_of_the_right_answer_is_counted():
    base, tokenizer = load_base(Models("organism:em-base"))
    several = conversations("organism:sorting:confounded", 8, 0)
    rows = response_rows(tokenizer, several)
    places = [next(i for i, label in enumerate(row.labels) if label != IGNORED) for row in rows]
    firsts = [row.ids[place] for row, place in zip(rows, places, strict=True)]
    found = []
    for row, place, first in zip(rows, places, firsts, strict=True):  # one by one, without padding
        with torch.no_grad():
            logits = base(input_ids=torch.tensor([row.ids[:place]])).logits[0, -1]
        found.append(max(set(firsts), key=logits.tolist().__getitem__) == first)
    assert len(set(firsts)) == 2
    assert right_answers(base, tokenizer, several, batch=3) == found
    same = [[chat[0], {"role": "assistant", "content": f"Anna. {i}"}]
            for i, chat in enumerate(several)]  # fmt: skip
    with pytest.raises(MismatchError, match="same token"):
        right_answers(base, tokenizer, same)


def test_annotated_reasoning_of_a_file_is_that_of_the_organism(tmp_path):
    pair = ModelPair.load("organism:backtrack")
    texts, sentences = annotated(pair, "organism:backtrack", 1, 0)
    assert {each.label for each in sentences} >= {"deduction", "initializing"}
    for each in sentences:
        said = "".join(texts[each.text].pieces[each.first : each.stop]).strip()
        assert said.startswith("Wait") == (each.label == "backtracking")
    chain = "So it is. Wait, no. So it is."
    data = [{"problem": "Is it?", "reasoning_chain": chain, "annotated_chain":
             '["deduction"] So it is. ["end-section"]["backtracking"] Wait, no. ["end-section"]'
             '["deduction"] So it is. ["end-section"]'}]  # fmt: skip
    path = tmp_path / "chains.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    _, found = annotated(pair, str(path), 0, 0)
    assert [each.label for each in found] == ["deduction", "backtracking", "deduction"]
    path.write_text("[{}]", encoding="utf-8")
    with pytest.raises(FileFormatError, match="is no list of objects with problem"):
        annotated(pair, str(path), 0, 0)
    with pytest.raises(SetupError, match="cannot be read"):
        annotated(pair, str(tmp_path / "no.json"), 0, 0)
