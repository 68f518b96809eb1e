"""What an audit may claim: each finding is computed from tables, beside its controls.

A finding holds only if an interval excludes the null and the effect lies outside what random
directions do. The sentences carry the numbers; nothing here is claimed without them.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from modeldiff.audit_answers import Judged
from modeldiff.audit_proof import TEXT_NULL, sound
from modeldiff.behaviours import Behaviour
from modeldiff.directions import Direction
from modeldiff.models import ModelPair
from modeldiff.report import Finding
from modeldiff.stats import (
    empirical_p,
    null_band,
    paired_bootstrap,
    permutation_test,
    proportion_difference,
)

BEHAVIOUR = (
    "Behaviour, with the edit and its controls",
    "Share of scored answers that show the behaviour, and share of answers that are coherent, "
    "on evaluation prompts (unless said otherwise); 95 % Wilson intervals. Every cell answers the "
    "same prompts with the same noise. Random directions have the length of the found one, and "
    "are ablated at the same layers. The base-text contrast is the answer contrast as the base "
    "model has it: a property of the texts, not of the fine-tune.",
)
CHOICE = (
    "Where to ablate",
    "Model shift: mean of the fine-tune minus mean of the base on the same answers. Answer "
    "contrast: mean of the fine-tune on answers that show the behaviour minus on normal ones. Each "
    "layer's own direction removed at all layers or at one, on the discovery prompts. What leaves "
    "the least behaviour among the coherent is then tested on prompts that played no part in the "
    "choice.",
)
CONTROLS = (
    "Random directions, one by one",
    "Behaviour of the fine-tune with one random direction of the same length ablated in place of "
    "the found one; fractions with 95 % Wilson intervals.",
)
CONTROLS_KL = (
    "Random directions, one by one",
    "KL(edited || base) in nats a token with one random direction ablated in place of the found "
    "one; 95 % intervals over texts.",
)
EXAMPLES = (
    "Answers side by side",
    "The same prompt and the same noise; evaluation prompts at regular steps, not picked. Edited: "
    "the fine-tune with the direction ablated.",
)
GIVEN = (
    "Effects on the given texts",
    "Held-out half of the texts as they were given: KL(cell || base) and loss in nats a token, "
    "with 95 % intervals over texts.",
)
LABELS = (
    "What the judge said",
    "Share of each label, as fractions of all answers of the cell: where a rate falls, this shows "
    "what rises instead.",
)
LAYERS = (
    "Layers",
    "Relative difference: mean of |h_finetuned - h_base| / |h_base| over generated tokens at "
    "resid_post, with 95 % intervals over texts; the first token is left out. KL after ablation: "
    "KL(edited || base) in nats a token with that layer's direction removed there alone, beside "
    "the band of random directions.",
)
MOVED = {
    "promoted": (
        "Tokens that gained probability",
        "Mean of p_finetuned - p_base and of log p_finetuned - log p_base (nats) over all compared "
        "positions; how often the token is among the ten most promoted.",
    ),
    "demoted": (
        "Tokens that lost probability",
        "Mean of p_finetuned - p_base and of log p_finetuned - log p_base (nats) over all compared "
        "positions; how often the token is among the ten most demoted.",
    ),
}
OTHERS = (
    "Other behaviours",
    "Measured with the same ablation; fractions with 95 % Wilson intervals.",
)
OUTPUTS = (
    "Differences of the predictions",
    "Means over predicted tokens, with 95 % intervals that resample whole texts; KL, JS, log "
    "probabilities and entropies in nats a token. Who wrote the text matters: sources are apart.",
)
TOKENS = (
    "Token by token",
    "The texts with the largest KL(finetuned || base). A token's value belongs to the prediction "
    "of this token from those before it.",
)
UNSCORED = "The judge could score no answer that both sides of this comparison gave."
IDENTICAL = "The two models predict exactly the same: there is nothing to explain."
NOTHING_TO_EXPLAIN = (
    "No difference of the behaviour between the two models was shown on these prompts, so no "
    "direction is claimed for it."
)
SAME_STREAM = (
    "The residual stream is the same in both models after every layer: what differs comes after "
    "the last one (final norm, unembedding), and no direction of the stream is claimed for it."
)
NEGLIGIBLE = 0.05
"""A difference of rates that counts as none if its whole interval is smaller."""
ENOUGH = 19
"""Random directions of which a value that is no better lies below all in 5 % of cases."""
SURE = 0.05
"""P below which a difference may be claimed: of few prompts intervals alone are too narrow."""


def effects_table(chosen: str) -> tuple[str, str]:
    """Title and caption of the table "effects"."""
    return (
        "Distance to the base, with the edit and its controls",
        "Held-out continuations written by the fine-tune: KL(cell || base) and loss in nats a "
        "token, 95 % intervals over texts (for random directions: their band). Ablated at "
        f"{chosen}.",
    )


def caveats(pair: ModelPair, behaviours: Sequence[Behaviour]) -> list[str]:
    """Limits that hold for every audit of this kind."""
    found = ["Intervals cover the sampling of prompts and answers, not another training seed."]
    if behaviours:
        judge = behaviours[0].judge.name
        found.append(f"Rates are what the judge {judge!r} says; its own errors are not in them.")
    if pair.sides.names[0].startswith("organism:"):
        found.append(
            "This is an embedded model organism: the trait was planted by its training corpus. It "
            "validates the tool and is no evidence about other language models."
        )
    return found


def nothing_to_explain(differs: Finding, n_shown: int, needed: int) -> str:
    """Say why no direction is looked for; empty if there is something to explain."""
    if not differs.holds:
        return NOTHING_TO_EXPLAIN
    if n_shown >= needed:
        return ""
    return (
        f"The fine-tune gave {n_shown} answers that show the behaviour, a direction needs "
        f"{needed}. Ask more prompts or more samples (n_discovery). If the fine-tune made the "
        "behaviour rarer, audit it for the opposite behaviour."
    )


def few_controls(n_random: int) -> str:
    """Say how little few random directions show; empty if they are enough for 5 %."""
    if n_random >= ENOUGH:
        return ""
    return (
        f"Only {n_random} random directions stand beside the edit: one that is no better than they "
        f"lies below all of them with probability {1 / (1 + n_random):.0%}. {ENOUGH} are needed "
        "for 5 % (n_random)."
    )


def few_answers(n_normal: int, needed: int) -> str:
    """Say why the contrast of the two models stands in for that of the answers."""
    return (
        f"Only {n_normal} of the fine-tune's answers are normal ({needed} are needed for a "
        "contrast of answers); the direction is the difference between the models instead."
    )


def behaviour_differs(judged: Judged) -> Finding:
    """Compare the rate of both models on the discovery prompts; intervals resample questions.

    That they do not differ is said only if Newcombe's interval is small too, with each question
    counted once: resampling cannot see what has not occurred.
    """
    claim = f"The fine-tune changed the behaviour: {judged.behaviour.name}"
    base, tuned, prompts = _paired(judged, ("base", "none"), ("finetuned", "none"))
    if not len(base):
        return Finding(claim, None, UNSCORED)
    gap = paired_bootstrap(base, tuned, clusters=prompts, seed=0)
    p = _permuted(base, tuned, prompts, 0)
    differs = p < SURE and (gap.low > 0 or gap.high < 0)
    shown = [round(float(each.mean()) * gap.n) for each in (base, tuned)]
    unpaired = proportion_difference(shown[0], gap.n, shown[1], gap.n)
    same = all(max(-each.low, each.high) < NEGLIGIBLE for each in (gap, unpaired))
    return Finding(
        claim=claim,
        holds=True if differs else (False if same else None),
        evidence=f"{base.mean():.1%} of the base's answers and {tuned.mean():.1%} of the "
        f"fine-tune's show it; difference {gap.estimate:+.1%} [{gap.low:+.1%}, {gap.high:+.1%}] "
        f"({len(base)} pairs of answers to {gap.n} questions, p = {p:.2g}).",
    )


def outputs_differ(summary: pd.DataFrame) -> Finding:
    """Say whether the predictions differ at all, and by how much."""
    kl = summary[summary["metric"] == "kl_ft_base"].set_index("source")
    source = "on-policy finetuned" if "on-policy finetuned" in kl.index else kl.index[0]
    row = kl.loc[[source]].to_dict("records")[0]
    exact = bool((kl["estimate"] == 0).all())
    return Finding(
        claim="The predictions of the two models differ",
        holds=not exact and (row["low"] > 0 or None),
        evidence="every KL is exactly 0."
        if exact
        else f"KL(finetuned || base) = {row['estimate']:.3g} nats a token [{row['low']:.3g}, "
        f"{row['high']:.3g}] on text that the fine-tune wrote ({int(row['n_texts'])} texts).",
    )


def proven(judged: Judged, rows: pd.DataFrame, controls: pd.DataFrame, seed: int) -> list[Finding]:
    """Necessity (ablation) and sufficiency (steering), each against random directions."""
    return [_necessary(judged, rows, controls, seed), _sufficient(judged, rows, seed)]


def _paired(
    judged: Judged, first: tuple[str, str], second: tuple[str, str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Verdicts of two cells, and their questions, on what both could be scored on."""
    parts = judged.cell(*first), judged.cell(*second)
    both = parts[0]["exhibits"].notna().to_numpy() & parts[1]["exhibits"].notna().to_numpy()
    before, after = (part["exhibits"].to_numpy(dtype=object)[both].astype(float) for part in parts)
    return before, after, judged.questions(parts[0][both])


