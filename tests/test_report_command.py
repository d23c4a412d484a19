"""`peft-moe report`, as it is used."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from kinds import KINDS, config_of
from peft import LoraConfig, get_peft_model
from tiny_models import make_model
from tiny_text import make_tokenizer, write_data
from transformers import AutoModelForCausalLM

from peft_moe import MoeLoraConfig, MoLoraConfig
from peft_moe.cli import main
from peft_moe.cli.loading import Source
from peft_moe.cli.report import report_directory, show
from peft_moe.report.adapter import read_moe_config
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
    assert "is a LORA adapter, which has no experts and no router" in capsys.readouterr().err


def test_names_cannot_colour_or_clear_the_console(capsys):
    finding = {"level": "bad", "title": "[red]x[/red]", "text": "Closest are \x1b[2J and [/]."}
    routing = {
        "method": "MOELoRA",
        "adapter": "a\x1b]0;x\x07:warning:",
        "rows": 1,
        "tokens": 1,
        "tasks": [],
        "layers": [],
    }
    show(routing | {"findings": [finding]}, [], [])
    said = capsys.readouterr().out
    assert not {"\x1b", "\x07"} & set(said)
    assert "[red]x[/red]" in said
    assert "[/]" in said
    assert r"a\x1b]0;x\x07:warning:" in said


@pytest.mark.parametrize("command", [["report"], ["check", "uniform"], ["inspect"]])
def test_errors_cannot_steer_the_terminal(command, adapter, data, tmp_path, capsys):
    path = Path(adapter, "adapter_config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    field = "peft_type" if command == ["inspect"] else "base_model_name_or_path"
    path.write_text(json.dumps(config | {field: "\x1b[2Jgone"}), encoding="utf-8")
    words = {"report": ["--out", str(tmp_path / "out"), "--no-pictures"], "check": [], "inspect": []}[command[0]]
    words += [] if command == ["inspect"] else ["--data", str(data)]
    assert main([*command, adapter, *words]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("peft-moe: ")
    assert r"\x1b[2Jgone" in last
    assert last.isprintable()


# what is wrong, and the error; the base model is never loaded, since there is none
REFUSED = {
    "no base model": ({}, [], "names no base model; pass --base-model."),
    "no router": ({"num_experts": 1, "tasks": ["leaf", "size"]}, [], "no router; there is nothing to report"),
    "rows that are too long": ({}, ["--base-model", "{tokenizer}", "--max-length", "1"], "has no room for the longest"),
    "no task column": ({}, ["--data", "{untold}"], "has no column 'task'"),
    "no such column": ({}, ["--task-column", "kind"], "has no column 'kind'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_reported_is_said_before_the_base_model_is_loaded(what, base, data, tmp_path, capsys):
    fields, words, message = REFUSED[what]
    adapter = save(base, tmp_path / "adapter", MoeLoraConfig, **{"tasks": ["leaf", "size"], "num_experts": 4} | fields)
    path = Path(adapter, "adapter_config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"base_model_name_or_path": None}), encoding="utf-8")
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "untold.jsonl").write_text('{"prompt": "ash", "completion": "broad"}\n', encoding="utf-8")
    places = {"tokenizer": tmp_path / "tokenizer", "untold": tmp_path / "untold.jsonl"}
    given = ["--data", str(data), "--out", str(tmp_path / "out"), "--no-pictures"]
    assert main(["report", adapter, *given, *(word.format(**places) for word in words)]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rows_need_no_task_where_the_adapter_needs_none(base, tmp_path, capsys):
    adapter = save(base, tmp_path / "molora", MoLoraConfig, r=2, num_experts=3)
    lines = [{"prompt": word, "completion": "broad", "kind": kind} for word, kind in (("ash", "x"), ("fir", "y"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    out = tmp_path / "out"
    words = ["--data", str(tmp_path / "rows.jsonl"), "--no-pictures", "--overwrite"]
    for column, tasks in {None: [], "kind": ["x", "y"]}.items():
        named = ["--task-column", column] if column else []
        assert main(["report", adapter, "--out", str(out), *words, *named]) == 0
        assert Routing.read(out / "routing.json").tasks == tasks
    capsys.readouterr()
    small = ["--data", str(tmp_path / "rows.jsonl"), "--max-new-tokens", "1", "--json"]
    assert main(["check", "uniform", adapter, *small]) == 0
    assert list(json.loads(capsys.readouterr().out)["as_it_is"]) == ["all", "mean"]


def test_rows_are_asked_as_in_training(base, tmp_path, capsys):
    adapter = save(base, tmp_path / "molora", MoLoraConfig, r=2, num_experts=3)
    lines = [{"instruction": "Name the leaf", "input": word, "output": "broad"} for word in ("ash", "fir")]
    file, out = tmp_path / "rows.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    tokens = {}
    for protocol in ("instruction", "bare"):
        asked = ["--protocol", protocol, "--data", str(file)]
        assert main(["report", adapter, *asked, "--out", str(out), "--no-pictures", "--overwrite"]) == 0
        tokens[protocol] = Routing.read(out / "routing.json").tokens
    longer = tokens["instruction"] - tokens["bare"]
    instruction = make_tokenizer()("Name the leaf\n", add_special_tokens=False)["input_ids"]
    assert longer == 2 * len(instruction)
    file.write_text('{"input": "ash", "output": "broad"}\n', encoding="utf-8")
    bare = ["check", "uniform", adapter, "--data", str(file), "--max-new-tokens", "1"]
    capsys.readouterr()
    assert main(bare) == 1
    assert "on the command line --protocol bare." in capsys.readouterr().err
    assert main([*bare, "--protocol", "bare"]) == 0


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float16), ("bfloat16", torch.bfloat16)])
def test_the_type_of_the_base_weights_can_be_chosen(dtype, expected, tmp_path):
    make_model("llama").to(torch.float16).save_pretrained(tmp_path / "base")
    adapter = save(tmp_path / "base", tmp_path / "molora", MoLoraConfig, r=2, num_experts=3)
    config = read_moe_config(adapter)
    model = Source(adapter, config, base_model=None, dtype=dtype, hub={}).model()
    assert model.get_base_model().lm_head.weight.dtype == expected


def test_folders_without_an_adapter_are_told_apart(adapter, data, tmp_path, capsys):
    two = tmp_path / "two"
    for name in ("one", "other"):
        shutil.copytree(adapter, two / name)
    words = ["--data", str(data), "--out", str(tmp_path / "out"), "--no-pictures"]
    assert main(["report", str(two), *words]) == 1
    assert "in each of its folders ['one', 'other']; give one of these" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nowhere"), *words]) == 1
    assert "in a folder or Hub repository called" in capsys.readouterr().err


def test_a_report_takes_its_place_whole_and_old_pictures_of_ours_go(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("routing.json", "groups.png", "mine.png"):
        (out / name).write_text("old")
    with (
        pytest.raises(FileExistsError, match=r"\['routing.json', 'groups.png'\] already"),
        report_directory(out, overwrite=False),
    ):
        raise AssertionError("what is there is in the way")

    def write(work, *, fail):
        (work / "routing.json").write_text("new")
        if fail:
            raise OSError("No space left on device")
        (work / "index.html").write_text("new")

    def there():
        return {path.name: path.read_text() for path in out.iterdir()}

    with pytest.raises(OSError, match="No space"), report_directory(out, overwrite=True) as work:
        write(work, fail=True)
    assert there() == {"routing.json": "old", "groups.png": "old", "mine.png": "old"}
    with report_directory(out, overwrite=True) as work:
        write(work, fail=False)
    assert there() == {"routing.json": "new", "index.html": "new", "mine.png": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
