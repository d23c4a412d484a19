"""The pictures have the numbers they should, whatever the names are; read back from what was drawn."""

import gc
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
from PIL import Image

from peft_moe.report.by_layer import stack_of
from peft_moe.report.heatmaps import draw, write_pictures
from peft_moe.report.panels import label

MODULES = ["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"]


def make_layer(block, module, experts, tasks=(), *, seed=0, **changes):
    """A layer with random numbers, the same for the same seed."""
    random = np.random.default_rng([seed, block or 0, len(module), len(experts)])

    def share():
        values = random.random(len(experts)) + 0.05
        return (values / values.sum()).tolist()

    cosine = random.uniform(-0.5, 0.5, (len(experts), len(experts)))
    cosine = (cosine + cosine.T) / 2
    np.fill_diagonal(cosine, 1)
    name = ".".join(filter(None, ("model.layers", str(block), module))) if block is not None else module
    return {
        "name": name, "block": block, "module": module, "experts": list(experts), "tokens": 100, "load": share(),
        "entropy": 0.7, "similarity": cosine.tolist(), "group_of": None, "group_load": None,
        "tasks": {task: {"tokens": 10 + i, "load": share()} for i, task in enumerate(tasks)},
    } | changes  # fmt: skip


def make_routing(blocks=8, modules=MODULES, experts="0123", tasks=("icd", "rad"), **changes):
    layers = [make_layer(block, module, experts, tasks) for block in range(blocks) for module in modules]
    return {"format": 1, "method": "MoLoRA", "tasks": list(tasks), "groups": None, "layers": layers} | changes


def make_grouped(blocks=5):
    experts, group_of = ["f/a", "f/b", "s/c", "general"], [0, 0, 1, -1]
    layers = [make_layer(b, "", experts, group_of=group_of, group_load=[0.1 * b, 1 - 0.1 * b]) for b in range(blocks)]
    return {"format": 1, "method": "AT-MoE", "tasks": [], "groups": ["f", "s"], "layers": layers}


def panels(figure):
    """By title, what is drawn in each heat map."""
    return {
        axis.get_title(): np.ma.filled(axis.images[0].get_array().astype(float), np.nan)
        for axis in figure.axes
        if axis.images and axis.get_title()
    }


def texts(figure):
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def test_each_method_has_the_figures_that_it_has_numbers_for():
    assert set(draw(make_routing())) == {"layers", "tasks", "depth", "similarity"}
    assert set(draw(make_grouped())) == {"layers", "groups", "depth", "similarity"}
    bare = {"layers": [{"name": "x", "experts": ["0", "1"], "load": [0.4, 0.6]}]}
    assert set(draw(bare)) == {"layers", "depth"}


def test_many_layers_have_a_panel_for_each_module_with_blocks_as_rows():
    routing = make_routing()
    drawn = panels(draw(routing)["layers"])
    assert list(drawn) == MODULES
    for layer in routing["layers"]:
        assert drawn[layer["module"]][layer["block"]].tolist() == layer["load"]


def test_few_layers_share_a_panel_with_their_names():
    routing = make_routing(blocks=2, modules=MODULES[1:], experts="012")
    figure = draw(routing)["layers"]
    (axis,) = (axis for axis in figure.axes if axis.images)
    assert axis.images[0].get_array().tolist() == [layer["load"] for layer in routing["layers"]]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == [layer["name"] for layer in routing["layers"]]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["0", "1", "2"]


def test_an_encoder_and_a_decoder_are_told_apart():
    layers = [
        make_layer(b, "q", "01", name=f"{stack}.block.{b}.q", seed=i)
        for i, stack in enumerate(("encoder", "decoder"))
        for b in range(10)
    ]
    figures = draw({"layers": layers})
    drawn = panels(figures["layers"])
    assert list(drawn) == ["encoder.block … q", "decoder.block … q"]
    assert drawn["decoder.block … q"][3].tolist() == layers[13]["load"]
    assert len(figures["depth"].axes[0].lines[0].get_xdata()) == 20


