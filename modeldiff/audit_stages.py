"""The stages of an audit, each adding tables and findings to a `Work` as they become finished."""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import pandas as pd

from modeldiff import audit_findings as findings
from modeldiff import audit_proof as proof
from modeldiff._progress import Progress, check, reporter
from modeldiff.audit_answers import (
    NORMAL,
    SHOWS,
    Asker,
    Judged,
    classes,
    full_texts,
    to_continue,
)
from modeldiff.audit_proof import CONTRAST, SHIFT, TEXT_NULL
from modeldiff.behaviours import Behaviour
from modeldiff.cache import Cache
from modeldiff.directions import Direction
from modeldiff.edit_effects import effects
from modeldiff.errors import ModelDiffError
from modeldiff.interventions import Cell, grid
from modeldiff.models import ModelPair
from modeldiff.outputs import OutputDiff
from modeldiff.report import Finding, Table
from modeldiff.survey import (
    Survey,
    base_directions,
    data_directions,
    model_directions,
    survey,
)
from modeldiff.tokens import Text, token_names

STAGES = ("answers", "outputs", "activations", "directions", "proof")
MIN_ANSWERS = 10
"""Answers of each class that a direction needs."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides an audit's numbers, beside the pair and what it is asked.

    Args:
        seed: Of sampling, splits, controls and intervals.
        n_random: Random directions that the ablation is compared with.
        n_discovery: Answers to each discovery prompt, from which directions are found.
        n_samples: Answers to each evaluation prompt.
        n_scan: Random directions beside each layer of the scan.
        max_new_tokens: Length of continuations where no behaviour says it.
        max_rows: Rows of a generation batch.
        max_tokens: Tokens of a forward batch.
    """

    seed: int = 0
    n_random: int = 20
    n_discovery: int = 4
    n_samples: int = 1
    n_scan: int = 5
    max_new_tokens: int = 64
    max_rows: int = 512
    max_tokens: int = 8192

    def __post_init__(self) -> None:
        low = {name: n for name, n in vars(self).items() if n < (0 if name == "seed" else 1)}
        if low:
            raise ModelDiffError(
                f"the audit's settings {low} are too small: all must be at least 1, the seed at "
                "least 0. Without random directions nothing could be claimed."
            )


