"""The configs: what they refuse, what they find out about a model, and that they survive a round trip."""

import copy
import json
import math
import pickle
from dataclasses import replace

import pytest
import torch
from helpers import TARGETS, routed_layers
from peft import PeftConfig, PeftModel, get_peft_model
from tiny_models import TASK_TYPES, make_inputs, make_model
from torch import nn

from peft_moe import MedMoeLoraConfig, MoeLoraConfig, MoLoraConfig, PeftMoeType

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
    ({"bias": "gate_only"}, r"bias=.gate_only. is not known; use one of"),
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


# MoLoraConfig and MedMoeLoraConfig

GROUPS = {"tasks": ["chat", "icd", "rad"], "expert_groups": {"general": ["chat"], "medical": ["icd", "rad"]}}
GENERAL = {"base_expert_mode": "general", "tasks": ["chat", "icd"], "general_tasks": ["chat"]}
REFUSED_BY_BOTH = [
    ({"num_experts": 0}, r"num_experts=0 is a number of experts; give a whole number from 1 up"),
    ({"num_experts_pattern": {"fc1": 0}}, r"num_experts_pattern\['fc1'\]=0"),
    ({"rank_pattern": {"fc1": 0}}, r"rank_pattern\['fc1'\]=0 is a rank"),
    ({"alpha_pattern": {"fc1": -1}}, r"alpha_pattern\['fc1'\]=-1 scales"),
    ({"lora_alpha": 0}, r"lora_alpha=0 scales the adapter"),
    ({"lora_dropout": 1.0}, r"lora_dropout=1\.0 is a probability"),
    ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' is not known"),
    ({"bias": "gate_only"}, r"bias=.gate_only. is not known"),
    ({"tasks": []}, r"tasks=\[\]; give a list of the tasks' names"),
    ({"tasks": ["a", "a"]}, r"tasks names \['a'\] more than once"),
    ({"balance_loss": "swich"}, r"balance_loss='swich' is not known; use one of \['none', 'switch', 'variance'"),
    ({"balance_loss": None}, r"balance_loss=None is not known"),
    ({"balance_loss": {"cv": 0.1}}, r"balance_loss=\{'cv': 0\.1\} is not known"),
    ({"balance_loss": {"none": 0.1}}, r"balance_loss=\{'none': 0\.1\} is not known"),
    ({"balance_loss": {"z": -0.1}}, r"balance_loss\['z'\]=-0\.1 is the weight of a loss; give a number from 0 up"),
    ({"balance_loss": {"z": True}}, r"balance_loss\['z'\]=True"),
    ({"balance_coefficient": -1}, r"balance_coefficient=-1 is the weight of a loss; give a number from 0 up"),
    ({"balance_coefficient": math.inf}, r"balance_coefficient=inf"),
    ({"balance_coefficient": math.nan}, r"balance_coefficient=nan"),
    ({"balance_coefficient": "0.1"}, r"balance_coefficient='0\.1'"),
    ({"localized_delta": 1.0}, r"localized_delta=1\.0 is how much more a group's experts get; give a number from 0 to"),
    ({"localized_delta": -0.1}, r"localized_delta=-0\.1"),
    ({"balance_loss": "localized"}, r"compares experts with groups of tasks; give tasks=\[\.\.\.\] and expert_groups"),
    ({"balance_loss": {"localized": 0.1}, "tasks": ["a"]}, r"compares experts with groups of tasks"),
    ({**GROUPS, "tasks": ["chat", "icd"]}, r"every task belongs to one.*unknown or twice: \['rad'\], missing: \[\]"),
    ({**GROUPS, "tasks": ["chat", "icd", "rad", "x"]}, r"unknown or twice: \[\], missing: \['x'\]"),
    ({"tasks": ["a"], "expert_groups": {"g": ["a"], "h": ["a"]}}, r"unknown or twice: \['a'\]"),
    ({"tasks": ["a"], "expert_groups": {"g": ["a"], "h": []}}, r"no group is empty"),
    ({"tasks": ["a"], "expert_groups": {}}, r"expert_groups=\{\} and tasks=\['a'\]"),
    ({"expert_groups": {"g": ["a"]}}, r"unknown or twice: \['a'\]"),
]  # fmt: skip
REFUSED_BY_MOLORA = [
    ({"r": 0}, r"r=0 is the rank of an expert; give a whole number from 1 up"),
    ({"r": 2.0}, r"r=2\.0"),
    ({"lora_alpha": None}, r"lora_alpha=None scales the adapter"),
    ({"top_k": 0}, r"top_k=0 is the number of experts per token; give a whole number from 1 up"),
    ({"top_k": None}, r"top_k=None"),
    ({"top_p": 0}, r"top_p=0 is a sum of probabilities; give a number from 0\.01 to 1"),
    ({"top_p": 1.1}, r"top_p=1\.1"),
    ({"router_jitter": 1}, r"router_jitter=1 is how far the router's input is moved; give a number from 0 to 0\.99"),
    ({"num_shared_experts": -1}, r"num_shared_experts=-1 is a number of experts; give a whole number from 0 up"),
    ({"num_shared_experts": 1.0}, r"num_shared_experts=1\.0 is a number of experts; give a whole number from 0 up"),
    ({"num_shared_experts": True}, r"num_shared_experts=True"),
    ({"num_shared_experts": 2, "num_experts": 1}, r"num_shared_experts=2 stand beside .* r=48"),
    ({"router_bias": "no"}, r"router_bias='no' is a yes or no"),
    ({"balance_loss": "switch", "top_p": 1.0}, r"top_p=1 chooses all"),
    ({"expert_groups": {"x": {"a"}}, "tasks": ["a"]}, r"expert_groups=\{'x': \{'a'\}\}; give"),
    ({"expert_groups": ["a"], "tasks": ["a"]}, r"expert_groups=\['a'\]; give"),
    (
        {"balance_loss": "switch", "top_k": 8},
        r"top_k=8 of 8 experts chooses all.*use 'variance' or 'cv2', or choose fewer",
    ),
    ({"balance_loss": {"switch": 0.1}, "num_experts": 2}, r"top_k=2 of 2 experts chooses all"),
]
REFUSED_BY_MEDMOE = [
    ({"expert_schedule": "linear"}, r"expert_schedule='linear': this shape is not known"),
    ({"expert_schedule": {"type": "bands", "bands": []}}, r"expert_schedule=.*bands has a list of"),
    ({"expert_schedule": None}, r"expert_schedule=None"),
    ({"expert_ranks": []}, r"expert_ranks=\[\] has no rank; give one for all experts, or a list to take in turn"),
    ({"expert_ranks": 0}, r"expert_ranks=0 is the rank of an expert"),
    ({"expert_ranks": [8, -1]}, r"expert_ranks=-1"),
    ({"expert_ranks": None}, r"expert_ranks=None"),
    ({"lora_alpha": -1}, r"lora_alpha=-1 scales"),
    ({"base_expert_mode": "zero"}, r"base_expert_mode='zero' is not known; use one of \('frozen', 'regula"),
    ({"num_base_experts": -1}, r"num_base_experts=-1 is a number of experts; give a whole number from 0 up"),
    ({"num_base_experts": 1.5}, r"num_base_experts=1\.5 is a number of experts; give a whole number from 0 up"),
    ({"num_base_experts": True}, r"num_base_experts=True"),
    ({"base_coefficient": -0.1}, r"base_coefficient=-0\.1 is the weight of a loss"),
    ({"base_expert_rank": 0}, r"base_expert_rank=0 is the rank of the base expert"),
    ({"base_expert_rank": 4}, r"base_expert_rank=4: a frozen base expert has no matrices"),
    ({"base_expert_mode": "regularized", "num_base_experts": 0}, r"trains base experts, and num_base_experts=0"),
    ({"learn_temperature": "false"}, r"learn_temperature='false' is a yes or no"),
    ({"experts_per_layer": {"model.layers": [2, -2]}}, r"experts_per_layer\['model.layers'\]\[1\]=-2"),
    ({"experts_per_layer": [2, 3]}, r"experts_per_layer=\[2, 3\]; it is set by itself"),
    ({"base_expert_mode": "general"}, r"mode 'general' trains the base expert on rows of general data; give both"),
    ({"general_tasks": ["a"], "tasks": ["a", "b"]}, r"base_expert_mode='frozen' and general_tasks=\['a'\]"),
    ({**GENERAL, "general_tasks": ["mmlu"]}, r"general tasks are some of the tasks, and not all; unknown: \['mmlu'\]"),
    ({**GENERAL, "general_tasks": ["chat", "icd"]}, r"some of the tasks, and not all"),
    ({**GENERAL, "num_base_experts": 0}, r"'general' trains base experts, and num_base_experts=0; give 1"),
    ({**GENERAL, **GROUPS, "balance_loss": "localized"}, r"'localized': it brings the localized loss itself"),
    ({"temperature": 0.05}, r"temperature=0\.05 is the temperature at the start; give a number from 0\.1 up"),
    ({"temperature": math.inf}, r"temperature=inf"),
    ({"temperature": None}, r"temperature=None"),
    ({"inference_top_k": 0}, r"inference_top_k=0 is the number of experts per token"),
    ({"balance_loss": "switch"}, r"'switch' counts which experts are chosen, and here every token gets all"),
]  # fmt: skip
TOKEN_ROUTED = {"MoLoRA": MoLoraConfig, "Med-MoE-LoRA": MedMoeLoraConfig}


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        *((config, *row) for config in TOKEN_ROUTED.values() for row in REFUSED_BY_BOTH),
        *((MoLoraConfig, *row) for row in REFUSED_BY_MOLORA),
        *((MedMoeLoraConfig, *row) for row in REFUSED_BY_MEDMOE),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else str(v)[:40],
)
def test_a_token_routed_config_refuses_with_the_value_and_a_remedy(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_moelora_refuses_an_alpha_of_none_too():
    with pytest.raises(ValueError, match="lora_alpha=None scales the adapter"):
        MoeLoraConfig(lora_alpha=None)


def test_defaults_of_molora_are_those_of_the_paper():
    """MING-MOE and its training script: 8 experts of rank 16, 2 per token, alpha 32, a bias, no balance loss."""
    config = MoLoraConfig()
    assert (config.r, config.num_experts, config.top_k, config.lora_alpha, config.lora_dropout) == (16, 8, 2, 32, 0.05)
    assert (config.router_bias, config.router_jitter, config.num_shared_experts, config.top_p) == (True, 0, 0, None)
    assert (config.balance_loss, config.coefficients, config.tasks) == ("none", {}, None)
    assert config.experts_at("mlp.up_proj") == ((16,) * 8, (2.0,) * 8)  # alpha over the rank of EACH expert
    assert config.peft_type is PeftMoeType.MOLORA


def test_defaults_of_medmoelora_are_those_of_the_paper_or_say_that_they_are_ours():
    """Med-MoE-LoRA as far as it states them; the weight of the loss, γ and τ at the start are not in the paper."""
    config = MedMoeLoraConfig()
    assert (config.expert_ranks, config.lora_alpha, config.lora_dropout) == ([8, 16, 32], None, 0.05)
    assert (config.num_base_experts, config.base_expert_mode, config.inference_top_k) == (1, "frozen", None)
    assert (config.balance_loss, config.coefficients) == ("variance", {"variance": 0.01})
    assert (config.temperature, config.learn_temperature) == (1.0, True)
    keys = [f"model.layers.{i}.mlp.up_proj" for i in range(32)]
    config.resolve_layers([*keys, *(f"vision.layers.{i}.q" for i in range(5))], keys)
    assert config.experts_per_layer.keys() == {"model.layers"}  # of what is targeted
    counts = config.experts_per_layer["model.layers"]
    # 2 experts up to the paper's layer 10, 8 at the end
    assert (counts[0], counts[9], counts[31]) == (2, 2, 8)
    assert config.experts_at("model.layers.31.mlp.up_proj") == ((8, 16, 32, 8, 16, 32, 8, 16), (2.0,) * 8)
    assert config.experts_at("model.layers.0.mlp.up_proj") == ((8, 16), (2.0, 2.0))  # alpha is 2 r_i
    assert config.peft_type is PeftMoeType.MEDMOELORA


def test_two_configs_do_not_share_a_default_list():
    MedMoeLoraConfig().expert_ranks.append(64)
    assert MedMoeLoraConfig().expert_ranks == [8, 16, 32]


LOSSES_ASKED_FOR = [
    ({"balance_loss": "none"}, {}),
    ({"balance_loss": "cv2"}, {"cv2": 0.01}),
    ({"balance_loss": "z", "balance_coefficient": 0.5}, {"z": 0.5}),
    ({"balance_loss": {"cv2": 0.1, "z": 0.001}, "balance_coefficient": 0.5}, {"cv2": 0.1, "z": 0.001}),
    ({"balance_loss": "localized", **GROUPS}, {"localized": 0.01}),
]


@pytest.mark.parametrize("config", TOKEN_ROUTED.values(), ids=TOKEN_ROUTED)
@pytest.mark.parametrize(("fields", "expected"), LOSSES_ASKED_FOR, ids=lambda v: str(v)[:40])
def test_balance_losses_have_the_coefficients_that_were_asked_for(config, fields, expected):
    assert config(**fields).coefficients == expected


def test_patterns_alphas_and_rslora_reach_the_experts_of_molora():
    config = MoLoraConfig(
        r=4, num_experts=3, lora_alpha=16, num_shared_experts=2,
        rank_pattern={"fc1": 8}, alpha_pattern={"fc2": 6}, num_experts_pattern={"q_proj": 1, r"layers\.0\..*": 2},
    )  # fmt: skip
    assert config.experts_at("layers.1.fc1") == ((8,) * 5, (2.0,) * 5)
    assert config.experts_at("layers.1.fc2") == ((4,) * 5, (1.5,) * 5)
    assert config.experts_at("layers.0.fc2") == ((4,) * 4, (1.5,) * 4)
    assert config.experts_at("layers.1.q_proj") == ((4,), (4.0,))  # a plain LoRA, without shared experts
    assert MoLoraConfig(r=16, use_rslora=True).experts_at("x").scaling == (8.0,) * 8


def test_patterns_alphas_and_rslora_reach_the_experts_of_medmoelora():
    config = MedMoeLoraConfig(
        expert_schedule=[2, 3], expert_ranks=[4, 16], base_expert_mode="regularized", num_base_experts=2,
        rank_pattern={"fc1": 8}, alpha_pattern={"fc2": 8}, num_experts_pattern={"q_proj": 1},
    )  # fmt: skip
    config.resolve_layers(["layers.0.fc1", "layers.1.fc1"], ["layers.1.fc1"])
    assert config.experts_at("layers.1.x") == ((4, 4, 4, 16, 4), (2.0,) * 5)  # base experts first, of the smallest rank
    assert config.experts_at("layers.0.x").ranks == (4, 4, 4, 16)
    assert config.experts_at("layers.1.fc1") == ((4, 4, 8, 8, 8), (2.0,) * 5)
    assert config.experts_at("layers.1.fc2") == ((4, 4, 4, 16, 4), (2.0, 2.0, 2.0, 0.5, 2.0))
    assert config.experts_at("layers.1.q_proj").ranks == (4, 4, 4)
    assert config.experts_at("head").ranks == (4, 4, 4, 16, 4, 16, 4, 16, 4, 16)  # outside of layers: num_experts
    config = MedMoeLoraConfig(expert_ranks=[4, 16], num_experts=2, use_rslora=True)
    assert config.experts_at("x") == ((4, 16), (4.0, 8.0))  # 2 r / √r
    assert MedMoeLoraConfig(expert_ranks=[4, 16], num_experts=2, lora_alpha=32).experts_at("x").scaling == (8.0, 2.0)


ROUND_TRIPS = [
    MoLoraConfig(
        task_type="CAUSAL_LM", r=4, num_experts=4, top_k=3, top_p=0.5, router_bias=False, router_jitter=0.1,
        num_shared_experts=1, num_experts_pattern={"v": 1}, target_modules=["q", "v"], localized_delta=0.3,
        balance_loss={"localized": 0.1, "z": 0.001}, balance_coefficient=0.5, **GROUPS,
    ),
    MoLoraConfig(),
    MedMoeLoraConfig(
        task_type="CAUSAL_LM", expert_schedule={"type": "bands", "bands": [[0, 1, 2], [1, 4, 6]]}, target_modules=["q"],
        experts_per_layer={"layers": [2, 6, 6, 6]}, expert_ranks=[1, 2], lora_alpha=7, num_base_experts=2,
        base_expert_rank=3, base_coefficient=0.3, temperature=0.5, learn_temperature=False, inference_top_k=2,
        balance_loss="cv2", **GENERAL,
    ),
    MedMoeLoraConfig(expert_schedule={"type": "power", "min": 2, "max": 8, "gamma": 1.5}),
    MedMoeLoraConfig(expert_schedule=[2, 4, 8]),
    MedMoeLoraConfig(),
]  # fmt: skip


@pytest.mark.parametrize("config", ROUND_TRIPS, ids=lambda c: type(c).__name__)
def test_a_token_routed_config_round_trips_through_its_file(config, tmp_path):
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == config.peft_type.value
    for loaded in (PeftConfig.from_pretrained(tmp_path), type(config).from_pretrained(tmp_path)):
        assert type(loaded) is type(config)
        assert {**loaded.to_dict(), "inference_mode": None} == {**config.to_dict(), "inference_mode": None}
    for clone in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert clone == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "top_k=1.*it stays as it was drawn"),
        ({"balance_loss": "switch"}, "top_k=1.*only the balance loss trains it"),
    ],
)
def test_one_expert_per_token_is_warned_of(fields, message):
    with pytest.warns(UserWarning, match=message) as caught:
        MoLoraConfig(top_k=1, **fields)
    assert len(caught) == 1
    assert caught[0].filename == __file__  # points at who wrote it


