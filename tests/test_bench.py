"""scripts/bench/ as `make bench` runs it, on tiny sizes: every step of every script, and its pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import layer
import model
import pictures
import pytest
import scaling
import tables
import timing
from methods import LABELS, dtypes_here
from tiny_models import make_model

FAST = ["--rounds", "2", "--threads", "1"]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Call the main of a script with arguments; gives the rows it wrote and what it printed."""

    def call(script, *arguments):
        monkeypatch.setattr(timing, "SHORTEST", 1)  # ms: no time here is read
        for setting in timing.KEEP_MEMORY.items():  # as if started again already
            monkeypatch.setenv(*setting)
        name = script.__name__
        path = tmp_path / f"{name}.json"
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--output", str(path), *FAST, *arguments])
        script.main()
        return json.loads(path.read_text()), capsys.readouterr().out

    return call


def check(row):
    """What every row of a time or of memory has to be."""
    if row["step"] == "memory":
        assert row["ratio"] > 0
        assert {"base", "total", "ours"} <= row["peak_bytes"].keys()
        return
    for name, ratio in row["ratios"].items():
        low, high = ratio["quartiles"]
        assert 0 < low <= ratio["median"] <= high
        assert row["ms"][name] > 0


def draw(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pictures.py", str(folder)])
    pictures.main()
    return {path.name for path in folder.glob("*.png") if path.read_bytes().startswith(b"\x89PNG")}


def test_a_layer_is_measured_in_every_step_and_drawn(run, tmp_path, monkeypatch):
    monkeypatch.setitem(layer.SHAPES, "576x1536", (16, 24))
    small = ["--shape", "576x1536", "--dtype", "fp32"]
    written, out = run(layer, *small, "--method", "molora", "at_moe")
    assert [(row["method"], row["step"]) for row in written["rows"]] == [
        (method, step) for method in ("molora", "at_moe") for step in layer.STEPS
    ]
    for row in written["rows"]:
        check(row)
    by_step = {row["step"]: row for row in written["rows"] if row["method"] == "molora"}
    assert by_step["train"]["ratios"].keys() == {"base", "total", "active"}
    assert by_step["memory"]["saved_bytes"]["total"] == {"1024 × 128 float32": 4 * 1024 * 128}
    assert by_step["train"]["target"] == 1.03
    assert by_step["prefill"]["target"] is None
    assert f"| {LABELS['molora']} | train | " in out
    written, _ = run(layer, *small, "--method", "moelora", "lora", "--steps", "prefill", "--keep")
    assert len(written["rows"]) == 2 * len(layer.STEPS) + 2
    assert all(row["settings"] == {"rounds": 2, "threads": 1, "dropout": 0.0} for row in written["rows"])
    assert draw(tmp_path, monkeypatch) == {"layer.png", "layer-forward.png"}


def test_a_model_is_measured_in_every_step_and_drawn(run, tmp_path, monkeypatch):
    make_model("llama").save_pretrained(tmp_path / "tiny")
    small = ["--model", str(tmp_path / "tiny"), "--batch", "2", "--seq", "8", "--tokens", "2", "--dtype", "fp32"]
    written, out = run(model, *small, "--method", "moelora", "recording")
    assert [(row["method"], row["step"]) for row in written["rows"]] == [
        (method, step) for method in ("moelora", "recording") for step in model.STEPS
    ]
    for row in written["rows"]:
        check(row)
        assert (row["target"] is None) == (row["method"] == "recording")
    assert out.count("| MOELoRA, total rank 64 |") == len(model.STEPS)
    assert draw(tmp_path, monkeypatch) == {"model.png"}


def test_growth_is_measured_along_every_axis_and_drawn(run, tmp_path, monkeypatch):
    small = ["--shape", "16", "24", "--factors", "1", "8", "--dtype", "fp32"]
    written, _ = run(scaling, *small)
    found = {(row["axis"], row["method"], row["factor"]) for row in written["rows"]}
    assert found == {(a, m, f) for a in scaling.AXES for m in scaling.METHODS for f in (1, 8)}
    for row in written["rows"]:
        check(row | {"step": "train"})
    assert draw(tmp_path, monkeypatch) == {"scaling.png"}


def test_rows_of_another_machine_are_not_kept_beside_new_ones(run, tmp_path, monkeypatch):
    monkeypatch.setitem(layer.SHAPES, "576x1536", (16, 24))
    small = ["--shape", "576x1536", "--dtype", "fp32", "--method", "lora", "--steps", "memory"]
    written, _ = run(layer, *small)
    before = json.dumps(written | {"machine": written["machine"] | {"cpus": 1000}})
    (tmp_path / "layer.json").write_text(before)
    with pytest.raises(SystemExit, match=r"'cpus': 1000.*give another --output"):
        run(layer, *small, "--keep")
    assert (tmp_path / "layer.json").read_text() == before


def test_rows_with_another_dropout_are_not_kept_beside_those_without(run, tmp_path, monkeypatch):
    monkeypatch.setitem(layer.SHAPES, "576x1536", (16, 24))
    small = ["--shape", "576x1536", "--dtype", "fp32", "--method", "molora", "--steps"]
    written, _ = run(layer, *small, "memory", "--dropout", "0.5")
    assert any("bool" in shape for shape in written["rows"][0]["saved_bytes"]["ours"])
    with pytest.raises(SystemExit, match=r"has rows of other settings.*'dropout': 0.5.*give another --output"):
        run(layer, *small, "train", "--keep")


def test_without_anything_to_draw_pictures_says_who_writes_it(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        draw(tmp_path, monkeypatch)
    assert "`make bench` writes them" in capsys.readouterr().err


def test_a_benchmark_starts_itself_again_with_what_it_was_given(tmp_path):
    code = "import os, sys, timing; timing.keep_memory(); print(sys.argv[1:], os.environ['MALLOC_MMAP_MAX_'])"
    (tmp_path / "program.py").write_text(code)
    found = subprocess.run(
        [sys.executable, tmp_path / "program.py", "--rounds", "5"],
        env=os.environ | {"PYTHONPATH": str(Path(timing.__file__).parent), "MALLOC_MMAP_MAX_": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split("\n")[0] == "['--rounds', '5'] 0"


def test_a_layer_can_be_timed_beside_its_lora_alone(run, monkeypatch):
    monkeypatch.setitem(layer.SHAPES, "576x1536", (16, 24))
    small = ["--shape", "576x1536", "--dtype", "fp32", "--method", "molora", "--steps", "train", "memory"]
    time, memory = run(layer, *small, "--against", "total")[0]["rows"]
    assert time["ratios"].keys() == {"total"}
    assert memory["peak_bytes"].keys() == {"base", "total", "active", "ours"}


def test_what_is_counted_of_a_lora_once_is_what_it_is_counted_as_again(monkeypatch):
    models = layer.contestants("molora", (16, 24), "fp32")
    first = layer.memory(models, "molora", "fp32")
    monkeypatch.setattr(layer, "COUNTED", {})
    assert layer.memory(models, "molora", "fp32") == first
    other = layer.contestants("molora_k2_r64", (16, 24), "fp32")
    again = layer.memory(other, "molora_k2_r64", "fp32")
    assert again["peak_bytes"]["base"] == first["peak_bytes"]["base"]
    assert again["peak_bytes"]["total"] > first["peak_bytes"]["total"]  # of another rank, and so counted for itself


@pytest.mark.parametrize(("fastest", "expected"), [("bfloat16", ["fp32", "bf16"]), ("float32", ["fp32"])])
def test_bfloat16_is_left_out_where_the_cpu_does_not_multiply_in_it(monkeypatch, fastest, expected):
    monkeypatch.setattr("methods.resolve_dtype", lambda name, device: fastest)
    assert dtypes_here(["fp32", "bf16"]) == expected


def test_the_tables_of_the_page_are_those_of_its_json(tmp_path):
    page = tmp_path / tables.PAGE.name
    (tmp_path / page.stem).symlink_to(tables.PAGE.with_suffix(""))
    page.write_text(tables.PAGE.read_text())
    assert tables.main(["--page", str(page)]) == 0
    assert page.read_text() == tables.PAGE.read_text()


def test_a_page_that_lacks_a_mark_stays_as_it_is(tmp_path, capsys):
    page = tmp_path / tables.PAGE.name
    (tmp_path / page.stem).symlink_to(tables.PAGE.with_suffix(""))
    page.write_text(text := tables.PAGE.read_text().replace("<!-- end of dispatch -->", "").replace("0.9", "0.1"))
    with pytest.raises(SystemExit):
        tables.main(["--page", str(page)])
    assert "'<!-- end of dispatch -->'" in capsys.readouterr().err
    assert page.read_text() == text


def test_a_miss_is_bold_and_one_within_the_spread_in_italics():
    assert [tables.marked(*args) for args in ((1.034, 1.0, 1.03), (1.05, 1.02, 1.03), (1.05, 1.04, 1.03))] == [
        "1.03",
        "*1.05*",
        "**1.05**",
    ]
    assert tables.marked(9.0, 9.0, None) == "9.00"


def test_the_floor_is_the_base_and_the_products_of_the_ranks_at_work():
    shape = {"shape": "576x1536", "dtype": "fp32", "method": "molora_k1_r64"}
    rows = [
        {**shape, "step": "train", "ratios": {"total": {"median": 0.8}, "base": {"median": 2.4}}},
        {**shape, "step": "memory", "saved_bytes": {"total": {"1024 × 512 float32": 1}}},
    ]
    of_base = 2 * 1024 * 576 * 1536
    of_adapter = 3 * 1024 * 64 * (576 + 1536)  # one of eight experts of rank 64
    assert tables.floor(rows, "576x1536", "molora_k1_r64") == f"{0.8 / 2.4 * (1 + of_adapter / of_base):.2f}"
    assert tables.floor(rows, "2048x5632", "molora_k1_r64") == "–"
