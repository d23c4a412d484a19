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
import timing
from methods import LABELS
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
