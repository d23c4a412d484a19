"""What the parts of a report's page say: maps, charts and filters, against the numbers that they are of."""

import math

import pytest
from report_browser import KINDS, cell, choose, layer_named, luminance, percent, tip, tips

pytest_plugins = ["report_fixtures"]


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
            "strongest expert of": f"{percent(layer['top1'][5])} of tokens",
            "has weight in": f"{percent(layer['chosen'][5])} of tokens",
            "rank": "8",
        }
    page.locator("h1").hover()
    assert not page.locator("#tip").is_visible()


def test_a_tap_shows_numbers_too(show):
    page, routing, _ = show(360, **KINDS["molora"])
    cell(page, "layer-maps", 1, 3).tap()
    assert tip(page)[1]["load"] == percent(routing["layers"][3]["load"][3])


@pytest.mark.parametrize(("scheme", "sign"), [("light", -1), ("dark", 1)])
def test_more_load_is_darker_on_light_and_lighter_on_dark(show, scheme, sign):
    page, routing, _ = show(scheme=scheme, **KINDS["molora"])
    colours = page.locator("#layer-maps td").evaluate_all("all => all.map(e => getComputedStyle(e).backgroundColor)")
    loads = [load for module in range(3) for layer in routing["layers"][module::3] for load in layer["load"]]
    cells = sorted(zip(loads, map(luminance, colours), strict=True))
    for i, (less, a) in enumerate(cells):
        # two of the ramp's 64 steps: enough to see
        assert all((b - a) * sign > 0 for more, b in cells[i:] if more - less > 2 / 63 * max(loads))


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


def test_a_task_that_is_chosen_reaches_every_part_and_keeps_what_was_chosen_there(show):
    page, routing, _ = show(**KINDS["molora"])
    page.locator("#table-box summary").click()
    of_all = routing["layers"][4]
    row = [of_all["name"], "8", " ".join(map(str, of_all["ranks"])), str(of_all["tokens"])]
    row += [f"{of_all['effective_experts']:.1f}", f"{of_all['entropy']:.2f}", "8.0"]
    assert row_of_table(page, 4) == [*row, " ".join(map(percent, of_all["load"]))]
    choose(page, "task-layer", "model.layers.1.self_attn.v_proj")
    choose(page, "similarity-layer", "model.layers.2.mlp.up_proj")
    choose(page, "filter-task", "triage")
    task = of_all["tasks"]["triage"]
    row[3:] = [str(task["tokens"]), f"{effective(task['load']):.1f}", f"{task['entropy']:.2f}"]
    assert row_of_table(page, 4) == [*row, " ".join(map(percent, task["load"]))]
    assert page.locator("#table caption").text_content() == "Tokens of triage"
    titles = page.locator("#depth-charts figcaption").all_text_contents()
    assert all("triage" in title for title in titles[:4])
    values = [
        lambda layer: f"{effective(layer['tasks']['triage']['load']):.1f}",
        lambda layer: f"{layer['tasks']['triage']['entropy']:.2f}",
        lambda layer: percent(max(layer["tasks"]["triage"]["load"])),
        lambda layer: percent(apart(layer, "triage")),
    ]
    for chart, value in enumerate(values):
        (said,) = tips(page, page.locator("#depth-charts figure").nth(chart).locator(".hit").nth(1))
        assert said == ("Block 1", {layer["module"]: value(layer) for layer in routing["layers"][3:6]})
    for task in ("triage", "icd"):
        choose(page, "filter-task", task)
        assert page.locator("#task-layer option:checked").text_content() == "model.layers.1.self_attn.v_proj"
        assert page.locator("#similarity-layer option:checked").text_content() == "model.layers.2.mlp.up_proj"
    choose(page, "filter-block", "Block 0")  # neither is there
    first = page.locator("#similarity-layer option:checked").text_content()
    assert first == "Most alike: model.layers.0.self_attn.q_proj"
    choose(page, "task-layer", "Mean of 3 layers")
    choose(page, "filter-block", "Block 2")
    assert page.locator("#task-layer option:checked").text_content() == "Mean of 3 layers"


def row_of_table(page, row):
    return page.locator("#table tbody tr").nth(row).locator("th, td").all_text_contents()


def effective(load):
    return math.exp(-sum(share * math.log(share) for share in load))


def apart(layer, task):
    """Total variation between a task's load and the mean of the other tasks', from the numbers of the page."""
    loads = {name: [float(f"{x:.5g}") for x in part["load"]] for name, part in layer["tasks"].items()}
    own, others = loads.pop(task), loads.values()
    mean = [sum(column) / len(others) for column in zip(*others, strict=True)]
    return sum(max(0, a - b) for a, b in zip(own, mean, strict=True))


def test_the_map_of_tasks_starts_where_they_part_most(show):
    page, routing, _ = show(**KINDS["molora"])

    layer = max(routing["layers"], key=lambda layer: sum(apart(layer, task) for task in routing["tasks"]))
    assert page.locator("#task-layer option:checked").text_content() == f"Tasks part most: {layer['name']}"
    shown = page.locator("#task-map td").evaluate_all("all => all.map(e => [e.textContent, e.ariaLabel])")
    for t, task in enumerate(routing["tasks"]):
        for e in range(8):
            load = layer["tasks"][task]["load"][e]
            assert shown[8 * t + e] == [f"{100 * load:.0f}", f"{task}, expert {e}: load {percent(load)}"]
    choose(page, "task-layer", "Mean of 9 layers")
    cell(page, "task-map", 1, 2).hover()
    mean = sum(layer["tasks"][routing["tasks"][1]]["load"][2] for layer in routing["layers"]) / 9
    assert tip(page)[1] == {"load": percent(mean)}


