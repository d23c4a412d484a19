"""Weights that a user fixes, what routers are said to decide, and one LoRA where nothing is left to decide."""

import json
import math
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from grouped_helpers import grouped, make_experts
from helpers import adapter_gradients, config_for, enable_checkpointing, logits, routed_layers
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from tiny_models import TASK_TYPES, make_inputs, make_model
from torch import nn
from transformers import BatchEncoding

from peft_moe import GroupedMoeConfig, fold, read_expert
from peft_moe.cli import main

ARCHITECTURES = ["llama", "gpt2", "bert", "t5", "vit"]
GROUPS = {"f": ["a", "b", "c"], "s": ["c", "a"], "t": ["b"]}
NAMES = [f"{group}/{name}" for group, names in GROUPS.items() for name in names]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the experts of this file are."""
    return tmp_path_factory.mktemp("experts")


def config(folder, **fields):
    """Three groups of LoRAs for a llama, some in several of them, a general one, and routers that are not even."""
    sources = make_experts("llama", folder)
    groups = {group: {name: sources[name] for name in names} for group, names in GROUPS.items()}
    settings = {"task_type": "CAUSAL_LM", "groups": groups, "general_expert": sources["p"], "mix": 0.75}
    return GroupedMoeConfig(**{**settings, "init_lora_weights": False, **fields})


def mixture(folder, *, seed=0, adapter_name="default", **fields):
    torch.manual_seed(seed)
    return get_peft_model(make_model("llama"), config(folder, **fields), adapter_name=adapter_name).eval()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# an implementation of its own, of one token after the other and one expert after the other


def shared_out(weights, names, given, off):
    """Given weights, and what they leave, to the others in the router's proportion."""
    free = [name for name in names if name not in given and name not in off]
    rest, total = 1 - sum(given.values()), sum(weights[name] for name in free)
    return {name: rest * weights[name] / total if name in free else float(given.get(name, 0)) for name in names}


class Reference:
    """A llama with hooks that weigh its LoRAs as the routers of `model` do and `control` says.

    Args:
        model: whose routers.
        folder: where the experts are.
        control: arguments of `set_group_weights`.
    """

    def __init__(self, model, folder, control):
        self.model, self.control = make_model("llama"), control
        self.routers = dict(model.base_model.routers())
        self.mix = control.get("mix", 0.75)
        self.loras = {name: read_expert(source).layers for name, source in make_experts("llama", folder).items()}
        self.weights = {}  # by block and expert, (n, s)
        for i, block in enumerate(self.model.model.layers):
            block.register_forward_pre_hook(partial(self.enter, f"model.layers.{i}"))
        for key, module in self.model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(partial(self.add, key))

    def enter(self, block, module, args):
        gate = self.routers[block].gate
        tokens = [[self.of_token(gate, token) for token in row] for row in args[0]]
        self.weights[block] = {
            name: torch.tensor([[float(token[name]) for token in row] for row in tokens]) for name in tokens[0][0]
        }

    def of_token(self, gate, e):
        scores = gate.weight @ (e / (e.square().mean() + 1e-6).sqrt())
        own, within = dict(self.control.get("group_weights", {})), {}
        for group, value in self.control.get("weights", {}).items():
            if isinstance(value, dict):
                within[group] = value
            else:
                own[group] = value
        off = self.control.get("off", [])
        groups = dict(zip(GROUPS, scores[: len(GROUPS)].softmax(-1), strict=True))
        gone = [g for g, names in GROUPS.items() if g in off or all(f"{g}/{name}" in off for name in names)]
        groups = shared_out(groups, GROUPS, own, gone)
        weights, scores = {}, scores[len(GROUPS) :].split([len(names) for names in GROUPS.values()])
        for (group, names), row in zip(GROUPS.items(), scores, strict=True):
            experts = dict(zip(names, row.softmax(-1), strict=True))
            absent = [] if group in gone else [name for name in names if f"{group}/{name}" in off]
            for name, weight in shared_out(experts, names, within.get(group, {}), absent).items():
                weights[f"{group}/{name}"] = groups[group] * weight
        return weights

    def add(self, key, module, args, output):
        block = ".".join(key.split(".")[:3])
        parts = {"p": 1 - self.mix} if block in self.weights else {}
        for name, weight in self.weights.get(block, {}).items():
            parts[name] = self.mix * weight.unsqueeze(-1)
        for name, weight in parts.items():
            lora = self.loras[name.split("/")[-1]].get(key)
            if lora is not None:
                output = output + weight * lora.scaling * (args[0] @ lora.a.T @ lora.b.T)
        return output


CONTROLS = {
    "nothing": {},
    "a group's weight": {"weights": {"f": 0.7}},
    "all groups' weights": {"weights": {"f": 0.2, "s": 0.3, "t": 0.5}},
    "a group alone": {"weights": {"t": 1}},
    "no weight for a group": {"weights": {"s": 0.0}},
    "an expert alone in its group": {"weights": {"f": {"b": 1.0}}},
    "a part for an expert": {"weights": {"f": {"b": 0.25}}},
    "parts for two of three experts": {"weights": {"f": {"a": 0.2, "c": 0.5}}},
    "parts for all experts of a group": {"weights": {"s": {"a": 0.2, "c": 0.8}}},
    "thirds": {"weights": {"f": {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}}},
    "no weight for an expert": {"weights": {"f": {"a": 0}}},
    "one expert alone": {"weights": {"s": {"a": 1.0}}, "group_weights": {"s": 1.0}, "mix": 1.0},
    "weights of groups and of experts": {
        "weights": {"f": {"a": 1.0}, "s": {"c": 0.4}, "t": 0.1},
        "group_weights": {"f": 0.6},
    },
    "a group off": {"off": ["s"]},
    "two groups off": {"off": ["s", "f"]},
    "experts off": {"off": ["f/a", "s/c"]},
    "all experts of a group off": {"off": ["s/a", "s/c"]},
    "an expert off beside a part": {"weights": {"f": {"b": 0.5}}, "off": ["f/c", "t"]},
    "a share of the mixture": {"mix": 0.9},
    "the mixture alone": {"mix": 1},
    "the general expert alone": {"mix": 0},
    "all of it": {"weights": {"f": {"a": 0.1}, "s": 0.2}, "group_weights": {"f": 0.3}, "off": ["f/b"], "mix": 0.4},
}


