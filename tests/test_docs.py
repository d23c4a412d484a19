"""What the documentation shows runs as shown, and what it names exists."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from peft_moe import MoeLoraConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_the_readme_s_python_runs_as_shown(smollm2, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "SmolLM2-135M-Instruct").symlink_to(smollm2)
    (code,) = blocks(ROOT / "README.md", "python")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "triage-lora" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_within_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_name_files_that_exist(page):
    for path in re.findall(r"\b(?:scripts|recipes)/[\w/]+\.(?:py|yaml)\b", page.read_text()):
        assert (ROOT / path).exists(), path


def test_the_defaults_in_the_method_s_page_are_those_of_the_config():
    (block,) = blocks(ROOT / "docs" / "moelora.md", "yaml")
    config, trainer = MoeLoraConfig(), {f.name for f in fields(TrainingArguments)}
    for name, value in yaml.safe_load(block).items():
        assert name in trainer or getattr(config, name) == value, name
