"""How the page of a report looks, and that it can be used by all: themes, paper, contrast, keyboard, names."""

from itertools import pairwise

import pytest
from report_browser import KINDS, cell, percent, tip

pytest_plugins = ["report_fixtures"]
pytestmark = pytest.mark.long

WINDOWS = [(width, scheme) for width in (1280, 360) for scheme in ("light", "dark")]

# Every visible text: the lowest contrast of its colour with what lies behind it, by the formula of WCAG 2.
CONTRAST = """() => {
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const over = (top, below) => top.slice(0, 3).map((x, i) => x * (top[3] ?? 1) + below[i] * (1 - (top[3] ?? 1)));
  const linear = x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  const light = rgb => rgb.reduce((sum, x, i) => sum + linear(x / 255) * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = node => node === null ? [255, 255, 255]
    : over(parse(getComputedStyle(node).backgroundColor), behind(node.parentElement));
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
    if (!text || ["SCRIPT", "NOSCRIPT"].includes(node.tagName) || !node.getClientRects().length) continue;
    const style = getComputedStyle(node), back = behind(node);
    const ink = over(parse(node instanceof SVGElement ? style.fill : style.color), back);
    const [a, b] = [light(ink), light(back)].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), node.tagName, text.slice(0, 30)]);
  }
  return found;
}"""


@pytest.mark.parametrize("kind", KINDS)
def test_it_fits_the_window_and_can_be_read(show, kind):
    page, _, _ = show(**KINDS[kind])
    page.locator("#table-box summary").click()
    for width, scheme in WINDOWS:
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=scheme)
        wait_for_theme(page, scheme)
        page.locator("#token-text .token").first.focus()
        page.keyboard.press("ArrowRight")  # the token has its tip, and its way through the depth
        assert page.locator("#tip").is_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        found = page.evaluate(CONTRAST)
        assert len(found) > 60
        assert [text for text in found if text[0] < 4.5] == []


def wait_for_theme(page, theme):
    page.locator(f'html[data-theme="{theme}"]').wait_for(state="attached")
    assert page.get_attribute("#theme", "aria-pressed") == str(theme == "dark").lower()


def test_it_is_as_dark_as_the_system_until_the_button_is_pressed(show):
    page, _, _ = show(scheme="dark", blocks=1)
    wait_for_theme(page, "dark")
    page.emulate_media(color_scheme="light")
    wait_for_theme(page, "light")
    page.click("#theme")
    wait_for_theme(page, "dark")
    for system in ("dark", "light"):
        page.emulate_media(color_scheme=system)
        assert page.evaluate(f"matchMedia('(prefers-color-scheme: {system})').matches")
        wait_for_theme(page, "dark")


def test_nothing_moves_for_those_who_ask_for_it(show):
    page, _, _ = show(blocks=1)
    moving = """() => [...document.querySelectorAll('*')].map(e => getComputedStyle(e))
        .filter(style => style.transitionDuration !== '0s' || style.scrollBehavior === 'smooth').length"""
    assert page.evaluate(moving) == 0
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate(moving) > 0


# What is cut at the edge of the paper, and what is closed or hidden by an own scrollbar.
CUT = """() => [
  ...[...document.querySelectorAll('.map, .plain, svg, .text')]
    .filter(e => e.getBoundingClientRect().right > innerWidth),
  ...[...document.querySelectorAll('.scroll, .text, .legend')].filter(e => e.scrollWidth > e.clientWidth + 1
                                                                       || e.scrollHeight > e.clientHeight + 1),
  ...document.querySelectorAll('details:not([open])'),
  ...[...document.querySelectorAll('.map td')].filter(e => e.getBoundingClientRect().width < 2),
].map(e => e.outerHTML.slice(0, 100))"""


@pytest.mark.parametrize("options", [{"blocks": 40, "modules": ["mlp"]}, {"blocks": 1, "experts": 64}])
def test_on_paper_all_is_unrolled_and_light(show, options):
    page, _, _ = show(718, scheme="dark", **options)  # A4 without margins of 1 cm
    closed = page.locator("details:not([open])").count()
    assert closed >= 1
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert not page.locator("#filters").is_visible()
    assert page.locator("#table tbody tr").count() > 0
    assert page.evaluate(CUT) == []
    wait_for_theme(page, "light")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() == closed
    wait_for_theme(page, "dark")