@pytest.mark.parametrize("case", CONTROLS)
def test_fixed_weights_are_as_computed_token_by_token_and_the_rest_follows_the_router(case, folder):
    control, inputs = CONTROLS[case], make_inputs("llama", batch=2)
    model = mixture(folder)
    reference = Reference(model, folder, control)
    with torch.no_grad():
        expected = reference.model(**inputs).logits
    free = logits(model, inputs)
    with model.routing(**control):
        close(logits(model, inputs), expected)
        explained = model.explain(inputs)
    for block, weights in reference.weights.items():
        for group, experts in explained.weights(block).items():
            for name, weight in experts.items():
                torch.testing.assert_close(weight, weights[f"{group}/{name}"], rtol=1e-4, atol=1e-6)
        assert explained.mix[block] == pytest.approx(reference.mix)
    assert torch.equal(logits(model, inputs), free)
    if control:
        assert not torch.allclose(expected, free, atol=1e-4)
    model.set_group_weights(**control)
    close(logits(model, inputs), expected)
    model.set_group_weights()
    assert torch.equal(logits(model, inputs), free)
    close(logits(mixture(folder, group_weights=control or None), inputs), expected)


@pytest.mark.parametrize(
    ("fields", "control", "expected"),
    [
        # the weights of f/a, f/b and s/c as they are (w) and as they are then
        ({}, {"weights": {"f": 0.9}}, lambda a, b, c: (0.9 * a / (a + b), 0.9 * b / (a + b), 0.1)),
        ({}, {"weights": {"f": {"a": 0.9}}}, lambda a, b, c: (0.9 * (a + b), 0.1 * (a + b), c)),
        ({"within_group": "static"}, {"off": ["f/a"]}, lambda a, b, c: (0, a + b, c)),
        ({"flat_routing": True}, {"off": ["f/a"]}, lambda a, b, c: (0, b / (b + c), c / (b + c))),
        ({"flat_routing": True}, {"off": ["s"]}, lambda a, b, c: (a / (a + b), b / (a + b), 0)),
        ({"flat_routing": True}, {"weights": {"s": 0.9}}, lambda a, b, c: (0.1 * a / (a + b), 0.1 * b / (a + b), 0.9)),
        (
            {"flat_routing": True, "within_group": "static"},
            {"off": ["f/b"]},
            lambda a, b, c: (a / (a + c), 0, c / (a + c)),
        ),
        ({"router_input": "prompt"}, {"weights": {"s": {"c": 1.0}}, "off": ["f/b"]}, lambda a, b, c: (a + b, 0, c)),
    ],
)  # fmt: skip
def test_every_kind_of_router_can_be_fixed(fields, control, expected, folder):
    model, inputs = grouped("llama", folder, **fields), make_inputs("llama", labels=False)
    block = "model.layers.0"  # what enters it is the same in any case

    def weights():
        found = model.explain(inputs).weights(block)
        return found["f"]["a"], found["f"]["b"], found["s"]["c"]

    free = weights()
    with model.routing(**control):
        for weight, value in zip(weights(), expected(*free), strict=True):
            torch.testing.assert_close(
                weight, torch.as_tensor(value, dtype=weight.dtype).expand_as(weight), rtol=1e-5, atol=1e-6
            )