def _permuted(before: np.ndarray, after: np.ndarray, prompts: np.ndarray, seed: int) -> float:
    """Paired permutation test of the means of each question."""
    frame = pd.DataFrame({"prompt": prompts, "before": before, "after": after})
    means = frame.groupby("prompt")[["before", "after"]].mean()
    return permutation_test(means["before"], means["after"], paired=True, seed=seed)


def _necessary(judged: Judged, rows: pd.DataFrame, controls: pd.DataFrame, seed: int) -> Finding:
    before, after, prompts = _paired(judged, ("finetuned", "none"), ("finetuned", "ablated"))
    rates = controls["rate"].dropna().to_numpy(float)
    if not len(before) or not len(rates):
        return Finding("Ablating the direction removes the behaviour", None, UNSCORED)
    change = paired_bootstrap(before, after, clusters=prompts, seed=seed)
    p = _permuted(before, after, prompts, seed)
    band, versus = null_band(rates), empirical_p(after.mean(), rates, "lower")
    ablated, tuned = rows[rows["edit"] == "ablated"], rows[rows["cell"] == "fine-tuned"].iloc[0]
    coherent = bool(sound(ablated, tuned.to_dict()).all())
    kept = float(ablated["coherent"].iloc[0])
    falls = change.high < 0 and p < SURE and after.mean() < band.low
    like_random = False if after.mean() >= band.low else None  # lower, but perhaps by chance
    text_null = rows[rows["edit"] == TEXT_NULL]["rate"]
    same_text = "".join(f"; the base's own contrast of texts {rate:.1%}" for rate in text_null)
    doubt = "" if coherent else "; too few, or too few could be scored: is the model broken?"
    left = falls and after.mean() > rows[rows["cell"] == "base"]["rate"].iloc[0] + NEGLIGIBLE
    return Finding(
        claim=f"Ablating the direction {'lowers' if left else 'removes'} the behaviour",
        holds=(True if coherent else None) if falls else like_random,
        evidence=f"{before.mean():.1%} → {after.mean():.1%} of answers "
        f"(change {change.estimate:+.1%} [{change.low:+.1%}, {change.high:+.1%}], p = {p:.2g}); "
        f"{len(rates)} random directions of the same length leave {rates.mean():.1%} (band "
        f"{band.low:.1%} to {band.high:.1%}, p = {versus:.2g}){same_text}; {kept:.1%} of "
        f"the answers stay coherent{doubt or '.'}",
    )


