"""What may be missing in a report's page, and what may be in it."""

import copy

import pytest
from report_browser import HOSTILE, KINDS, cell, percent, tip
from report_samples import sample_report

pytest_plugins = ["report_fixtures"]


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
    assert page.locator("#token-text .token").nth(3).get_attribute("aria-selected") == "true"
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