@pytest.mark.parametrize("fields", [{"num_experts": 1}, {"top_p": 0.5}, {"num_experts": 2, "top_k": 2}])
def test_nothing_is_warned_of_where_the_router_has_a_gradient_or_there_is_none(fields):
    MoLoraConfig(**{"top_k": 1, **fields})  # warnings are errors


def routers_of(model):
    """The name of each adapted layer and the number of experts that its router chooses from, 1 for none."""
    found = {}
    for key, layer in model.base_model.model.named_modules():
        if hasattr(layer, "moelora_bank"):
            router = layer.router_of("default")
            found[key] = router.gate.num_experts if router else 1
    return found


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("name", TASK_TYPES)
def test_the_recipe_has_experts_in_feed_forward_layers_and_a_plain_lora_in_attention(name, targets):
    config = MoLoraConfig(task_type=TASK_TYPES[name], r=2, num_experts=3, target_modules=targets)
    found = routers_of(get_peft_model(make_model(name), config))
    in_blocks = {key: n for key, n in found.items() if ".0." in key or ".1." in key}
    in_attention = {key: n for key, n in in_blocks.items() if "attn" in key.lower() or "attention" in key.lower()}
    feed_forward = {key: n for key, n in in_blocks.items() if key not in in_attention}
    assert in_attention
    assert feed_forward
    assert set(in_attention.values()) == {1}
    assert set(feed_forward.values()) == {3}


