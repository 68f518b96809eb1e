"""`LatentCard`: one latent: what is known of it, where it fires, and what its decoders say."""

from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets as W

from modeldiff.dictionaries.examples import Example
from modeldiff.dictionaries.models import Dictionary
from modeldiff.logit_lens import LogitLens
from modeldiff.report_text import number
from modeldiff_widgets import _render, _theme
from modeldiff_widgets._latent_measure import Measured, number_of
from modeldiff_widgets._pair_view import PairView

LENS, N_RANDOM = 6, 19
PER_PAGE = 3
_DECODERS = {"base": "base decoder", "finetuned": "fine-tuned decoder"}
_OF_DIFFERENCE = {
    "base": "decoder, read by the base",
    "finetuned": "decoder, read by the fine-tune",
}
_FACTS = {
    "relative_decoder_norm": "relative decoder norm", "firing_rate": "fires on",
    "nu_error": "ν error", "nu_reconstruction": "ν reconstruction", "nu_activation": "ν activation",
    "decoder_cosine": "cosine of decoders", "mean_activation": "mean activation",
    "max_activation": "largest activation", "n_active": "active rows",
}  # fmt: skip


class LatentCard:
    """The views of one latent; the panel fills them."""

    def __init__(self) -> None:
        self.head, self.lens_view = W.HTML(), W.HTML()
        self.view = PairView(metric="latent", height="11rem", details=False, blank="no text")
        self.view.name("latent", "latent", "activation of the latent")
        self.place = _theme.note()
        self.examples: list[Example] = []
        self.page = 0

    def show_facts(self, found: Measured, latent: int) -> None:
        """Say what is known of the latent."""
        row = found.table.iloc[latent]
        kind = str(row["class"])
        facts = {
            name: _said(column, value)
            for column, name in _FACTS.items()
            if (value := number_of(_plain(row.get(column)))) is not None
        }
        tone: Any = {"finetuned-only": "finetuned", "base-only": "base"}.get(kind, "neutral")
        figures = _render.table(list(facts), [list(facts.values())], numeric=(-1,))
        self.head.value = _render.badge(kind, tone) + figures

    def show_examples(self, examples: Sequence[Example], peak: float, blank: str) -> None:
        """Show the first page of examples; ``peak`` has full colour."""
        self.examples, self.page = list(examples), 0
        self.view.blank = blank
        self.view.scale = max(peak, 1e-9)
        self.turn(0)

    def turn(self, pages: int) -> None:
        """Go some pages on or back."""
        last = max(0, (len(self.examples) - 1) // PER_PAGE)
        self.page = min(max(self.page + pages, 0), last)
        start = self.page * PER_PAGE
        shown = self.examples[start : start + PER_PAGE]
        self.view.set_columns([_column(each) for each in shown] or [{"title": "", "tokens": []}])
        self.place.value = (
            f"{start + 1} to {start + len(shown)} of {len(self.examples)} texts; full colour is "
            "its largest activation." if shown else ""
        )  # fmt: skip

    def show_lenses(
        self, dictionary: Dictionary, lenses: Mapping[Any, LogitLens], without: str = ""
    ) -> None:
        """Show what each decoder promotes and suppresses; ``without`` says why there is none."""
        names = _OF_DIFFERENCE if dictionary.config.inputs == "difference" else _DECODERS
        blocks = [
            block for side, lens in lenses.items() for block in _blocks(side, names[side], lens)
        ]
        notes = [_verdict(names[side], lens) for side, lens in lenses.items()] + [without]
        html = _render.columns(blocks) if blocks else ""
        self.lens_view.value = html + "".join(_render.note(each) for each in notes if each)

    def snapshot_html(self) -> str:
        """The latent as static HTML."""
        return "".join([self.head.value, self.view.snapshot_html(), self.lens_view.value])


def sides_of(dictionary: Dictionary) -> tuple[str, ...]:
    """Models that have a decoder of their own here."""
    inputs = dictionary.config.inputs
    if dictionary.config.is_crosscoder:
        return ("base", "finetuned")
    return ("base",) if inputs == "base" else ("finetuned",)


def heavier(dictionary: Dictionary, latent: int) -> str:
    """Whose decoder is offered first: the fine-tune's, unless the base's is much longer."""
    if not dictionary.config.is_crosscoder:
        return sides_of(dictionary)[-1]
    base, finetuned = dictionary.decoder_norms[latent, :2].tolist()
    return "base" if finetuned < 0.1 * base else "finetuned"


def _column(example: Example) -> dict[str, Any]:
    n = len(example.activations)
    tokens = list(example.tokens) or [f"[{token}]" for token in example.token_ids]
    return {
        "title": f"{number(example.value)} · text {example.document}",
        "tokens": tokens,
        "values": {"latent": list(example.activations)},
        "marks": ["predicted" if i == example.peak else "" for i in range(n)],
        "notes": [f"activation {number(each)}" for each in example.activations],
    }


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _said(column: str, value: float) -> str:
    if column == "firing_rate":
        return f"{100 * value:.3g} % of rows"
    return str(int(value)) if column == "n_active" else number(value)


def _blocks(side: str, title: str, lens: LogitLens) -> list[tuple[str, str, str]]:
    most = max(float(lens.tokens["logit"].abs().max()), 1e-9)
    made = []
    for kind, tone, name in (("direction", side, title),
                             ("random", "random", "random control")):  # fmt: skip
        html = "".join(
            _render.note(end) + _bars(lens.of(end, kind), most, tone)
            for end in ("promoted", "suppressed")
        )
        made.append((name, tone, html))
    return made


def _bars(rows: Any, most: float, tone: Any) -> str:
    pairs = zip(rows["token"], rows["logit"], strict=True)
    return _render.token_bars(
        [(str(token), abs(logit) / most, f"{logit:+.2f}") for token, logit in pairs], tone
    )


def _verdict(title: str, lens: LogitLens) -> str:
    own = float(lens.tokens.loc[lens.tokens["kind"] == "direction", "logit"].abs().max())
    further = lens.p <= 1 / (len(lens.random_reach) + 1)
    return (
        f"{title.capitalize()}: largest logit {own:.2f}; of {len(lens.random_reach)} "
        f"random directions {max(lens.random_reach):.2f}: it "
        f"{'reaches' if further else 'does not reach'} further than {'each' if further else 'all'} "
        f"of them (p = {lens.p:.2f})."
    )
