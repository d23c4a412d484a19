"""The way that layers take without a gradient, against the general one: where it is taken, and where it must not be.

The reference is the same model in plain PyTorch.
"""

import copy
import io
import itertools
import pickle
from functools import partial

import pytest
import torch
from helpers import logits, plain, routed_layers
from kinds import KINDS, config_of, two_adapters
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import EOS, PAD, make_inputs, make_model
from torch import nn
from torch.nn.utils import parametrize

from peft_moe import MoLoraConfig, hotswap_adapter, kernels
from peft_moe.routing import top_k
from peft_moe.shortcut import Shortcut

DEFAULT = "default"
TOKEN = "molora"


@pytest.fixture
def runs(monkeypatch):
    """A list with an entry for each layer that took the shortcut."""
    taken, run = [], Shortcut.run

    def counted(self, x):
        taken.append(self.adapter)
        return run(self, x)

    monkeypatch.setattr(Shortcut, "run", counted)
    return taken


def routed(kind, folder, *, seed=0, dtype=None, **fields):
    """A tiny Llama with an adapter that changes the output, in eval mode."""
    torch.manual_seed(seed)
    base = make_model("llama")
    return get_peft_model(base if dtype is None else base.to(dtype), config_of(kind, "llama", folder, **fields)).eval()


def inputs_of(batch=3, seq=5):
    return make_inputs("llama", batch=batch, seq=seq, labels=False)


def in_plain(model, inputs, **kwargs):
    with plain():
        return logits(model, inputs, **kwargs)


def warm(model, inputs=None, **kwargs):
    """The logits of a second call, whose shortcut is there already."""
    inputs = inputs or inputs_of()
    logits(model, inputs, **kwargs)
    return logits(model, inputs, **kwargs)


def assert_as_plain(model, inputs=None, *, rtol=1e-5, atol=1e-5, calls=2, **kwargs):
    """In the first call after a change, and in one that may take a shortcut that was found after it."""
    inputs = inputs or inputs_of()
    expected = in_plain(model, inputs, **kwargs)
    for _ in range(calls):
        torch.testing.assert_close(logits(model, inputs, **kwargs), expected, rtol=rtol, atol=atol)
    return expected


# it is taken