@dataclass(eq=False)
class Work:
    """What one run of an audit has found so far."""

    pair: ModelPair
    settings: Settings
    cache: Cache
    progress: Progress
    cancel: Event | None
    tables: dict[str, Table] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    directions: list[Direction] = field(default_factory=list)
    caveats: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._report = reporter(self.progress, "audit")
        s, rest = self.settings, (self.settings.max_rows, self.cache, self.cancel)
        self.discoverer = Asker(self.pair, s.seed, s.n_discovery, *rest)
        self.asker = Asker(self.pair, s.seed, s.n_samples, *rest)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage, report it, and stop before it if the run was cancelled."""
        check(self.cancel)
        index = STAGES.index(name)
        self._report(index, len(STAGES), name)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(time.perf_counter() - started, 3)
            self._report(index + 1, len(STAGES), name)

    def add(self, name: str, frame: pd.DataFrame, title: str, caption: str) -> None:
        """Keep a finished table."""
        self.tables[name] = Table(frame.reset_index(drop=True), title, caption)


def audit_behaviour(work: Work, behaviours: Sequence[Behaviour]) -> None:
    """Explain the first behaviour; measure the others beside it."""
    main, others = behaviours[0], behaviours[1:]
    discovery, evaluation = main.split(work.settings.seed)
    with work.stage("answers"):
        asked = work.discoverer.judge(discovery, grid())
        work.findings.append(findings.behaviour_differs(asked))
        work.add("behaviour", proof.model_rows(asked), *findings.BEHAVIOUR)
    with work.stage("outputs"):
        sides = ("base", "finetuned")
        wrote = {f"on-policy {side}": _texts(work, asked, side) for side in sides}
        if not _outputs(work, wrote):
            return
    with work.stage("activations"):
        labels = classes(asked.cell("finetuned"))
        written = wrote["on-policy finetuned"]
        prompts = asked.cell("finetuned")["prompt_index"].tolist()
        found = _survey(work, written, labels, prompts)
    if reason := findings.nothing_to_explain(work.findings[0], labels.count(SHOWS), MIN_ANSWERS):
        work.caveats.append(reason)
        return
    with work.stage("directions"):
        kinds = _behaviour_directions(work, found, labels.count(NORMAL))
        if not kinds:
            return
        kind, place = _choose_by_behaviour(work, discovery, kinds)
        _scan(work, found, kinds[kind], written)
    with work.stage("proof"):
        _prove_behaviour(work, evaluation, others, kinds, kind, place)


def audit_texts(work: Work, items: Sequence[Any]) -> None:
    """Explain the distance between the two models' predictions on continuations of texts.

    Raises:
        ModelDiffError: If there are fewer than 8 texts that begin differently.
    """
    distinct = list(to_continue(work.pair, items).values())
    if len(distinct) < 8:
        raise ModelDiffError(
            "an audit needs a behaviour or at least 8 texts that begin differently, got "
            f"{len(distinct)}: half of them find a direction, the other half prove it."
        )
    order = list(range(len(distinct)))
    random.Random(work.settings.seed).shuffle(order)
    halves = [[distinct[i] for i in sorted(order[k::2])] for k in (0, 1)]
    prompts, given = ([[each[k] for each in half] for half in halves] for k in (0, 1))
    with work.stage("answers"):
        wrote = [_continue(work, half) for half in prompts]
    with work.stage("outputs"):
        if not _outputs(work, {**wrote[0], "given texts": tuple(given[0])}):
            return
    with work.stage("activations"):
        tuned = wrote[0]["on-policy finetuned"]
        owners = [i // work.settings.n_samples for i in range(len(tuned))]
        found = _survey(work, tuned, ["finetuned text"] * len(tuned), owners)
    with work.stage("directions"):
        directions = model_directions(found, "finetuned text", SHIFT)
        if not directions:
            work.caveats.append(findings.SAME_STREAM)
            return
        work.directions += list(directions.values())
        distance = _scan(work, found, directions, tuned).groupby("edit")["kl"].mean()
        chosen = min(proof.candidates(directions), key=lambda place: float(distance[place]))
    with work.stage("proof"):
        _prove_distance(work, directions, chosen, wrote[1]["on-policy finetuned"], given[1])


def _continue(work: Work, prompts: Sequence[Text]) -> dict[str, tuple[Text, ...]]:
    """Let both models continue prompts."""
    found = work.asker.ask(
        prompts, grid(), temperature=1.0, max_new_tokens=work.settings.max_new_tokens
    )
    return {
        f"on-policy {side}": full_texts(
            work.pair, found, [i for i, a in enumerate(found.answers) if a.side == side]
        )
        for side in ("base", "finetuned")
    }


def _texts(work: Work, judged: Judged, side: str) -> tuple[Text, ...]:
    rows = judged.table.index[judged.table["side"] == side]
    return full_texts(work.pair, judged.generations, list(rows))


def _outputs(work: Work, sources: Mapping[str, Sequence[Text]]) -> bool:
    """Compare predictions; False if the two models predict exactly the same."""
    written = {name: texts for name, texts in sources.items() if name != "given texts"}
    diff = work.pair.output_diff(
        written, on="new", max_tokens=work.settings.max_tokens, cancel=work.cancel
    )
    summary = diff.summary(seed=work.settings.seed)
    if "given texts" in sources:
        given = work.pair.output_diff(
            {"given texts": sources["given texts"]}, max_tokens=work.settings.max_tokens,
            cancel=work.cancel,
        )  # fmt: skip
        summary = pd.concat([summary, given.summary(seed=work.settings.seed)])
    work.add("outputs", summary, *findings.OUTPUTS)
    _moved_tokens(work, diff)
    found = findings.outputs_differ(summary)
    work.findings.append(found)
    if found.holds is False:
        work.caveats.append(findings.IDENTICAL)
    return found.holds is not False


def _moved_tokens(work: Work, diff: OutputDiff) -> None:
    columns = ["token", "mean_probability_change", "mean_log_ratio", "share_promoted"]
    for name, frame in (("promoted", diff.promoted(15)), ("demoted", diff.demoted(15))):
        work.add(name, frame[[*columns, f"n_{name}"]], *findings.MOVED[name])
    worst = diff.by_text().nlargest(4, "kl_ft_base")["text"]
    shown = diff.tokens[diff.tokens["text"].isin(worst)]
    columns = ["source", "text", "position", "token", "role", "kl_ft_base", "js", "delta_logprob"]
    top = {
        side: token_names(work.pair.tokenizer, shown[side].tolist())
        for side in ("top1_base", "top1_ft")
    }
    work.add("tokens", shown[columns].assign(**top), *findings.TOKENS)


def _survey(
    work: Work, texts: tuple[Text, ...], labels: list[str], prompts: Sequence[int]
) -> Survey:
    """Survey answers; those to one prompt are in one half."""
    found = survey(
        work.pair.sides, texts, labels, groups=prompts, on="new", seed=work.settings.seed,
        cancel=work.cancel,
    )  # fmt: skip
    work.add("layers", found.layers(work.settings.seed), *findings.LAYERS)
    return found


def _behaviour_directions(
    work: Work, found: Survey, n_normal: int
) -> dict[str, dict[int, Direction]]:
    """Directions by kind and layer: what might carry the behaviour, and the base's own contrast."""
    kinds = {SHIFT: model_directions(found, SHOWS, SHIFT)}
    if not kinds[SHIFT]:
        work.caveats.append(findings.SAME_STREAM)
        return {}
    if n_normal < MIN_ANSWERS:
        work.caveats.append(findings.few_answers(n_normal, MIN_ANSWERS))
    else:
        kinds[CONTRAST] = data_directions(found, SHOWS, NORMAL, CONTRAST)
        kinds[TEXT_NULL] = base_directions(found, SHOWS, NORMAL, TEXT_NULL)
    for directions in kinds.values():
        work.directions += list(directions.values())
    return kinds


