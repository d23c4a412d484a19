"""`peft-moe report`, as it is used."""

import json
import os

import pytest
import torch
from kinds import KINDS, config_of
from peft import LoraConfig, get_peft_model
from tiny_models import make_model
from tiny_text import make_tokenizer, write_data
from transformers import AutoModelForCausalLM

from peft_moe import MoeLoraConfig, MoLoraConfig
from peft_moe.cli import main
from peft_moe.cli.report import show
from peft_moe.report.results import Routing

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def adapter(base, tmp_path):
    return save(base, tmp_path / "[adapter]", MoeLoraConfig, tasks=["leaf", "size"], r=8, num_experts=4)


def save(base, folder, kind, **fields):
    torch.manual_seed(0)
    fields = {"task_type": "CAUSAL_LM", "target_modules": TARGETS, "init_lora_weights": False} | fields
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), kind(**fields)).save_pretrained(str(folder))
    return str(folder)


def test_a_report_is_written(adapter, data, tmp_path, capsys):
    out = tmp_path / "deep" / "report"
    assert main(["report", adapter, "--data", str(data), "--out", str(out), "--rows", "12", "--samples", "3"]) == 0
    routing = Routing.read(out / "routing.json")
    assert (routing.adapter, routing.method, routing.rows, routing.tasks) == (adapter, "MOELoRA", 12, ["leaf", "size"])
    assert routing.layers[0]["tasks"]["leaf"]["tokens"] + routing.layers[0]["tasks"]["size"]["tokens"] == routing.tokens
    assert list(out.glob("*.png"))
    assert "<html" in (out / "index.html").read_text(encoding="utf-8")
    said = " ".join(capsys.readouterr().out.split())
    assert f"MOELoRA adapter {adapter}: 12 rows" in said  # brackets in names are no markup
    for finding in routing.findings:
        assert finding["title"] in said
    assert str(out / "index.html") in said


@pytest.mark.parametrize("kind", KINDS)
def test_each_method_has_a_report(kind, base, data, tmp_path):
    torch.manual_seed(0)
    tasks = {"tasks": ["leaf", "size"], "default_task": None} if kind == "moelora" else {}
    model = get_peft_model(make_model("llama"), config_of(kind, "llama", tmp_path, **tasks))
    model.save_pretrained(str(tmp_path / kind))
    words = ["--base-model", str(base), "--data", str(data), "--out", str(tmp_path / "out"), "--rows", "6"]
    assert main(["report", str(tmp_path / kind), *words]) == 0
    routing = Routing.read(tmp_path / "out" / "routing.json")
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert all(json.dumps(layer["name"]) in page for layer in routing.layers)
    pictures = [path.read_bytes()[:4] for path in (tmp_path / "out").glob("*.png")]
    assert len(pictures) >= 3
    assert set(pictures) == {b"\x89PNG"}


def test_a_report_without_pictures_of_token_routing(base, data, tmp_path, capsys):
    adapter = save(base, tmp_path / "molora", MoLoraConfig, r=2, num_experts=3)
    out, words = tmp_path / "out", ["--split", "dev", "--rows", "3", "--no-pictures"]
    assert main(["report", adapter, "--data", str(data), "--out", str(out), *words]) == 0
    assert not list(out.glob("*.png"))
    assert Routing.read(out / "routing.json").rows == 2  # one of each task
    assert "pictures in" not in capsys.readouterr().out


def test_a_report_is_not_lost(adapter, data, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["report", adapter, "--data", str(data), "--out", str(out), "--rows", "2", "--no-pictures"]
    assert main(words) == 0
    before = (out / "routing.json").read_text(encoding="utf-8")
    capsys.readouterr()
    assert main(words) == 1
    assert "routing.json" in capsys.readouterr().err
    assert (out / "routing.json").read_text(encoding="utf-8") == before
    assert main([*words[:-2], "4", "--no-pictures", "--overwrite"]) == 0
    assert json.loads((out / "routing.json").read_text(encoding="utf-8"))["rows"] == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "0"], "--rows=0 is no count"),
        (["--batch-size", "0"], "--batch-size=0 is no count"),
        (["--samples", "-1"], "--samples=-1 is no count"),
        (["--split", "nowhere"], "nowhere"),
        (["--data", "missing.jsonl"], "No data at 'missing.jsonl'"),
        (["--out", "{file}"], "is a file"),
        (["--out", "{file}/in/it"], "is a file"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(words, message, adapter, data, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    given = [word.format(file=tmp_path / "file") for word in words]
    out = tmp_path / "out"
    assert main(["report", adapter, "--data", str(data), "--out", str(out), "--no-pictures", *given]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.splitlines()[-1].startswith("peft-moe: ")
    assert not out.exists()


def test_data_of_other_tasks_is_refused_before_the_model_is_loaded(base, data, tmp_path, capsys):
    adapter = save(base, tmp_path / "other", MoeLoraConfig, tasks=["leaf", "bark"], r=8, num_experts=4)
    words = ["--data", str(data), "--out", str(tmp_path / "out"), "--base-model", os.devnull, "--no-pictures"]
    assert main(["report", adapter, *words]) == 1
    assert "['size'] that are not among" in capsys.readouterr().err


def test_a_stock_lora_is_refused(base, data, tmp_path, capsys):
    adapter = save(base, tmp_path / "lora", LoraConfig, r=2)
    assert main(["report", adapter, "--data", str(data), "--out", str(tmp_path / "out"), "--no-pictures"]) == 1
    assert "is a LORA adapter, which routes nothing" in capsys.readouterr().err


def test_names_cannot_colour_or_clear_the_console(capsys):
    finding = {"level": "bad", "title": "[red]x[/red]", "text": "Closest are \x1b[2J and [/]."}
    routing = {"method": "MOELoRA", "adapter": "a\x1b]0;x\x07", "rows": 1, "tokens": 1, "tasks": [], "layers": []}
    show(routing | {"findings": [finding]}, [], [])
    said = capsys.readouterr().out
    assert not {"\x1b", "\x07"} & set(said)
    assert "[red]x[/red]" in said
    assert "[/]" in said