@pytest.mark.parametrize(
    ("fields", "in_attention"),
    [
        ({"target_modules": TARGETS["llama"]}, 3),
        ({"target_modules": r".*\.(q_proj|up_proj)"}, 3),
        ({"num_experts_pattern": {}}, 3),
        ({"num_experts_pattern": {"q_proj": 2}}, 2),
        ({}, 1),
    ],
)
def test_the_recipe_is_for_the_whole_model_and_where_no_pattern_was_given(fields, in_attention):
    model = get_peft_model(make_model("llama"), MoLoraConfig(task_type="CAUSAL_LM", r=2, num_experts=3, **fields))
    assert {n for key, n in routers_of(model).items() if key.endswith("q_proj")} == {in_attention}
    assert {n for key, n in routers_of(model).items() if "mlp" in key} == {3}


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_a_recipe_that_would_route_nothing_is_refused(targets):
    config = MoLoraConfig(target_modules=targets, exclude_modules=["gate_proj", "up_proj", "down_proj"])
    with pytest.raises(ValueError, match="a plain LoRA in attention, and all linear.*give num_experts_pattern={}"):
        get_peft_model(make_model("llama"), config)
    config = MoLoraConfig(
        r=2, target_modules=targets, exclude_modules=["gate_proj", "up_proj", "down_proj"], num_experts_pattern={}
    )
    assert set(routers_of(get_peft_model(make_model("llama"), config)).values()) == {8}