def test_the_arrow_keys_go_through_a_map(show):
    page, routing, _ = show(**KINDS["molora"])
    cell(page, "layer-maps", 0, 0).focus()
    moves = [("ArrowRight", 0, 1), ("ArrowDown", 1, 1), ("End", 1, 7), ("ArrowRight", 1, 7), ("PageDown", 2, 7)]
    moves += [("Home", 2, 0), ("ArrowLeft", 2, 0), ("ArrowUp", 1, 0), ("PageUp", 0, 0), ("ArrowUp", 0, 0)]
    for key, block, expert in moves:
        page.keyboard.press(key)
        layer = routing["layers"][3 * block]
        head, said = tip(page)
        assert (head, said["load"]) == (f"{layer['name']}, expert {expert}", percent(layer["load"][expert]))
        label = page.evaluate("document.activeElement.getAttribute('aria-label')")
        assert label.startswith(f"{head}: load {said['load']}")
        assert page.locator("#layer-maps table").first.locator('[tabindex="0"]').count() == 1
    page.keyboard.press("Escape")
    assert not page.locator("#tip").is_visible()


# Whether something lies over the focused cell, at its middle or near an edge.
HIDDEN = """() => {
  const cell = document.activeElement, box = cell.getBoundingClientRect();
  return [[0.5, 0.5], [0.1, 0.5], [0.9, 0.5], [0.5, 0.1], [0.5, 0.9]].some(([x, y]) =>
    document.elementFromPoint(box.left + x * box.width, box.top + y * box.height) !== cell);
}"""


def test_a_cell_that_is_gone_to_is_not_under_the_labels(show):
    page, _, _ = show(360, blocks=40, modules=["mlp"], tasks=("a task with a long name", "another"))
    page.set_viewport_size({"width": 360, "height": 640})
    for box, far, back in (("apart-maps", "End", "ArrowLeft"), ("layer-maps", "PageDown", "ArrowUp")):
        scroll = page.locator(f"#{box} .scroll")
        assert "more" in scroll.get_attribute("class") or "below" in scroll.get_attribute("class")
        cell(page, box, 0, 0).focus()
        page.keyboard.press(far)
        for _ in range(39):
            assert not page.evaluate(HIDDEN)
            page.keyboard.press(back)
        assert page.evaluate(f"document.activeElement === document.querySelector('#{box} td')")


# What Tab should stop at, where it is, and whether it shows that it is there.
STOPS = """() => {
  const stops = [...document.querySelectorAll('a, button, select, input, summary, #table, [data-items] [tabindex="0"]')]
    .filter(e => e.checkVisibility());
  const style = getComputedStyle(document.activeElement);
  const ring = style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) > 0 || parseFloat(style.strokeWidth) > 1;
  return [stops.length, stops.indexOf(document.activeElement), ring];
}"""


def test_tab_reaches_every_control_in_the_order_of_the_page(show):
    page, _, _ = show(**KINDS["at-moe"])
    count = page.evaluate(STOPS)[0]
    assert count > 30
    for stop in range(count):
        page.keyboard.press("Tab")
        assert page.evaluate(STOPS) == [count, stop, True]


def test_everything_that_can_be_used_has_a_name(show):
    page, _, _ = show(**KINDS["at-moe"])
    roles = page.locator("main, header, footer, nav, form").evaluate_all("all => all.map(e => e.tagName)")
    assert roles == ["HEADER", "NAV", "MAIN", "FORM", "FOOTER"]
    nameless = page.evaluate("""() => [...document.querySelectorAll(
        'select, input, button, [data-items], [data-item], form, nav, section')]
        .filter(e => !(e.ariaLabel || e.labels?.length || e.tagName === 'BUTTON' && e.textContent.trim()
                       || document.getElementById(e.getAttribute('aria-labelledby'))?.textContent))
        .map(e => e.outerHTML.slice(0, 80))""")
    assert nameless == []
    levels = [int(tag[1]) for tag in page.locator("h1, h2, h3").evaluate_all("all => all.map(e => e.tagName)")]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
