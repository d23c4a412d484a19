"""The page of a report as a file: what is in it. `test_page_*` are about what a browser makes of it."""

import base64
import configparser
import hashlib
import json
import math
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from report_browser import HOSTILE, written
from report_samples import sample_report

from peft_moe.report import page as page_module
from peft_moe.report.page import SCRIPTS, as_script_json, write_page

ASSETS = Path(page_module.__file__).parent / "assets"
ROOT = Path(__file__).parent.parent


def embedded(path, name):
    """What JSON of that name is in a page."""
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(rf'<script type="application/json" id="{name}-data">(.*?)</script>', text, re.S)[1])


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


def weights_in(sample, index, experts):
    """The whole numbers of a layer's weights, row by row, as they are in the file."""
    found = torch.frombuffer(bytearray(base64.b64decode(sample["weights"][index])), dtype=torch.uint8).long()
    return (found[::2] + 256 * found[1::2]).view(-1, experts)


@pytest.mark.parametrize("method", ["MOELoRA", "Med-MoE-LoRA"])
def test_weights_are_two_bytes_each_row_by_row(tmp_path, method):
    path = tmp_path / "page.html"
    routing, samples = written(path, method=method, blocks=2)
    for sample, given in zip(embedded(path, "sample"), samples, strict=True):
        for i, (layer, weights) in enumerate(zip(routing["layers"], given.weights, strict=True)):
            found = weights_in(sample, i, len(layer["experts"]))
            assert found.shape == weights.shape
            assert (found / 65535 - weights).abs().max() <= 1.5 / 65535


@pytest.mark.parametrize("grouped", [False, True], ids=["alike", "grouped"])
@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1e-2, 1.0])
def test_the_strongest_expert_is_not_lost_by_rounding(tmp_path, scale, grouped):
    path, routing = tmp_path / "page.html", sample_report("AT-MoE" if grouped else "MoLoRA", blocks=1, experts=7)[0]
    routing["layers"] = routing["layers"][:1]
    scores = scale * torch.randn(500, 7, generator=torch.Generator().manual_seed(0))
    scores[:, -1] += 3 * grouped  # the general expert has the most, and is not among those that are compared
    weights = scores.softmax(-1)
    write_page(routing, [{"task": None, "tokens": ["x"] * 500, "prompt_tokens": 0, "weights": [weights]}], path)
    found, compared = weights_in(embedded(path, "sample")[0], 0, 7), slice(0, 6 if grouped else 7)
    strongest = weights[:, compared].amax(-1)
    first = found[:, compared].argmax(-1)  # on a CPU, the first of equal ones
    assert torch.equal(weights.gather(1, first[:, None])[:, 0], strongest)


def test_samples_can_be_mappings(tmp_path):
    routing, samples = sample_report(blocks=1)
    write_page(routing, samples, tmp_path / "a.html")
    write_page(routing, [vars(sample) for sample in samples], tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_weight_adds_eight_thirds_of_a_byte(tmp_path):
    path, n, layers, experts = tmp_path / "page.html", 300, 20, 8
    routing, _ = sample_report(blocks=layers, modules=["mlp"], experts=experts)
    sizes = []
    for rows in (1, n):
        weights = [torch.full((rows, experts), 1 / experts)] * layers
        write_page(routing, [{"task": None, "tokens": ["x"] * n, "prompt_tokens": 0, "weights": weights}], path)
        sizes.append(path.stat().st_size)
    assert sizes[1] - sizes[0] == pytest.approx((n - 1) * layers * experts * 8 / 3, rel=0.01)


def test_the_page_itself_is_small(tmp_path):
    empty = {**sample_report(blocks=1)[0], "layers": [], "tasks": [], "findings": []}
    write_page(empty, [], tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 80_000


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("gpt2", "gpt2"),
        ("", ""),
        ("/home/ann/models/SmolLM2", "SmolLM2"),
        ("/home/ann/models/SmolLM2/", "SmolLM2"),
        ("../SmolLM2", "SmolLM2"),
        ("~/SmolLM2", "SmolLM2"),
        ("models/ann/SmolLM2", "SmolLM2"),
        ("C:\\Users\\ann\\SmolLM2", "SmolLM2"),
        ("C:/SmolLM2", "SmolLM2"),
    ],
)
def test_folders_of_the_base_model_are_not_in_the_page(tmp_path, given, shown):
    path = tmp_path / "page.html"
    written(path, blocks=1, change=lambda routing: routing.update(base_model=given))
    assert embedded(path, "routing")["base_model"] == shown


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