def test_the_recipe_is_saved_as_the_pattern_it_was(tmp_path):
    model = get_peft_model(make_model("llama"), MoLoraConfig(task_type="CAUSAL_LM", r=2, num_experts=3))
    pattern = model.peft_config["default"].num_experts_pattern
    assert list(pattern.values()) == [1]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["num_experts_pattern"] == pattern
    loaded = PeftModel.from_pretrained(make_model("llama"), tmp_path)
    assert routers_of(loaded) == routers_of(model)


def of_depth(num_layers):
    """A tiny LLaMA with so many layers."""
    model = make_model("llama")
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.layer_types = num_layers, None
    torch.manual_seed(0)
    return type(model)(config).eval()


def test_experts_per_layer_are_found_once_and_kept_on_load(tmp_path):
    config = MedMoeLoraConfig(
        task_type="CAUSAL_LM", expert_schedule="ascending", num_experts=6, expert_ranks=[1, 2],
        target_modules=["up_proj"], init_lora_weights=False,
    )  # fmt: skip
    model = get_peft_model(of_depth(4), config).eval()
    # 2 + ⌊4 (l/4)²⌋ for l = 1 … 4
    assert model.peft_config["default"].experts_per_layer == {"model.layers": [2, 3, 4, 6]}
    assert [n - 1 for n in routers_of(model).values()] == [2, 3, 4, 6]  # beside the base expert
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["experts_per_layer"] == {"model.layers": [2, 3, 4, 6]}
    # what is loaded does not depend on the schedule any more
    (tmp_path / "adapter_config.json").write_text(json.dumps({**written, "expert_schedule": "uniform"}))
    loaded = PeftModel.from_pretrained(of_depth(4), tmp_path).eval()
    assert loaded.peft_config["default"].experts_per_layer == {"model.layers": [2, 3, 4, 6]}
    inputs = make_inputs("llama")
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("depth", [2, 5])
def test_an_adapter_for_a_model_of_another_depth_is_refused(depth, tmp_path):
    config = MedMoeLoraConfig(task_type="CAUSAL_LM", num_experts=3, expert_ranks=1, target_modules=["up_proj"])
    get_peft_model(of_depth(4), config).save_pretrained(tmp_path)
    said = rf"layers \{{'model.layers': 4\}} and the .* of this model are \{{'model.layers': {depth}\}}.*leave exp"
    with pytest.raises(ValueError, match=said):
        PeftModel.from_pretrained(of_depth(depth), tmp_path)
    given = replace(config, experts_per_layer=config.experts_per_layer)
    with pytest.raises(ValueError, match=said):
        get_peft_model(of_depth(depth), given)


