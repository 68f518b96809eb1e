"""The front-end's modules on a bare page: hostile text, colours, keys, disposal, size."""

import time

import pytest

from modeldiff_widgets import PairView
from modeldiff_widgets._theme import STATIC, css
from tests.browser.steps import POOR_CONTRAST

pytestmark = pytest.mark.browser

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "<a href=javascript:alert(1)>x</a>",
    "</style><style>*{display:none}</style>",
    "{{constructor.constructor('alert(1)')()}}",
    "\u202egnp.exe\u2066",
    "\u200b\x00\x07\ufeff\u2028",
]
HIDDEN = "\u202e\u2066\u200b\x00\x07\ufeff\u2028"


def state_of(columns, **options):
    """The state that the kernel would send."""
    view = PairView(columns, **options)
    state = {n: v for n, v in view.get_state().items() if n in view.trait_names()}
    names = ("columns", "metric", "scale", "selected", "linked", "details", "labels", "height",
             "blank")  # fmt: skip
    view.close()
    return {name: state[name] for name in names}


def mounted(bare, columns, name="heat", **options):
    return bare.mount(name, STATIC / "pair_view.js", css(), state_of(columns, **options))


def column(tokens, values=None, **more):
    return {"title": "base", "kind": "base", "tokens": tokens,
            "values": {"kl_ft_base": values or [0.5] * len(tokens)}, **more}  # fmt: skip


def test_hostile_text_is_inert_wherever_it_is_shown(bare, shots):
    tops = [[(text, 0.5) for text in HOSTILE]] * len(HOSTILE)
    hostile = {
        "title": HOSTILE[0], "subtitle": HOSTILE[1], "badges": HOSTILE, "tokens": HOSTILE,
        "kind": HOSTILE[3], "marks": [HOSTILE[3]] * 9, "notes": HOSTILE,
        "values": {HOSTILE[0]: [1.0] * len(HOSTILE)}, "top": {"base": tops, HOSTILE[2]: tops},
    }  # fmt: skip
    labels = {HOSTILE[0]: (HOSTILE[1], HOSTILE[2])}
    heat = mounted(bare, [hostile], metric=HOSTILE[0], labels=labels, blank=HOSTILE[0])
    for i in range(len(HOSTILE)):
        heat.locator(".t").nth(i).hover()
        heat.locator(".t").nth(i).click()
        bare.set("heat", "selected", [0, i])
    shots.take(bare.page, "component_hostile.png")
    for tag in ("img", "script", "svg", "a", "style", "iframe"):
        assert heat.locator(tag).count() == 0
        assert bare.page.locator(f".mdw-card-hover {tag}").count() == 0
    shown = bare.page.locator("body").inner_text()
    assert not set(HIDDEN) & set(shown)
    assert "⟨U+202E⟩" in shown
    assert bare.page.evaluate("getComputedStyle(document.querySelector('.t')).unicodeBidi") == (
        "isolate"
    )


@pytest.mark.parametrize("module", ["job_bar", "code_view"])
def test_hostile_text_is_inert_in_the_small_views(bare, module):
    for number, text in enumerate(HOSTILE):
        state = {"status": text, "label": text, "fraction": 0.5, "message": text, "can_pin": True,
                 "error": [text, text], "code": text, "unfolded": True}  # fmt: skip
        view = bare.mount(f"v{number}", STATIC / f"{module}.js", css(), state)
        for tag in ("img", "script", "svg", "a", "iframe"):
            assert view.locator(tag).count() == 0


