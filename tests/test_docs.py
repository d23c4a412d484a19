"""What the documentation shows runs as shown, and what it names exists."""

import ast
import importlib
import json
import math
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from helpers import logits
from pages import PAGES, WRONG_SIDE, name_of
from peft import get_peft_model
from tiny_models import make_inputs, make_model
from tiny_text import make_tokenizer
from transformers import AutoModelForCausalLM, TrainingArguments, pipeline

import peft_moe
from peft_moe import GroupedMoeConfig, MedMoeLoraConfig, MoeConfig, MoeLoraConfig, MoLoraConfig
from peft_moe.losses import BALANCE_LOSSES, Routed

ROOT = Path(__file__).parents[1]
METHODS = {
    "moelora.md": MoeLoraConfig,
    "molora.md": MoLoraConfig,
    "medmoelora.md": MedMoeLoraConfig,
    "at_moe.md": GroupedMoeConfig,
}
MANDATORY = {GroupedMoeConfig: {"groups": {"style": {"concise": "loras/concise"}}, "general_expert": "loras/general"}}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.long
def test_the_readme_s_python_runs_as_shown(smollm2, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "SmolLM2-135M-Instruct").symlink_to(smollm2)
    (code,) = blocks(ROOT / "README.md", "python")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert WRONG_SIDE not in done.stderr
    assert (tmp_path / "triage-lora" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_within_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_name_files_that_exist(page):
    for path in re.findall(r"\b(?:scripts|recipes)/[\w/]+\.(?:py|yaml)\b", page.read_text()):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_to_a_section_name_a_heading(page):
    for target, section in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text()):
        there = (page.parent / target) if target else page
        headings = re.findall(r"^#+ (.*)$", there.read_text(), flags=re.MULTILINE)
        assert section in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], section


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_in_the_pages_is_python_and_imports_what_exists(page):
    for code in blocks(page, "python"):
        for line in compile(code, page.name, "exec", flags=ast.PyCF_ONLY_AST).body:
            if isinstance(line, ast.ImportFrom):
                assert all(hasattr(importlib.import_module(line.module), name.name) for name in line.names)


@pytest.mark.parametrize(("page", "config_cls"), METHODS.items())
def test_the_defaults_in_a_method_s_page_are_those_of_its_config(page, config_cls):
    (block,) = blocks(ROOT / "docs" / page, "yaml")
    config, trainer = config_cls(**MANDATORY.get(config_cls, {})), {f.name for f in fields(TrainingArguments)}
    default = {f.name: getattr(config, f.name) for f in fields(config_cls)}
    if config_cls is MoLoraConfig:
        assert default["num_experts_pattern"] is None  # settled when the model is known
    for name, value in yaml.safe_load(block).items():
        if name in MANDATORY.get(config_cls, {}):
            continue
        assert name in trainer - default.keys() or default[name] == value, name


@pytest.mark.parametrize(("page", "config_cls"), METHODS.items())
def test_a_method_s_page_names_every_field_of_its_own(page, config_cls):
    text = (ROOT / "docs" / page).read_text()
    own = {f.name for f in fields(config_cls)} - {f.name for f in fields(MoeConfig)}
    assert not {name for name in own if not re.search(rf"\b{name}\b", text)}


def test_the_readme_s_table_has_every_config():
    text = (ROOT / "README.md").read_text()
    configs = {name for name in peft_moe.__all__ if name.endswith("Config")} - {"MoeConfig", "TokenRoutedConfig"}
    assert set(re.findall(r"^\| \[[^|]*\| `(\w+)` \|", text, flags=re.MULTILINE)) == configs
    assert configs == {config_cls.__name__ for config_cls in METHODS.values()}