def test_a_config_makes_adapters_of_models_of_different_depth():
    config = MedMoeLoraConfig(task_type="CAUSAL_LM", num_experts=3, expert_ranks=1, target_modules=["up_proj"])
    first = get_peft_model(make_model("llama"), config)
    counts = dict(config.experts_per_layer)
    second = get_peft_model(of_depth(3), config)
    assert first.peft_config["default"].experts_per_layer == config.experts_per_layer == counts
    assert [len(each) for each in second.peft_config["default"].experts_per_layer.values()] == [3]
    assert get_peft_model(make_model("llama", seed=1), config).peft_config["default"] is config
    config.expert_schedule = [2, 1]  # for the models to come
    third = get_peft_model(make_model("llama"), config)
    assert list(third.peft_config["default"].experts_per_layer.values()) == [[2, 1]]
    assert config.experts_per_layer == counts
    config.expert_schedule = "ascending"
    second.add_adapter("again", config)
    assert second.peft_config["again"].experts_per_layer == second.peft_config["default"].experts_per_layer


def test_a_model_with_other_layers_is_refused(tmp_path):
    config = MedMoeLoraConfig(num_experts=3, expert_ranks=1, target_modules=["up_proj"])
    get_peft_model(make_model("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers \{'model.layers': 2\} and .* are \{'layers': 2\}"):
        PeftModel.from_pretrained(make_model("llama").model, tmp_path)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([2, 4, 8], r"expert_schedule=\[2, 4, 8\] has 3 entries, and the model has 2 layers"),
        ({"type": "bands", "bands": [[0, 1, 2]]}, r"leave out layers \[1\]"),
        ({"type": "bands", "bands": [[0, 3, 2]]}, r"layer 2 is beyond the model's 2 layers"),
    ],
)
def test_a_schedule_that_does_not_fit_the_model_leaves_it_as_it_was(schedule, message):
    model = make_model("llama")
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, MedMoeLoraConfig(expert_schedule=schedule, target_modules=["up_proj"]))
    assert not routed_layers(model)


