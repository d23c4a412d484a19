"""Small random models of every architecture the tests cover: two layers, hidden size 32, built in memory."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

VOCAB = 128
HIDDEN = 32
IMAGE = 8
LABELS = 3
PAD, BOS, EOS = 0, 1, 2

SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}

# peft's task type for each model
TASK_TYPES: dict[str, str | None] = {
    "llama": "CAUSAL_LM",
    "gpt2": "CAUSAL_LM",
    "opt": "CAUSAL_LM",
    "bert": "SEQ_CLS",
    "t5": "SEQ_2_SEQ_LM",
    "vit": None,
}


def _llama() -> PreTrainedModel:
    sizes = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, max_position_embeddings=128, **sizes, **SPECIAL)
    return LlamaForCausalLM(config)


def _gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=VOCAB, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=128, **SPECIAL)
    return GPT2LMHeadModel(config)


def _opt() -> PreTrainedModel:
    sizes = {"ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": HIDDEN}
    config = OPTConfig(vocab_size=VOCAB, hidden_size=HIDDEN, max_position_embeddings=128, **sizes, **SPECIAL)
    return OPTForCausalLM(config)


def _bert() -> PreTrainedModel:
    sizes = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_labels=LABELS, pad_token_id=PAD, **sizes)
    return BertForSequenceClassification(config)


def _t5() -> PreTrainedModel:
    sizes = {"d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    config = T5Config(vocab_size=VOCAB, d_model=HIDDEN, decoder_start_token_id=PAD, **sizes, **SPECIAL)
    return T5ForConditionalGeneration(config)


def _vit() -> PreTrainedModel:
    sizes = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ViTConfig(hidden_size=HIDDEN, image_size=IMAGE, patch_size=4, num_labels=LABELS, **sizes)
    return ViTForImageClassification(config)


BUILDERS = {"llama": _llama, "gpt2": _gpt2, "opt": _opt, "bert": _bert, "t5": _t5, "vit": _vit}

SIZES = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
}  # fmt: skip
# Causal models for what is about token routing; the Gemmas have one layer with a sliding window and one without.
_WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
FURTHER = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, **_WINDOWS)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **_WINDOWS)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)),
}


def make_model(name: str, *, seed: int = 0) -> PreTrainedModel:
    """A fresh model in eval mode; the same name and seed give the same weights, and the global RNG is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return (BUILDERS | FURTHER)[name]().eval()


def make_inputs(
    name: str, *, batch: int = 3, seq: int = 5, labels: bool = True, seed: int = 0
) -> dict[str, torch.Tensor]:
    """A batch for `make_model(name)`: token ids (batch, seq) or images, without padding, and labels."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        inputs = {"pixel_values": torch.randn(batch, 3, IMAGE, IMAGE, generator=generator)}
    else:
        input_ids = torch.randint(3, VOCAB, (batch, seq), generator=generator)
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if not labels:
        # an encoder-decoder needs something to decode from
        return inputs | {"decoder_input_ids": inputs["input_ids"]} if name == "t5" else inputs
    classes = name in ("bert", "vit")
    targets = torch.randint(0, LABELS, (batch,), generator=generator) if classes else inputs["input_ids"].clone()
    return inputs | {"labels": targets}
