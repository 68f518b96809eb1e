"""Sets of questions from YAML: the shipped ones, one's own, and the published format."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml

from modeldiff._files import PathLike
from modeldiff.behaviours import Behaviour, Judge, Prompt
from modeldiff.errors import FileFormatError, JudgeError, SetupError
from modeldiff.judges import NoJudge, backtracking_judge, refusal_judge

_FOLDER = Path(__file__).parent / "question_sets"
_RULES: Mapping[str, Callable[[], Judge]] = {
    "refusal": refusal_judge,
    "backtracking": backtracking_judge,
}
_TYPES = ("free_form", "free_form_judge", "free_form_judge_0_100")
_Fields = Mapping[str, type | tuple[type, ...]]
_SHARED: _Fields = {
    "system": str, "temperature": (int, float), "samples_per_paraphrase": int,
    "judge": str, "judge_prompts": dict,
}  # fmt: skip
_ENTRY: _Fields = {
    "id": str, "type": str, "paraphrases": list, "group": str, "max_tokens": int, **_SHARED,
}  # fmt: skip
_SET: _Fields = {
    "name": str, "meaning": str, "max_new_tokens": int, "questions": list, **_SHARED,
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """One question in all its wordings.

    Args:
        id: Its name, unique in the set.
        paraphrases: Its wordings, whole: a template or a format that is asked for is part of them.
        group: Its kind.
        system: System prompt; empty for the model's default.
        samples: Answers to each wording that its authors take; None if they do not say.
        judge_prompts: What a judging model is asked, by the name of the score.
    """

    id: str
    paraphrases: tuple[str, ...]
    group: str = ""
    system: str = ""
    samples: int | None = None
    judge_prompts: tuple[tuple[str, str], ...] = ()

    def prompts(self) -> tuple[Prompt, ...]:
        """A chat for each wording."""
        system = (("system", self.system),) if self.system else ()
        return tuple(
            Prompt((*system, ("user", text)), self.group, self.id) for text in self.paraphrases
        )


@dataclass(frozen=True)
class QuestionSet:
    """Questions as a file gives them.

    Args:
        name: Of the set.
        meaning: What a rate of 1 means.
        questions: The questions.
        rule: Name of the rule judge that the set brings; empty if it needs another.
        temperature: At which answers are sampled.
        max_new_tokens: Where answers are cut.
    """

    name: str
    meaning: str
    questions: tuple[Question, ...]
    rule: str = ""
    temperature: float = 1.0
    max_new_tokens: int = 600

    @property
    def judge_prompts(self) -> dict[str, str]:
        """What a judging model is asked, by the name of the score, such as for ScoreJudge.

        Raises:
            JudgeError: If questions want different prompts; use each `Question.judge_prompts`.
        """
        several = {each.judge_prompts for each in self.questions}
        if len(several) > 1:
            raise JudgeError(
                f"the questions of {self.name!r} have {len(several)} different sets of judge "
                "prompts. Load them apart with only=, and judge each with its own."
            )
        return dict(several.pop())

    def behaviour(self, judge: Judge | None = None) -> Behaviour:
        """The questions as a behaviour; without a judge or a rule it says so when judged."""
        prompts = tuple(prompt for each in self.questions for prompt in each.prompts())
        chosen = judge or (_RULES[self.rule]() if self.rule else NoJudge(self.name, _HINT))
        return Behaviour(
            self.name, self.meaning, prompts, chosen, self.temperature, self.max_new_tokens
        )


_HINT = (
    "Give judge=: a model's scores (ScoreJudge with a LocalScorer or an ApiScorer), a classifier "
    "(NgramJudge.fit on labelled answers), words (RegexJudge, RuleJudge), or any object with a "
    "name that maps (prompt, answer) to a Verdict."
)


def question_sets() -> list[str]:
    """Names of the shipped sets.

    Example:
        >>> "emergent_misalignment" in question_sets()
        True
    """
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_behaviour(
    name_or_path: PathLike, judge: Judge | None = None, *, only: Sequence[str] | None = None
) -> Behaviour:
    """Load questions as a behaviour.

    Args:
        name_or_path: A shipped set (`question_sets`), or a YAML file.
        judge: Who says whether an answer shows it. Without, a set that names a rule judge has
            that; any other raises `JudgeError` when it is judged.
        only: Ids of the questions to keep.

    Raises:
        SetupError: If there is no such set.
        FileNotFoundError: If there is no such file.
        FileFormatError: If the file is not as it should be; names the entry and the field.

    Example:
        >>> refusals = load_behaviour("refusal")
        >>> refusals.judge(refusals.prompts[0], "I cannot help with that.").exhibits
        True
    """
    return load_questions(name_or_path, only=only).behaviour(judge)


def load_questions(name_or_path: PathLike, *, only: Sequence[str] | None = None) -> QuestionSet:
    """Load a set of questions, with the prompts of its judge if it has any.

    A file is either a list of entries, as published with the emergent misalignment papers (``id``,
    ``type``, ``paraphrases``, ``samples_per_paraphrase``, ``judge``, ``judge_prompts``,
    ``system``), or a mapping with such a list under ``questions`` and ``name``, ``meaning``,
    ``judge`` (a rule judge), ``temperature`` and ``max_new_tokens`` beside it. An entry's ``judge``
    names its authors' model and is not used.

    Args:
        name_or_path: A shipped set, or a YAML file.
        only: Ids of the questions to keep.

    Raises:
        SetupError: If there is no such set.
        FileNotFoundError: If there is no such file.
        FileFormatError: If the file is not as it should be; names the entry and the field.

    Source:
        The format is that of the code of arXiv 2502.17424.
    """
    path = _path_of(name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        twice = _given_twice(yaml.compose(text, Loader=yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{str(path)!r} is not readable as YAML: {error}") from error
    if twice:
        _wrong(path, f"line {twice[1]}", f"gives the field {twice[0]!r} a second time")
    found = _set_of(content, path)
    return found if only is None else _only(found, only, path)


def _path_of(name_or_path: PathLike) -> Path:
    text = str(name_or_path)
    if text in question_sets():
        return _FOLDER / f"{text}.yaml"
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.exists():
        return path
    raise SetupError(
        f"there is no set of questions {text!r}{_near(text, question_sets())}; shipped are "
        f"{', '.join(question_sets())}. A file of your own ends in .yaml."
    )


def _given_twice(root: yaml.Node | None) -> tuple[str, int] | None:
    """A field that a mapping gives twice, of which YAML would keep the last, and its line."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
            continue
        keys = [str(key.value) for key, _ in node.value]
        for number, (key, value) in enumerate(node.value):
            if keys[number] in keys[:number]:
                return keys[number], key.start_mark.line + 1
            waiting.append(value)
    return None