def test_an_encoder_and_a_decoder_have_a_schedule_each():
    config = MedMoeLoraConfig(task_type="SEQ_2_SEQ_LM", num_experts=4, expert_ranks=1, target_modules=["wo"])
    model = get_peft_model(make_model("t5"), config)
    # 2 + ⌊2 (l/2)²⌋ for l = 1, 2
    assert model.peft_config["default"].experts_per_layer == {"encoder.block": [2, 4], "decoder.block": [2, 4]}
    assert [n - 1 for n in routers_of(model).values()] == [2, 4, 2, 4]


IN_ATTENTION = [  # name of a module in some architecture, and whether it is attention's
    ("model.layers.0.self_attn.q_proj", True),
    ("transformer.h.0.attn.c_attn", True),
    ("encoder.block.0.layer.0.SelfAttention.q", True),
    ("bert.encoder.layer.0.attention.output.dense", True),
    ("model.layers.0.temporal_block.q_proj", True),
    ("model.layers.0.mixer.o_proj", True),
    ("bert.encoder.layer.0.intermediate.dense", False),
    ("bert.encoder.layer.0.output.dense", False),
    ("perceiver.encoder.cross_attention.mlp.dense1", False),
    ("model.layers.0.mlp.gate_proj", False),
    ("model.decoder.layers.0.fc1", False),
]


