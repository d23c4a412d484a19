"""Arithmetic of the memory that training takes per device; nothing is measured, and no weights are made.

    python scripts/bench/memory.py
    python scripts/bench/memory.py --rows 4 --tokens 4096

Counts the parameters of three Llamas of published shapes and of this package's adapters with their defaults on all
linear layers, on PyTorch's meta device, and prints the tables of docs/distributed.md, where the formulas are explained.
"""

import argparse
import copy
import warnings
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_moe import MedMoeLoraConfig, MoeLoraConfig, MoLoraConfig

SHAPES = {  # hidden, feed-forward, layers, heads, heads of keys and values, vocabulary: their config.json
    "Llama-2-7B": (4096, 11008, 32, 32, 32, 32000),
    "Llama-3.1-70B": (8192, 28672, 80, 64, 8, 128256),
    "Llama-3.1-405B": (16384, 53248, 126, 128, 8, 128256),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FIELDS = {"task_type": "CAUSAL_LM", "target_modules": TARGETS}
ADAPTERS: dict[str, PeftConfig] = {
    "stock LoRA, r=16": LoraConfig(**FIELDS, r=16),
    "MOELoRA": MoeLoraConfig(**FIELDS, tasks=[f"task{i}" for i in range(8)]),
    "MoLoRA": MoLoraConfig(**FIELDS),
    "Med-MoE-LoRA": MedMoeLoraConfig(**FIELDS),
}
EXPERTS, GROUPS, EXPERT_RANK = (
    7,
    3,
    8,
)  # of recipes/at_moe.yaml: six in three groups and the general one, each of rank 8
GB, DEVICES = 1e9, (1, 8, 64)
NF4 = (4 + 32 / 64) / 8  # bytes: 4 bits, and a float32 factor for each 64 weights


@dataclass
class Model:
    """Numbers of parameters of a base model, and its sizes."""

    name: str
    hidden: int
    feed_forward: int
    layers: int
    key_value: int
    vocabulary: int
    total: int
    in_blocks: int  # weights of the linear layers of all blocks

    def weights(self, bits: str) -> float:
        """Bytes of the base model: all in bfloat16, or the linear layers of its blocks in nf4."""
        linear = self.in_blocks * (NF4 if bits == "nf4" else 2)
        return linear + 2 * (self.total - self.in_blocks)

    def activations(self, rows: int, tokens: int) -> float:
        """Bytes kept with checkpointing: block inputs, the insides of one block, and the logits with their gradient."""
        h, i = self.hidden, self.feed_forward
        inside = 2 * (6 * h + 2 * self.key_value + 4 * i)
        of_adapter = 9 * (6 * h + i)  # float32 inputs of the seven layers, what dropout left of them, and its mask
        return rows * tokens * (2 * self.layers * h + inside + of_adapter + 2 * 4 * self.vocabulary)


def count(name: str) -> tuple[Model, dict[str, int]]:
    """A model, and the parameters of each adapter in it."""
    hidden, feed_forward, layers, heads, kv_heads, vocabulary = SHAPES[name]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
    )
    adapters = {}
    for adapter, adapter_config in ADAPTERS.items():
        with init_empty_weights():
            base = LlamaForCausalLM(config)
            total = sum(p.numel() for p in base.parameters())
            linear = [m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
            in_blocks = sum(m.weight.numel() for m in linear)
            model = get_peft_model(base, copy.deepcopy(adapter_config))  # which a model fills in
        adapters[adapter] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with init_empty_weights():
        lora = get_peft_model(LlamaForCausalLM(config), LoraConfig(**FIELDS, r=EXPERT_RANK))
    adapters["AT-MoE, frozen experts"] = EXPERTS * sum(p.numel() for p in lora.parameters() if p.requires_grad)
    adapters["AT-MoE, routers"] = layers * hidden * (GROUPS + EXPERTS - 1)
    key_value = hidden // heads * kv_heads
    return Model(name, hidden, feed_forward, layers, key_value, vocabulary, total, in_blocks), adapters


def per_device(model: Model, trained: int, frozen: int, engine: str, devices: int, bits: str = "bf16") -> float:
    """Bytes of weights, gradients and Adam's states on each device; activations come on top."""
    base, d = model.weights(bits), devices
    if engine == "DDP":
        return base + 4 * frozen + (16 if d == 1 else 20) * trained
    if engine == "ZeRO-2":
        return base + 4 * frozen + 4 * trained + 16 * trained / d
    gathered = 0.0
    if d > 1:  # the block that runs and the next one, and the embeddings or the head
        gathered = 2 * (model.weights(bits) + 4 * trained) / model.layers + 2 * model.vocabulary * model.hidden
    return (base + 16 * trained) / d + gathered + 4 * frozen


def row(*cells: object) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1, help="rows in a micro-batch of a device")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens in a row")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of peft, which expects weights to start with
    counted = [count(name) for name in SHAPES]

    print(row("millions of parameters", *SHAPES))
    print(row("---", *["---:"] * len(SHAPES)))
    print(row("base", *[f"{model.total / 1e6:,.0f}" for model, _ in counted]))
    for adapter in counted[0][1]:
        print(row(adapter, *[f"{adapters[adapter] / 1e6:,.1f}" for _, adapters in counted]))

    print(f"\nGB per device for activations, {args.rows} x {args.tokens} tokens, checkpointing on\n")
    print(row(*SHAPES))
    print(row(*["---:"] * len(SHAPES)))
    print(row(*[f"{model.activations(args.rows, args.tokens) / GB:,.1f}" for model, _ in counted]))

    for adapter in ("MOELoRA", "MoLoRA", "AT-MoE"):
        print(f"\nGB per device for {adapter}, without activations\n")
        print(row("base", "engine", *[f"{d} device{'s' * (d > 1)}" for d in DEVICES]))
        print(row("---", "---", *["---:"] * len(DEVICES)))
        for model, adapters in counted:
            trained = adapters["AT-MoE, routers" if adapter == "AT-MoE" else adapter]
            frozen = adapters["AT-MoE, frozen experts"] if adapter == "AT-MoE" else 0
            for engine, bits in [("DDP", "bf16"), ("DDP", "nf4"), ("ZeRO-2", "bf16"), ("FSDP2, ZeRO-3", "bf16")]:
                figures = [per_device(model, trained, frozen, engine, d, bits) / GB for d in DEVICES]
                print(row(model.name, f"{engine}, {bits}", *[f"{figure:,.1f}" for figure in figures]))


if __name__ == "__main__":
    main()
