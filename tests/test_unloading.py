"""Taking adapters out of a model, merged or not: the base model comes back whole."""

import pytest
import torch
from helpers import TASKS, logits, routed_layers
from kinds import KINDS, config_of
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import make_inputs, make_model
from transformers import RobertaConfig, RobertaForSequenceClassification

from peft_moe import MoeLoraConfig, MoLoraConfig

HEAD = {"task_type": "SEQ_CLS", "target_modules": ["query"], "init_lora_weights": False, "lora_dropout": 0.0}


def roberta():
    """A model whose head is no single layer."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_labels=3,
        max_position_embeddings=40,
    )  # fmt: skip
    return RobertaForSequenceClassification(config)


@pytest.mark.parametrize("kind", ["moelora", "lora"])
def test_a_head_of_several_layers_stays_trained_when_adapters_are_merged(kind):
    config = LoraConfig(**HEAD) if kind == "lora" else MoeLoraConfig(**HEAD, tasks=TASKS, default_task="rad")
    model = get_peft_model(roberta(), config).eval()
    inputs = {"input_ids": torch.randint(2, 128, (3, 7))}
    with torch.no_grad():
        model.classifier.modules_to_save["default"].out_proj.bias += 1
    expected = logits(model, inputs)
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged, inputs), expected, atol=1e-5)
    assert type(merged.classifier) is type(roberta().classifier)
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in roberta().named_parameters()}


@pytest.mark.parametrize("fields", [{"modules_to_save": ["mlp"]}, {"trainable_token_indices": [5, 6]}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_unloading_gives_the_base_model_back_beside_modules_and_tokens_that_are_trained(kind, fields, tmp_path):
    config, inputs = config_of(kind, "llama", tmp_path), make_inputs("llama", labels=False)
    plain = make_model("llama").eval()
    config.target_modules = ["q_proj", "v_proj"] if kind != "at_moe" else config.target_modules
    for name, value in fields.items():
        setattr(config, name, value)
    if kind == "at_moe" and "modules_to_save" in fields:
        config.modules_to_save = ["lm_head"]  # its experts are in mlp
    model = get_peft_model(make_model("llama"), config).eval()
    assert not torch.allclose(logits(model, inputs), logits(plain, inputs), atol=1e-4)
    base = model.unload()
    assert torch.equal(logits(base, inputs), logits(plain, inputs))
    assert not routed_layers(base)


@pytest.mark.parametrize("fields", [{"modules_to_save": ["mlp"]}, {"trainable_token_indices": [5, 6]}], ids=str)
def test_merging_keeps_modules_and_tokens_that_were_trained(fields):
    config = MoeLoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], tasks=TASKS, init_lora_weights=False, **fields
    )
    model, inputs = get_peft_model(make_model("llama"), config).eval(), make_inputs("llama", labels=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "moelora" not in name:
                parameter += 0.1
    expected = logits(model, inputs, task_ids="icd")
    assert torch.allclose(logits(model.merge_and_unload(task="icd"), inputs), expected, atol=1e-5)


def test_a_load_that_fails_leaves_a_model_with_such_a_head_as_it_was(tmp_path):
    get_peft_model(roberta(), MoLoraConfig(**HEAD)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "moelora_bank" in name)
    base, inputs = roberta().eval(), {"input_ids": torch.randint(2, 128, (3, 7))}
    expected = logits(base, inputs)
    save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, path)
    with pytest.raises(ValueError, match="NaN"):
        PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(base, inputs), expected)
    assert all(parameter.requires_grad for parameter in base.parameters())