@pytest.mark.parametrize(("key", "attention"), IN_ATTENTION)
def test_the_recipe_knows_attention_by_the_names_of_modules(key, attention):
    config = MoLoraConfig(target_modules="all-linear")
    config.resolve([key, "model.layers.0.self_attn.q_proj"])
    assert config.routed_at(key) == (1 if attention else 8)


def test_layers_with_fewer_experts_than_groups_are_refused():
    groups = {"tasks": ["a", "b", "c"], "expert_groups": {"x": ["a"], "y": ["b"], "z": ["c"]}}
    config = MedMoeLoraConfig(balance_loss="localized", target_modules=["up_proj"], expert_schedule=[3, 2], **groups)
    with pytest.raises(ValueError, match=r"3 groups, and 'model\.layers\.1\.mlp\.up_proj' has 2 experts"):
        get_peft_model(make_model("llama"), config)


def test_a_switch_loss_without_gradient_in_one_layer_is_refused_for_that_layer():
    config = MoLoraConfig(
        balance_loss="switch", top_k=2, num_experts_pattern={"up_proj": 2}, target_modules=["up_proj", "down_proj"]
    )
    with pytest.raises(ValueError, match="top_k=2 of 2 experts chooses all"):
        get_peft_model(make_model("llama"), config)


@pytest.mark.parametrize(
    "fields",
    [{"balance_loss": "cv2"}, {"balance_loss": "none", "base_expert_mode": "general", "general_tasks": ["chat"]}],
    ids=["balance loss", "base expert for general data"],
)
def test_a_loss_that_leaves_padding_out_is_refused_where_padding_cannot_be_told(fields):
    inside = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    config = MedMoeLoraConfig(target_modules=["0"], num_experts=2, tasks=["chat", "icd"], **fields)
    with pytest.raises(
        ValueError, match=r"leave padding out, and the inputs of 'experts\.0' are tokens picked from all"
    ):
        get_peft_model(inside, config)


def test_groups_find_their_experts_again_after_saving_which_sorts_their_names(tmp_path):
    groups = {"tasks": ["a", "b"], "expert_groups": {"z": ["a"], "m": ["b"]}}
    config = MoLoraConfig(
        task_type="CAUSAL_LM", num_experts=4, balance_loss="localized", target_modules=["up_proj"], **groups
    )
    model = get_peft_model(make_model("llama"), config)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("llama"), tmp_path)
    before, after = ([router.matches for _, router in m.base_model.routers()] for m in (model, loaded))
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("config", [MoeLoraConfig, MoLoraConfig, MedMoeLoraConfig])
def test_lists_for_models_of_many_kinds_are_no_reason_to_warn_or_refuse(config):
    """Nor are they with stock LoRA; warnings are errors here."""
    lists = {"target_modules": ["q_proj", "c_attn", "query"], "modules_to_save": ["lm_head", "wte", "embed_out"]}
    fields = {"tasks": 2} if config is MoeLoraConfig else {}
    model = get_peft_model(make_model("llama"), config(**lists, layers_to_transform=[0, 1, 2, 3], **fields))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("lm_head" in name for name in trained)
    assert any("q_proj" in name for name in trained)