# how far a model may be from plain PyTorch: float32 to its rounding; bfloat16 to a few of 2⁻⁸ of the largest logit,
# since the two round at different places and each layer passes that on
TOLERANCES = {None: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (3, 1), (1, 5), (3, 5), (3, 100)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_takes_it(kind, batch, seq, dtype, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 256)
    model, inputs = routed(kind, tmp_path, dtype=dtype), inputs_of(batch, seq)
    assert_as_plain(model, inputs, calls=2, rtol=0, atol=TOLERANCES[dtype])
    assert len(runs) == 2 * len(routed_layers(model))


VARIANTS = {
    "tasks per row": ("moelora", {}, {"task_ids": ["icd", "rad", "def"]}),
    "several tasks per row": ("moelora", {}, {"task_ids": [["icd", "rad"], ["def"], ["rad"]]}),
    "a gate per layer": ("moelora", {"gate_scope": "layer"}, {}),
    "one expert": ("moelora", {"num_experts": 1}, {}),
    "one expert of a token router": ("molora", {"num_experts": 1}, {}),
    "k of 1": ("molora", {"top_k": 3}, {}),
    "all experts": ("molora", {"top_k": 9}, {}),
    "top p": ("molora", {"top_p": 0.6}, {}),
    "shared experts": ("molora", {"num_shared_experts": 2}, {}),
    "no bias": ("molora", {"router_bias": False}, {}),
    "rslora": ("molora", {"use_rslora": True, "lora_alpha": 7}, {}),
    "ranks": ("medmoelora", {"expert_ranks": [2, 4, 3]}, {}),
    "a trained base expert": ("medmoelora", {"base_expert_mode": "regularized"}, {}),
    "a temperature": ("medmoelora", {"temperature": 0.3, "learn_temperature": False}, {}),
    "a learnt temperature": ("medmoelora", {"temperature": 0.3}, {}),
    "k of an inference": ("medmoelora", {"inference_top_k": 2}, {}),
    "several empty base experts": ("medmoelora", {"num_base_experts": 2}, {}),
    "prompts": ("at_moe", {"router_input": "prompt"}, {}),
    "a learnt mix": ("at_moe", {"learn_mix": True}, {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_gives_what_plain_pytorch_gives(variant, runs, tmp_path):
    kind, fields, kwargs = VARIANTS[variant]
    model = routed(kind, tmp_path, **fields)
    assert_as_plain(model, calls=3, **kwargs)
    assert len(runs) == 3 * len(routed_layers(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64])
def test_it_gives_what_plain_pytorch_gives_in_float64(kind, dtype, tmp_path):
    # a factor of 7 / 3, which float32 does not hold
    fields = {} if kind == "at_moe" else {"lora_alpha": 7, **({"r": 12} if kind == "moelora" else {})}
    model = routed(kind, tmp_path, dtype=dtype, **fields).double()
    assert_as_plain(model, calls=3, rtol=0, atol=TOLERANCES[dtype])


CASTS = ["model", "adapter", "bank", "router", "base"]
DTYPES = [torch.bfloat16, torch.float64]


@pytest.mark.parametrize(
    ("kind", "cast", "dtype"),
    list(itertools.product(KINDS, CASTS, DTYPES)),
)
def test_a_cast_after_a_call_is_noticed(kind, cast, dtype, tmp_path):
    model = routed(kind, tmp_path)
    warm(model)
    for module in [model] if cast == "model" else model.modules():
        if cast == "model":
            module.to(dtype)
        elif not isinstance(module, BaseTunerLayer):
            continue
        else:
            bank, router = module.bank(DEFAULT), module.router_of(DEFAULT)
            if cast in ("adapter", "bank"):
                bank.to(dtype)
            if cast in ("adapter", "router") and router is not None:
                router.to(dtype)
    if cast == "base":  # as where a half-precision base is loaded, whose adapter is float32
        for name, parameter in model.named_parameters():
            if "moelora" not in name:
                parameter.data = parameter.data.to(dtype)
    try:
        expected = in_plain(model, inputs_of())
    except RuntimeError:
        pytest.skip("plain PyTorch cannot either")
    actual = [logits(model, inputs_of()) for _ in range(3)]
    for ours in actual:
        torch.testing.assert_close(ours, expected, rtol=0, atol=3e-2)


# it is not taken


def assert_not_taken(runs, call):
    """The result of a call that does not take the shortcut."""
    runs.clear()
    result = call()
    assert not runs
    return result


def layer_of(model):
    return routed_layers(model)[0]


MODES = {
    "a gradient": lambda model: torch.enable_grad(),
    "autocast": lambda model: torch.autocast("cpu", dtype=torch.bfloat16),
    "plain": lambda model: plain(),
    "no adapter": lambda model: model.disable_adapter(),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_mode_it_is_not_for(kind, mode, runs, tmp_path):
    model, inputs = routed(kind, tmp_path), inputs_of()
    before = warm(model, inputs)
    runs.clear()
    with torch.no_grad(), MODES[mode](model):
        model(**inputs)
        assert not runs
    torch.testing.assert_close(logits(model, inputs), before)
    assert runs


def test_training_mode_draws_dropout_without_a_gradient(runs, tmp_path):
    model, inputs = routed(TOKEN, tmp_path, lora_dropout=0.5), inputs_of()
    before = warm(model, inputs)
    model.train()
    assert not torch.equal(assert_not_taken(runs, lambda: logits(model, inputs)), before)
    torch.testing.assert_close(warm(model.eval(), inputs), before)


def test_jitter_is_drawn_in_training_mode_only(runs, tmp_path):
    model, inputs = routed(TOKEN, tmp_path, router_jitter=0.9, top_k=4), inputs_of()
    before = warm(model, inputs)
    model.train()
    assert not torch.equal(assert_not_taken(runs, lambda: logits(model, inputs)), before)


def in_training(model, kind):
    for module in model.modules():
        if isinstance(module, kind):
            module.train()


PARTS_IN_TRAINING = {
    "dropout, as for Monte Carlo": lambda model: in_training(model, nn.Dropout),
    "banks": lambda model: [layer.bank(DEFAULT).train() for layer in routed_layers(model)],
    "gates": lambda model: [layer.router_of(DEFAULT).gate.train() for layer in routed_layers(model)],
    "routers": lambda model: [layer.router_of(DEFAULT).train() for layer in routed_layers(model)],
}


@pytest.mark.parametrize("parts", PARTS_IN_TRAINING)
def test_parts_in_training_mode_of_a_layer_in_eval_mode(parts, tmp_path):
    model, inputs = routed(TOKEN, tmp_path, lora_dropout=0.5, router_jitter=0.9, top_k=4), inputs_of()
    before = warm(model, inputs)
    PARTS_IN_TRAINING[parts](model)
    with plain():
        torch.manual_seed(0)
        expected = logits(model, inputs)
    assert not torch.equal(expected, before)
    for _ in range(2):
        torch.manual_seed(0)
        torch.testing.assert_close(logits(model, inputs), expected)


# hooks and replaced parts


def parts_of(layer):
    """The modules that plain PyTorch calls in a layer."""
    bank, router = layer.bank(DEFAULT), layer.router_of(DEFAULT)
    parts = {"base layer": layer.base_layer, "bank": bank, "A": bank.lora_A, "B": bank.lora_B, "router": router}
    return parts | {"gate": router.gate, "dropout": bank.dropout}


NAMES = ["base layer", "bank", "A", "B", "router", "gate", "dropout"]


def double(module, args, output):
    return 2 * output


def double_input(module, args):
    return (2 * args[0], *args[1:])


HOOKS = ["after", "before", "instead", "everywhere after", "everywhere before"]


@pytest.mark.parametrize(
    ("name", "hook"),
    list(itertools.product(NAMES, HOOKS)),
)
@pytest.mark.parametrize("when", ["first", "then"])
def test_hooks_see_and_change_what_passes(name, hook, when, tmp_path):
    model, inputs = routed(TOKEN, tmp_path, top_k=4), inputs_of()
    before = warm(model, inputs) if when == "then" else in_plain(model, inputs)
    module = parts_of(layer_of(model))[name]
    old, remove = module.forward, None
    if hook == "after":
        module.register_forward_hook(double)
    elif hook == "before":
        module.register_forward_pre_hook(double_input)
    elif hook == "instead":
        module.forward = lambda *args: 2 * old(*args)
    elif hook == "everywhere after":
        remove = nn.modules.module.register_module_forward_hook(
            lambda m, args, output: 2 * output if m is module else None
        )
    else:
        remove = nn.modules.module.register_module_forward_pre_hook(
            lambda m, args: double_input(m, args) if m is module else None
        )
    try:
        expected = assert_as_plain(model, inputs)
        assert not torch.allclose(expected, before)
    finally:
        if remove is not None:
            remove.remove()


@pytest.mark.parametrize("name", ["base layer", "A", "B", "gate"])
def test_a_parametrization_that_comes_after_a_call(name, tmp_path):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = routed(TOKEN, tmp_path)
    before = warm(model)
    parametrize.register_parametrization(parts_of(layer_of(model))[name], "weight", Doubled())
    assert not torch.allclose(assert_as_plain(model), before)


def replace_base(layer):
    layer.base_layer = nn.Linear(layer.in_features, layer.out_features, bias=False)


def replace_a(layer):
    old = layer.bank(DEFAULT).lora_A
    layer.bank(DEFAULT).lora_A = nn.Linear(old.in_features, old.out_features, bias=False)


def replace_b(layer):
    old = layer.bank(DEFAULT).lora_B
    layer.bank(DEFAULT).lora_B = nn.Linear(old.in_features, old.out_features, bias=False)


def replace_gate(layer):
    gate = copy.deepcopy(layer.router_of(DEFAULT).gate)
    nn.init.normal_(gate.weight)
    layer.router_of(DEFAULT).gate = gate


def replace_router(layer):
    router = copy.deepcopy(layer.router_of(DEFAULT))
    nn.init.normal_(router.gate.weight)
    layer.moelora_router[DEFAULT] = router


def replace_bank(layer):
    bank = copy.deepcopy(layer.bank(DEFAULT))
    nn.init.normal_(bank.lora_B.weight)
    layer.moelora_bank[DEFAULT] = bank


def replace_choice(layer):
    layer.router_of(DEFAULT).inference_select = partial(top_k, k=1)


def replace_weight_of_base(layer):
    layer.base_layer.weight = nn.Parameter(torch.randn_like(layer.base_layer.weight))


def give_base_a_bias(layer):
    layer.base_layer.bias = nn.Parameter(torch.randn(layer.out_features))


def change_bias_of_gate(layer):
    layer.router_of(DEFAULT).gate.bias = nn.Parameter(torch.randn(4))


def adapt_base(layer):
    holder = nn.ModuleDict({"base_layer": layer.base_layer})
    get_peft_model(holder, LoraConfig(target_modules=["base_layer"], init_lora_weights=False))
    layer.base_layer = holder["base_layer"]


REPLACED = [
    replace_base, replace_a, replace_b, replace_gate, replace_router, replace_bank, replace_choice,
    replace_weight_of_base, give_base_a_bias, change_bias_of_gate, adapt_base,
]  # fmt: skip


@pytest.mark.parametrize("replace", REPLACED, ids=lambda replace: replace.__name__)
def test_a_replaced_part_is_used_from_the_next_call_on(replace, tmp_path):
    model = routed(TOKEN, tmp_path)
    before = warm(model)
    replace(layer_of(model))
    model.eval()
    assert not torch.allclose(assert_as_plain(model), before)


# what is done to a model between calls


def other_weights(model):
    """A state dict of the adapter's weights times 2."""
    return {name: 2 * value for name, value in model.state_dict().items() if "moelora" in name}


def load(assign, model):
    model.load_state_dict(other_weights(model), strict=False, assign=assign)


def step(model):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    inputs = inputs_of()
    told = {"task_ids": "rad"} if model.active_peft_config.needs_tasks else {}
    model(**inputs, labels=inputs["input_ids"], **told).loss.backward()
    optimizer.step()
    model.eval()


def train_one_part(words, model):
    """Change only parameters with one of these words in their names."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "moelora" in name and words in name:
                parameter.add_(torch.randn(parameter.shape))


DONE = {
    "weights loaded into parameters": partial(load, False),
    "parameters replaced": partial(load, True),
    "a step of training": step,
    "gates changed in place": partial(train_one_part, "router"),
    "banks changed in place": partial(train_one_part, "lora_"),
}


@pytest.mark.parametrize("done", DONE)
@pytest.mark.parametrize("kind", KINDS)
def test_what_changed_between_calls_shows_in_the_next(kind, done, tmp_path):
    model = routed(kind, tmp_path)
    before = warm(model)
    DONE[done](model)
    assert not torch.allclose(assert_as_plain(model), before)


def test_a_temperature_that_was_trained_between_calls_is_the_new_one(runs, tmp_path):
    model = routed("medmoelora", tmp_path)
    before = warm(model)
    with torch.no_grad():
        for layer in routed_layers(model):
            layer.router_of(DEFAULT).gate.temperature_bias.add_(3)
    runs.clear()
    assert not torch.allclose(assert_as_plain(model), before)
    assert runs


@pytest.mark.parametrize("kind", KINDS)
def test_copies_find_out_for_themselves(kind, tmp_path):
    model, inputs = routed(kind, tmp_path), inputs_of()
    before = warm(model, inputs)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for other in copies:
        torch.testing.assert_close(warm(other, inputs), before)
        partial(train_one_part, "lora_")(other)
        assert not torch.allclose(assert_as_plain(other, inputs), before)
        torch.testing.assert_close(warm(model, inputs), before)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_that_take_turns(kind, runs, tmp_path):
    model, inputs = two_adapters((kind, kind), "llama", tmp_path), inputs_of()
    of_one = warm(model, inputs)
    model.set_adapter("two")
    of_two = assert_as_plain(model, inputs)
    assert not torch.allclose(of_one, of_two)
    model.set_adapter("one")
    torch.testing.assert_close(warm(model, inputs), of_one)
    assert set(runs) == {"one", "two"}


def test_two_active_adapters_add_up(runs, tmp_path):
    model, inputs = two_adapters((TOKEN, TOKEN), "llama", tmp_path), inputs_of()
    one = warm(model, inputs)
    model.base_model.set_adapter(["one", "two"])
    runs.clear()
    assert not torch.allclose(assert_as_plain(model, inputs, calls=3), one)
    assert not runs


def test_rows_of_different_adapters(runs, tmp_path):
    model, inputs = two_adapters((TOKEN, TOKEN), "llama", tmp_path), inputs_of()
    before, names = warm(model, inputs), ["two", "__base__", "one"]
    runs.clear()
    mixed = assert_as_plain(model, inputs, adapter_names=names)
    assert not runs
    torch.testing.assert_close(mixed[2], before[2])
    assert not torch.allclose(mixed[0], before[0])
    torch.testing.assert_close(logits(model, inputs), before)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_comes_again_under_its_name(kind, tmp_path):
    model, inputs = two_adapters((kind, kind), "llama", tmp_path), inputs_of()
    before = warm(model, inputs)
    model.set_adapter("two")
    model.delete_adapter("one")
    torch.manual_seed(1)
    model.add_adapter("one", config_of(kind, "llama", tmp_path))
    model.set_adapter("one")
    model.eval()
    partial(train_one_part, "one")(model)
    assert not torch.allclose(assert_as_plain(model, inputs), before)


@pytest.mark.parametrize("kind", ["moelora"])
def test_merging_and_unmerging(kind, runs, tmp_path):
    model, inputs = routed(kind, tmp_path), inputs_of()
    before = warm(model, inputs)
    model.merge_adapter()
    torch.testing.assert_close(assert_not_taken(runs, lambda: logits(model, inputs)), before, rtol=1e-4, atol=1e-4)
    assert_as_plain(model, inputs)
    model.unmerge_adapter()
    torch.testing.assert_close(warm(model, inputs), before, rtol=1e-4, atol=1e-4)
    assert runs


def test_tasks_that_change_between_calls(runs, tmp_path):
    model, inputs = routed("moelora", tmp_path), inputs_of()
    seen = [warm(model, inputs)]
    for kwargs in [{"task_ids": "icd"}, {"task_ids": ["icd", "def", "rad"]}, {"task_ids": [["icd", "def"]] * 3}, {}]:
        seen.append(assert_as_plain(model, inputs, **kwargs))
    model.set_task("def")
    seen.append(assert_as_plain(model, inputs))
    with model.task("icd"):
        torch.testing.assert_close(assert_as_plain(model, inputs), seen[1])
    torch.testing.assert_close(assert_as_plain(model, inputs), seen[-1])
    torch.testing.assert_close(seen[4], seen[0])
    assert not torch.allclose(seen[1], seen[0])
    assert len(runs) > 7


@pytest.mark.parametrize("kind", [TOKEN, "medmoelora"])
def test_what_is_recorded_is_counted_in_every_call(kind, tmp_path):
    model, inputs = routed(kind, tmp_path), inputs_of()
    warm(model, inputs)
    counted = []
    for mode in (plain, lambda: torch.no_grad()):
        model.record_routing()
        with mode():
            for _ in range(3):
                logits(model, inputs)
        counted.append(model.routing_statistics(reset=True))
        model.record_routing(False)
    assert str(counted[0].keys()) == str(counted[1].keys())
    first = next(iter(counted[0]))
    assert counted[0][first]["tokens"] == counted[1][first]["tokens"] == 3 * 15


def test_controls_that_are_set_between_calls(runs, tmp_path):
    model, inputs = routed("at_moe", tmp_path), inputs_of()
    before = warm(model, inputs)
    model.set_group_weights({"f": 0.0, "s": 1.0})
    assert not torch.allclose(assert_as_plain(model, inputs), before)
    model.set_group_weights(None)
    torch.testing.assert_close(warm(model, inputs), before)


# on first use of forward mode torch scripts functions of its own
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS[:3])  # layers of AT-MoE run inside a block only
def test_a_function_transform_goes_the_general_way(kind, runs, tmp_path):
    model = routed(kind, tmp_path)
    warm(model)
    layer = layer_of(model)
    x = torch.randn(3, 5, layer.in_features)
    with torch.no_grad():
        with plain():
            expected = layer(x)
        layer(x)
        runs.clear()
        if kind != "moelora":  # a row's task cannot be told without rows
            torch.testing.assert_close(torch.func.vmap(layer)(x), expected)
        y, _ = torch.func.jvp(layer, (x,), (x,))
    torch.testing.assert_close(y, expected)
    assert not runs


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode_and_back(kind, runs, tmp_path):
    model, inputs = routed(kind, tmp_path), inputs_of()
    with torch.inference_mode():
        first = warm(model, inputs)
    assert runs
    torch.testing.assert_close(first.clone(), assert_as_plain(model, inputs))
    told = {"task_ids": "rad"} if kind == "moelora" else {}
    model.train()(**inputs, labels=inputs["input_ids"], **told).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_after_calls_without_one_is_that_of_plain_pytorch(kind, tmp_path):
    model, inputs = routed(kind, tmp_path), inputs_of()
    warm(model, inputs)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for mode in (torch.enable_grad, plain):
        with mode():
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            found.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_an_output_may_be_changed_in_place_where_a_gradient_is_recorded(tmp_path):
    layer = layer_of(routed(TOKEN, tmp_path))
    x, weight = torch.randn(3, 5, layer.in_features), torch.ones(layer.out_features, requires_grad=True)
    for mode in (plain, torch.enable_grad):  # plain PyTorch can
        with mode():
            for _ in range(3):
                with torch.no_grad():
                    y = layer(x)
                y += weight
                y.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_another_saved_adapter_in_its_place(kind, runs, tmp_path):
    model, other = (routed(kind, tmp_path, seed=seed) for seed in (0, 1))
    for index, each in enumerate((model, other)):
        each.save_pretrained(tmp_path / str(index))
    before = warm(model)
    hotswap_adapter(model, tmp_path / "1")
    after = assert_as_plain(model)
    assert runs
    torch.testing.assert_close(after, warm(other))
    assert not torch.allclose(after, before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_does_not_take_it(kind, runs, tmp_path):
    torch.compiler.reset()
    model, inputs = routed(kind, tmp_path), inputs_of()
    before = warm(model, inputs)
    compiled = torch.compile(model, backend="eager")
    runs.clear()
    for _ in range(2):
        torch.testing.assert_close(logits(compiled, inputs), before)
    assert not runs
    torch.testing.assert_close(logits(model, inputs), before)
    assert runs


@pytest.mark.parametrize("bias", [True, False])
def test_a_base_layer_with_a_bias(bias, runs):
    torch.manual_seed(0)
    fields = {"target_modules": ["0"], "num_experts": 4, "r": 2, "init_lora_weights": False}
    model = get_peft_model(nn.Sequential(nn.Linear(5, 7, bias=bias)), MoLoraConfig(**fields)).eval()
    for shape in [(5,), (3, 5), (3, 1, 5), (3, 2, 4, 5), (2, 200, 5), (0, 5), (3, 0, 5)]:
        x = torch.randn(shape)
        with torch.no_grad():
            layer_of(model)(torch.randn(2, 5))
            runs.clear()
            ours = layer_of(model)(x)
            assert runs
            with plain():
                torch.testing.assert_close(ours, layer_of(model)(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("view", [lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x[:1].expand(4, -1, -1)])
@pytest.mark.parametrize("kind", [TOKEN, "medmoelora"])
def test_an_input_that_is_not_contiguous(kind, view, runs, tmp_path):
    layer = layer_of(routed(kind, tmp_path))
    x = view(torch.randn(4, 6, layer.in_features))
    before = x.clone()
    with torch.no_grad():
        layer(x)
        ours = layer(x)
        assert runs
        assert torch.equal(x, before)
        with plain():
            torch.testing.assert_close(ours, layer(x), rtol=1e-5, atol=1e-5)


# generation

GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": EOS, "pad_token_id": PAD}
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "returned sequences": {"do_sample": True, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_generate_gives_the_tokens_of_plain_pytorch(kind, batch, way, runs, tmp_path):
    model, inputs = routed(kind, tmp_path), inputs_of(batch)
    told = {"task_ids": ["icd", "def", "rad"][:batch]} if kind == "moelora" else {}
    arguments = GREEDY | WAYS[way] | told
    torch.manual_seed(0)
    with plain():
        expected = model.generate(**inputs, **arguments)
    assert not runs
    for _ in range(2):
        torch.manual_seed(0)
        assert torch.equal(model.generate(**inputs, **arguments), expected)
    assert len(runs) >= 9 * len(routed_layers(model))  # all steps but the first


def test_each_generate_has_its_own_task(tmp_path):
    model, inputs = routed("moelora", tmp_path), inputs_of(3)
    for task in ["icd", "def", ["rad", "icd", "def"], "icd"]:
        with plain():
            expected = model.generate(
                **inputs, **GREEDY, task_ids=task, output_logits=True, return_dict_in_generate=True
            )
        ours = model.generate(**inputs, **GREEDY, task_ids=task, output_logits=True, return_dict_in_generate=True)
        for a, b in zip(ours.logits, expected.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
