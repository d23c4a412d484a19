"""The page of a report: what is in the file, and what a browser makes of it."""

import base64
import configparser
import copy
import hashlib
import json
import math
import os
import re
import shutil
from fnmatch import fnmatch
from itertools import groupby, pairwise
from pathlib import Path

import pytest
import torch
from report_samples import sample_report

from peft_moe.report import page as page_module
from peft_moe.report.page import SCRIPTS, as_script_json, write_page

ASSETS = Path(page_module.__file__).parent / "assets"
ROOT = Path(__file__).parent.parent
WINDOWS = [(width, scheme) for width in (1280, 360) for scheme in ("light", "dark")]
HOSTILE = [
    "</script><img src=x onerror=ran=1><script>ran=1</script>",
    '"><svg onload=ran=1>',
    "<!--<script>",
    "\u202e]]>gnirts\u2066",
    "שלום عليكم",
    "👩‍⚕️🧬 {{script}}",
    "__proto__",
    "constructor",
    "line\u2028and\u2029paragraph",
    "&lt;b&gt; \\u003c",
    "long" * 2500,
]


def written(path, *, samples=None, change=None, **options):
    """The page of a made-up report, with its dict and samples."""
    routing, made = sample_report(**options)
    if change:
        change(routing)
    samples = made if samples is None else samples
    write_page(routing, samples, path)
    return routing, samples


def embedded(path, name):
    """What JSON of that name is in a page."""
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(rf'<script type="application/json" id="{name}-data">(.*?)</script>', text, re.S)[1])


# ---- the file


@pytest.mark.parametrize("text", HOSTILE)
def test_text_survives_as_json_that_cannot_end_its_element(text):
    found = as_script_json({text: [text]})
    assert json.loads(found) == {text: [text]}
    assert found.isascii()
    assert not set("<>&") & set(found)


def test_the_page_holds_what_it_was_given(tmp_path):
    path = tmp_path / "page.html"
    routing, samples = written(path)
    found = embedded(path, "routing")
    assert found.keys() == routing.keys()
    for layer, given in zip(found["layers"], routing["layers"], strict=True):
        assert layer["load"] == pytest.approx(given["load"], rel=1e-4)
        assert layer["tasks"]["icd"]["entropy"] == pytest.approx(given["tasks"]["icd"]["entropy"], rel=1e-4)
    for sample, given in zip(embedded(path, "sample"), samples, strict=True):
        assert sample["tokens"] == given.tokens
        assert (sample["task"], sample["prompt_tokens"]) == (given.task, given.prompt_tokens)


@pytest.mark.parametrize("method", ["MOELoRA", "Med-MoE-LoRA"])
def test_weights_are_a_byte_each_row_by_row(tmp_path, method):
    path = tmp_path / "page.html"
    _, samples = written(path, method=method, blocks=2)
    for sample, given in zip(embedded(path, "sample"), samples, strict=True):
        for text, weights in zip(sample["weights"], given.weights, strict=True):
            assert list(base64.b64decode(text)) == [math.floor(255 * w + 0.5) for row in weights.tolist() for w in row]


