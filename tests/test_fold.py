"""Folding a task gives a stock LoRA with the same logits."""

import json
import subprocess
import sys

import pytest
import torch
from helpers import TARGETS, TASKS, config_for, logits, routed
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftConfig, PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from tiny_models import make_inputs, make_model

from peft_moe import fold
from peft_moe.cli import main
from peft_moe.directory import FILES, adapter_directory
from peft_moe.fold_card import How, folded_card

ARCHITECTURES = ["llama", "gpt2", "opt", "bert", "t5", "vit"]


def folded_logits(directory, name, inputs):
    return logits(PeftModel.from_pretrained(make_model(name), directory).eval(), inputs)


@pytest.mark.parametrize("gate_scope", ["model", "layer"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_folding_a_task_gives_the_same_logits_as_routing_it(name, gate_scope, tmp_path):
    model, inputs = routed(name, gate_scope=gate_scope, use_rslora=name == "opt"), make_inputs(name)
    model.save_pretrained(tmp_path / "adapter")
    for task in TASKS:
        expected = logits(model, inputs, task_ids=task)
        for source in (model, tmp_path / "adapter"):
            out = fold(source, tmp_path / task, task=task, overwrite=True)
            torch.testing.assert_close(folded_logits(out, name, inputs), expected, rtol=1e-4, atol=1e-5)


def test_mixed_ranks_and_single_experts_fold_to_one_rank(tmp_path):
    model, inputs = (
        routed("llama", rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 5}, num_experts_pattern={"down_proj": 1}),
        make_inputs("llama"),
    )
    out = fold(model, tmp_path / "f", task="rad")
    torch.testing.assert_close(
        folded_logits(out, "llama", inputs), logits(model, inputs, task_ids="rad"), rtol=1e-4, atol=1e-5
    )
    config = json.loads((out / "adapter_config.json").read_text())
    assert (
        config["peft_type"],
        config["r"],
        config["lora_alpha"],
        config["rank_pattern"],
        config["alpha_pattern"],
    ) == ("LORA", 8, 8, {}, {})
    state = load_file(out / "adapter_model.safetensors")
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in state)
    assert (
        {t.shape[0] for k, t in state.items() if "lora_A" in k}
        == {t.shape[1] for k, t in state.items() if "lora_B" in k}
        == {8}
    )


def test_several_tasks_fold_to_their_mean(tmp_path):
    model, inputs = routed("llama"), make_inputs("llama")
    out = fold(model, tmp_path / "f", task=["icd", "def"])
    torch.testing.assert_close(
        folded_logits(out, "llama", inputs), logits(model, inputs, task_ids=[["icd", "def"]] * 3), rtol=1e-4, atol=1e-5
    )


