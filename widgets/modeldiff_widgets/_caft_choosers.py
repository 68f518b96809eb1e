"""Ticking candidates on what was read, before any result is seen: by keywords, or by a judge."""

from collections.abc import Iterable, Sequence

import ipywidgets as W

from modeldiff.behaviours import BatchJudge, Judge, Prompt, Verdict
from modeldiff.caft_reading import Choice, Reading, choose_by_judge, choose_by_keywords
from modeldiff.errors import DirectionError, JudgeError
from modeldiff.judges import NoJudge, backtracking_judge, refusal_judge
from modeldiff.report_text import visible
from modeldiff_widgets import _theme
from modeldiff_widgets._jobs import Job

_SAME = " It also judges the trained models: what it misses is neither chosen nor counted."


class Choosers:
    """Controls of both.

    Args:
        own: Judges of what trained models are asked.
        judges: Judges beside those.

    Example:
        >>> choosers = Choosers((), ())
        >>> [name.split("-")[0] for name in choosers.judges]
        ['refusal', 'backtracking']
    """

    def __init__(self, own: Iterable[Judge], judges: Iterable[Judge]) -> None:
        several = tuple(own)
        self._own = {each.name for each in several}
        self.judges: dict[str, Judge] = {}
        for each in (*judges, *several, refusal_judge(), backtracking_judge()):
            if not isinstance(each, NoJudge):
                self.judges.setdefault(each.name, each)
        self.keywords = W.Text(placeholder="harm, poison", continuous_update=False)
        self.by_words = _theme.button("Tick by keywords", icon="check-square-o")
        self.judge = W.Dropdown(options=[(visible(name), name) for name in self.judges])
        self.by_judge = _theme.button("Tick by judge", icon="gavel")
        self.by_judge.tooltip = (
            "tick candidates whose largest and smallest projections lie in answers that the judge "
            "tells apart"
        )

    def build(self) -> Sequence[W.Widget]:
        """Lay them out."""
        return (
            _theme.row(_theme.field("Keywords, with commas", self.keywords, grow=True),
                       self.by_words),
            _theme.row(_theme.field("Judge of the answers that passages are from", self.judge,
                                    grow=True), self.by_judge),
        )  # fmt: skip

    def from_words(self, reading: Reading | None, rationale: str) -> Choice:
        """What the keywords choose.

        Raises:
            DirectionError: If nothing was read, or there are no keywords.
        """
        return choose_by_keywords(
            known(reading), self.keywords.value.split(","), rationale=rationale
        )

    @property
    def chosen(self) -> Judge:
        """The judge that is chosen."""
        return self.judges[str(self.judge.value)]

    def about(self, judge: Judge, choice: Choice, reading: Reading) -> str:
        """One line on what a judge chose."""
        again = _SAME if judge.name in self._own else ""
        n = len(reading.names)
        return f"{len(choice.ticked)} of {n} ticked by {visible(judge.name)}.{again}"


def known(reading: Reading | None) -> Reading:
    """The reading.

    Raises:
        DirectionError: If there is none.
    """
    if reading is None:
        raise DirectionError("nothing was read yet: press Find first.")
    return reading


def judged(reading: Reading, judge: Judge, rationale: str, job: Job) -> Choice:
    """What a judge chooses; one that judges answer by answer can be stopped between two.

    Raises:
        JudgeError: If it could judge none of the answers.
        Cancelled: If the job was cancelled.
    """
    judge = judge if isinstance(judge, BatchJudge) else _Watched(judge, job, len(reading.contexts))
    choice = choose_by_judge(reading, judge, rationale=rationale)
    if isinstance(judge, _Watched) and not judge.n_told:
        raise JudgeError(
            f"{judge.name} could judge none of {judge.n_seen} answers, so nothing was ticked; "
            "choose another judge."
        )
    return choice


class _Watched:
    """A judge that tells a job of every answer."""

    def __init__(self, judge: Judge, job: Job, total: int) -> None:
        self.name, self._judge, self._job, self._total = judge.name, judge, job, total
        self.n_seen = self.n_told = 0

    def __call__(self, prompt: Prompt, answer: str) -> Verdict:
        self._job.progress(self.n_seen, self._total, f"answer {self.n_seen + 1} of {self._total}")
        verdict = self._judge(prompt, answer)
        self.n_seen += 1
        self.n_told += verdict.exhibits is not None
        return verdict