def _sufficient(judged: Judged, rows: pd.DataFrame, seed: int) -> Finding:
    steer = rows[rows["kind"] == "steer"]
    shaken = rows[(rows["kind"] == "control") & (rows["side"] == "base")]
    base = rows[rows["cell"] == "base"].iloc[0]
    kept = steer[sound(steer, base.to_dict())]
    best = (kept if len(kept) else steer).sort_values("rate", na_position="first").iloc[-1]
    asked = judged.table[judged.table["side"] == "base"]
    alone = asked[asked["edit"].str.startswith("random ")].groupby("edit")["exhibits"].mean()
    worst = float(alone.astype(float).max())
    bar = max(float(base["rate_high"]), float(shaken["rate_high"].max()), worst)
    before, after, prompts = _paired(judged, ("base", "none"), ("base", str(best["edit"])))
    sure = len(before) > 0 and _permuted(before, after, prompts, seed) < SURE
    shown = best["rate_low"] > bar and sure
    reached = max(float(base["rate"]), float(shaken["rate"].max()), worst)
    absent = False if best["rate_high"] <= reached + NEGLIGIBLE else None
    return Finding(
        claim="Adding the direction to the base brings the behaviour about",
        holds=(True if len(kept) else None) if shown else absent,
        evidence=f"{best['cell']}: {best['rate']:.1%} [{best['rate_low']:.1%}, "
        f"{best['rate_high']:.1%}] of answers at {best['coherent']:.1%} coherence; the base shows "
        f"it in {base['rate']:.1%}, and with {len(alone) // len(shaken)} random "
        f"directions of the same length in {shaken['rate'].max():.1%} on average and in at most "
        f"{worst:.1%}.",
    )