def test_colours_and_labels_say_value_and_sign(bare):
    heat = mounted(bare, [column(["a", "b", "c", "d"], [1.0, -2.0, 4.0, None])], scale=2.0)
    spans = heat.locator(".t")
    shares = [float(s.evaluate("e => e.style.getPropertyValue('--v')")) for s in spans.all()]
    assert shares == [0.5, 1.0, 1.0, 0.0]
    assert [("neg" in s.get_attribute("class")) for s in spans.all()] == [0, 1, 0, 0]
    labels = [s.get_attribute("aria-label") for s in spans.all()]
    assert labels == ["a KL 1", "b KL −2", "c KL 4", "d"]
    colour = "e => getComputedStyle(e).backgroundColor"
    assert spans.nth(1).evaluate(colour) != spans.nth(2).evaluate(colour)
    assert "dotted" in spans.nth(1).evaluate("e => getComputedStyle(e).textDecoration")
    bare.set("heat", "scale", 4.0)
    assert spans.nth(0).evaluate("e => e.style.getPropertyValue('--v')") == "0.250"
    rounding = column(["a", "b"], [1.0, -1e-8])
    assert not mounted(bare, [rounding], name="rounding").locator(".neg, .signed").count()
    bare.set("heat", "scale", 0.0)  # the largest
    assert spans.nth(2).evaluate("e => e.style.getPropertyValue('--v')") == "1.000"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_keeps_its_contrast_on_every_colour(bare, shots, scheme):
    bare.page.emulate_media(color_scheme=scheme)
    if scheme == "dark":
        bare.page.evaluate("document.body.style.background = '#15181c'")
    tokens = [f" word{i}" for i in range(41)]
    values = [(i - 20) / 20 for i in range(41)]
    heat = mounted(bare, [column(tokens, values, subtitle="seed 0", badges=["coherent"])])
    heat.locator(".t").nth(40).click()
    bare.set("heat", "selected", [0, 40])
    bare.page.mouse.move(0, 0)
    shots.take(bare.page, f"component_contrast_{scheme}.png")
    assert bare.page.evaluate(POOR_CONTRAST) == []


def test_keys_reach_every_token_and_only_one_is_in_the_tab_order(bare):
    heat = mounted(bare, [column(list("abc")), column(list("de"))], linked=True)
    assert heat.locator("[role=listbox]").count() == 2
    assert heat.locator("[role=option][tabindex='0']").count() == 1
    bare.page.evaluate("document.body.addEventListener('keydown', e => window.leaked = e.key)")
    heat.locator(".t").first.focus()
    focused = "document.activeElement.textContent"
    walk = ["ArrowRight", "ArrowRight", "ArrowRight", "ArrowDown", "ArrowUp", "Home", "End",
            "ArrowLeft", "PageDown", "PageUp"]  # fmt: skip
    seen = []
    for key in walk:
        bare.page.keyboard.press(key)
        seen.append(bare.page.evaluate(focused))
    assert seen == ["b", "c", "c", "e", "b", "a", "c", "b", "c", "a"]
    assert heat.locator("[role=option][tabindex='0']").count() == 1
    bare.page.keyboard.press("Enter")
    bare.page.keyboard.press(" ")
    assert [m[1] for m in bare.sent()] == [{"kind": "select", "column": 0, "index": 0}] * 2
    assert bare.page.evaluate("window.leaked") is None


def test_hover_marks_the_same_place_elsewhere(bare):
    heat = mounted(bare, [column(list("abc")), column(list("abc"))], linked=True)
    heat.locator(".t").nth(1).hover()
    assert heat.locator(".linked").count() == 1
    assert bare.page.locator(".mdw-card-hover").is_visible()
    bare.page.mouse.move(5, 790)
    assert heat.locator(".linked").count() == 0
    assert bare.page.locator(".mdw-card-hover").count() == 0


def test_a_stream_grows_in_place_and_twice_is_once(bare):
    heat = mounted(bare, [column(["a"]), column([])])
    piece = {"kind": "append", "column": 0, "start": 1, "tokens": [" b", "\n", " c"],
             "values": {"kl_ft_base": [1.0, 0.0, 1.0]}, "streaming": True}  # fmt: skip
    first = heat.locator(".t").first.element_handle()
    bare.receive("heat", piece)
    bare.receive("heat", piece)
    assert heat.locator(".t").all_inner_texts() == ["a", "b", "↵\n", "c"]
    assert first.evaluate("e => e.isConnected")  # nothing was drawn again
    assert heat.locator(".caret").count() == 1
    bare.receive("heat", {"kind": "append", "column": 0, "start": 4, "tokens": [],
                          "streaming": False})  # fmt: skip
    assert heat.locator(".caret").count() == 0
    assert heat.locator(".blank").inner_text() == "nothing yet"
    bare.receive("heat", {"kind": "append", "column": 7, "start": 0, "tokens": ["x"]})


