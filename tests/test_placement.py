"""Which block a layer of AT-MoE belongs to, in models of stages too, and what is refused when an adapter is put in."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import make_model
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    ConvNextConfig,
    ConvNextModel,
    DebertaConfig,
    DebertaModel,
    DebertaV2Config,
    DebertaV2Model,
    FunnelConfig,
    FunnelModel,
    MobileBertConfig,
    MobileBertModel,
    PvtConfig,
    PvtModel,
    SegformerConfig,
    SegformerModel,
    SwinConfig,
    SwinModel,
    Swinv2Config,
    Swinv2Model,
)

from peft_moe import GroupedMoeConfig, fold
from peft_moe.grouped.placement import block_of, width_of
from peft_moe.report import describe
from peft_moe.schedule import layer_of

SMALL = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
STAGES = {"num_encoder_blocks": 2, "depths": [2, 1], "hidden_sizes": [8, 16], "num_attention_heads": [1, 2]}
STAGES |= {"mlp_ratios": [2, 2]}
WINDOWS = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2], "window_size": 2}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8}
MODELS = {
    "albert": (AlbertModel, AlbertConfig(**SMALL, embedding_size=8)),
    "convnext": (ConvNextModel, ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2)),
    "deberta": (DebertaModel, DebertaConfig(**SMALL, **RELATIVE)),
    "deberta-v2": (DebertaV2Model, DebertaV2Config(**SMALL, **RELATIVE)),
    "deberta-v3": (DebertaV2Model, DebertaV2Config(**SMALL, **RELATIVE, share_att_key=True)),
    "funnel": (
        FunnelModel,
        FunnelConfig(
            vocab_size=50, block_sizes=[2, 2], d_model=16, n_head=2, d_head=8, d_inner=16, num_decoder_layers=1
        ),
    ),
    "mobilebert": (
        MobileBertModel,
        MobileBertConfig(**SMALL, embedding_size=8, intra_bottleneck_size=8, true_hidden_size=8),
    ),
    "pvt": (PvtModel, PvtConfig(**STAGES, image_size=32, patch_sizes=[4, 2], strides=[4, 2],
                                sequence_reduction_ratios=[2, 1])),
    "segformer": (SegformerModel, SegformerConfig(**STAGES, patch_sizes=[3, 3], strides=[2, 2], sr_ratios=[2, 1])),
    "swin": (SwinModel, SwinConfig(**WINDOWS)),
    "swinv2": (Swinv2Model, Swinv2Config(**WINDOWS)),
}  # fmt: skip
PADDED = {
    "input_ids": torch.arange(3, 19).reshape(2, 8),
    "attention_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3]),
}


def base_of(name):
    make, config = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(config).eval()


def inputs_of(name):
    size = {"pvt": 32, "segformer": 16, "swin": 16, "swinv2": 16}.get(name)
    return PADDED if size is None else {"pixel_values": torch.randn(2, 3, size, size, generator=torch.manual_seed(0))}


def config_of(router_input, **fields):
    groups = {"f": ["a", "b"], "s": ["c"]}
    common = {
        "groups": groups,
        "train_experts": True,
        "r": 2,
        "init_lora_weights": False,
        "target_modules": "all-linear",
    }
    return GroupedMoeConfig(**common, router_input=router_input, **fields)


def output(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


# (model, router_input): what is left out
WORK = {
    ("albert", "token"): "pooler",
    ("albert", "prompt"): "pooler",
    ("deberta", "token"): r".*\.(pos_proj|pos_q_proj)",
    ("deberta-v2", "prompt"): r".*\.(pos_key_proj|pos_query_proj)",
    ("deberta-v3", "token"): r".*\.(key_proj|query_proj)",
    ("deberta-v3", "prompt"): r".*\.(key_proj|query_proj)",
    ("funnel", "token"): r"(.*\.)?encoder\.blocks\.[1-9]\d*\.0\..*",
    ("funnel", "prompt"): r"(.*\.)?encoder\.blocks\.[1-9]\d*\..*",
    ("pvt", "prompt"): None,
    ("segformer", "prompt"): None,
    ("segformer", "token"): r".*\.(k_proj|v_proj)",  # of fewer tokens
    ("swin", "prompt"): None,
    ("swin", "token"): r".*attention.*",  # of windows
    ("swinv2", "prompt"): r".*continuous_position_bias_mlp.*",
}


@pytest.mark.parametrize(("name", "router_input"), WORK, ids=str)
def test_models_of_stages_route_rows_apart_save_and_fold(name, router_input, tmp_path):
    torch.manual_seed(0)
    config = config_of(router_input, exclude_modules=WORK[name, router_input])
    model, inputs = get_peft_model(base_of(name), config).eval(), inputs_of(name)
    found = output(model, inputs)
    rows = [output(model, {key: value[i : i + 1] for key, value in inputs.items()}) for i in range(2)]
    torch.testing.assert_close(torch.cat(rows), found, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found, output(base_of(name), inputs), atol=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base_of(name), tmp_path / "adapter").eval()
    assert torch.equal(output(loaded, inputs), found)
    # routers that fixed weights leave apart by λ alone, so that folding has to find each layer's own
    fixed = {"weights": {"f": {"a": 0.3}, "s": 0.4}}
    model.set_group_weights(fixed["weights"])
    out = fold(model, tmp_path / "folded", routing=fixed)
    stock = PeftModel.from_pretrained(base_of(name), out).eval()
    torch.testing.assert_close(output(stock, inputs), output(model, inputs), rtol=1e-4, atol=1e-5)


def test_folding_finds_the_router_of_each_block_of_a_stage(tmp_path):
    torch.manual_seed(0)
    config = config_of("prompt", within_group="static")
    model, inputs = get_peft_model(base_of("segformer"), config).eval(), inputs_of("segformer")
    fixed = {"group_weights": {"f": 0.7}}  # within groups it is what each router has learnt
    model.set_group_weights(group_weights=fixed["group_weights"])
    out = fold(model, tmp_path / "folded", routing=fixed)
    stock = PeftModel.from_pretrained(base_of("segformer"), out).eval()
    torch.testing.assert_close(output(stock, inputs), output(model, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["segformer", "swin", "funnel"])
def test_a_report_names_the_router_of_each_block_of_a_stage(name, tmp_path):
    config = config_of("prompt", exclude_modules=WORK[name, "prompt"])
    model = get_peft_model(base_of(name), config)
    model.save_pretrained(tmp_path)
    found = describe(tmp_path)
    names = [router["name"] for router in found["routers"]]
    assert len(set(names)) == len(names)
    blocks = {key: block_of(base_of(name), key) or key for router in found["routers"] for key in router["layers"]}
    assert set(blocks.values()) == {key for key, _ in model.routers()}
    for router in found["routers"]:
        (block,) = {blocks[key] for key in router["layers"]}
        assert f"{block}.".startswith(f"{router['name']}.")  # the stage, if it has no other block
        assert [key for key in blocks if blocks[key] == block] == router["layers"]


REFUSED = {
    ("convnext", "token"): "in a block of a convnext model.*use MoLoraConfig",
    ("mobilebert", "prompt"): "in a block of a mobilebert model.*use MoLoraConfig",
    ("deberta", "token"): r"relative positions.*exclude_modules=\['self.pos_proj', 'self.pos_q_proj'\]",
    ("deberta-v2", "token"): r"relative positions.*exclude_modules=\['self.pos_key_proj', 'self.pos_query_proj'\]",
    ("deberta-v2", "prompt"): r"relative positions.*exclude_modules=\['self.pos_key_proj', 'self.pos_query_proj'\]",
    ("deberta-v3", "prompt"): r"relative positions.*exclude_modules=\['self.key_proj', 'self.query_proj'\]",
    ("funnel", "token"): r"'encoder.blocks.1.0.*router_input='token'.*exclude_modules=",
    ("funnel", "prompt"): r"'encoder.blocks.1.0.*router_input='prompt'.*exclude_modules=",
    ("swinv2", "prompt"): r"relative positions.*exclude_modules=\['continuous_position_bias_mlp.0', ",
}


@pytest.mark.parametrize(("name", "router_input"), REFUSED, ids=str)
def test_what_no_router_could_weigh_is_refused_before_anything_is_changed(name, router_input):
    base, inputs = base_of(name), inputs_of(name) if name != "convnext" else None
    kinds = [type(module) for module in base.modules()]
    with pytest.raises(ValueError, match=REFUSED[name, router_input]):
        get_peft_model(base, config_of(router_input))
    assert [type(module) for module in base.modules()] == kinds
    if inputs is not None:
        assert torch.equal(output(base, inputs), output(base_of(name), inputs))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "t5", "vit", "qwen2", "gemma2", "gemma3", "mixtral"])
def test_in_models_without_stages_a_block_has_the_first_number(name):
    model = make_model(name)
    for key, module in model.named_modules():
        if isinstance(module, nn.Linear) or "Conv1D" in type(module).__name__:
            place = layer_of(key)
            assert block_of(model, key) == (place and f"{place[0]}.{place[1]}")


def made_of(**children):
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def block(width=4):
    return made_of(q=nn.Linear(width, width))


class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Linear(4, 4)


def model_of(first):
    return made_of(blocks=nn.ModuleList([first]))


@pytest.mark.parametrize(
    ("model", "key", "expected"),
    [
        (model_of(block()), "blocks.0.q", "blocks.0"),
        (model_of(nn.ModuleList([block(), block()])), "blocks.0.1.q", "blocks.0.1"),
        (model_of(nn.ModuleDict({"a": block()})), "blocks.0.a.q", None),
        (model_of(nn.Sequential(block(), block())), "blocks.0.1.q", "blocks.0.1"),
        (model_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))), "blocks.0.1", "blocks.0"),
        (model_of(made_of(blocks=nn.ModuleList([block()]), out=nn.Linear(4, 8))), "blocks.0.blocks.0.q",
         "blocks.0.blocks.0"),
        (model_of(made_of(blocks=nn.ModuleList([block()]), out=nn.Linear(4, 8))), "blocks.0.out", None),
        (model_of(made_of(parts=nn.ModuleList([block(), Other()]))), "blocks.0.parts.1.w", "blocks.0"),
        (model_of(made_of(q=nn.Linear(4, 4), ffn=nn.ModuleList([block(), block()]))), "blocks.0.ffn.1.q", "blocks.0"),
        (nn.Sequential(model_of(block())), "0.blocks.0.q", "0.blocks.0"),
        (nn.Sequential(made_of(q=nn.Linear(4, 4))), "0.q", "0"),
        (made_of(head=nn.Linear(4, 4)), "head", None),
    ],
    ids=["a block", "a list", "a dict", "a sequence of blocks", "a sequence of layers", "a stage", "after its blocks",
         "parts of several types", "a list that comes later", "in a sequence", "only a sequence", "no number"],
)  # fmt: skip
def test_the_block_of_a_layer(model, key, expected):
    assert block_of(model, key) == expected


def test_a_block_is_as_wide_as_what_its_first_layer_reads_that_is_not_about_positions():
    assert width_of(base_of("swinv2"), "encoder.layers.1.blocks.0") == 16
    assert width_of(base_of("segformer"), "stages.0.blocks.1") == 8