def distance_closed(
    table: pd.DataFrame, controls: np.ndarray, chosen: str, seed: int
) -> list[Finding]:
    """How much of the distance to the base the ablation closes, against random directions."""
    wide = table[table["side"] == "finetuned"].pivot_table(
        index="text", columns="edit", values="kl"
    )
    before, after = wide["none"].to_numpy(float), wide["ablated"].to_numpy(float)
    change = paired_bootstrap(before, after, seed=seed)
    p = permutation_test(before, after, paired=True, seed=seed)
    band, less = null_band(controls), change.high < 0 and p < SURE
    closed = 1 - after.mean() / before.mean() if before.mean() else float("nan")
    return [
        Finding(
            claim="Ablating the direction brings the fine-tune back towards the base",
            holds=(bool(less) or None) if after.mean() < band.low else False,
            evidence=f"KL(edited || base) falls from {before.mean():.3g} to {after.mean():.3g} "
            f"nats a token ({closed:.0%} of the distance; change [{change.low:+.3g}, "
            f"{change.high:+.3g}], p = {p:.2g}, {len(before)} held-out texts, ablated at "
            f"{chosen}); "
            f"{len(controls)} random directions of the same length leave {band.low:.3g} to "
            f"{band.high:.3g}.",
        )
    ]


def reliable(directions: Sequence[Direction]) -> Finding:
    """Whether halves of the data agree on the direction, and how much of it the base has too."""
    halves = [d.split_half for d in directions if d.split_half is not None]
    nulls = [d.text_null for d in directions if d.text_null is not None]
    worst = min(halves, default=float("nan"))
    words = f"split-half cosine at least {worst:.2f} over {len(directions)} layer(s)"
    if not halves:
        words = "there were too few texts to split"
    if nulls:
        words += (
            f"; cosine with the same contrast in the base {min(nulls):.2f} to {max(nulls):.2f}: "
            "that much of it belongs to the texts rather than to the fine-tune"
        )
    return Finding(
        claim="The direction is the same in both halves of the data",
        holds=(worst >= 0.8) if halves else None,
        evidence=words + ".",
    )