def _scan(
    work: Work, found: Survey, directions: Mapping[int, Direction], texts: Sequence[Text]
) -> pd.DataFrame:
    """Ablate at each layer alone, beside random directions; returns the effects."""
    s = work.settings
    some = list(texts[:: max(1, len(texts) // 48)])[:48]
    scanned = effects(
        work.pair.sides, some, proof.scan_cells(directions, s.n_scan, s.seed), on="new",
        max_tokens=s.max_tokens, cancel=work.cancel,
    )  # fmt: skip
    rows = proof.scan_rows(work.tables["layers"].frame, directions, scanned, s.n_scan)
    work.add("layers", rows, *findings.LAYERS)
    return scanned


def _choose_by_behaviour(
    work: Work, discovery: Behaviour, kinds: Mapping[str, Mapping[int, Direction]]
) -> tuple[str, str]:
    """Pick direction and place on the discovery prompts: least behaviour among the coherent."""
    options = [
        (kind, place, layers)
        for kind, directions in kinds.items()
        if kind != TEXT_NULL
        for place, layers in proof.candidates(directions).items()
    ]
    cells = [
        proof.cells_of_ablation(f"{kind}, {place}", kinds[kind], layers)
        for kind, place, layers in options
    ]
    tried = work.asker.judge(discovery, [Cell("finetuned"), *cells])
    rows = pd.DataFrame(
        [proof.behaviour_row(tried, "finetuned", cell.name, cell.name, "edit") for cell in cells]
    )
    work.add("choice", rows, *findings.CHOICE)
    unedited = proof.behaviour_row(tried, "finetuned", "none", "fine-tuned", "model")
    sized = rows.assign(n_layers=[len(layers) for *_, layers in options])
    sound = sized[proof.sound(sized, unedited)]
    sound = sound if len(sound) else sized
    best = sound.sort_values(["rate", "n_layers"], kind="stable").index[0]
    kind, place, _ = options[int(best)]
    return kind, place


def _prove_behaviour(
    work: Work,
    evaluation: Behaviour,
    others: Sequence[Behaviour],
    kinds: Mapping[str, Mapping[int, Direction]],
    kind: str,
    place: str,
) -> None:
    """Measure the chosen edit and its controls on the evaluation prompts."""
    s, directions = work.settings, kinds[kind]
    work.caveats += list(filter(None, [findings.few_controls(s.n_random)]))
    layers = proof.candidates(directions)[place]
    best = _steering_layer(work, layers)
    drawn = proof.random_sets(directions, s.n_random, s.seed)
    ablated = proof.cells_of_ablation("ablated", directions, layers)
    randoms = [proof.cells_of_ablation(f"random {i}", one, layers) for i, one in enumerate(drawn)]
    nulls = [
        proof.cells_of_ablation(name, found, proof.candidates(found)["every layer"])
        for name, found in kinds.items()
        if name != kind
    ]
    steers = proof.cells_of_steering("steered", directions[best])
    shakes = [
        cell
        for i in range(min(5, s.n_random))
        for cell in proof.cells_of_steering(f"random {i}", drawn[i][best])
    ]
    cells = [*grid(), ablated, *nulls, *steers, *shakes, *randoms]
    judged = work.asker.judge(evaluation, cells)
    rows = proof.behaviour_rows(judged, f"{kind} ablated at {place}", nulls, s.n_random)
    rows += proof.steering_rows(judged, best, steers, shakes)
    work.add("behaviour", pd.DataFrame(rows), *findings.BEHAVIOUR)
    work.add("labels", proof.label_rows(judged, rows), *findings.LABELS)
    controls = proof.control_rows(judged, [cell.name for cell in randoms], s.seed)
    work.add("controls", controls, *findings.CONTROLS)
    work.add("examples", proof.example_rows(judged), *findings.EXAMPLES)
    work.findings += findings.proven(judged, work.tables["behaviour"].frame, controls, s.seed)
    work.findings.append(findings.reliable([directions[layer] for layer in layers]))
    _measure_others(work, others, ablated)


def _steering_layer(work: Work, layers: Sequence[int]) -> int:
    """The layer at which ablating alone brings the fine-tune nearest to the base."""
    frame = work.tables["layers"].frame
    frame = frame[frame["layer"].isin(layers)]
    return int(frame.sort_values("kl_after_ablation")["layer"].iloc[0])


def _measure_others(work: Work, others: Sequence[Behaviour], ablated: Cell) -> None:
    rows = []
    for behaviour in others:
        judged = work.asker.judge(behaviour, [*grid(), ablated])
        for side, edit in (("base", "none"), ("finetuned", "none"), ("finetuned", "ablated")):
            name = side if edit == "none" else f"{side}, {edit}"
            row = proof.behaviour_row(
                judged, side, edit, name, "edit" if edit != "none" else "model"
            )
            rows.append({"behaviour": behaviour.name, **row})
    if rows:
        work.add("other_behaviours", pd.DataFrame(rows), *findings.OTHERS)


def _prove_distance(
    work: Work,
    directions: Mapping[int, Direction],
    chosen: str,
    wrote: Sequence[Text],
    given: Sequence[Text],
) -> None:
    """Measure how much of the distance to the base the chosen edit closes on held-out texts."""
    s = work.settings
    work.caveats += list(filter(None, [findings.few_controls(s.n_random)]))
    layers = proof.candidates(directions)[chosen]
    drawn = proof.random_sets(directions, s.n_random, s.seed)
    randoms = [proof.cells_of_ablation(f"random {i}", one, layers) for i, one in enumerate(drawn)]
    ablated = proof.cells_of_ablation("ablated", directions, layers)
    cells = [*grid(), ablated, *randoms]
    kinds = {"none": "model", "ablated": "edit", **{cell.name: "control" for cell in randoms}}
    table = effects(
        work.pair.sides, wrote, cells, on="new", max_tokens=s.max_tokens, cancel=work.cancel
    )
    rows = proof.effect_rows(table, kinds, s.seed)
    shown = rows["kind"] != "control"
    pooled = proof.pooled_effects(rows, s.n_random)
    work.add("effects", pd.concat([rows[shown], pooled]), *findings.effects_table(chosen))
    controls = rows[~shown].rename(
        columns={"edit": "control", "kl_to_base": "kl", "kl_low": "low", "kl_high": "high"}
    )
    work.add("controls", controls[["control", "kl", "low", "high"]], *findings.CONTROLS_KL)
    on_given = effects(
        work.pair.sides, given, [*grid(), ablated], max_tokens=s.max_tokens, cancel=work.cancel
    )
    work.add("effects_given", proof.effect_rows(on_given, kinds, s.seed), *findings.GIVEN)
    work.findings += findings.distance_closed(table, controls["kl"].to_numpy(float), chosen, s.seed)
    work.findings.append(findings.reliable([directions[layer] for layer in layers]))