def test_samples_can_be_mappings(tmp_path):
    routing, samples = sample_report(blocks=1)
    write_page(routing, samples, tmp_path / "a.html")
    write_page(routing, [vars(sample) for sample in samples], tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_weight_adds_four_thirds_of_a_byte(tmp_path):
    path, n, layers, experts = tmp_path / "page.html", 300, 20, 8
    routing, _ = sample_report(blocks=layers, modules=["mlp"], experts=experts)
    sizes = []
    for rows in (1, n):
        weights = [torch.full((rows, experts), 1 / experts)] * layers
        write_page(routing, [{"task": None, "tokens": ["x"] * n, "prompt_tokens": 0, "weights": weights}], path)
        sizes.append(path.stat().st_size)
    assert sizes[1] - sizes[0] == pytest.approx((n - 1) * layers * experts * 4 / 3, rel=0.01)


def test_the_page_itself_is_small(tmp_path):
    empty = {**sample_report(blocks=1)[0], "layers": [], "tasks": [], "findings": []}
    write_page(empty, [], tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 70_000


def test_numbers_that_are_none_become_null(tmp_path):
    path = tmp_path / "page.html"
    written(path, change=lambda routing: routing["layers"][0]["similarity"][0].__setitem__(1, math.nan))
    assert embedded(path, "routing")["layers"][0]["similarity"][0][1] is None


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda r, s: r.update(format=2), "routing of format 2; the page shows format 1"),
        (lambda r, s: s[1].weights.pop(), "sample 1 has weights of 2 layers and the routing has 3"),
        (lambda r, s: s[0].tokens.pop(), r"sample 0, layer 0: weights of shape .* or \(1, 8\)"),
        (lambda r, s: r["layers"][2]["experts"].pop(), "sample 0, layer 2: weights of shape"),
        (lambda r, s: s[0].weights.__setitem__(0, torch.ones(8)), r"shape \(8,\)"),
        (lambda r, s: s[0].weights[1][0].fill_(math.nan), "sample 0, layer 1: a weight is not finite"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, break_it, message):
    routing, samples = sample_report(blocks=1)
    break_it(routing, samples)
    with pytest.raises(ValueError, match=message):
        write_page(routing, samples, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_the_policy_allows_this_script_and_this_style_and_nothing_else(tmp_path):
    path = tmp_path / "page.html"
    written(path, blocks=1)
    text = path.read_text(encoding="utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    digests = [
        base64.b64encode(hashlib.sha256(re.search(pattern, text, re.S)[1].encode()).digest()).decode()
        for pattern in (r"<script>(.*?)</script>", r"<style>(.*?)</style>")
    ]
    assert policy.split("; ") == [
        "default-src 'none'",
        f"script-src 'sha256-{digests[0]}'",
        f"style-src 'sha256-{digests[1]}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]


def test_the_script_never_parses_text_as_html_or_code():
    for name in SCRIPTS:
        script = (ASSETS / name).read_text(encoding="utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|fetch\(|import\b", script
        )


def test_every_asset_is_used_and_shipped():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    patterns = parser["options.package_data"]["peft_moe"].split()
    names = sorted(path.name for path in ASSETS.iterdir())
    assert names == sorted([*SCRIPTS, "page.css", "page.html"])
    assert all(any(fnmatch(f"report/assets/{name}", pattern) for pattern in patterns) for name in names)


# ---- the browser


@pytest.fixture(scope="module")
def chromium():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        reason = "no Chromium here, and the page is checked in one: install chromium"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def show(chromium, tmp_path):
    """Opens the page of a made-up report; in the end nothing may have been asked for, logged or run but the page."""
    opened = []

    def open_page(width=1280, scheme="light", **options):
        path = tmp_path / f"{len(opened)}.html"
        routing, samples = written(path, **options)
        context = chromium.new_context(
            viewport={"width": width, "height": 800},
            color_scheme=scheme,
            reduced_motion="reduce",
            has_touch=width < 500,
        )
        context.set_default_timeout(5000)
        page, seen = context.new_page(), []
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("request", lambda request: seen.append(request.url))
        page.goto(path.as_uri())
        opened.append((context, page, path.as_uri(), seen))
        return page, routing, samples

    yield open_page
    for context, page, url, seen in opened:
        assert page.evaluate("typeof ran") == "undefined"
        assert seen == [url]
        context.close()


def percent(value):
    return f"{100 * float(f'{value:.5g}'):.1f}%"


def cell(page, box, row, column, table=0):
    """A cell by its row and column without labels."""
    return page.locator(f"#{box} table").nth(table).locator("tbody tr").nth(row).locator("td").nth(column)


def tip(page):
    """What the tooltip says, as its head and a dict."""
    assert page.locator("#tip").is_visible()
    names, values = (page.locator(f"#tip {tag}").all_text_contents() for tag in ("dt", "dd"))
    return page.locator("#tip strong").text_content(), dict(zip(names, values, strict=True))


def choose(page, field, label):
    page.select_option(f"#{field}", label=label)


def layer_named(routing, name):
    return next(layer for layer in routing["layers"] if layer["name"] == name)


KINDS = {
    "molora": {"method": "MoLoRA", "blocks": 3},
    "moelora": {"method": "MOELoRA", "blocks": 2},
    "at-moe": {"method": "AT-MoE", "blocks": 5},
    "med-moe": {"method": "Med-MoE-LoRA", "blocks": 30, "modules": ["q_proj", "mlp.up_proj"]},
    "one layer, 64 experts, no task": {"blocks": 1, "modules": ["mlp"], "experts": 64, "tasks": ()},
}

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


def test_on_paper_all_is_unrolled_and_light(show):
    page, _, _ = show(scheme="dark", **KINDS["molora"])
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert not page.locator("#filters").is_visible()
    assert page.evaluate(
        "[...document.querySelectorAll('.scroll, .text')].every(e => getComputedStyle(e).overflowX === 'visible')"
    )
    assert page.evaluate("document.documentElement.dataset.theme") == "light"


def test_pointing_at_a_layer_shows_its_numbers(show):
    page, routing, _ = show(**KINDS["molora"])
    for table, module in enumerate(("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")):
        layer = layer_named(routing, f"model.layers.2.{module}")
        cell(page, "layer-maps", 2, 5, table).hover()
        head, said = tip(page)
        assert head == f"{layer['name']}, expert 5"
        assert said == {
            "load": percent(layer["load"][5]),
            "times an even share": f"{layer['load'][5] * 8:.2f}",
            "weighed most by": f"{percent(layer['top1'][5])} of tokens",
            "given weight by": f"{percent(layer['chosen'][5])} of tokens",
            "rank": "8",
        }
    page.locator("h1").hover()
    assert not page.locator("#tip").is_visible()


def test_a_tap_shows_numbers_too(show):
    page, routing, _ = show(360, **KINDS["molora"])
    cell(page, "layer-maps", 1, 3).tap()
    assert tip(page)[1]["load"] == percent(routing["layers"][3]["load"][3])


def luminance(colour):
    """Of an opaque CSS colour, by WCAG 2."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(k * x for k, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize(("scheme", "sign"), [("light", -1), ("dark", 1)])
def test_more_load_is_darker_on_light_and_lighter_on_dark(show, scheme, sign):
    page, routing, _ = show(scheme=scheme, **KINDS["molora"])
    colours = page.locator("#layer-maps td").evaluate_all("all => all.map(e => getComputedStyle(e).backgroundColor)")
    loads = [load for module in range(3) for layer in routing["layers"][module::3] for load in layer["load"]]
    cells = sorted(zip(loads, map(luminance, colours), strict=True))
    for i, (less, a) in enumerate(cells):
        # two of the ramp's 64 steps: enough to see
        assert all((b - a) * sign > 0 for more, b in cells[i:] if more - less > 2 / 63 * max(loads))


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


def test_filters_choose_task_module_and_block(show):
    page, routing, samples = show(**KINDS["molora"])
    assert page.locator("#layer-maps table").count() == 3
    choose(page, "filter-module", "mlp.up_proj")
    assert page.locator("#shown").text_content() == "3 of 9 layers"
    assert page.locator("#layer-maps figcaption").all_text_contents() == ["mlp.up_proj"]
    choose(page, "filter-block", "Block 1")
    assert page.locator("#shown").text_content() == "1 of 9 layers"
    assert page.locator("#layer-maps tbody tr").count() == 1
    layer = layer_named(routing, "model.layers.1.mlp.up_proj")
    cell(page, "layer-maps", 0, 4).hover()
    assert tip(page)[1]["load"] == percent(layer["load"][4])
    choose(page, "filter-task", "triage")
    cell(page, "layer-maps", 0, 4).hover()
    assert tip(page)[1]["load of triage"] == percent(layer["tasks"]["triage"]["load"][4])
    assert page.locator("#task-map tbody th").all_text_contents() == ["triage"]
    rows = page.locator("#token-sample option").all_text_contents()
    assert len(rows) == sum(sample.task == "triage" for sample in samples)
    assert all("triage" in row for row in rows)
    assert page.locator("#token-layer option").all_text_contents() == [layer["name"]]


def test_the_map_of_tasks_starts_where_they_part_most(show):
    page, routing, _ = show(**KINDS["molora"])

    def apart(layer):
        loads = [part["load"] for part in layer["tasks"].values()]
        return sum(abs(a - b) for load in loads for a, b in zip(load, layer["load"], strict=True))

    layer = max(routing["layers"], key=apart)
    assert page.locator("#task-layer option:checked").text_content().startswith(layer["name"])
    for t, task in enumerate(routing["tasks"]):
        for e in range(8):
            found = cell(page, "task-map", t, e)
            assert found.text_content() == f"{100 * layer['tasks'][task]['load'][e]:.0f}"
            assert (
                found.get_attribute("aria-label")
                == f"{task}, expert {e}: load {percent(layer['tasks'][task]['load'][e])}"
            )
    choose(page, "task-layer", "Mean of 9 layers")
    cell(page, "task-map", 1, 2).hover()
    mean = sum(layer["tasks"][routing["tasks"][1]]["load"][2] for layer in routing["layers"]) / 9
    assert tip(page)[1] == {"load": percent(mean)}


def test_where_tasks_part_is_the_weight_that_would_have_to_move(show):
    page, routing, _ = show(**KINDS["molora"])
    layer = layer_named(routing, "model.layers.2.self_attn.v_proj")
    for t, task in enumerate(routing["tasks"]):  # names of tasks are long, so that blocks go across
        cell(page, "apart-maps", t, 2, table=1).hover()
        moved = sum(max(0, a - b) for a, b in zip(layer["tasks"][task]["load"], layer["load"], strict=True))
        assert tip(page) == (f"{layer['name']}, {task}", {"apart from all tasks": percent(moved)})


def test_groups_have_their_experts_and_their_place_in_the_depth(show):
    page, routing, _ = show(**KINDS["at-moe"])
    first = routing["layers"][0]
    assert page.locator("#group-map tbody th").all_text_contents() == ["function", "style", "no group"]
    for g in range(3):
        for e, of in enumerate(first["group_of"]):
            cell(page, "group-map", g, e).hover()
            mean = sum(layer["load"][e] for layer in routing["layers"]) / 5
            assert tip(page)[1] == ({"load": percent(mean)} if of == (g, -1)[g == 2] else {"": "not in this group"})
    cell(page, "group-depth", 1, 3).hover()
    assert tip(page) == ("model.layers.3, style", {"weight": percent(routing["layers"][3]["group_load"][1])})
    choose(page, "filter-task", "icd")
    cell(page, "group-depth", 0, 3).hover()
    *named, general = routing["layers"][3]["tasks"]["icd"]["load"]
    assert tip(page)[1] == {"weight of icd": percent(sum(named[:3]) / (1 - general))}


def test_charts_by_depth_say_their_numbers(show):
    page, routing, _ = show(**KINDS["molora"])
    charts = page.locator("#depth-charts figure")
    assert charts.count() == 5
    for chart, value in (
        (0, lambda x: f"{x['effective_experts']:.1f}"),
        (1, lambda x: f"{x['entropy']:.2f}"),
        (2, lambda x: percent(max(x["load"]))),
    ):
        charts.nth(chart).locator(".hit").nth(1).focus()
        page.keyboard.press("ArrowRight")
        assert tip(page) == ("Block 2", {layer["module"]: value(layer) for layer in routing["layers"][6:]})


def test_similarity_starts_with_the_layer_that_has_copies(show):
    page, routing, _ = show(**KINDS["molora"])
    similarity = routing["layers"][0]["similarity"]
    assert (
        page.locator("#similarity-note").text_content()
        == f"Most alike here: expert 1 and expert 4, cosine {similarity[1][4]:.2f}."
    )
    cell(page, "similarity-map", 4, 1).hover()
    assert tip(page) == ("expert 4 and expert 1", {"cosine": f"{similarity[4][1]:.2f}"})
    choose(page, "similarity-layer", "model.layers.2.mlp.up_proj")
    assert cell(
        page, "similarity-map", 3, 2
    ).text_content() == f"{routing['layers'][8]['similarity'][3][2]:.2f}".replace("-0.00", "0.00")


def test_findings_say_in_words_how_bad_they_are(show):
    page, routing, _ = show(**KINDS["molora"])
    assert page.locator(".finding .level").all_inner_texts() == ["✕Bad", "iNote", "✓Good"]
    texts = page.locator(".finding div > p").all_text_contents()
    assert sorted(texts) == sorted(finding["text"] for finding in routing["findings"])


# ---- token by token


def bytes_of(weights, token):
    return [math.floor(255 * w + 0.5) for w in weights[0 if len(weights) == 1 else token].tolist()]


def colour_of(page, name):
    """The legend's colour of an expert, as three numbers."""
    key = page.locator("#token-legend button", has_text=re.compile(rf"^{re.escape(name)}\d"))
    return re.findall(r"\d+", key.locator("i").evaluate("e => getComputedStyle(e).backgroundColor"))[:3]


def check_tokens(page, layer, sample, weights):
    """Every token has the colour of its strongest expert, as strong as its weight."""
    colours = {name: colour_of(page, f"expert {name}" if name.isdigit() else name) for name in layer["experts"]}
    assert len(set(map(tuple, colours.values()))) == len(colours)
    found = page.locator("#token-text .token").evaluate_all(
        "all => all.map(e => [e.dataset.item, e.dataset.expert, getComputedStyle(e).backgroundColor, e.textContent])"
    )
    assert len(found) == len(sample.tokens)
    for token, (item, expert, colour, text) in enumerate(found):
        row = bytes_of(weights, token)
        name = layer["experts"][row.index(max(row))]
        assert (int(item), expert) == (token, name)
        assert text == (sample.tokens[token] or "∅").replace("\n", "↵\n")
        *rgb, alpha = re.findall(r"[\d.]+", colour) + (["1"] if colour.startswith("rgb(") else [])
        assert rgb == colours[name]
        assert float(alpha) == pytest.approx(0.15 + 0.85 * max(row) / 255, abs=0.006)


@pytest.mark.parametrize("kind", list(KINDS)[:4])
def test_a_token_has_the_colour_of_its_strongest_expert(show, kind):
    page, routing, samples = show(**KINDS[kind])
    check_tokens(page, routing["layers"][0], samples[0], samples[0].weights[0])
    page.select_option("#token-sample", index=3)
    page.select_option("#token-layer", index=len(routing["layers"]) - 1)
    check_tokens(page, routing["layers"][-1], samples[3], samples[3].weights[-1])
    page.locator("#token-depth").focus()
    page.keyboard.press("ArrowLeft")
    check_tokens(page, routing["layers"][-2], samples[3], samples[3].weights[-2])
    assert page.locator("#token-layer option:checked").text_content() == routing["layers"][-2]["name"]
    assert bool(page.locator("#token-note").text_content()) == (kind == "moelora")


def test_a_token_tells_the_weights_of_all_experts(show):
    page, _, samples = show(**KINDS["molora"])
    sample = samples[0]
    page.locator("#token-text .token").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    by_key = tip(page)
    row = bytes_of(sample.weights[0], 2)
    assert by_key == (f"“{sample.tokens[2]}”", {f"expert {e}": f"{100 * w / 255:.1f}%" for e, w in enumerate(row)})
    assert (
        page.evaluate("document.activeElement.ariaLabel")
        == f"{sample.tokens[2].strip()}, expert {row.index(max(row))} {100 * max(row) / 255:.1f}%"
    )
    page.locator("h1").hover()
    page.locator("#token-text .token").nth(2).hover()
    assert tip(page) == by_key


def test_prompt_and_answer_are_told_apart(show):
    page, _, samples = show(**KINDS["molora"])
    cut = samples[0].prompt_tokens
    assert page.locator("#token-text h3").all_text_contents() == ["Prompt", "Answer"]
    assert page.locator(".prompt .token").count() == cut
    assert page.locator(".answer .token").count() == len(samples[0].tokens) - cut


def test_an_expert_can_be_seen_alone(show):
    page, _, samples = show(**KINDS["molora"])
    key = page.locator("#token-legend button").nth(6)
    key.click()
    assert key.get_attribute("aria-pressed") == "true"
    rgb = colour_of(page, "expert 6")
    found = page.locator("#token-text .token").evaluate_all("all => all.map(e => getComputedStyle(e).backgroundColor)")
    for token, colour in enumerate(found):
        *base, alpha = re.findall(r"[\d.]+", colour) + (["1"] if colour.startswith("rgb(") else [])
        assert float(alpha) == pytest.approx(bytes_of(samples[0].weights[0], token)[6] / 255, abs=0.006)
        assert base == rgb
    key.click()
    assert key.get_attribute("aria-pressed") == "false"


def test_a_token_can_be_followed_through_the_depth(show):
    page, _, samples = show(**KINDS["molora"])
    assert page.locator("#token-depth-map h3").text_content() == "The row through the depth"
    page.locator("#token-text .token").nth(4).click()
    assert page.locator("#token-depth-map h3").text_content() == f"“{samples[0].tokens[4].strip()}” through the depth"
    cell(page, "token-depth-map", 5, 2).hover()
    weight = bytes_of(samples[0].weights[6], 4)[5]  # the first module's layer of block 2
    assert tip(page) == ("model.layers.2.self_attn.q_proj, expert 5", {"weight": f"{100 * weight / 255:.1f}%"})


def test_the_expert_can_be_written_where_it_changes(show):
    page, _, samples = show(**KINDS["molora"])
    page.check("#token-names")
    tops = [(w := bytes_of(samples[0].weights[0], t)).index(max(w)) for t in range(len(samples[0].tokens))]
    marks = page.locator(".token.change").evaluate_all("all => all.map(e => getComputedStyle(e, '::before').content)")
    assert marks == [f'"{top}"' for top, _ in groupby(tops)]


# ---- what may be missing, and what may be in it


@pytest.mark.parametrize(
    ("change", "samples", "gone"),
    [
        (lambda r: [r.update(tasks=[]), [layer.update(tasks={}) for layer in r["layers"]]], None, {"tasks", "groups"}),
        (lambda r: [layer.update(similarity=None) for layer in r["layers"]], None, {"similarity", "groups"}),
        (None, [], {"tokens", "groups"}),
        (lambda r: [layer.update(block=None) for layer in r["layers"]], None, {"groups"}),
        (lambda r: r.update(layers=r["layers"][:1]), [], {"tokens", "groups", "depth"}),
        (
            lambda r: r.update(layers=[], tasks=[], findings=[]),
            [],
            {"tokens", "groups", "depth", "tasks", "similarity"},
        ),
    ],
    ids=["no tasks", "no similarity", "no samples", "no block numbers", "one layer", "no layers"],
)
def test_parts_without_data_are_left_out(show, change, samples, gone):
    page, _, _ = show(360, change=change, samples=samples, **KINDS["molora"])
    sections = page.locator("main > section")
    hidden = {
        s
        for s, seen in zip(
            sections.evaluate_all("all => all.map(e => e.id)"), [s.is_visible() for s in sections.all()], strict=True
        )
        if not seen
    }
    assert hidden == gone
    links = page.locator("nav a").evaluate_all("all => all.map(e => e.hash.slice(1))")
    assert set(links) == {"summary", "tokens", "layers", "tasks", "groups", "depth", "similarity", "numbers"} - gone


@pytest.mark.parametrize("width", [1280, 360])
def test_hostile_text_is_only_text(show, width):
    routing, samples = sample_report(blocks=2, experts=len(HOSTILE), tasks=())
    samples = samples[:1]
    routing.update(adapter=HOSTILE[0], method=HOSTILE[1], base_model=HOSTILE[-1], tasks=sorted(HOSTILE))
    routing["findings"] = [
        {"level": text, "title": text, "text": text, "where": [text], "numbers": {}} for text in HOSTILE
    ]
    for layer, text in zip(routing["layers"], HOSTILE, strict=False):
        layer.update(name=text, module=text, experts=HOSTILE)
        layer["tasks"] = {task: {"tokens": 1, "load": layer["load"], "entropy": 1.0} for task in HOSTILE[:-2]}
    samples[0].task = HOSTILE[0]
    samples[0].tokens = (HOSTILE * 20)[: len(samples[0].tokens)]
    page, _, _ = show(width, change=lambda made: (made.clear(), made.update(copy.deepcopy(routing))), samples=samples)
    for task in range(len(HOSTILE)):
        page.select_option("#filter-task", index=1 + task)
    page.select_option("#filter-task", index=0)
    page.locator("#token-text .token").nth(3).focus()
    page.locator("#table-box summary").click()
    shown = page.locator("#token-text .token").all_text_contents()
    assert shown[0] == HOSTILE[0]
    assert shown[3] == "[U+202E]]]>gnirts[U+2066]"
    assert shown[10] == HOSTILE[10]
    assert page.locator("#adapter").text_content() == HOSTILE[0]
    assert page.locator(".finding h3").nth(1).text_content() == HOSTILE[1]
    assert page.locator("img, svg[onload], main script").count() == 0
    assert page.locator("script").count() == 3
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.body.innerText.includes('\\u202e')") is False


def test_an_encoder_and_a_decoder_are_told_apart(show):
    def rename(routing):
        for layer, stack in zip(routing["layers"], ("encoder", "encoder", "decoder", "decoder"), strict=True):
            layer.update(name=f"{stack}.block.{layer['block'] % 2}.mlp", block=layer["block"] % 2)

    page, routing, _ = show(blocks=4, modules=["mlp"], change=rename)
    assert page.locator("#layer-maps figcaption").all_text_contents() == ["encoder.block: mlp", "decoder.block: mlp"]
    cell(page, "layer-maps", 1, 2, table=1).hover()
    head, said = tip(page)
    assert (head, said["load"]) == ("decoder.block.1.mlp, expert 2", percent(routing["layers"][3]["load"][2]))
    assert page.locator("#depth-legend .key").count() == 2


def test_a_large_report_holds_one_text_and_no_more_than_its_cells(show):
    modules = ["q", "k", "v", "o", "gate", "up", "down"]
    page, routing, samples = show(blocks=30, modules=modules, copies=False)
    assert len(routing["layers"]) == 210
    assert page.locator("#layer-maps td").count() == 210 * 8
    assert page.locator(".token").count() == len(samples[0].tokens)
    assert page.locator("*").count() < 10_000  # a weight of a sample has none
    page.select_option("#token-layer", index=209)
    check_tokens(page, routing["layers"][209], samples[0], samples[0].weights[209])