REFUSED = {
    "no such group": ({"weights": {"style": 1.0}}, r"'style' is no group; there are \['f', 's', 't'\]"),
    "no such group beside others": ({"group_weights": {"style": 1.0}}, r"'style' is no group"),
    "no such expert": ({"weights": {"f": {"z": 1.0}}}, r"'z' is no member of group 'f'; there are \['a', 'b', 'c'\]"),
    "an expert without its group": ({"weights": {"a": 1.0}}, r"'a' is no group"),
    "nothing of that name to switch off": ({"off": ["style"]}, r"'style' is no group"),
    "no such expert to switch off": ({"off": ["f/z"]}, r"'z' is no expert of 'f'; there are \['a', 'b', 'c'\]"),
    "a number to switch off": ({"off": [1]}, r"'1' is no group"),
    "one name to switch off": ({"off": "f"}, r"off='f' is no list; give a list of groups and of 'group/expert'"),
    "no list to switch off": ({"off": 5}, r"off=5 is no list"),
    "no mapping": ({"weights": "f"}, r"weights='f' is no mapping; give \{'group': weight, ...\}"),
    "a list": ({"group_weights": ["f"]}, r"group_weights=\['f'\] is no mapping"),
    "a weight above 1": ({"weights": {"f": 1.5}}, r"The weight of 'f' is 1.5; weights are shares.*number from 0 to 1"),
    "a weight below 0": ({"weights": {"f": {"a": -0.1}}}, r"The weight of 'a' is -0.1; weights are shares"),
    "a weight that is no number": ({"weights": {"f": math.nan}}, r"The weight of 'f' is nan"),
    "a weight that is infinite": ({"group_weights": {"f": math.inf}}, r"The weight of 'f' is inf"),
    "a weight that is a name": ({"weights": {"f": "a"}}, r"The weight of 'f' is 'a'; weights are shares"),
    "a weight that is yes": ({"weights": {"f": {"a": True}}}, r"The weight of 'a' is True"),
    "a weight that is nothing": ({"weights": {"f": None}}, r"The weight of 'f' is None"),
    "groups above 1": (
        {"weights": {"f": 0.7, "s": 0.5}},
        r"The weights given in the groups add up to 1.2; .*at most 1",
    ),
    "experts above 1": (
        {"weights": {"f": {"a": 0.7, "b": 0.5}}},
        r"The weights given in group 'f' add up to 1.2; they are shares, so give at most 1 in all",
    ),
    "groups below 1": (
        {"weights": {"f": 0.3, "s": 0.3, "t": 0.3}},
        r"in the groups add up to 0.9 and nothing else is on to take the rest; give weights that add up to 1",
    ),
    "an only expert below 1": ({"weights": {"t": {"b": 0.5}}}, r"in group 't' add up to 0.5 and nothing else is on"),
    "below 1 where the rest is off": (
        {"weights": {"f": {"a": 0.5}}, "off": ["f/b", "f/c"]},
        r"in group 'f' add up to 0.5 and nothing else is on",
    ),
    "two weights of a group": (
        {"weights": {"f": 0.5}, "group_weights": {"f": 0.4}},
        r"Group 'f' has two weights, 0.5 and 0.4; give one",
    ),
    "a weight of what is off": (
        {"weights": {"f": 0.5}, "off": ["f"]},
        r"'f' is switched off and has the weight 0.5; leave one of them out",
    ),
    "weights within what is off": (
        {"weights": {"f": {"a": 1.0}}, "off": ["f"]},
        r"Group 'f' is off and has weights \{'a': 1.0\} within; leave one of them out",
    ),
    "a weight of an expert that is off": ({"weights": {"f": {"a": 1.0}}, "off": ["f/a"]}, r"'a' is switched off"),
    "everything off": (
        {"off": ["f", "s", "t/b"]},
        r"Everything in the groups is switched off; leave one on, or use mix=0 for the general expert",
    ),
    "a mix above 1": ({"mix": 1.1}, r"mix is 1.1; weights are shares"),
    "a mix that is text": ({"mix": "0.5"}, r"mix is '0.5'; weights are shares"),
    "no such adapter": ({"adapter_name": "other"}, r"adapter_name='other'; the model has \['default'\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_cannot_be_are_refused_and_those_before_stay(case, folder):
    control, message = REFUSED[case]
    model, inputs = mixture(folder), make_inputs("llama")
    model.set_group_weights({"f": 0.7}, off=["s/a"])
    before = logits(model, inputs)
    with pytest.raises(ValueError, match=message):
        model.set_group_weights(**control, store=True)
    with pytest.raises(ValueError, match=message), model.routing(**control):
        raise AssertionError("not entered")
    assert model.active_peft_config.group_weights is None
    assert torch.equal(logits(model, inputs), before)
    if "adapter_name" not in control:
        with pytest.raises(ValueError, match=message):
            config(folder, group_weights=control)


def test_a_share_of_the_mixture_needs_a_general_expert(folder, tmp_path):
    model = mixture(folder, general_expert=None, mix=None)
    message = r"mix=0.5: the adapter has no general expert to share with; leave mix out"
    with pytest.raises(ValueError, match=message):
        model.set_group_weights(mix=0.5)
    with pytest.raises(ValueError, match=message):
        fold(model, tmp_path / "f", routing={"mix": 0.5})


@pytest.mark.parametrize("router_input", ["token", "prompt"])
@pytest.mark.parametrize("case", ["a group's weight", "one expert alone", "experts off", "all of it"])
def test_fixed_weights_give_the_same_bits_again_and_after_loading(case, router_input, folder, tmp_path):
    control, inputs = CONTROLS[case], make_inputs("llama", labels=False)
    model = mixture(folder, router_input=router_input)
    free = logits(model, inputs)
    with model.routing({"t": 1.0}):
        model.set_group_weights(**control, store=True)
        expected = logits(model, inputs)
        assert torch.equal(logits(model, inputs), expected)
    model.set_group_weights(**control)
    assert torch.equal(logits(model, inputs), expected)
    model.save_pretrained(tmp_path / "stored")
    saved = json.loads((tmp_path / "stored" / "adapter_config.json").read_text())
    assert saved["group_weights"] == control
    loaded = PeftModel.from_pretrained(make_model("llama"), tmp_path / "stored").eval()
    assert torch.equal(logits(loaded, inputs), expected)
    loaded.set_group_weights()  # for now
    assert torch.equal(logits(loaded, inputs), free)
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["group_weights"] == control
    loaded.set_group_weights(store=True)  # for good
    loaded.save_pretrained(tmp_path / "cleared")
    assert json.loads((tmp_path / "cleared" / "adapter_config.json").read_text())["group_weights"] is None
    cleared = PeftModel.from_pretrained(make_model("llama"), tmp_path / "cleared").eval()
    assert torch.equal(logits(cleared, inputs), free)


def test_fixed_weights_are_stored_only_if_that_is_asked_for(folder, tmp_path):
    model, inputs = mixture(folder), make_inputs("llama")
    free = logits(model, inputs)
    model.set_group_weights(off=["f"])
    with model.routing({"t": 1.0}):
        model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["group_weights"] is None
    assert torch.equal(logits(PeftModel.from_pretrained(make_model("llama"), tmp_path).eval(), inputs), free)


@pytest.mark.parametrize("number", [np.float32, np.float64, Fraction])
def test_numbers_of_other_libraries_are_stored_as_plain_ones(number, folder, tmp_path):
    model, inputs = mixture(folder), make_inputs("llama")
    weights, own, mix = {"f": {"a": number(0.25)}}, {"s": number(0.5)}, number(0.75)
    model.set_group_weights(weights, group_weights=own, mix=mix, store=True)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["group_weights"]
    assert saved == {"weights": {"f": {"a": 0.25}}, "group_weights": {"s": 0.5}, "mix": 0.75}
    assert torch.equal(logits(PeftModel.from_pretrained(make_model("llama"), tmp_path).eval(), inputs), expected)


def test_what_is_stored_does_not_change_with_what_it_was_made_of(folder):
    model, mine = mixture(folder), {"f": {"a": 1.0}}
    model.set_group_weights(mine, store=True)
    mine["f"]["a"] = 0.5
    assert model.active_peft_config.group_weights == {"weights": {"f": {"a": 1.0}}}


def test_with_blocks_nest_and_give_back_what_was_before_even_after_errors(folder):
    model, inputs = mixture(folder), make_inputs("llama")
    outcomes = {}
    for name, control in {
        "free": {},
        "set": {"off": ["f"]},
        "outer": {"weights": {"t": 1.0}},
        "inner": {"mix": 0},
    }.items():
        model.set_group_weights(**control)
        outcomes[name] = logits(model, inputs)

    def now():
        (name,) = (name for name, outcome in outcomes.items() if torch.equal(logits(model, inputs), outcome))
        return name

    model.set_group_weights()
    with suppress(KeyError), model.routing({"t": 1.0}):
        assert now() == "outer"
        raise KeyError
    assert now() == "free"
    model.set_group_weights(off=["f"])
    with model.routing({"t": 1.0}):
        assert now() == "outer"
        with suppress(ZeroDivisionError), model.routing(mix=0):  # in place of it, not on top of it
            assert now() == "inner"
            raise ZeroDivisionError
        assert now() == "outer"
        with pytest.raises(ValueError, match="is no group"), model.routing({"x": 1.0}):
            pass
        assert now() == "outer"
        with model.routing():
            assert now() == "free"
        model.set_group_weights(mix=0)
        assert now() == "inner"
    assert now() == "set"


def test_blocks_of_several_threads_take_turns(folder):
    model, inputs = mixture(folder), make_inputs("llama", labels=False)
    inside, other = threading.Event(), threading.Event()

    def second():
        inside.wait()
        with model.routing(mix=0.0):
            other.set()

    before = dict(model.base_model.context.controls)
    with ThreadPoolExecutor(1) as pool:
        with model.routing(mix=1.0):
            waiting = pool.submit(second)
            inside.set()
            assert not other.wait(0.2)
            logits(model, inputs)
        waiting.result()
    assert other.is_set()
    assert model.base_model.context.controls == before


def test_what_was_fixed_in_inference_can_be_trained(folder):
    model, inputs = mixture(folder), make_inputs("llama")
    with torch.inference_mode():
        model.set_group_weights(mix=0.5)
        model(**inputs)
    model.train()(**inputs).loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


def test_the_order_of_names_is_that_of_the_config_also_after_loading(folder, tmp_path):
    """JSON sorts the names in a mapping, and experts lie in a layer in the order of the config."""
    sources, inputs = make_experts("llama", folder), make_inputs("llama")
    groups = {"z": {"b": sources["b"], "a": sources["a"]}, "a": {"c": sources["c"]}}
    torch.manual_seed(0)
    fields = {"groups": groups, "general_expert": sources["p"], "init_lora_weights": False}
    model = get_peft_model(make_model("llama"), GroupedMoeConfig(task_type="CAUSAL_LM", **fields)).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("llama"), tmp_path).eval()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    assert [(group, list(names)) for group, names in loaded.active_peft_config.groups.items()] == [
        ("z", ["b", "a"]),
        ("a", ["c"]),
    ]
    for control in ({"weights": {"z": {"b": 1.0}}}, {"off": ["a"]}, {"weights": {"a": 0.75}, "off": ["z/a"]}):
        with model.routing(**control), loaded.routing(**control):
            assert torch.equal(logits(loaded, inputs), logits(model, inputs))
            assert str(loaded.explain(inputs)) == str(model.explain(inputs))


def test_generate_follows_fixed_weights(folder):
    model = mixture(folder)
    inputs = make_inputs("llama", labels=False)
    stock = PeftModel.from_pretrained(make_model("llama"), make_experts("llama", folder)["b"]).eval()
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with model.routing({"t": 1.0}, mix=1.0):
        assert torch.equal(model.generate(**inputs, **settings), stock.generate(**inputs, **settings))


# training


def losses_and_gradients(model, inputs, controls, *, backward_inside):
    model.zero_grad()
    losses = []
    for control in controls:
        with model.routing(**control):
            losses.append(model(**inputs).loss)
            if backward_inside:
                losses[-1].backward()
    if not backward_inside:
        sum(losses).backward()
    return [loss.item() for loss in losses], adapter_gradients(model)


@pytest.mark.parametrize("router_input", ["token", "prompt"])
@pytest.mark.parametrize("use_reentrant", [True, False, None])
def test_backward_after_the_with_block_has_the_weights_of_its_own_forward(use_reentrant, router_input, folder):
    """Gradient checkpointing runs the layers again in backward, when other weights are fixed or none."""
    inputs = make_inputs("llama")
    inputs["labels"][:, :2] = -100
    controls = [{"weights": {"f": 0.7}, "off": ["f/a"]}, {}, {"weights": {"s": {"a": 1.0}}, "mix": 0.25}]
    model = mixture(folder, router_input=router_input, learn_mix=True).train()
    expected = losses_and_gradients(model, inputs, controls, backward_inside=True)
    assert len({round(loss, 4) for loss in expected[0]}) == 3
    if use_reentrant is not None:
        model.enable_input_require_grads()
        enable_checkpointing(model, use_reentrant)
    model.set_group_weights({"t": 1.0})  # what is fixed while backward runs
    found = losses_and_gradients(model, inputs, controls, backward_inside=False)
    assert found[0] == pytest.approx(expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_fixed_weights_get_no_gradient_and_free_ones_do(folder):
    model, inputs = mixture(folder).train(), make_inputs("llama")
    with model.routing({"f": {"a": 1.0}}):
        model(**inputs).loss.backward()
    for router in dict(model.base_model.routers()).values():
        groups, experts = router.gate.weight.grad.split([3, 6])
        assert (groups.abs().sum(1) > 0).all()
        assert (experts.abs().sum(1) > 0).tolist() == [False, False, False, True, True, False]


# several adapters


def test_each_adapter_has_fixed_weights_of_its_own(folder):
    inputs = make_inputs("llama")
    model = mixture(folder)
    first = logits(model, inputs)
    sources = make_experts("llama", folder)
    second = GroupedMoeConfig(
        task_type="CAUSAL_LM", groups={"g": {"x": sources["a"], "y": sources["c"]}}, group_weights={"off": ["g/y"]}
    )
    model.add_adapter("second", second)
    assert torch.equal(logits(model, inputs), first)
    model.set_group_weights({"g": {"y": 1.0}}, adapter_name="second")
    assert torch.equal(logits(model, inputs), first)
    with pytest.raises(ValueError, match="'g' is no group; there are"):
        model.set_group_weights({"g": {"y": 1.0}})
    model.set_group_weights({"t": 1.0}, mix=1.0)
    stock = {
        name: logits(PeftModel.from_pretrained(make_model("llama"), sources[name]).eval(), inputs) for name in "abc"
    }
    close(logits(model, inputs), stock["b"])
    model.set_adapter("second")
    close(logits(model, inputs), stock["c"])
    with model.routing({"g": {"x": 1.0}}):
        close(logits(model, inputs), stock["a"])
    with pytest.raises(ValueError, match="'t' is no group; there are"):
        model.set_group_weights({"t": 1.0})
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"active adapters are \['default', 'second'\]; say which with adapter_name="):
        model.set_group_weights()
    with pytest.raises(ValueError, match=r"active adapters are \['default', 'second'\]"):
        model.explain(inputs)
    together = logits(model, inputs)
    with model.routing(mix=0, adapter_name="default"):
        assert not torch.allclose(logits(model, inputs), together, atol=1e-4)
        assert set(model.explain(inputs, adapter_name="default").mix.values()) == {0.0}
        assert model.explain(inputs, adapter_name="second").groups == {"g": ["x", "y"]}
    assert torch.equal(logits(model, inputs), together)
    model.set_adapter("default")
    model.delete_adapter("second")
    model.add_adapter("second", GroupedMoeConfig(task_type="CAUSAL_LM", groups={"h": {"a": sources["a"]}}))
    model.set_adapter("second")  # another one of that name has nothing fixed
    close(logits(model, inputs), stock["a"])
    assert list(model.base_model.context.controls) == ["default"]


# explain


def test_an_explanation_has_the_names_of_blocks_groups_and_experts(folder):
    model = mixture(folder)
    explained = model.explain(make_inputs("llama", batch=2, seq=7))
    assert explained.blocks == ("model.layers.0", "model.layers.1")
    assert explained.groups == GROUPS
    assert explained.per_token
    for block in explained.blocks:
        weights = explained.weights(block)
        assert {group: list(experts) for group, experts in weights.items()} == GROUPS
        shapes = {tuple(weight.shape) for experts in weights.values() for weight in experts.values()}
        assert shapes == {(2, 7)}
        total = sum(weight for experts in weights.values() for weight in experts.values())
        torch.testing.assert_close(total, torch.ones(2, 7))
        torch.testing.assert_close(explained.group_weights[block].sum(-1), torch.ones(2, 7))
        assert explained.mix[block] == 0.75
        assert not explained.group_weights[block].requires_grad


def test_an_explanation_is_what_the_router_s_parameters_make_of_the_hidden_states(folder):
    model, inputs = mixture(folder, group_temperature=0.5, expert_temperature=2.0), make_inputs("llama")
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    explained = model.explain(inputs)
    for i, (block, router) in enumerate(model.base_model.routers()):
        e = states[i] * (states[i].square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        groups, *rows = (e @ router.gate.weight.T).split([3, 3, 2, 1], dim=-1)
        groups = (groups / 0.5).softmax(-1)
        for j, (group, names) in enumerate(GROUPS.items()):
            within = (rows[j] / 2.0).softmax(-1)
            for k, name in enumerate(names):
                expected = groups[..., j] * within[..., k]
                torch.testing.assert_close(explained.weights(block)[group][name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked_and_does_not_count_in_means(side, folder):
    model, inputs = mixture(folder), make_inputs("llama", labels=False)
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[0, slice(0, 3) if side == "left" else slice(2, 5)] = 0
    explained = model.explain({**inputs, "attention_mask": mask})
    for block in explained.blocks:
        assert torch.equal(explained.masks[block], mask.bool())
        of_a = explained.weights(block)["f"]["a"]
        assert explained.means()[block]["f"]["a"] == pytest.approx(float(of_a[mask.bool()].mean()))
        assert explained.means(row=0)[block]["f"]["a"] == pytest.approx(float(of_a[0][mask[0].bool()].mean()))
        assert explained.means(row=1)[block]["f"]["a"] == pytest.approx(float(of_a[1].mean()))
    total = [sum(sum(experts.values()) for experts in groups.values()) for groups in explained.means(row=0).values()]
    assert total == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("arch", ["llama", "bert", "vit"])
def test_an_explanation_per_prompt_has_one_decision_for_a_row(arch, folder):
    model, inputs = grouped(arch, folder, router_input="prompt"), make_inputs(arch, labels=False)
    explained = model.explain(inputs)
    assert len(explained.blocks) == 2
    assert not explained.per_token
    for block in explained.blocks:
        weights = explained.weights(block)
        assert {tuple(weight.shape) for experts in weights.values() for weight in experts.values()} == {(3,)}
        torch.testing.assert_close(weights["f"]["a"] + weights["f"]["b"] + weights["s"]["c"], torch.ones(3))
        assert explained.masks[block] is None
        assert explained.means()[block]["s"]["c"] == pytest.approx(float(weights["s"]["c"].mean()))
        assert explained.means(row=2)[block]["s"]["c"] == pytest.approx(float(weights["s"]["c"][2]))


@pytest.mark.parametrize("arch", ["opt", "gpt2", "bert", "t5", "vit"])
def test_every_architecture_is_explained(arch, folder):
    model, inputs = grouped(arch, folder), make_inputs(arch, labels=False)
    explained = model.explain(inputs)
    assert set(explained.blocks) == {name for name, _ in model.base_model.routers()}
    for block in explained.blocks:
        weights = explained.weights(block)
        assert {weight.dim() for experts in weights.values() for weight in experts.values()} == {2}
        total = sum(weight for experts in weights.values() for weight in experts.values())
        assert len(total) == 3
        torch.testing.assert_close(total, torch.ones_like(total))


def test_layers_with_routers_of_their_own_are_explained_by_their_names():
    fields = {"train_experts": True, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}
    groups = {"g": {"x": None, "y": None}, "h": {"z": None}}
    torch.manual_seed(0)
    model = get_peft_model(make_model("llama"), GroupedMoeConfig(groups=groups, **fields)).eval()
    explained = model.explain(make_inputs("llama"))
    assert explained.blocks == ("model.layers.0", "model.layers.1", "lm_head")
    assert explained.weights("lm_head")["g"]["x"].shape == (3, 5)


@pytest.mark.parametrize("fields", [{}, {"router_input": "prompt"}, {"learn_mix": True}, {"within_group": "static"}])
def test_an_explanation_can_be_kept_as_json(fields, folder):
    model, inputs = mixture(folder, **fields), make_inputs("llama", labels=False)
    explained = model.explain(inputs)
    kept = json.loads(json.dumps(explained.to_dict()))
    assert list(kept) == list(explained.blocks)
    for block, entry in kept.items():
        assert {group: list(experts) for group, experts in entry["experts"].items()} == GROUPS
        assert list(entry["groups"]) == list(GROUPS)
        assert torch.equal(torch.tensor(entry["experts"]["f"]["a"]), explained.weights(block)["f"]["a"])
        assert torch.equal(torch.tensor(entry["groups"]["s"]), explained.group_weights[block][..., 1])
        assert entry["mix"] == explained.mix[block]
        assert (entry["mask"] is None) == (explained.masks[block] is None)


def test_an_explanation_is_printed_as_a_table(folder):
    model = mixture(folder)
    with model.routing({"f": {"a": 1.0}}, group_weights={"f": 0.5, "s": 0.5}, off=["s/c"], mix=0.25):
        lines = str(model.explain(make_inputs("llama"))).splitlines()
    assert [line.split() for line in lines] == [
        ["block", *NAMES, "λ"],
        ["model.layers.0", "0.500", "0.000", "0.000", "0.000", "0.500", "0.000", "0.250"],
        ["model.layers.1", "0.500", "0.000", "0.000", "0.000", "0.500", "0.000", "0.250"],
    ]
    assert len({line.index("  0.250") for line in lines[1:]}) == 1
    assert lines[1].index("0.500") == lines[0].index("f/a")


@pytest.mark.parametrize("train", [True, False])
def test_explaining_changes_nothing(train, folder):
    model, inputs = mixture(folder, lora_dropout=0.5, train_experts=True).train(train), make_inputs("llama")
    frozen_part = model.base_model.model.model.layers[0].mlp
    frozen_part.train(not train)
    before = {name: module.training for name, module in model.named_modules()}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        expected = model(**inputs).logits
    first, second = model.explain(inputs), model.explain(inputs)  # without dropout
    for block in first.blocks:
        assert torch.equal(first.group_weights[block], second.group_weights[block])
    assert {name: module.training for name, module in model.named_modules()} == before
    with torch.random.fork_rng():
        torch.manual_seed(1)
        again = model(**inputs)
    assert torch.equal(again.logits, expected)
    again.loss.backward()
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model.explain({})
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(router.seen is None for _, router in model.base_model.routers())
    assert not model.base_model.recording


def test_an_explanation_takes_what_a_tokenizer_gives(folder):
    model, inputs = mixture(folder), make_inputs("llama", labels=False)
    of_dict, of_encoding = model.explain(inputs), model.explain(BatchEncoding(inputs))
    assert torch.equal(of_dict.group_weights["model.layers.1"], of_encoding.group_weights["model.layers.1"])


def test_an_adapter_that_is_not_asked_is_not_explained(folder):
    model, inputs = mixture(folder), make_inputs("llama")
    model.add_adapter("second", config(folder))
    message = "No router of adapter '{}' was asked; is it active and enabled?"
    with pytest.raises(ValueError, match=message.format("second")):
        model.explain(inputs, adapter_name="second")
    with model.disable_adapter(), pytest.raises(ValueError, match=message.format("default")):
        model.explain(inputs)
    with pytest.raises(ValueError, match=r"adapter_name='third'; the model has \['default', 'second'\]"):
        model.explain(inputs, adapter_name="third")


# one LoRA where nothing is left to decide

# of f (a, b), s (c) and the general expert p
FIXED = {"weights": {"f": {"a": 0.25, "b": 0.75}}, "group_weights": {"f": 0.4, "s": 0.6}, "mix": 0.7}
SHARES = {"a": 0.7 * 0.4 * 0.25, "b": 0.7 * 0.4 * 0.75, "c": 0.7 * 0.6, "p": 0.3}


def loaded_logits(arch, directory, inputs):
    return logits(PeftModel.from_pretrained(make_model(arch), directory).eval(), inputs)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_fixed_weights_are_one_lora_however_it_is_made(arch, folder, tmp_path):
    model, inputs = grouped(arch, folder), make_inputs(arch, labels=False)
    model.set_group_weights(**FIXED)
    expected = logits(model, inputs)
    # the folder of the adapter, which does not know what is fixed, and one that does
    model.save_pretrained(tmp_path / "adapter")
    model.set_group_weights(**FIXED, store=True)
    model.save_pretrained(tmp_path / "stored")
    model.active_peft_config.group_weights = None
    for i, (source, routing) in enumerate([(model, None), (tmp_path / "adapter", FIXED), (tmp_path / "stored", None)]):
        close(loaded_logits(arch, fold(source, tmp_path / f"folded-{i}", routing=routing), inputs), expected)
    config, state_dict = convert_to_lora(model, rank=14)  # the sum of the ranks
    config.fan_in_fan_out = arch == "gpt2"
    stock = get_peft_model(make_model(arch), config).eval()
    assert not set_peft_model_state_dict(stock, state_dict).unexpected_keys
    if arch == "bert":  # a new head, which peft leaves out
        stock.base_model.model.classifier = model.base_model.model.classifier
    torch.testing.assert_close(logits(stock, inputs), expected, rtol=1e-3, atol=1e-4)
    weights = [layer.get_base_weight().clone() for layer in routed_layers(model)]
    for safe_merge in (False, True):
        model.merge_adapter(safe_merge=safe_merge)
        assert all(layer.merged for layer in routed_layers(model))
        close(logits(model, inputs), expected)
        model.unmerge_adapter()
        for layer, weight in zip(routed_layers(model), weights, strict=True):
            torch.testing.assert_close(layer.get_base_weight(), weight, rtol=1e-6, atol=1e-6)
        close(logits(model, inputs), expected)
    merged = model.merge_and_unload()
    close(logits(merged, inputs), expected)
    assert not routed_layers(merged)
    assert not any("forward" in vars(module) or "generate" in vars(module) for module in merged.modules())


@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
def test_what_is_added_to_a_weight_is_the_sum_of_the_loras_shares(arch, folder):
    model = grouped(arch, folder)
    model.set_group_weights(**FIXED)
    layers = {name: read_expert(source).layers for name, source in make_experts(arch, folder).items()}
    for key, module in model.base_model.model.named_modules():
        if module in routed_layers(model):
            expected = torch.zeros(module.out_features, module.in_features)
            for name, share in SHARES.items():
                if key in layers[name]:
                    lora = layers[name][key]
                    expected += share * lora.scaling * lora.b @ lora.a
            expected = expected.T if arch == "gpt2" else expected
            close(module.get_delta_weight("default"), expected)


# what is not free though nobody fixed it, and what becomes so
SETTLED = {
    "one group by its weight": ({}, {"group_weights": {"s": 1.0}}),
    "one group by what is off": ({}, {"off": ["f"]}),
    "one expert": ({}, {"weights": {"f": {"b": 1.0}, "s": 0}}),
    "one expert by what is off": ({}, {"off": ["s", "f/a"]}),
    "numbers within fixed groups": ({"within_group": "static"}, {"weights": {"f": 0.3, "s": 0.7}}),
    "a share that was learnt": (
        {"learn_mix": True},
        {"weights": {"f": {"a": 0.5, "b": 0.5}}, "group_weights": {"f": 1}},
    ),
    "numbers without groups": ({"flat_routing": True, "within_group": "static"}, {}),
    "numbers without groups, one fixed": ({"flat_routing": True, "within_group": "static"}, {"off": ["f/a"]}),
    "a learnt share of numbers": ({"learn_mix": True, "flat_routing": True, "within_group": "static"}, {}),
    "the general expert alone": ({}, {"mix": 0}),
    "the general expert alone from the start": ({"mix": 0.0}, {}),
    "no groups": ({"flat_routing": True}, FIXED),
    "prompts": ({"router_input": "prompt"}, FIXED),
    "trained experts": ({"train_experts": True}, FIXED),
    "without a general expert": ({"general_expert": None}, {k: v for k, v in FIXED.items() if k != "mix"}),
}


@pytest.mark.parametrize("case", SETTLED)
def test_what_depends_on_no_input_is_merged_and_folded_exactly(case, folder, tmp_path):
    fields, control = SETTLED[case]
    model, inputs = grouped("llama", folder, **fields), make_inputs("llama")
    if "learn_mix" in fields:
        for i, (_, router) in enumerate(model.base_model.routers()):
            router.gate.mix_bias.data.fill_(2.0 * i - 1)
    with model.routing(**control):
        expected = logits(model, inputs)
        close(loaded_logits("llama", fold(model, tmp_path / "0"), inputs), expected)
        model.save_pretrained(tmp_path / "adapter")
        close(loaded_logits("llama", fold(tmp_path / "adapter", tmp_path / "1", routing=control), inputs), expected)
        model.merge_adapter()
    close(logits(model, inputs), expected)  # merged weights stay what they were
    model.unmerge_adapter()
    with model.routing(**control):
        close(logits(model, inputs), expected)


@pytest.mark.parametrize("fields", [{}, {"within_group": "static"}, {"flat_routing": True}, {"router_input": "prompt"}])
def test_one_group_of_one_expert_is_one_lora_with_nothing_fixed(fields, folder, tmp_path):
    source, inputs = make_experts("llama", folder)["b"], make_inputs("llama")
    model = get_peft_model(make_model("llama"), GroupedMoeConfig(groups={"g": {"x": source}}, **fields)).eval()
    model.save_pretrained(tmp_path / "adapter")
    expected = loaded_logits("llama", source, inputs)
    for i, of in enumerate((model, tmp_path / "adapter")):
        close(loaded_logits("llama", fold(of, tmp_path / str(i)), inputs), expected)
    close(logits(model.merge_and_unload(), inputs), expected)


GROUPS_FREE, F_FREE = "the weights of the groups", "the weights within 'f'"
FREE = {
    "everything": ({}, {}, f"{GROUPS_FREE}, {F_FREE}"),
    "the groups": ({}, {"weights": {"f": {"a": 1.0}}}, GROUPS_FREE),
    "the groups by an expert that is off": ({}, {"off": ["f/b"]}, GROUPS_FREE),
    "within a group": ({}, {"weights": {"f": 0.5, "s": 0.5}}, F_FREE),
    "within the group that is left": ({}, {"off": ["s"]}, F_FREE),
    "the share only is fixed": ({}, {"mix": 1.0}, f"{GROUPS_FREE}, {F_FREE}"),
    "groups over numbers": ({"within_group": "static"}, {}, GROUPS_FREE),
    "without groups": ({"flat_routing": True}, {"weights": {"f": {"a": 1.0}}}, GROUPS_FREE),
    "by prompts": ({"router_input": "prompt"}, {"off": ["s"]}, F_FREE),
}


@pytest.mark.parametrize("case", FREE)
def test_what_is_still_free_is_said_and_nothing_is_merged(case, folder, tmp_path):
    fields, control, free = FREE[case]
    model, inputs = grouped("llama", folder, **fields), make_inputs("llama")
    model.set_group_weights(**control, store=True)
    model.save_pretrained(tmp_path / "adapter")
    before, weights = logits(model, inputs), {n: p.clone() for n, p in model.named_parameters()}
    message = f"Adapter 'default' cannot be merged exactly while {free} depend on the input; fix them.*moe.calibrate"
    layer = routed_layers(model)[-1]
    for merge in (
        model.merge_adapter,
        model.merge_and_unload,
        partial(model.merge_adapter, safe_merge=True),
        partial(model.merge_adapter, adapter_names=["default"]),
        partial(layer.get_delta_weight, "default"),
        layer.merge,
    ):
        with pytest.raises(ValueError, match=message):
            merge()
    assert not any(layer.merged for layer in routed_layers(model))
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(logits(model, inputs), before)
    for source in (model, tmp_path / "adapter"):
        message = rf"cannot be folded while {free} depend on the input; fix them \(routing=.*peft_moe.calibrate\(model"
        with pytest.raises(ValueError, match=message):
            fold(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not layer.supports_lora_conversion()
    with pytest.raises(TypeError, match="do not support LoRA conversion: .*MoeLinear"):
        convert_to_lora(model, rank=8)


def test_an_adapter_that_can_be_merged_is_not_if_another_cannot(folder):
    model, inputs = grouped("llama", folder), make_inputs("llama")
    model.add_adapter("second", config(folder))
    model.base_model.set_adapter(["default", "second"])
    model.set_group_weights(**FIXED, adapter_name="default")
    before = logits(model, inputs)
    with pytest.raises(ValueError, match="Adapter 'second' cannot be merged exactly while the weights of the groups, "):
        model.merge_adapter()
    assert not any(layer.merged for layer in routed_layers(model))
    assert torch.equal(logits(model, inputs), before)
    model.set_group_weights(**CONTROLS["one expert alone"], adapter_name="second")
    before = logits(model, inputs)
    model.merge_adapter()
    close(logits(model, inputs), before)
    model.unmerge_adapter()
    close(logits(model, inputs), before)


def test_while_an_adapter_is_merged_its_weights_cannot_be_changed(folder):
    model, inputs = grouped("llama", folder), make_inputs("llama")
    free = logits(model, inputs)
    model.set_group_weights(**FIXED)
    fixed = logits(model, inputs)
    model.merge_adapter()
    message = r"Adapter 'default' is merged with the weights it had then; call model.unmerge_adapter\(\) first"
    for control in (FIXED, {}, {"off": ["s"]}):
        with pytest.raises(ValueError, match=message):
            model.set_group_weights(**control)
        with pytest.raises(ValueError, match=message), model.routing(**control):
            raise AssertionError("not entered")
    with pytest.raises(ValueError, match=message):
        model.explain(inputs)
    close(logits(model, inputs), fixed)
    with model.disable_adapter():
        close(logits(model, inputs), logits(make_model("llama"), inputs))
    close(logits(model, inputs), fixed)  # disabling has taken them out
    model.set_group_weights()
    close(logits(model, inputs), free)


def test_unmerging_takes_out_what_was_put_in_whatever_is_trained_meanwhile(folder):
    model, inputs = grouped("llama", folder, learn_mix=True), make_inputs("llama")
    model.set_group_weights({"s": 1.0})
    model.merge_adapter()
    for _, router in model.base_model.routers():
        router.gate.mix_bias.data += 3
    model.unmerge_adapter()
    with model.disable_adapter():
        close(logits(model, inputs), logits(make_model("llama"), inputs))


def test_a_folded_adapter_is_a_stock_lora_of_one_rank(folder, tmp_path):
    model = grouped("llama", folder)
    out = fold(model, tmp_path / "f", routing=FIXED)
    saved = json.loads((out / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["r"], saved["lora_alpha"], saved["rank_pattern"]) == ("LORA", 14, 14, {})
    state_dict = load_file(out / "adapter_model.safetensors")
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in state_dict)
    assert {t.shape[0] for key, t in state_dict.items() if "lora_A" in key} == {14}
    assert "groups f (a, b), s (c) with fixed weights, folded by peft_moe" in (out / "README.md").read_text()
    again = read_expert(out)  # and can be an expert again
    assert sorted(again.layers) == sorted(key.removesuffix(".lora_A.weight")[17:] for key in state_dict if "_A." in key)


@pytest.mark.long
def test_a_folded_adapter_loads_where_peft_moe_is_not_installed(folder, tmp_path):
    model, inputs = grouped("llama", folder), make_inputs("llama", labels=False)
    make_model("llama").save_pretrained(tmp_path / "base")
    fold(model, tmp_path / "f", routing=FIXED)
    torch.save(inputs, tmp_path / "inputs.pt")
    code = """
import sys, torch
sys.modules["peft_moe"] = None  # any import of it fails
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "f").eval()
with torch.no_grad():
    torch.save(model(**torch.load("inputs.pt")).logits, "logits.pt")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    model.set_group_weights(**FIXED)
    close(torch.load(tmp_path / "logits.pt"), logits(model, inputs))


# the command


@pytest.fixture
def adapter(folder, tmp_path):
    grouped("llama", folder).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_card_of_a_fold_says_which_weights_were_fixed(folder, tmp_path):
    def said(out):
        return " ".join((out / "README.md").read_text().split())

    model = mixture(folder)
    model.set_group_weights({"f": {"a": 1.0}}, group_weights={"f": 1.0}, store=True)
    assert f"the adapter with its weights fixed by `{model.active_peft_config.group_weights}`" in said(
        fold(model, tmp_path / "stored")
    )
    others = {"weights": {"f": {"b": 1.0}}, "group_weights": {"f": 1.0}, "mix": 1.0}
    with model.routing(**others):
        assert "the adapter with those weights" in said(fold(model, tmp_path / "for now"))
    assert f"fixed by `{others}`" in said(fold(model, tmp_path / "given", routing=others))


def test_the_command_folds_what_is_fixed_by_it_or_in_the_adapter(adapter, tmp_path, capsys):
    model, inputs = PeftModel.from_pretrained(make_model("llama"), adapter).eval(), make_inputs("llama")
    out = tmp_path / "out"
    assert main(["fold", str(adapter), "--routing", json.dumps(FIXED), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"fixed weights: {out}\n"
    with model.routing(**FIXED):
        close(loaded_logits("llama", out, inputs), logits(model, inputs))
    model.set_group_weights(off=["f"], store=True)
    model.save_pretrained(adapter)
    assert main(["fold", str(adapter), "--out", str(out)]) == 1
    assert "already" in capsys.readouterr().err
    assert main(["fold", str(adapter), "--out", str(out), "--overwrite"]) == 0
    close(loaded_logits("llama", out, inputs), logits(model, inputs))
    # in place of what is stored, not on top of it
    command = [
        "fold",
        str(adapter),
        "--out",
        str(out),
        "--overwrite",
        "--routing",
        '{"weights": {"f": {"a": 1}, "s": 0}}',
    ]
    assert main(command) == 0
    with model.routing({"f": {"a": 1}, "s": 0}):
        close(loaded_logits("llama", out, inputs), logits(model, inputs))


COMMANDS = {
    "nothing fixed": (
        [],
        r"cannot be folded while the weights of the groups, the weights within 'f' depend on the input",
    ),
    "part of it fixed": (["--routing", '{"off": ["s"]}'], r"cannot be folded while the weights within 'f' depend"),
    "no such group": (["--routing", '{"weights": {"x": 1}}'], r"'x' is no group; there are \['f', 's'\]"),
    "an argument that is none": (
        ["--routing", '{"wieghts": {}}'],
        r"\{'wieghts': \{\}\} fixes no weights; give a mapping of",
    ),
    "weights that are none": (["--routing", '{"weights": 1}'], r"weights=1 is no mapping"),
    "a task": (["--task", "icd"], r"task='icd': AT-MoE adapters choose experts by no task; leave task= out"),
    "all tasks": (["--all-tasks"], r"knows no tasks, and --all-tasks folds each; fix its weights by --routing"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_the_command_fails_with_one_line(case, adapter, tmp_path, capsys):
    arguments, message = COMMANDS[case]
    assert main(["fold", str(adapter), "--out", str(tmp_path / "out"), *arguments]) == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(capsys.readouterr().err.removeprefix("peft-moe: ").removesuffix("\n"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", "[1]", "f"])
def test_the_command_takes_json_only(text, adapter, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["fold", str(adapter), "--out", str(tmp_path / "out"), "--routing", text])
    assert "argument --routing: invalid" in capsys.readouterr().err


def test_adapters_with_tasks_are_not_fixed(tmp_path):
    model = get_peft_model(make_model("llama"), config_for("llama"))
    with pytest.raises(ValueError, match=r"MOELORA adapters are folded for a task; pass task= with one of \['icd', "):
        fold(model, tmp_path / "f", routing={})


def test_stock_loras_have_no_weights_to_fix(tmp_path):
    stock = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"], task_type=TASK_TYPES["llama"]))
    assert not hasattr(stock, "set_group_weights")
    with pytest.raises(ValueError, match="is a LORA adapter; fold takes adapters of peft_moe"):
        fold(stock, tmp_path / "f", routing=FIXED)


def test_a_folded_adapter_has_no_place_for_experts_that_get_nothing(tmp_path):
    model = grouped("llama", tmp_path)
    with model.routing({"s": {"c": 1.0}}, group_weights={"s": 1.0}, mix=1.0):
        expected = logits(model, make_inputs("llama"))
        fold(model, tmp_path / "folded")
    config = json.loads((tmp_path / "folded" / "adapter_config.json").read_text())
    ranks = {bank.ranks[2] for bank in (layer.moelora_bank["default"] for layer in routed_layers(model))}
    assert config["r"] == max(ranks) < max(sum(layer.moelora_bank["default"].ranks) for layer in routed_layers(model))
    stock = PeftModel.from_pretrained(make_model("llama"), tmp_path / "folded").eval()
    torch.testing.assert_close(logits(stock, make_inputs("llama")), expected, rtol=1e-4, atol=1e-5)
