"""The token view of a report's page."""

import re
from itertools import groupby
from types import SimpleNamespace

import pytest
import torch
from kinds import config_of
from peft import get_peft_model
from report_browser import KINDS, cell, numbers_in, percent, tip, tips
from tiny_models import make_model
from tiny_text import make_tokenizer, write_data

from peft_moe.cli import main
from peft_moe.report.results import Routing

pytest_plugins = ["report_fixtures"]
pytestmark = pytest.mark.long


def weights_of(weights, token):
    return weights[0 if len(weights) == 1 else token].tolist()


def colour_of(page, name):
    """The legend's colour of an expert, as three numbers."""
    key = page.locator("#token-legend button", has_text=re.compile(rf"^{re.escape(name)}\d"))
    return numbers_in(key.locator("i").evaluate("e => getComputedStyle(e).backgroundColor"))[:3]


def check_tokens(page, layer, sample, weights):
    """Every token has the colour of its strongest expert, as strong as its weight; a general one takes no part."""
    groups = layer["group_of"] or [0] * len(layer["experts"])
    names = [name for name, group in zip(layer["experts"], groups, strict=True) if group >= 0]
    colours = {name: colour_of(page, f"expert {name}" if name.isdigit() else name) for name in names}
    assert len(set(map(tuple, colours.values()))) == len(colours)
    found = page.locator("#token-text .token").evaluate_all(
        "all => all.map(e => [e.dataset.item, e.dataset.expert, getComputedStyle(e).backgroundColor, e.textContent])"
    )
    assert len(found) == len(sample.tokens)
    for token, (item, expert, colour, text) in enumerate(found):
        row = [w if group >= 0 else 0.0 for w, group in zip(weights_of(weights, token), groups, strict=True)]
        name = layer["experts"][row.index(max(row))]
        whole = sum(row) if -1 in groups else 1
        assert (int(item), expert) == (token, name)
        assert text == sample.tokens[token]
        *rgb, alpha = numbers_in(colour) + ([1.0] if colour.startswith("rgb(") else [])
        assert rgb == colours[name]
        assert float(alpha) == pytest.approx(0.15 + 0.85 * max(row) / whole, abs=0.006)


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
    assert page.get_attribute("#token-depth", "aria-valuetext") == routing["layers"][-2]["name"]
    general = page.locator("#token-legend button", has_text="general")
    assert [general.count(), general.locator("i").count()] == [kind == "at-moe", 0]  # a colour that no token has
    said = {"moelora": "for the row, not for a token", "at-moe": "the general expert"}
    note = page.locator("#token-note").text_content()
    assert said.get(kind, "") in note
    assert bool(note) == (kind in said)


def test_a_token_tells_the_weights_of_all_experts(show):
    page, _, samples = show(**KINDS["molora"])
    sample = samples[0]
    page.locator("#token-text .token").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    by_key = tip(page)
    row = weights_of(sample.weights[0], 2)
    assert by_key[0] == f"“{sample.tokens[2]}”"
    check_percent(by_key[1], {f"expert {e}": w for e, w in enumerate(row)})
    top = f"expert {row.index(max(row))}"
    assert page.evaluate("document.activeElement.ariaLabel") == f"{sample.tokens[2].strip()}, {top} {by_key[1][top]}"
    page.locator("h1").hover()
    page.locator("#token-text .token").nth(2).hover()
    assert tip(page) == by_key


def check_percent(said, weights):
    """Shown percents, to a digit behind the point, are those of the weights."""
    shown = {name: float(text.rstrip("%")) for name, text in said.items()}
    assert shown == pytest.approx({name: 100 * w for name, w in weights.items()}, abs=0.0501)


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
        *base, alpha = numbers_in(colour) + ([1.0] if colour.startswith("rgb(") else [])
        assert alpha == pytest.approx(weights_of(samples[0].weights[0], token)[6], abs=0.006)
        assert base == rgb
    key.click()
    assert key.get_attribute("aria-pressed") == "false"


def test_a_token_can_be_followed_through_the_depth(show):
    page, _, samples = show(**KINDS["molora"])
    assert page.locator("#token-depth-map h3").text_content() == "The row through the depth"
    page.locator("#token-text .token").nth(4).click()
    assert page.locator("#token-depth-map h3").text_content() == f"“{samples[0].tokens[4].strip()}” through the depth"
    cell(page, "token-depth-map", 5, 2).hover()
    weight = weights_of(samples[0].weights[6], 4)[5]  # the first module's layer of block 2
    head, said = tip(page)
    assert head == "model.layers.2.self_attn.q_proj, expert 5"
    check_percent(said, {"weight": weight})


def test_there_is_a_way_back_to_the_mean_of_the_row(show):
    page, _, _ = show(**KINDS["molora"])
    token, title = page.locator("#token-text .token").nth(4), page.locator("#token-depth-map h3")
    chosen = page.locator('#token-text .token[aria-selected="true"]')
    for back in (token.click, lambda: page.keyboard.press("Escape"), lambda: page.keyboard.press("Enter")):
        token.click()
        assert title.text_content() != "The row through the depth"
        assert chosen.evaluate_all("all => all.map(e => e.dataset.item)") == ["4"]
        back()
        assert title.text_content() == "The row through the depth"
        assert chosen.count() == 0
        assert page.locator("#token-text .token").count() == page.locator('.token[aria-selected="false"]').count()
    page.keyboard.press(" ")
    page.keyboard.press("ArrowRight")
    assert chosen.evaluate_all("all => all.map(e => e.dataset.item)") == ["5"]