def test_the_values_of_balance_losses_are_as_their_table_says():
    table = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "balance.md").read_text(), flags=re.MULTILINE)
    assert [name for name in table if name in BALANCE_LOSSES] == list(BALANCE_LOSSES)
    e, k = 4, 2
    even = torch.full((1, 6, e), 1 / e)
    equal_scores = Routed(scores=torch.zeros(1, 6, e), weights=even)
    same_two = torch.tensor([50.0, 50.0, 0, 0]).expand(1, 6, e)  # the same K = 2 experts get all
    collapsed = Routed(scores=same_two, weights=same_two / 100)
    one = Routed(scores=2 * same_two, weights=torch.tensor([1.0, 0, 0, 0]).expand(1, 6, e))
    matches = torch.tensor([[True, True, False, False]])
    delta = 0.1
    drawn = torch.tensor([1 + delta, 1 + delta, 1 - delta, 1 - delta]).expand(1, 6, e) / e
    for name, routed, value in [
        ("switch", equal_scores, 1),
        ("switch", collapsed, e / k),
        ("variance", equal_scores, 0),
        ("variance", one, (e - 1) / e**2),
        ("cv2", equal_scores, 0),
        ("cv2", one, e - 1),
        ("z", equal_scores, math.log(e) ** 2),
    ]:
        assert BALANCE_LOSSES[name](routed).item() == pytest.approx(value, abs=1e-6), name
    localized = Routed(scores=torch.zeros(1, 6, e), weights=drawn, matches=matches)
    assert BALANCE_LOSSES["localized"](localized, delta=delta).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("config_cls", [MoLoraConfig, MedMoeLoraConfig])
def test_loaders_of_transformers_take_token_routed_adapters(config_cls, tmp_path):
    base = make_model("llama")
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")  # where pipeline looks for it
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = config_cls(task_type="CAUSAL_LM", num_experts=4, init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    inputs = make_inputs("llama", labels=False)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path / "adapter")
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert not torch.allclose(logits(loaded, inputs), expected)
    loaded.load_adapter(str(tmp_path / "adapter"))
    piped = pipeline("text-generation", model=str(tmp_path / "adapter"))
    assert piped("oak elm", max_new_tokens=2, do_sample=False)
    for other in (auto, loaded, piped.model):
        torch.testing.assert_close(logits(other.eval(), inputs), expected)


def test_loaders_of_transformers_refuse_moelora(tmp_path):
    base = make_model("llama")
    base.save_pretrained(tmp_path / "base")
    config = MoeLoraConfig(task_type="CAUSAL_LM", tasks=["a", "b"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(ValueError, match="uses shared state"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")


SHOWN = blocks(ROOT / "docs" / "integrations.md", "python")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing[_a-z]*` is deprecated:FutureWarning")  # trl 1.16
@pytest.mark.parametrize("code", SHOWN, ids=["token", "tasks", "rollouts", "lm_eval"])
def test_the_python_of_the_page_on_integrations_runs_as_shown(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"Name the {name}", "task_ids": task} for name, task in (("oak", "triage"), ("elm", "summary"))]
    names = {
        "model": make_model("llama"),
        "other": make_model("llama"),
        "tokenizer": make_tokenizer(),
        "dataset": Dataset.from_list([row | {"completion": " tall"} for row in rows]),
        "pairs": Dataset.from_list([row | {"chosen": " tall", "rejected": " small"} for row in rows]),
        "prompts": Dataset.from_list(rows),
        "reward": lambda completion_ids, **columns: [float(sum(ids)) for ids in completion_ids],
    }
    if "lm_eval" in code:
        tasks = pytest.importorskip("lm_eval.tasks", reason="lm_eval is not installed")
        config = MoeLoraConfig(task_type="CAUSAL_LM", tasks=["triage", "summary"])
        names["model"] = get_peft_model(names["model"], config)
        rows = [{"question": "Name the oak", "target": 1}] * 3
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        names["task"] = {
            "task": "size",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": ["small", "tall"],
            "doc_to_target": "{{target}}",
        }
        names["manager"] = tasks.TaskManager(include_defaults=False)
    on_a_cpu = 'Config("out", use_cpu=True, bf16=False, max_steps=2, per_device_train_batch_size=2, report_to="none"'
    code = code.replace('Config("out"', on_a_cpu)  # and otherwise as shown
    code = code.replace(f"GRPO{on_a_cpu}", f"GRPO{on_a_cpu}, num_generations=2, max_completion_length=4")
    exec(code, names)
    if "lm_eval" in code:
        assert names["results"]["results"]["size"]["acc,none"] in (0, 1)
