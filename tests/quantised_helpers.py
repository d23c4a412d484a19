"""What tests of quantised bases need: a small Llama, every way to quantise it on a CPU, and the four configs for it."""

from functools import partial
from pathlib import Path

import torch
from helpers import TARGETS, TASKS
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import VOCAB
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from peft_moe import GroupedMoeConfig, MedMoeLoraConfig, MoeLoraConfig, MoLoraConfig

FOUR_BITS = partial(BitsAndBytesConfig, load_in_4bit=True, bnb_4bit_quant_type="nf4")
# Each way to quantise, as transformers takes it, and how far its kernel is from a product with the dequantised weight.
BASES = {
    "nf4": (FOUR_BITS, 1e-5),
    "nf4-double": (partial(FOUR_BITS, bnb_4bit_use_double_quant=True), 1e-5),
    "fp4": (partial(FOUR_BITS, bnb_4bit_quant_type="fp4"), 1e-5),
    "int8": (partial(BitsAndBytesConfig, load_in_8bit=True), 2e-2),  # it rounds the input too
    "torchao-int8": (lambda **more: TorchAoConfig(Int8WeightOnlyConfig(), **more), 1e-5),
    "torchao-int8-dynamic": (lambda **more: TorchAoConfig(Int8DynamicActivationInt8WeightConfig(), **more), 2e-2),
    "torchao-int4": (lambda **more: TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4), **more), 1e-5),
    "torchao-float8": (lambda **more: TorchAoConfig(Float8WeightOnlyConfig(), **more), 1e-5),
}
# torchao's kernel for these has no backward, so that nothing below a quantised layer is trained, under stock LoRA too
FORWARD_ONLY = ("torchao-int8-dynamic",)
CONFIGS = ("moelora", "molora", "medmoe", "grouped")
TARGET = TARGETS["llama"]


def save_base(folder: Path) -> Path:
    """Write the unquantised model; bitsandbytes' 4-bit blocks need layers of 64 and more."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, pad_token_id=0, **sizes))
        # of a size that the adapters' changes are not lost in
        for layer in model.model.layers:
            for parameter in layer.parameters():
                parameter.data.mul_(3 if parameter.dim() > 1 else 1)
        model.save_pretrained(folder)
    return folder


def load(folder: Path, name: str | None, dtype: torch.dtype = torch.float32, **quantisation) -> LlamaForCausalLM:
    """The model, quantised; None is not."""
    config = None if name is None else BASES[name][0](**quantisation)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def save_lora(folder: Path, base: Path, *, seed: int, r: int) -> str:
    """A stock LoRA that changes the output."""
    if not folder.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = LoraConfig(
                task_type="CAUSAL_LM", r=r, lora_alpha=2 * r, target_modules=TARGET, init_lora_weights=False
            )
            get_peft_model(load(base, None), config).save_pretrained(str(folder))
    return str(folder)


def config_on(kind: str, base: Path, **changes):
    """One of the four configs, whose new adapter changes the output, without dropout."""
    fields = {"task_type": "CAUSAL_LM", "target_modules": TARGET, "lora_dropout": 0.0, "init_lora_weights": False}
    if kind == "moelora":
        return MoeLoraConfig(**fields | {"r": 8, "num_experts": 4, "tasks": TASKS} | changes)
    if kind == "molora":
        return MoLoraConfig(**fields | {"r": 8, "num_experts": 4, "top_k": 2} | changes)
    if kind == "medmoe":
        return MedMoeLoraConfig(**fields | {"num_experts": 4} | changes)
    folders = {name: save_lora(base.parent / f"lora-{name}", base, seed=i, r=2 + i) for i, name in enumerate("abc")}
    groups = {"f": {"a": folders["a"], "b": folders["b"]}, "s": {"c": folders["c"]}}
    fields = {"task_type": "CAUSAL_LM", "groups": groups, "init_lora_weights": False}
    return GroupedMoeConfig(**fields | changes)


def quantised(kind: str, folder: Path, name: str, *, seed: int = 0, changes=None, **loading) -> PeftModel:
    """A quantised model with an adapter."""
    config = config_on(kind, folder, **(changes or {}))
    base = load(folder, name, **loading)
    torch.manual_seed(seed)
    return get_peft_model(base, config)


def told(kind: str) -> dict:
    """What a call of three rows is told besides its inputs."""
    return {"task_ids": [2, 0, 1]} if kind == "moelora" else {}


def fix(model: PeftModel, kind: str) -> PeftModel:
    """Choose a task, or weights, for all rows, so that the adapter is one matrix per layer."""
    if kind == "moelora":
        model.set_task("rad")
    else:
        model.set_group_weights({"f": {"a": 0.75, "b": 0.25}, "s": {"c": 1.0}}, group_weights={"f": 0.5, "s": 0.5})
    return model
