"""MoeLoraConfig: what it refuses, and that it survives a round trip."""

import copy
import json
import math
import pickle

import pytest
from peft import PeftConfig

from peft_moe import MoeLoraConfig, PeftMoeType

REFUSED = [
    ({"r": 10, "num_experts": 4}, r"r=10 does not split over num_experts=4; use r=8"),
    ({"r": 0}, r"r=0 is the total rank.*from 1 up"),
    ({"r": 2.5}, r"r=2\.5"),
    ({"num_experts": 0}, r"num_experts=0"),
    ({"num_experts": True}, r"num_experts=True"),
    ({"num_experts_pattern": {"fc1": -1}}, r"num_experts_pattern\['fc1'\]=-1"),
    ({"rank_pattern": {"fc1": 0}}, r"rank_pattern\['fc1'\]=0"),
    ({"alpha_pattern": {"fc1": 0}}, r"alpha_pattern\['fc1'\]=0 scales"),
    ({"lora_alpha": math.nan}, r"lora_alpha=nan"),
    ({"lora_dropout": "0.1"}, r"lora_dropout='0.1' is a probability"),
    ({"init_lora_weights": 0}, r"init_lora_weights=0 is not known"),
    ({"tasks": "icd"}, r"tasks='icd'; give a list"),
    ({"tasks": {"icd"}}, r"give a list of the tasks' names"),
    ({"tasks": None}, r"tasks=None; give a list"),
    ({"lora_dropout": 1.0}, r"lora_dropout=1\.0 is a probability"),
    ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' is not known; use one of"),
    ({"bias": "all"}, r"bias='all'.*use bias='none'"),
    ({"gate_scope": "block"}, r"gate_scope='block' is not known; use 'model'"),
    ({"task_embedding_dim": 0}, r"task_embedding_dim=0"),
    ({"tasks": 0}, r"tasks=0"),
    ({"tasks": []}, r"tasks=\[\]"),
    ({"tasks": ["a", "b", "a"]}, r"tasks names \['a'\] more than once"),
    ({"tasks": ["a", ""]}, r"give a list of"),
    ({"tasks": ["a"], "default_task": "b"}, r"default_task='b' is not among tasks: .*'a' \(0\)"),
    ({"tasks": 3, "default_task": 3}, r"default_task=3 is not among tasks"),
    ({"target_modules": "all-linear", "layers_to_transform": [0]}, r"layers_to_transform=\[0\].*is a string; give"),
    ({"target_modules": ["q"], "layers_pattern": "layers"}, r"layers_pattern='layers'.*give layers_to_transform too"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=lambda v: str(v)[:40])
def test_a_contradiction_is_refused_at_construction(fields, message):
    with pytest.raises(ValueError, match=message):
        MoeLoraConfig(**fields)


@pytest.mark.parametrize(
    "name", ["use_dora", "layer_replication", "megatron_config", "loftq_config", "ensure_weight_tying"]
)
def test_fields_that_cannot_work_are_absent(name):
    with pytest.raises(TypeError, match=name):
        MoeLoraConfig(**{name: True})


def test_defaults_are_those_of_the_paper_and_its_code():
    config = MoeLoraConfig()
    assert (config.r, config.num_experts, config.lora_alpha, config.lora_dropout) == (16, 8, 32, 0.1)
    assert (config.tasks, config.task_embedding_dim, config.gate_scope) == (16, 64, "model")
    assert config.experts_at("any").ranks == (2,) * 8
    assert config.experts_at("any").scaling == (2.0,) * 8  # alpha over the TOTAL rank


def test_patterns_and_rslora_reach_the_experts():
    config = MoeLoraConfig(
        r=8, num_experts=4, lora_alpha=16,
        rank_pattern={"fc1": 12}, alpha_pattern={"fc1": 6}, num_experts_pattern={r"layers\.0\..*": 2},
    )  # fmt: skip
    assert config.experts_at("layers.1.fc2") == ((2, 2, 2, 2), (2.0,) * 4)
    assert config.experts_at("layers.1.fc1") == ((3, 3, 3, 3), (0.5,) * 4)
    assert config.experts_at("layers.0.fc1") == ((6, 6), (0.5,) * 2)
    assert MoeLoraConfig(r=16, lora_alpha=32, use_rslora=True).experts_at("x").scaling == (8.0,) * 8


def test_a_config_round_trips_through_its_file(tmp_path):
    config = MoeLoraConfig(
        task_type="CAUSAL_LM", r=8, num_experts=4, target_modules=["q", "v"], tasks=["b", "a"], default_task="a",
        rank_pattern={"q": 4}, num_experts_pattern={"v": 1}, gate_scope="layer", modules_to_save=["head"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "MOELORA"
    for loaded in (PeftConfig.from_pretrained(tmp_path), MoeLoraConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, MoeLoraConfig)
        assert {**loaded.to_dict(), "inference_mode": None} == {**config.to_dict(), "inference_mode": None}
        assert loaded.task_names == ["b", "a"]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_config_can_be_copied_and_pickled(clone):
    config = MoeLoraConfig(tasks=["a", "b"])
    assert clone(config) == config
    assert clone(config).peft_type is PeftMoeType.MOELORA


def test_a_count_of_tasks_gives_them_numbers_for_names():
    assert MoeLoraConfig(tasks=3).task_names == ["0", "1", "2"]