def test_the_expert_can_be_written_where_it_changes(show):
    page, _, samples = show(**KINDS["molora"])
    assert not page.is_checked("#token-names")
    page.check("#token-names")
    tops = [(w := weights_of(samples[0].weights[0], t)).index(max(w)) for t in range(len(samples[0].tokens))]
    marks = page.locator(".token.change").evaluate_all("all => all.map(e => getComputedStyle(e, '::before').content)")
    assert marks == [f'"{top}"' for top, _ in groupby(tops)]


def test_a_large_report_holds_one_text_and_no_more_than_its_cells(show):
    modules = ["q", "k", "v", "o", "gate", "up", "down"]
    page, routing, samples = show(blocks=30, modules=modules, copies=False)
    assert len(routing["layers"]) == 210
    assert page.locator("#layer-maps td").count() == 210 * 8
    assert page.locator(".token").count() == len(samples[0].tokens)
    assert page.locator("*").count() < 10_000  # a weight of a sample has none
    page.select_option("#token-layer", index=209)


def test_names_are_written_where_there_are_more_experts_than_colours_that_all_can_tell_apart(show):
    page, _, _ = show(blocks=1, modules=["mlp"], experts=9)
    assert page.is_checked("#token-names")
    assert page.locator(".named .change").count() > 1


def near_even(tokens, experts):
    """Weights that differ in the fourth digit and behind."""
    scores = torch.randn(len(tokens), experts, generator=torch.Generator().manual_seed(1))
    return (2e-4 * scores).softmax(-1)


def test_the_strongest_of_near_even_weights_is_shown(show):
    tokens = [f"t{i} " for i in range(60)]
    weights = near_even(tokens, 8)
    sample = SimpleNamespace(task=None, tokens=tokens, prompt_tokens=50, weights=[weights])
    page, _, _ = show(blocks=1, modules=["mlp"], tasks=(), samples=[sample])
    found = page.locator("#token-text .token").evaluate_all("all => all.map(e => Number(e.dataset.expert))")
    assert found == weights.argmax(-1).tolist()


ODD = [
    ("<|im_start|>", ""), ("user", ""), ("\n", "↵"), ("Ask", ""), ("", "·"), ("\u200d", "[U+200D]"),
    ("\u0301", "◌\u0301"), ("a\u0301", "a\u0301"), ("\u00ad\u200b", "[U+00AD][U+200B]"), ("\U000e0041", "[U+E0041]"),
    ("\r\n", "\\r↵"), ("x" * 50, ""), ("<|im_end|>", ""), ("\n", "↵"), ("<|im_start|>", ""), ("assistant", ""),
    ("\n", "↵"), ("E11", ""), ("<|im_end|>", ""),
]  # fmt: skip


def test_odd_tokens_can_be_seen_and_rows_told_apart(show):
    tokens = [token for token, _ in ODD]
    made = {"task": "icd", "prompt_tokens": len(ODD) - 2, "weights": [near_even(tokens, 8)]}
    samples = [{**made, "tokens": tokens, "cut": 1234}, {**made, "tokens": tokens}]
    page, _, _ = show(blocks=1, modules=["mlp"], samples=samples)
    shown = page.locator("#token-text .token").evaluate_all(
        """all => all.map(e => [e.textContent, [...e.querySelectorAll('.sign')].map(s => s.dataset.sign).join('')])"""
    )
    for (token, look), (text, signs) in zip(ODD, shown, strict=True):
        assert look in (signs, text, "")
        assert text == (token.replace("\r", "") if signs or not look else look)
    sign = page.locator(".sign").nth(1)
    assert sign.evaluate("e => getComputedStyle(e, '::before').content") == '"·"'
    assert page.locator(".token").nth(4).bounding_box()["width"] > 1
    assert "A dot is" in page.locator("#token-note").text_content()
    assert page.get_by_text("… 1,234 earlier tokens are not shown.").is_visible()
    rows = page.locator("#token-sample option").all_text_contents()
    assert rows == [f"{i}. icd: …{'x' * 40} → E11" for i in (1, 2)]
    page.select_option("#token-sample", index=1)
    assert page.get_by_text("not shown").count() == 0


def test_a_real_report_shows_what_routing_json_says(open_file, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    torch.manual_seed(0)
    make_model("llama").save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    model = get_peft_model(
        make_model("llama"), config_of("moelora", "llama", tmp_path, tasks=["leaf", "size"], default_task=None)
    )
    model.save_pretrained(str(tmp_path / "moelora"))
    data = write_data(tmp_path / "data")
    words = ["--base-model", str(base), "--data", str(data), "--out", str(out), "--rows", "6", "--no-pictures"]
    assert main(["report", str(tmp_path / "moelora"), *words]) == 0
    routing, page = Routing.read(out / "routing.json"), open_file(out / "index.html")
    layer, task = routing.layers[0], page.locator("#token-text .task bdi").text_content()
    (head, said), *_ = tips(page, page.locator("#token-text .token"))
    names = [f"expert {name}" if name.isdigit() else name for name in layer["experts"]]
    check_percent(said, dict(zip(names, layer["tasks"][task]["load"], strict=True)))
    assert head
    cell(page, "layer-maps", 0, 0).hover()
    assert tip(page)[1]["load"] == percent(layer["load"][0])
    assert str(tmp_path) not in page.locator("#facts").text_content()
