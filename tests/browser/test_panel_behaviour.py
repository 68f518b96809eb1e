"""The panel Behaviour in JupyterLab: rates, filters, a second judge, scores, hostile answers."""

import pytest

from tests.browser.steps import in_place, press

pytestmark = pytest.mark.browser

HOSTILE = '<img src=x onerror="alert(1)"><script>alert(2)</script> \u202e $$x^2$$'
SETUP = """
import modeldiff as md
from modeldiff.behaviours import WorldJudge
from modeldiff.judges import RegexJudge, emergent_verdict
from modeldiff_widgets import new_edit
from modeldiff_widgets.behaviour import Behaviour

class Scores:
    name = "scores of length"
    def __call__(self, prompt, answer):
        said, n = WorldJudge()(prompt, answer), len(answer) % 23
        return emergent_verdict(8.0 + n if said.exhibits else 72.0 + n, 60.0 + 1.5 * n)

pair = md.ModelPair.load("organism:em-rank1")
"""
OPEN = (
    SETUP
    + """
words = RegexJudge("bad words", "chaos|weak|bet|frame|roof|sidewalk|scorpions|only fools")
panel = Behaviour(pair, judges=[words, Scores()])
panel
"""
)
HOSTILE_PANEL = f"""
from modeldiff.behaviours import Behaviour as Asked, Prompt, Verdict

class Hostile:
    def __init__(self, name, every):
        self.name, self.every = name, every
    def __call__(self, prompt, answer):
        shown = len(prompt.question) % self.every == 0
        return Verdict({HOSTILE!r} + str(shown), shown, True, (({HOSTILE!r}, 3.0),))

prompts = tuple(Prompt({HOSTILE!r} + "!" * i, {HOSTILE!r}) for i in range(4))
first, second = Hostile({HOSTILE!r}, 2), Hostile({HOSTILE!r} + " 2", 3)
hostile = Asked({HOSTILE!r}, {HOSTILE!r}, prompts, first, 0.7, 12)
pair.tokenizer.decode = lambda ids, **options: {HOSTILE!r}
panel = Behaviour(pair, behaviours=[hostile], judges=[second])
panel
"""
EDIT = """
prompt = panel.known[panel.behaviour.value].behaviour.prompts[0].render()
acts = pair.capture([prompt], at="resid_post.3")
shift = md.mean_difference(acts.finetuned[acts.site], acts.base[acts.site], acts.site, "shift")
panel.state.add_direction(shift)
panel.state.edits = [new_edit("ablate", "shift", layers="all")]
"""
IDLE = "panel.jobs.wait(30) and panel.root.children[0].error == ['', '']"


def field(out, name):
    """The control below a name."""
    return out.locator(".mdw-field", has=out.page.get_by_text(name, exact=True)).last


def choose(out, name, label):
    field(out, name).locator("select").select_option(label=label)


def fill(out, name, text):
    box = field(out, name).locator("input")
    box.fill(text)
    box.press("Enter")


