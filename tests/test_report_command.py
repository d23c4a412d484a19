"""`peft-moe report`, from an adapter and rows to files."""

import json
from pathlib import Path

import pytest
import torch
from helpers import TARGETS
from kinds import KINDS, config_of
from peft import LoraConfig, get_peft_model
from tiny_models import make_model
from tiny_text import make_tokenizer, write_data

from peft_moe.cli import main


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A base model, rows, an adapter of each method, and a stock LoRA."""
    folder = tmp_path_factory.mktemp("report")
    write_data(folder / "data")
    make_tokenizer().save_pretrained(folder / "base")
    make_model("llama").save_pretrained(folder / "base")
    for kind in KINDS:
        torch.manual_seed(0)
        tasks = {"tasks": ["leaf", "size"], "default_task": None} if kind == "moelora" else {}
        model = get_peft_model(make_model("llama"), config_of(kind, "llama", folder, **tasks))
        model.save_pretrained(folder / kind)
    stock = LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS["llama"])
    get_peft_model(make_model("llama"), stock).save_pretrained(folder / "stock")
    return folder


def command(saved, kind, out, *options):
    base = ["--base-model", str(saved / "base"), "--data", str(saved / "data"), "--out", str(out)]
    return ["report", str(saved / kind), *base, *options]


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_has_numbers_pictures_and_a_page(kind, saved, tmp_path, capsys):
    assert main(command(saved, kind, tmp_path / "out", "--rows", "6", "--samples", "2")) == 0
    out = capsys.readouterr().out
    routing = json.loads((tmp_path / "out" / "routing.json").read_text())
    assert routing["rows"] == 6
    assert routing["adapter"] == str(saved / kind)
    assert set(routing["tasks"]) == {"leaf", "size"}
    for finding in routing["findings"]:
        assert finding["title"] in " ".join(out.split())
    assert str(tmp_path / "out" / "index.html") in out.replace("\n", "")
    page = (tmp_path / "out" / "index.html").read_text()
    assert all(json.dumps(layer["name"]) in page for layer in routing["layers"])
    pictures = [path.read_bytes()[:4] for path in (tmp_path / "out").glob("*.png")]
    assert len(pictures) >= 3
    assert set(pictures) == {b"\x89PNG"}


def test_nothing_is_lost_and_nothing_run_where_a_report_is_already(saved, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "index.html").write_text("mine")
    (out / "notes.txt").write_text("mine too")
    assert main(command(saved, "molora", out, "--no-pictures")) == 1
    assert "index.html" in (said := capsys.readouterr().err)
    assert "--overwrite" in said
    assert [path.name for path in sorted(out.iterdir())] == ["index.html", "notes.txt"]
    assert main(command(saved, "molora", out, "--no-pictures", "--overwrite", "--rows", "3")) == 0
    assert (out / "notes.txt").read_text() == "mine too"
    assert not list(out.glob("*.png"))
    assert (out / "index.html").read_text().startswith("<!")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("molora", ["--rows", "0"], "--rows=0"),
        ("molora", ["--batch-size", "0"], "--batch-size=0"),
        ("molora", ["--split", "no_such"], "no_such"),
        ("stock", [], "has no routers"),
        ("nowhere", [], "nowhere"),
    ],
)
def test_what_cannot_be_reported_is_one_line_and_leaves_nothing(kind, options, message, saved, tmp_path, capsys):
    assert main(command(saved, kind, tmp_path / "out", *options)) == 1
    error = capsys.readouterr().err
    assert error.startswith("peft-moe: ")
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_directory(saved, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert main(command(saved, "molora", tmp_path / "out")) == 1
    assert "is a file" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"