def test_layers_with_different_numbers_of_experts_are_compared_with_an_even_share():
    layers = [make_layer(b, "up", [str(i) for i in range(2 + b // 10)]) for b in range(20)]
    (grid,) = (axis.images[0].get_array() for axis in draw({"layers": layers})["layers"].axes if axis.images)
    for row, layer in zip(np.ma.filled(grid, np.nan), layers, strict=True):
        n = len(layer["load"])
        np.testing.assert_allclose(row[:n], np.array(layer["load"]) * n)
        assert np.isnan(row[n:]).all()


@pytest.mark.parametrize("routing", [make_routing(), make_grouped()], ids=["tokens", "groups"])
def test_colours_start_at_nothing_and_the_even_share_is_marked_in_the_bar(routing):
    even = 1 / len(routing["layers"][0]["experts"])
    for name, figure in draw(routing).items():
        for axis in figure.axes:
            for image in axis.images:
                low, high = image.get_clim()
                assert low == 0
                assert high >= np.nanmax(image.get_array())
        bars = [axis for axis in figure.axes if axis.get_label() == "<colorbar>"]
        assert bool(bars) == (name != "depth")
        if name in ("layers", "tasks"):
            assert f"even share, {even:.3g}" in bars[0].get_ylabel()
            assert even in [line.get_ydata()[0] for line in bars[0].lines]


def test_tasks_are_means_over_layers_that_weigh_as_their_tokens():
    routing = make_routing(blocks=3)
    for i, layer in enumerate(routing["layers"]):
        layer["tasks"]["icd"]["tokens"] = i * i
    figure = draw(routing)["tasks"]
    drawn = panels(figure)
    assert list(drawn) == ["all layers", "task icd", "task rad"]
    for row, task in enumerate(["icd", "rad"]):
        for block in (None, 0, 1, 2):
            total, weight = np.zeros(4), 0
            for layer in routing["layers"]:
                if block in (None, layer["block"]):
                    total += np.array(layer["tasks"][task]["load"]) * layer["tasks"][task]["tokens"]
                    weight += layer["tasks"][task]["tokens"]
            found = drawn["all layers"][row] if block is None else drawn[f"task {task}"][block]
            np.testing.assert_allclose(found, total / weight)


def test_a_task_that_a_layer_has_not_seen_leaves_a_gap():
    routing = make_routing(blocks=3)
    for layer in routing["layers"]:
        if layer["block"] == 1:
            del layer["tasks"]["rad"]
    drawn = panels(draw(routing)["tasks"])
    assert np.isnan(drawn["task rad"][1]).all()
    assert np.isfinite(drawn["task rad"][[0, 2]]).all()
    assert np.isfinite(drawn["all layers"]).all()


def test_experts_stand_in_the_row_of_their_group():
    routing = make_grouped()
    by_group, by_block = panels(draw(routing)["groups"]).values()
    load = np.mean([layer["load"] for layer in routing["layers"]], axis=0)
    nan = np.nan
    expected = [[load[0], load[1], nan, nan], [nan, nan, load[2], nan], [nan, nan, nan, load[3]]]
    np.testing.assert_allclose(by_group, expected)
    np.testing.assert_allclose(by_block, [layer["group_load"] for layer in routing["layers"]])


def test_depth_has_the_largest_and_smallest_load_experts_in_effect_and_entropy():
    routing = make_routing(blocks=4, modules=["up"])
    load, effective, entropy = draw(routing)["depth"].axes[:3]
    loads = [layer["load"] for layer in routing["layers"]]
    lines = [line.get_ydata() for line in load.lines[:3]]
    np.testing.assert_allclose(lines, [[max(x) for x in loads], [min(x) for x in loads], [0.25] * 4])
    np.testing.assert_allclose(effective.lines[0].get_ydata(), [np.exp(-sum(v * np.log(v) for v in x)) for x in loads])
    np.testing.assert_allclose(entropy.lines[0].get_ydata(), [0.7] * 4)
    assert entropy.lines[1].get_ydata()[0] == pytest.approx(np.log(4))
    for layer in routing["layers"]:
        layer["chosen_per_token"] = 2.0  # of 4 experts: the largest entropy is that of two even weights
    assert draw(routing)["depth"].axes[2].lines[1].get_ydata()[0] == pytest.approx(np.log(2))


def test_similarity_is_the_size_of_cosines_and_its_depth_has_the_two_most_alike():
    routing = make_routing(blocks=4, modules=["up"])
    figure = draw(routing)["similarity"]
    every = np.abs([layer["similarity"] for layer in routing["layers"]])
    (grid,) = panels(figure).values()
    np.testing.assert_allclose(grid, every.mean(0))
    line = next(axis for axis in figure.axes if axis.lines and not axis.images).lines[0]
    apart = [max(m[i, j] for i in range(4) for j in range(4) if i != j) for m in every]
    np.testing.assert_allclose(line.get_ydata(), apart)


def test_layers_of_another_kind_are_left_out_of_means_and_the_title_says_so():
    routing = make_routing(blocks=3, modules=["up"])
    routing["layers"].append(make_layer(3, "up", "01", ("icd", "rad")))
    figures = draw(routing)
    for name in ("tasks", "similarity"):
        assert any("3 of 4 layers" in text for text in texts(figures[name])), name
    assert panels(figures["tasks"])["all layers"].shape == (2, 4)


NASTY = [
    "$\\frac{1}{0}$ $x^",
    "a\x00b\x1b[2J\u202e\n\r",
    "漢字\U0001f600\ud800",
    "x" * 100_000,
    "<b>&{}%s\\input{x}",
    "",
]


@pytest.mark.parametrize("name", NASTY, ids=["mathtext", "control", "no glyphs", "long", "markup", "empty"])
def test_names_are_drawn_as_they_are_but_for_what_cannot_be(name):
    routing = make_routing(blocks=2, modules=[name, "up"], experts=[name, name + "1"], tasks=[name, "b"])
    grouped = make_grouped() | {"groups": [name, "s"]}
    for one in routing, grouped:
        one["method"] = one["adapter"] = name
        for figure in draw(one).values():
            figure.canvas.draw()  # where matplotlib would warn of glyphs, and fail at TeX
            assert max(figure.canvas.get_width_height()) <= 2000
            for text in texts(figure):
                assert len(text) < 300
                assert text.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "routing",
    [
        make_routing(blocks=1, modules=["up"], experts="01", tasks=("a",), adapter="outputs/" + "long/" * 20),
        make_grouped() | {"adapter": "x" * 100},
    ],
    ids=["small", "groups"],
)
def test_sentences_of_titles_are_whole_whatever_the_size_and_the_names(routing):
    starts = {
        "layers": "Where the weight goes: load of each expert by layer",
        "tasks": "Do tasks use different experts? Load of each expert by task",
        "groups": "Which groups the input gets",
        "depth": "Load and entropy by depth",
        "similarity": "Are experts copies of each other?",
    }
    for name, figure in draw(routing).items():
        title = figure.get_suptitle()
        assert " ".join(title.split("\n")).startswith(f"{starts[name]} {routing['method']} of ")
        assert max(map(len, title.split("\n"))) <= 12 * figure.get_size_inches()[0]


def test_what_precedes_a_block_s_number_ends_at_the_whole_number():
    layers = {
        "a.1x.b.1.q": "a.1x.b",
        "model.layers.1": "model.layers",
        "1.q": "",
        "encoder.block.1.layer.0.q": "encoder.block",
    }
    assert {name: stack_of({"name": name, "block": 1}) for name in layers} == layers


def test_a_name_is_cut_in_its_middle():
    assert label("model.layers.10.mlp.up_proj", 15) == "model…p.up_proj"
    assert len(label("model.layers.10.mlp.up_proj", 15)) == 15
    assert label("$x$", 15) == "$x$"


@pytest.mark.parametrize(
    "routing",
    [
        make_routing(blocks=30, modules=[f"m{i}" for i in range(7)], experts=[str(i) for i in range(8)]),
        make_routing(blocks=2, modules=MODULES[:2], experts="012"),
        make_routing(blocks=100, modules=["up"], experts=[str(i) for i in range(64)]),
        make_routing(blocks=1, modules=["up"], experts="01", tasks=()),
        make_routing(blocks=4, modules=["up"], tasks=[f"task {i}" for i in range(60)]),
        {"layers": [make_layer(None, f"anything{i}", "01") for i in range(300)]},
        {"layers": [make_layer(0, "up", "01", load=[0.0, 0.0]), make_layer(1, "up", "01", load=[float("nan")] * 2)]},
    ],
    ids=["210 by 8", "4 by 3", "64 experts", "one layer", "60 tasks", "no blocks", "no load"],
)
def test_pictures_of_any_size_are_of_modest_size_and_not_blank(routing, tmp_path):
    files = write_pictures(routing, tmp_path / "new" / "folder")
    assert {file.name for file in files} == {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    for file in files:
        with Image.open(file) as image:
            assert image.format == "PNG"
            assert max(image.size) <= 2000
            assert np.asarray(image.convert("L")).std() > 5
        assert file.stat().st_size < 400_000


def test_a_picture_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    (tmp_path / "layers.png").write_bytes(b"old")

    def fail(self, file, **options):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="No space"):
        write_pictures(make_routing(blocks=1), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"layers.png": b"old"}


def test_figures_belong_to_the_caller_alone():
    from matplotlib import pyplot

    before = pyplot.get_fignums()  # of other tests
    figures = draw(make_routing(blocks=2))
    alive = [weakref.ref(figure) for figure in figures.values()]
    assert pyplot.get_fignums() == before
    del figures
    gc.collect()
    assert [figure() for figure in alive] == [None] * 4


@pytest.mark.long
def test_threads_draw_the_same_as_one(tmp_path):
    routing = make_routing(blocks=3)
    threads = [threading.Thread(target=write_pictures, args=(routing, tmp_path / str(i))) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files = write_pictures(routing, tmp_path / "alone")
    for file in files:
        for i in range(3):
            assert (tmp_path / str(i) / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        ({"layers": []}, "routing has no layers"),
        ({}, "routing has no layers"),
        ({"layers": [make_layer(0, "up", "01", load=[1.0])]}, r"layers\[0\] has 2 experts and 1 loads"),
    ],
)
def test_what_is_no_report_is_refused(routing, message):
    with pytest.raises(ValueError, match=message):
        draw(routing)


@pytest.mark.long
def test_without_matplotlib_the_error_says_what_to_install():
    code = (
        "import sys\n"
        "import peft_moe.report.heatmaps as heatmaps\n"
        "assert 'matplotlib' not in sys.modules\n"
        "sys.modules['matplotlib'] = None\n"
        "heatmaps.draw({'layers': [{'name': 'x', 'experts': ['0', '1'], 'load': [0.5, 0.5]}]})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: Pictures need matplotlib; install it with `pip install matplotlib`." in done.stderr