def test_disposing_leaves_nothing_behind(bare):
    heat = mounted(bare, [column(list("abc"))])
    heat.locator(".t").nth(1).hover()
    before = bare.page.evaluate("mdModels.heat.listening")
    bare.page.evaluate("mdModules.heat.dispose()")
    assert bare.page.locator(".mdw-card-hover").count() == 0
    assert bare.page.evaluate("mdModels.heat.listening") == 1  # what the model itself needs
    assert before > 5
    bare.receive("heat", {"kind": "append", "column": 0, "start": 3, "tokens": ["d"]})
    assert heat.locator(".t").count() == 3


def test_two_views_of_one_model_see_the_same_stream(bare):
    heat = mounted(bare, [column(["a"])])
    bare.page.evaluate("""async () => {
      const el = document.createElement("div");
      el.id = "second";
      document.body.append(el);
      await mdModules.heat.module.render({model: mdModels.heat, el});
    }""")
    bare.receive("heat", {"kind": "append", "column": 0, "start": 1, "tokens": [" b"]})
    assert heat.locator(".t").count() == bare.page.locator("#second .t").count() == 2


def test_two_times_four_thousand_tokens_are_drawn_and_recoloured_in_time(bare):
    tokens = [f" w{i}" for i in range(4000)]
    values = [i % 97 / 97 for i in range(4000)]
    start = time.monotonic()
    heat = mounted(bare, [column(tokens, values), column(tokens, values)], scale=1.0)
    bare.page.evaluate("() => new Promise(r => requestAnimationFrame(() => setTimeout(r)))")
    drawn = time.monotonic() - start
    again = bare.page.evaluate("""async () => {
      const start = performance.now();
      mdModels.heat.set("scale", 0.5);
      await new Promise(r => requestAnimationFrame(() => setTimeout(r)));
      return performance.now() - start;
    }""")
    assert heat.locator(".t").count() == 8000
    assert drawn < 6.0, f"{drawn:.1f} s"
    assert again < 3000, f"{again:.0f} ms"


def test_the_code_unfolds_and_says_so(bare):
    view = bare.mount("code", STATIC / "code_view.js", css(), {"code": "a < b", "unfolded": False})
    assert not view.locator("pre").is_visible()
    view.locator("summary").press("Enter")
    assert view.locator("pre").inner_text() == "a < b"
    bare.page.wait_for_function("() => mdModels.code.state.unfolded === true")
    view.get_by_role("button", name="Copy").click()
    bare.page.wait_for_function(
        "() => /Copied|Selected/.test(document.querySelector('.copy').textContent)"
    )


def test_the_job_bar_says_what_it_does(bare, shots):
    state = {"status": "running", "label": "compare", "fraction": 0.25, "message": "token 5/20",
             "can_pin": True, "error": ["", ""]}  # fmt: skip
    view = bare.mount("bar", STATIC / "job_bar.js", css(), state)
    assert view.get_by_role("progressbar").get_attribute("aria-valuenow") == "25"
    assert view.get_by_role("status").inner_text() == "running: compare"
    view.get_by_role("button", name="Cancel").click()
    view.get_by_role("button", name="Pin").click()
    assert [message[1]["kind"] for message in bare.sent()] == ["cancel", "pin"]
    bare.set("bar", "error", ["ValueError: no", "Traceback ...\n  line"])
    assert view.get_by_role("alert").locator(".line").inner_text() == "ValueError: no"
    assert not view.locator("pre").is_visible()
    shots.take(bare.page, "component_job_bar.png")
    bare.set("bar", "status", "done")
    assert view.get_by_role("button", name="Cancel").is_disabled()
    bare.set("bar", "error", ["", ""])
    assert view.get_by_role("alert").count() == 0