@pytest.mark.long
def test_a_folded_adapter_loads_where_peft_moe_is_not_installed(tmp_path):
    model, inputs = routed("llama"), make_inputs("llama", labels=False)
    make_model("llama").save_pretrained(tmp_path / "base")
    fold(model, tmp_path / "f", task="rad")
    torch.save(inputs, tmp_path / "inputs.pt")
    code = """
import sys, torch
sys.modules["peft_moe"] = None  # any import of it fails
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "f").eval()
with torch.no_grad():
    torch.save(model(**torch.load("inputs.pt")).logits, "logits.pt")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    torch.testing.assert_close(
        torch.load(tmp_path / "logits.pt"), logits(model, inputs, task_ids="rad"), rtol=1e-4, atol=1e-5
    )


def test_a_classification_head_comes_along(tmp_path):
    model, inputs = routed("bert"), make_inputs("bert")
    model.base_model.model.classifier.modules_to_save["default"].weight.data.normal_()
    out = fold(model, tmp_path / "f", task="icd")
    torch.testing.assert_close(
        folded_logits(out, "bert", inputs), logits(model, inputs, task_ids="icd"), rtol=1e-4, atol=1e-5
    )


def test_peft_s_own_conversion_gives_the_chosen_task():
    model, inputs = routed("llama"), make_inputs("llama")
    model.set_task("rad")
    config, state_dict = convert_to_lora(model, rank=8)
    stock = get_peft_model(make_model("llama"), config).eval()
    assert not set_peft_model_state_dict(stock, state_dict).unexpected_keys
    torch.testing.assert_close(logits(stock, inputs), logits(model, inputs), rtol=1e-4, atol=1e-5)


def test_the_other_adapter_of_a_model_can_be_folded(tmp_path):
    model, inputs = routed("llama"), make_inputs("llama")
    model.add_adapter("second", config_for("llama", tasks=["x"]))
    out = fold(model, tmp_path / "f", task="x", adapter_name="second")
    model.set_adapter("second")
    torch.testing.assert_close(
        folded_logits(out, "llama", inputs), logits(model, inputs, task_ids="x"), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match=r"adapter_name='third'; the model has \['default', 'second'\]"):
        fold(model, tmp_path / "g", task="x", adapter_name="third")


def test_nothing_on_disk_is_lost(tmp_path):
    model = routed("llama")
    out = fold(model, tmp_path / "f", task="icd")
    (out / "notes.txt").write_text("mine")
    before = (out / "adapter_model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"holds \[.*\] already.*overwrite=True"):
        fold(model, out, task="rad")
    with pytest.raises(ValueError, match="Unknown task 'mri'"):
        fold(model, out, task="mri", overwrite=True)
    assert (out / "adapter_model.safetensors").read_bytes() == before
    fold(model, out, task="rad", overwrite=True)
    assert (out / "adapter_model.safetensors").read_bytes() != before
    assert (out / "notes.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f"]


def test_an_adapter_is_not_folded_over_itself(adapter, capsys):
    before = (adapter / "adapter_model.safetensors").read_bytes()
    for out in (adapter, adapter / ".." / adapter.name):
        with pytest.raises(ValueError, match="holds the adapter that this is made of; choose another directory"):
            fold(adapter, out, task="icd", overwrite=True)
    assert main(["fold", str(adapter), "--task", "icd", "--out", str(adapter), "--overwrite"]) == 1
    assert "made of" in capsys.readouterr().err
    assert (adapter / "adapter_model.safetensors").read_bytes() == before


def test_all_tasks_are_folded_or_none(adapter, tmp_path, capsys):
    taken = tmp_path / "all" / TASKS[-1]
    taken.mkdir(parents=True)
    (taken / "README.md").write_text("mine")
    assert main(["fold", str(adapter), "--all-tasks", "--out", str(tmp_path / "all")]) == 1
    assert f"{taken} holds ['README.md'] already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "all").iterdir()] == [taken.name]


def test_tasks_that_differ_in_case_alone_need_folders_of_their_own(tmp_path, capsys):
    routed("llama", tasks=["icd", "ICD"]).save_pretrained(tmp_path / "cased")
    assert main(["fold", str(tmp_path / "cased"), "--all-tasks", "--out", str(tmp_path / "all")]) == 1
    assert "do not make distinct directory names" in capsys.readouterr().err
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize(("local", "base"), [(True, None), (False, "owner/name")])
def test_the_card_of_a_local_base_model_keeps_its_path_out_of_the_metadata(local, base, tmp_path):
    config = config_for("llama", base_model_name_or_path=str(tmp_path) if local else "owner/name")
    card = folded_card(config, LoraConfig(), How("title", "what", "result"))
    assert ModelCard(card).data.base_model == base


def test_a_link_to_another_place_is_written_into_there(tmp_path):
    """Which may be another file system, where files of a folder beside the link could not be moved to."""
    model = routed("llama")
    place, link = tmp_path / "elsewhere" / "f", tmp_path / "link"
    place.mkdir(parents=True)
    link.symlink_to(place)
    for task in ("icd", "rad"):
        with adapter_directory(link, overwrite=True) as work:
            assert work.parent.resolve() == place
            for name in FILES:
                (work / name).write_text(task if name != "adapter_config.json" else json.dumps({"task": task}))
        assert sorted(path.name for path in place.iterdir()) == sorted(FILES)
        assert (place / "README.md").read_text() == task
    fold(model, link, task="icd", overwrite=True)
    assert PeftConfig.from_pretrained(place).r == 8
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_only_our_adapters_can_be_folded(tmp_path):
    stock = get_peft_model(make_model("llama"), LoraConfig(target_modules=TARGETS["llama"]))
    with pytest.raises(ValueError, match=r"'default' is a LORA adapter; fold takes adapters of peft_moe"):
        fold(stock, tmp_path / "f", task="icd")
    stock.save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="is a LORA adapter; fold takes adapters of peft_moe"):
        fold(tmp_path / "stock", tmp_path / "f", task="icd")
    assert not (tmp_path / "f").exists()


# the command


@pytest.fixture
def adapter(tmp_path):
    model = routed("llama")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_command_folds_one_task_or_all(adapter, tmp_path, capsys):
    model, inputs = PeftModel.from_pretrained(make_model("llama"), adapter).eval(), make_inputs("llama")
    assert main(["fold", str(adapter), "--task", "rad", "--out", str(tmp_path / "one")]) == 0
    assert main(["fold", str(adapter), "--task", "1", "--out", str(tmp_path / "by-id")]) == 0
    assert main(["fold", str(adapter), "--all-tasks", "--out", str(tmp_path / "all")]) == 0
    assert f"task rad: {tmp_path / 'one'}" in capsys.readouterr().out
    for directory, task in [("one", "rad"), ("by-id", "rad"), *((f"all/{t}", t) for t in TASKS)]:
        expected = logits(model, inputs, task_ids=task)
        torch.testing.assert_close(folded_logits(tmp_path / directory, "llama", inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("task", "source", "message"),
    [("mri", "adapter", "Unknown task 'mri'; this adapter knows 'icd'"), ("icd", "nowhere", "nowhere")],
)
def test_the_command_fails_with_one_line(adapter, tmp_path, capsys, task, source, message):
    assert main(["fold", str(tmp_path / source), "--task", task, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("peft-moe: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_readme_in_the_way_is_not_overwritten(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds \['README.md'\] already"):
        fold(routed("llama"), tmp_path, task="icd")
    assert (tmp_path / "README.md").read_text() == "mine"


def test_what_to_fold_must_be_clear(tmp_path):
    model = routed("llama")
    with pytest.raises(TypeError, match="not a Sequential; unwrap the model first"):
        fold(torch.nn.Sequential(model), tmp_path / "f", task="icd")
    model.add_adapter("second", config_for("llama"))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"active adapters are \['default', 'second'\]; say which"):
        fold(model, tmp_path / "f", task="icd")


@pytest.mark.parametrize("tasks", [["a/b", "a_b"], ["..", "."]])
def test_names_of_tasks_cannot_lead_out_of_the_directory(tasks, tmp_path, capsys):
    routed("llama", tasks=tasks).save_pretrained(tmp_path / "adapter")
    assert main(["fold", str(tmp_path / "adapter"), "--all-tasks", "--out", str(tmp_path / "out")]) == 1
    assert "do not make distinct directory names" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