def test_where_tasks_part_is_the_weight_that_would_have_to_move(show):
    page, routing, _ = show(**KINDS["molora"])
    layer = layer_named(routing, "model.layers.2.self_attn.v_proj")
    for t, task in enumerate(routing["tasks"]):  # names of tasks are long, so that blocks go across
        cell(page, "apart-maps", t, 2, table=1).hover()
        assert tip(page) == (f"{layer['name']}, {task}", {"apart from other tasks": percent(apart(layer, task))})


def test_tasks_that_share_no_expert_are_wholly_apart(show):
    def disjoint(routing):
        for layer in routing["layers"]:
            for t, part in enumerate(layer["tasks"].values()):
                part["load"] = [float(e == t) for e in range(8)]

    page, _, _ = show(blocks=1, modules=["mlp"], change=disjoint)
    assert [said["apart from other tasks"] for _, said in tips(page, page.locator("#apart-maps td"))] == ["100.0%"] * 4


def test_groups_have_their_experts_and_their_place_in_the_depth(show):
    page, routing, _ = show(**KINDS["at-moe"])
    first = routing["layers"][0]
    assert page.locator("#group-map tbody th").all_text_contents() == ["function", "style", "no group"]
    said = tips(page, page.locator("#group-map td"))
    for g in range(3):
        for e, of in enumerate(first["group_of"]):
            mean = sum(layer["load"][e] for layer in routing["layers"]) / 5
            found = {"load": percent(mean)} if of == (g, -1)[g == 2] else {"": "not in this group"}
            assert said[7 * g + e][1] == found
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


def test_the_largest_entropy_is_that_of_as_many_experts_as_a_token_gets(show):
    def top_2(routing):
        for layer in routing["layers"]:
            layer["chosen_per_token"] = 2.0

    page, _, _ = show(**KINDS["molora"], change=top_2)
    assert (
        f"ln 2 = {math.log(2):.2f} if the 2 experts that a token gets" in page.locator("#entropy-note").text_content()
    )
    assert f"{math.log(2):.2f}" in page.locator("#depth-charts figure").nth(1).locator("svg").text_content()


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
    assert cell(page, "similarity-map", 3, 2).text_content() == f"{abs(routing['layers'][8]['similarity'][3][2]):.2f}"


def test_a_mirror_image_is_as_alike_as_a_copy(show):
    def mirror(routing):
        routing["layers"][1]["similarity"] = [[1.0, -0.95], [-0.95, 1.0]]

    page, _, _ = show(blocks=2, modules=["mlp"], experts=2, copies=False, change=mirror)
    assert page.locator("#similarity-layer option:checked").text_content() == "Most alike: model.layers.1.mlp"
    assert page.locator("#similarity-note").text_content().endswith("cosine -0.95, as a mirror image.")
    cells = page.locator("#similarity-map td")
    assert cells.all_text_contents() == ["1.00", "0.95", "0.95", "1.00"]
    assert tips(page, cells)[1] == ("expert 0 and expert 1", {"cosine": "-0.95"})
    assert page.locator("#figures > div", has_text="Most alike").locator("dd").text_content() == "0.95"
    chart = page.locator("#depth-charts figure", has_text="Most alike")
    assert tips(page, chart.locator(".hit"))[1][1] == {"Most alike pair of experts, |cosine|": "0.95"}


def test_a_line_with_gaps_has_a_dot_for_each_point_that_stands_alone(show):
    def every_fourth(routing):
        routing["layers"] = [
            layer for layer in routing["layers"] if layer["module"] == "mlp" or layer["block"] % 4 == 3
        ]

    page, _, _ = show(blocks=48, modules=["mlp", "attn"], samples=[], change=every_fourth)
    for chart in page.locator("#depth-charts figure").all():
        shapes = chart.locator("g.line")
        dots = [shape.locator("circle").count() for shape in shapes.all()]
        assert dots == [0, 12]
    assert page.locator("#depth-charts figure").count() > 3


def test_an_even_share_is_marked_where_all_layers_have_the_same_one(show):
    page, _, _ = show(**KINDS["med-moe"] | {"blocks": 6})
    mark = page.locator("#layers .mark")
    assert mark.count() == 0
    choose(page, "filter-block", "Block 5")  # of 8 experts
    high = float(page.locator("#layers .scale > span").last.text_content().rstrip("%"))
    left = float(mark.evaluate("e => e.style.left").rstrip("%"))
    assert left == pytest.approx(100 * 12.5 / high, abs=0.2)


def test_one_gate_for_all_layers_is_said(show):
    page, _, _ = show(**KINDS["moelora"])
    assert "share one gate" in page.locator("#layers-note").text_content()
    page, _, _ = show(**KINDS["molora"])
    assert "share one gate" not in page.locator("#layers-note").text_content()


def test_findings_say_in_words_how_bad_they_are(show):
    def one_of_each(routing):
        made = {"where": ["model.layers.0.mlp"], "numbers": {}}
        routing["findings"] = [
            {"level": level, "title": level, "text": f"It is {level}.", **made} for level in ("good", "bad", "note")
        ]

    page, routing, _ = show(blocks=1, change=one_of_each)
    assert page.locator(".finding summary").first.text_content() == "Where: 1 layer"
    assert page.locator(".finding .level").all_inner_texts() == ["✕Bad", "iNote", "✓Good"]
    texts = page.locator(".finding div > p").all_text_contents()
    assert sorted(texts) == sorted(finding["text"] for finding in routing["findings"])