def _set_of(content: Any, path: Path) -> QuestionSet:
    if not isinstance(content, list | dict):
        _wrong(path, "the file", "must be a list of questions, or a mapping with 'questions'")
    whole: dict[str, Any] = content if isinstance(content, dict) else {"questions": content}
    _check(whole, _SET, path, "the file")
    if not whole.get("questions"):
        _wrong(path, "the file", "has no 'questions'")
    rule = whole.get("judge", "")
    if rule and rule not in _RULES:
        known = f"{_near(rule, _RULES)}; rule judges are {', '.join(_RULES)}"
        _wrong(path, "the file", f"field 'judge' is {rule!r}{known}. Leave it out and give another")
    entries = [_entry(each, i, whole, path) for i, each in enumerate(whole["questions"])]
    _unique([each["id"] for each in entries], path)
    name = whole.get("name", path.stem)
    return QuestionSet(
        name=name,
        meaning=whole.get("meaning", f"the judge finds the behaviour {name!r} in the answer"),
        questions=tuple(_question(each) for each in entries),
        rule=rule,
        temperature=float(_common("temperature", entries, whole.get("temperature", 1.0), path)),
        max_new_tokens=_common("max_tokens", entries, whole.get("max_new_tokens", 600), path),
    )


def _entry(entry: Any, number: int, whole: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """One checked entry, with what the set gives to all."""
    if not isinstance(entry, dict):
        _wrong(path, f"question {number}", f"must be a mapping with 'id', is {entry!r}")
    where = f"question {number} ({str(entry.get('id', 'without id'))!r})"
    _check(entry, _ENTRY, path, where)
    for needed in ("id", "paraphrases"):
        if not entry.get(needed):
            _wrong(path, where, f"has no {needed!r}")
    texts = entry["paraphrases"]
    odd = [each for each in texts if not isinstance(each, str) or not each.strip()]
    if odd:
        _wrong(path, where, f"field 'paraphrases' holds {odd[0]!r}; each must be a text, in quotes")
    if len(set(texts)) < len(texts):
        _wrong(path, where, "field 'paraphrases' holds the same wording twice")
    if entry.get("type", _TYPES[0]) not in _TYPES:
        _wrong(path, where, f"field 'type' is {entry['type']!r}; known are {', '.join(_TYPES)}")
    shared = ("system", "samples_per_paraphrase", "judge_prompts")
    given = {key: whole[key] for key in shared if key in whole}
    merged = given | entry
    for key, text in merged.get("judge_prompts", {}).items():
        if not isinstance(key, str) or not isinstance(text, str) or "{answer}" not in text:
            _wrong(path, where, f"field 'judge_prompts': {key!r} must be a text with {{answer}}")
    return merged


def _question(entry: Mapping[str, Any]) -> Question:
    return Question(
        entry["id"],
        tuple(entry["paraphrases"]),
        entry.get("group", ""),
        entry.get("system", ""),
        entry.get("samples_per_paraphrase"),
        tuple(sorted(entry.get("judge_prompts", {}).items())),
    )


def _check(given: Mapping[Any, Any], known: _Fields, path: Path, where: str) -> None:
    for key, value in given.items():
        if key not in known:
            _wrong(path, where, f"has the unknown field {key!r}{_near(str(key), known)}")
        kinds = known[key]
        if not isinstance(value, kinds) or isinstance(value, bool):
            names = kinds if isinstance(kinds, tuple) else (kinds,)
            wanted = " or ".join(_WORDS[each] for each in names)
            _wrong(path, where, f"field {key!r} is {value!r}; it must be {wanted}")
        if isinstance(value, int | float) and not 0 <= value < float("inf"):
            _wrong(path, where, f"field {key!r} is {value}; it must not be negative")


_WORDS = {
    str: "a text (in quotes)", int: "a whole number", float: "a number", list: "a list",
    dict: "a mapping",
}  # fmt: skip


def _common(field: str, entries: Sequence[Mapping[str, Any]], default: Any, path: Path) -> Any:
    """The one value that all entries have; a behaviour samples all its answers alike."""
    values = {each["id"]: each.get(field, default) for each in entries}
    first = next(iter(values.values()))
    odd = next((name for name, value in values.items() if value != first), None)
    if odd is not None:
        what = f"field {field!r} is {values[odd]}, others have {first}"
        _wrong(path, f"question {odd!r}", f"{what}; one behaviour samples alike, so use two files")
    return first


def _unique(ids: Sequence[str], path: Path) -> None:
    for number, each in enumerate(ids):
        if each in ids[:number]:
            _wrong(path, f"question {number} ({each!r})", "has the id of an earlier question")


def _only(found: QuestionSet, ids: Sequence[str], path: Path) -> QuestionSet:
    known = {each.id: each for each in found.questions}
    for each in ids:
        if each not in known:
            _wrong(path, "the file", f"has no question {each!r}{_near(each, known)}")
    chosen = tuple(known[each] for each in dict.fromkeys(ids))
    return QuestionSet(
        found.name, found.meaning, chosen, found.rule, found.temperature, found.max_new_tokens
    )


def _near(name: str, known: Any) -> str:
    near = get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _wrong(path: Path, where: str, what: str) -> NoReturn:
    raise FileFormatError(f"{str(path)!r}: {where} {what}.")