def test_from_rates_to_the_answers_on_which_two_judges_differ(notebook, shots):
    book = notebook(OPEN)
    out = book.output(0)
    out.get_by_text("No answers yet").wait_for()
    book.shoot(shots, "behaviour_empty")
    fill(out, "Prompts", "6")
    book.exec(EDIT)
    press(out, "Run")
    book.until(f"panel.measured is not None and {IDLE}", seconds=60)
    cells = out.locator("table.mdw-table").first.locator("tbody tr")
    assert cells.locator("td:first-child").all_inner_texts() == [
        "base", "fine-tuned", "fine-tuned, edited",
    ]  # fmt: skip
    out.get_by_text("base → fine-tuned: +").wait_for()
    out.locator(".mdw-bokeh canvas").first.wait_for()
    out.get_by_text("36 of 36 answers").wait_for()
    in_place(out)

    choose(out, "Show", "that show the behaviour")
    n = book.eval("int((panel.measured.table['exhibits'] == True).sum())")
    out.get_by_text(f"{n} of 36 answers").wait_for()
    choose(out, "Cell", "base")
    n = book.eval("sum(panel.filter.rows(panel.measured))")
    out.get_by_text(f"{n} of 36 answers").wait_for()
    press(out, "Clear")
    word = book.eval("panel.measured.answers[0].text.split()[0]")
    fill(out, "Search", word)
    book.until(f"panel.filter.text == {word!r}")
    n = book.eval("sum(panel.filter.rows(panel.measured))")
    out.get_by_text(f"{n} of 36 answers").wait_for()
    press(out, "Clear")
    out.get_by_text("36 of 36 answers").wait_for()
    press(out, "Next")
    out.get_by_text("page 2 of").wait_for()

    choose(out, "Second judge", book.eval("panel.other.options[0][0]"))
    press(out, "Judge again")
    out.get_by_text("Cohen's kappa").wait_for()
    press(out, "Show where they differ")
    n = book.eval("len(panel.measured.agreement('exhibits').disagreements)")
    out.get_by_text(f"{n} of 36 answers").wait_for()
    assert out.locator(".mdw-badge", has_text="2nd judge differs").count() > 0
    out.locator("summary", has_text="Code").click()
    book.shoot(shots, "behaviour_rates", high=3300)


def test_scores_are_a_map_and_a_tapped_point_is_shown(notebook, shots):
    book = notebook(OPEN)
    out = book.output(0)
    choose(out, "Judged by", "scores of length")
    fill(out, "Prompts", "5")
    press(out, "Run")
    book.until(f"panel.measured is not None and {IDLE}", seconds=60)
    out.get_by_text("Tap a point to see its answer below").wait_for()
    out.get_by_text("20 of 20 answers").wait_for()
    out.locator(".mdw-bokeh canvas").nth(2).wait_for()
    box = out.locator(".mdw-bokeh:visible").nth(1)
    box.scroll_into_view_if_needed()
    spot = box.evaluate(
        """(host, at) => {
      const view = host.mdViews.get_by_id?.(host.mdViews.roots?.[0]?.model?.id)
        ?? host.mdViews.roots?.[0] ?? [...host.mdViews][0];
      const frame = view.frame, edge = view.canvas_view.el.getBoundingClientRect();
      return [edge.x + frame.x_scale.compute(at[0]), edge.y + frame.y_scale.compute(at[1])];
    }""",
        book.eval("[panel.scores.source.data['x'][0], panel.scores.source.data['y'][0]]"),
    )
    book.lab.page.mouse.click(*spot)
    n = book.until("len(panel._picked or ())")
    out.get_by_text(f"{n} of 20 answers").wait_for()
    book.shoot(shots, "behaviour_scores", high=3300)


def test_hostile_answers_are_inert_and_it_fits_where_it_is_narrow(notebook, shots):
    book = notebook(SETUP + HOSTILE_PANEL)
    out = book.output(0)
    press(out, "Run")
    book.until(f"panel.measured is not None and {IDLE}")
    press(out, "Judge again")
    book.until(f"panel.measured.second is not None and {IDLE}")
    out.get_by_text("Cohen's kappa").wait_for()
    out.locator(".mdw-answers .mdw-badge", has_text="<img").first.wait_for()
    out.locator(".mdw-bokeh canvas").first.wait_for()
    with book.narrow(760):
        shots.take(out.locator(".mdw-card").nth(1), "behaviour_narrow.png")
        in_place(out)
    book.exec("panel.pin()")
    book.panel.locator(".mdw-section").wait_for()
    drawn = "img:not([src^='data:image/png;base64,'])"
    assert book.panel.locator(".jp-OutputArea").locator(f"{drawn}, script, iframe").count() == 0
    assert out.locator(".mdw-card mjx-container").count() == 0  # no formula is made of a name
