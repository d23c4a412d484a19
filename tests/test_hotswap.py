"""A saved adapter takes the place of one that is in a model, without a new layer and without a compilation."""

import json
from pathlib import Path

import pytest
import torch
from grouped_helpers import EXPERTS, grouped_config, make_lora
from helpers import TARGETS, TASKS, config_for, logits
from kinds import KINDS, config_of
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_models import TASK_TYPES, make_inputs, make_model

from peft_moe import MoLoraConfig, hotswap_adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("loras")


def saved(config, path, *, arch="llama", seed=1) -> Path:
    torch.manual_seed(seed)
    get_peft_model(make_model(arch), config).save_pretrained(path)
    return path


def fresh(path, arch="llama") -> PeftModel:
    return PeftModel.from_pretrained(make_model(arch), path).eval()


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model, before) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)


@pytest.mark.parametrize("arch", ["llama", "bert"])  # bert's classifier is in modules_to_save
@pytest.mark.parametrize("other", [False, True], ids=["plain", "other"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_does_then_what_loading_the_other_afresh_does(kind, other, arch, folder, tmp_path):
    first, second = (
        saved(config_of(kind, arch, folder, other=other), tmp_path / str(seed), arch=arch, seed=seed) for seed in (1, 2)
    )
    model, inputs = fresh(first, arch), make_inputs(arch, labels=False)
    before, tensors = logits(model, inputs), [p.data_ptr() for p in model.parameters()]
    hotswap_adapter(model, str(second))
    assert torch.equal(logits(model, inputs), logits(fresh(second, arch), inputs))
    assert not torch.allclose(logits(model, inputs), before, atol=1e-4)
    assert [p.data_ptr() for p in model.parameters()] == tensors
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(fresh(tmp_path / "again", arch), inputs), logits(model, inputs))
    hotswap_adapter(model, first)  # and back
    assert torch.equal(logits(model, inputs), before)


@pytest.mark.parametrize("train_experts", [False, True])
def test_experts_of_at_moe_are_swapped_frozen_or_trained(train_experts, folder, tmp_path):
    """Those of another adapter are other LoRAs of the same names and sizes."""
    fields = {"train_experts": train_experts}
    first = saved(grouped_config("llama", folder, **fields), tmp_path / "1")
    config = grouped_config("llama", folder, **fields)
    loras = {
        name: make_lora(tmp_path / name, seed=seed, r=r, lora_alpha=alpha, target_modules=TARGETS["llama"][targets])
        for seed, (name, (r, alpha, targets)) in enumerate(EXPERTS.items(), start=50)
    }
    groups = {"f": {"a": loras["a"], "b": loras["b"]}, "s": {"c": loras["c"]}}
    config = grouped_config("llama", folder, **fields, groups=groups, general_expert=loras["p"])
    second = saved(config, tmp_path / "2", seed=4)
    model, inputs = fresh(first), make_inputs("llama")
    assert any(".lora_A." in name for name, _ in model.named_parameters()) is train_experts
    hotswap_adapter(model, second)
    assert torch.equal(logits(model, inputs), logits(fresh(second), inputs))
    now = model.peft_config["default"]
    assert now.groups == fresh(second).peft_config["default"].groups
    assert not now.is_new


def test_stored_group_weights_come_along_and_those_of_before_go(folder, tmp_path):
    model, inputs = fresh(saved(grouped_config("llama", folder), tmp_path / "1")), make_inputs("llama")
    fixing = grouped_config("llama", folder, group_weights={"weights": {"f": {"a": 1.0}}, "mix": 1.0})
    fixed = saved(fixing, tmp_path / "2", seed=2)
    hotswap_adapter(model, fixed)
    assert torch.equal(logits(model, inputs), logits(fresh(fixed), inputs))
    hotswap_adapter(model, tmp_path / "1")
    assert torch.equal(logits(model, inputs), logits(fresh(tmp_path / "1"), inputs))


def test_names_of_tasks_come_along_also_for_the_chosen_one(tmp_path):
    first = saved(config_for("llama"), tmp_path / "1")
    second = saved(config_for("llama", tasks=TASKS[::-1], default_task="rad"), tmp_path / "2", seed=2)
    model, expected, inputs = fresh(first), fresh(second), make_inputs("llama")
    model.set_task("icd")
    hotswap_adapter(model, second)
    assert torch.equal(logits(model, inputs), logits(expected, inputs, task_ids="icd"))
    model.set_task(None)
    assert torch.equal(logits(model, inputs), logits(expected, inputs))
    named = ["def", "icd", "rad"]
    assert torch.equal(logits(model, inputs, task_ids=named), logits(expected, inputs, task_ids=named))
    third, before = saved(config_for("llama", tasks=["x", "y", "z"]), tmp_path / "3"), state(model)
    model.set_task("icd")
    with pytest.raises(ValueError, match="chosen with set_task is 'icd': Unknown task 'icd'"):
        hotswap_adapter(model, third)
    assert unchanged(model, before)


def test_only_the_named_adapter_changes(folder, tmp_path):
    inputs = make_inputs("llama")
    second = saved(config_of("molora", "llama", folder), tmp_path / "2", seed=2)
    model = fresh(saved(config_of("molora", "llama", folder), tmp_path / "1"))
    model.load_adapter(tmp_path / "1", "kept")
    before = logits(model, inputs)
    hotswap_adapter(model, second)
    assert torch.equal(logits(model, inputs), logits(fresh(second), inputs))
    model.set_adapter("kept")
    assert torch.equal(logits(model, inputs), before)


def test_what_only_training_knows_stays_in_layers_and_config(tmp_path):
    model = fresh(saved(config_for("llama", lora_dropout=0.3), tmp_path / "1"))
    hotswap_adapter(model, saved(config_for("llama", lora_dropout=0.1), tmp_path / "2", seed=2))
    assert model.peft_config["default"].lora_dropout == 0.3
    assert {m.p for n, m in model.named_modules() if n.endswith("moelora_bank.default.dropout")} == {0.3}


REFUSED = {
    "another type": ("moelora", {}, "molora", {}, "is a MOLORA adapter and the one in the model MOELORA"),
    "a stock LoRA": ("moelora", {}, "lora", {}, "is a LORA adapter and the one in the model MOELORA"),
    "rank": ("moelora", {}, "moelora", {"r": 12}, r"the ranks of its experts in '.*' are \(3, 3, 3, 3\)"),
    "alpha": ("molora", {}, "molora", {"lora_alpha": 7}, r"the scaling of its experts in .* are \(3.5, "),
    "number of experts": ("molora", {}, "molora", {"num_experts": 5}, r"the ranks of its experts"),
    "layers": ("molora", {}, "molora", {"target_modules": ["q_proj"]}, "cannot be swapped in: it lacks"),
    "more layers": ("molora", {"target_modules": ["q_proj"]}, "molora", {}, "it has 'base_model"),
    "number of tasks": ("moelora", {}, "moelora", {"tasks": 5, "default_task": None}, r"has shape \(5, 64\)"),
    "experts per token": (
        "molora",
        {},
        "molora",
        {"top_k": 3},
        "its top_k is 3, that of the adapter in the model is 2",
    ),
    "scope of gates": ("moelora", {}, "moelora", {"gate_scope": "layer"}, "its gate_scope is 'layer'"),
    "routing": ("at_moe", {}, "at_moe", {"router_input": "prompt"}, "its router_input is 'prompt'"),
    "kind of experts": ("at_moe", {}, "at_moe", {"train_experts": True}, "its train_experts is True"),
    "share": ("at_moe", {}, "at_moe", {"mix": 0.25}, "its mix is 0.25"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_written(case, folder, tmp_path):
    kind, there, other_kind, fields, message = REFUSED[case]
    if other_kind == "lora":
        other = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    else:
        other = config_of(other_kind, "llama", folder, **fields)
    other = saved(other, tmp_path / "2", seed=2)
    model, inputs = fresh(saved(config_of(kind, "llama", folder, **there), tmp_path / "1")), make_inputs("llama")
    before, expected, config = state(model), logits(model, inputs), model.peft_config["default"]
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, other)
    assert unchanged(model, before)
    assert torch.equal(logits(model, inputs), expected)
    assert model.peft_config["default"] is config


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_a_head_that_is_a_target_is_saved_beside_the_adapter_and_has_to_be_the_same(tmp_path):
    config = {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    second = saved(MoLoraConfig(**config), tmp_path / "second", seed=2)
    assert any(".lm_head.base_layer." in key for key in load_file(second / "adapter_model.safetensors"))
    model, inputs = fresh(saved(MoLoraConfig(**config), tmp_path / "first")), make_inputs("llama", labels=False)
    hotswap_adapter(model, second)
    assert torch.equal(logits(model, inputs), logits(fresh(second), inputs))
    before = state(model)
    path = second / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if ".lm_head.base_layer." in key)
    save_file(tensors | {key: tensors[key] + 1}, path)
    with pytest.raises(ValueError, match="lm_head.base_layer.weight', which was saved beside it, is not as in this"):
        hotswap_adapter(model, second)
    assert unchanged(model, before)


def test_a_merged_adapter_is_refused(tmp_path):
    path = saved(config_for("llama"), tmp_path / "1")
    model = fresh(path)
    model.merge_adapter(task="icd")
    with pytest.raises(ValueError, match="Cannot hot-swap adapter 'default' because it is merged"):
        hotswap_adapter(model, path)
    model.unmerge_adapter()
    hotswap_adapter(model, path)


def test_models_and_names_that_have_no_such_adapter_are_refused(tmp_path):
    path = saved(config_for("llama"), tmp_path / "1")
    with pytest.raises(ValueError, match=r"adapter_name='x'; the model has \['default'\]"):
        hotswap_adapter(fresh(path), path, "x")
    for model in (make_model("llama"), get_peft_model(make_model("llama"), LoraConfig(task_type=TASK_TYPES["llama"]))):
        with pytest.raises(TypeError, match="takes a PeftModel with an adapter of peft_moe"):
            hotswap_adapter(model, path)


@pytest.mark.long
@pytest.mark.parametrize("kind", [*KINDS[::3], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:3])])
def test_a_compiled_model_is_not_compiled_again(kind, folder, tmp_path):
    few = {} if kind == "at_moe" else {"target_modules": ["q_proj"]}
    paths = [saved(config_of(kind, "llama", folder, **few), tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    model, inputs = fresh(paths[0]), make_inputs("llama", labels=False)
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    first = logits(compiled, inputs)
    compilations = counter.frame_count
    hotswap_adapter(compiled, paths[1])
    second = logits(compiled, inputs)
    assert counter.frame_count == compilations > 0
    torch.testing.assert_close(second, logits(fresh(paths[1]), inputs), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(first, second, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_pefts_own_state_dict_functions_work_in_place_too(kind, folder, tmp_path):
    paths = [saved(config_of(kind, "llama", folder), tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    model, other, inputs = fresh(paths[0]), fresh(paths[1]), make_inputs("llama")
    tensors = [p.data_ptr() for p in model.parameters()]
    result = set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    assert not result.unexpected_keys
    assert [p.data_ptr() for p in model.parameters()] == tensors
    assert torch.equal(logits(model, inputs), logits(other, inputs))


def test_a_saved_config_of_a_swapped_adapter_is_the_new_ones(tmp_path):
    model = fresh(saved(config_for("llama"), tmp_path / "1"))
    hotswap_adapter(model, saved(config_for("llama", tasks=["x", "y", "z"]), tmp_path / "2", seed=2))
    model.save_pretrained(tmp_path / "3")
    assert json.loads((tmp_path / "3" / "adapter_config.json").read_text())["tasks"] == ["x", "y", "z"]


@pytest.mark.parametrize("how", ["cut off", "not finite", "no JSON"])
def test_broken_files_are_refused_before_anything_is_written(how, tmp_path):
    first, second = (saved(config_for("llama", default_task="rad"), tmp_path / str(seed), seed=seed) for seed in (1, 2))
    model, inputs = fresh(first), make_inputs("llama")
    file = second / "adapter_model.safetensors"
    if how == "cut off":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "not finite":
        weights = load_file(file)
        weights[sorted(weights)[-1]].fill_(float("nan"))
        save_file(weights, file, metadata={"format": "pt"})
    else:
        (second / "adapter_config.json").write_text("{")
    before, expected = state(model), logits(model, inputs)
    message = {"cut off": "cannot be read .* cut off", "not finite": "NaN or infinite", "no JSON": "is no JSON"}[how]
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, second)
    assert unchanged(model, before)
    assert torch.equal(logits(model, inputs), expected)
