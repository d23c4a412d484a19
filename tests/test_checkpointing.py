"""Gradient checkpointing, whoever calls it: what runs again in backward is routed as its own forward was."""

import copy
import gc
import pickle
import threading
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from grouped_helpers import answered, grouped
from helpers import TARGETS, TASKS, adapter_gradients, enable_checkpointing, transformers_own_adapter_methods
from peft import LoraConfig, get_peft_model
from tiny_models import PAD, make_inputs, make_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from peft_moe import GroupedMoeConfig, MedMoeLoraConfig, MoeLoraConfig, MoLoraConfig
from peft_moe.routing import Call

KINDS = ["lora", "moelora", "molora", "medmoelora", "at_moe"]
REENTRANT = pytest.mark.parametrize("use_reentrant", [True, False])
every_kind = pytest.mark.parametrize("kind", KINDS)
# reentrant checkpointing without a gradient, and balance losses of outputs that are no loss
pytestmark = [
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
    pytest.mark.filterwarnings("ignore:The loss was computed outside of the model"),
    pytest.mark.filterwarnings("ignore:Layers with a balance loss were run in training by a call of a part"),
]


def config_of(kind, targets, **fields):
    common = {"target_modules": targets, "init_lora_weights": False, "lora_dropout": 0.0, **fields}
    if kind == "lora":
        return LoraConfig(r=4, **common)
    if kind == "moelora":
        return MoeLoraConfig(r=8, num_experts=4, tasks=TASKS, **common)
    if kind == "molora":
        return MoLoraConfig(r=2, num_experts=4, balance_loss="switch", **common)
    if kind == "medmoelora":
        return MedMoeLoraConfig(num_experts=4, expert_ranks=[2, 3], balance_loss="z", **common)
    return GroupedMoeConfig(groups={"f": ["a", "b"], "s": ["c"]}, train_experts=True, r=2, **common)


def same_gradients(found, expected):
    assert found.keys() == expected.keys()
    assert expected
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


# -- model code that calls torch's checkpoint itself ------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, hidden):
        return hidden + self.down(torch.tanh(self.up(hidden)))


class Body(nn.Module):
    """Blocks that it checkpoints itself, as code from the Hub does."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.run = at_once

    def forward(self, hidden):
        for block in self.layers:
            hidden = self.run(block, hidden)
        return hidden


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = Body(), nn.Linear(8, 3)

    def forward(self, hidden):
        return self.head(self.body(hidden))


def one_in_other(function, hidden, *, outer, inner):
    """With operations between the two, which backward may be at when the inner one runs again."""
    within = partial(checkpoint, use_reentrant=inner)
    return checkpoint(lambda hidden: within(function, hidden + 0) * 1, hidden, use_reentrant=outer)


RUNS = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "not reentrant": partial(checkpoint, use_reentrant=False),
    "reentrant in reentrant": partial(one_in_other, outer=True, inner=True),
    "not reentrant in not reentrant": partial(one_in_other, outer=False, inner=False),
    "not reentrant in reentrant": partial(one_in_other, outer=True, inner=False),
    "reentrant in not reentrant": partial(one_in_other, outer=False, inner=True),
}


def at_once(function, hidden):
    return function(hidden)


every_run = pytest.mark.parametrize("run", list(RUNS))


def own(kind, run=at_once):
    """An adapted model, and how it runs its blocks."""
    torch.manual_seed(0)
    base = Own()
    base.body.run = run
    return get_peft_model(base, config_of(kind, ["up", "down"])).train()


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 8, generator=generator, requires_grad=True)


def told(model, kind, i):
    """How the i-th call says what it is about: a block to call in, and arguments."""
    if kind == "at_moe":
        return model.routing({"f": 0.3} if i % 2 else {"s": 0.6}), {}
    return nullcontext(), {"task_ids": TASKS[i % 3]} if kind == "moelora" else {}


def call(model, kind, i):
    choice, arguments = told(model, kind, i)
    with choice:
        return model(batch(i), **arguments).square().sum()


def two_forwards(model, kind):
    (call(model, kind, 0) + 3 * call(model, kind, 1)).backward()


def first_in_first_out(model, kind):
    losses = [call(model, kind, i) for i in range(4)]
    for loss in losses:
        loss.backward()


def as_preference_training_does(model, kind):
    chosen = call(model, kind, 0)
    with torch.no_grad():
        call(model, kind, 1)
        with model.disable_adapter():
            reference = call(model, kind, 0)
    rejected = call(model, kind, 2)
    (2 * chosen - rejected + reference).backward()


def one_after_the_other(model, kind):
    """As gradient accumulation does, with an evaluation between that forgets no_grad."""
    for i in range(3):
        call(model, kind, i).backward()
        call(model, kind, i + 1)


def parts_and_wholes(model, kind):
    """Parts that are called by themselves take what is chosen then; calls have their own."""
    losses = []
    for i in range(3):
        if kind == "moelora":
            model.set_task(TASKS[i])
        elif kind == "at_moe":
            model.set_group_weights({"f": i / 4})
        losses.append(model.base_model.model.body(batch(i)).square().sum())
        losses.append(call(model, kind, i + 1))
    if kind == "moelora":
        model.set_task(None)
    elif kind == "at_moe":
        model.set_group_weights()
    sum((i + 1) * loss for i, loss in enumerate(losses)).backward()


WAYS = [two_forwards, first_in_first_out, as_preference_training_does, one_after_the_other, parts_and_wholes]


@pytest.mark.parametrize("way", WAYS)
@every_run
@every_kind
def test_a_model_that_checkpoints_by_itself_has_the_gradients_of_one_that_does_not(kind, run, way):
    found = []
    for how in (at_once, RUNS[run]):
        model = own(kind, how)
        way(model, kind)
        found.append(adapter_gradients(model))
    same_gradients(found[1], found[0])


@every_run
def test_a_call_that_is_made_again_in_backward_has_the_task_of_the_first_time(run):
    """An adapted model as a part of another, which checkpoints it whole."""
    found = []
    for how in (at_once, RUNS[run]):
        model, losses = own("moelora"), []
        for i, task in enumerate(TASKS):
            with model.task(task):
                losses.append(how(model, batch(i)).square().sum())
        sum(losses).backward()
        found.append(adapter_gradients(model))
    same_gradients(found[1], found[0])


@every_run
def test_a_task_may_be_chosen_in_what_runs_again(run):
    found = []
    for how in (at_once, RUNS[run]):
        model, losses = own("moelora"), []

        def twice(hidden, model=model):
            with model.task(TASKS[1]):
                hidden = model.base_model.model.body(hidden)
            return model.base_model.model.body(hidden)

        for i, task in enumerate(TASKS):
            model.set_task(task)
            losses.append(how(twice, batch(i)).square().sum())
        sum(losses).backward()
        found.append(adapter_gradients(model))
    same_gradients(found[1], found[0])


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch looks at it itself
@pytest.mark.parametrize("kind", ["moelora", "at_moe"])
def test_compiled_blocks_that_run_again_have_the_gradients_of_their_own_forward(kind):
    found = []
    for how in (at_once, RUNS["reentrant"]):
        torch.compiler.reset()
        model = own(kind, how)
        for block in model.base_model.model.body.layers if how is not at_once else ():
            block.compile()
        parts_and_wholes(model, kind)
        two_forwards(model, kind)
        found.append(adapter_gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-4)


def test_a_forward_of_which_nothing_is_kept_cannot_be_run_again_for():
    """Rather than for another: what a hook has taken is from inside the graph, and keeps nothing of its call."""
    model, taken = own("moelora", RUNS["not reentrant"]), []
    model.base_model.model.body.register_forward_hook(lambda module, args, output: taken.append(output))
    for i in range(2):
        call(model, "moelora", i)
    taken[1].square().sum().backward()
    with pytest.raises(RuntimeError, match=r"what its forward was told is no longer known.*Call backward before"):
        taken[0].square().sum().backward()


def test_calls_go_with_their_graphs():
    model, kept = own("moelora", RUNS["not reentrant"]), call(own("moelora"), "moelora", 0)
    history = model.base_model.context._history
    losses = [call(model, "moelora", i) for i in range(3)]

    def calls():
        gc.collect()
        return sum(isinstance(span.state, Call) for line in history._lines.values() for span in line)

    assert calls() == 3
    del losses[:2]
    assert calls() == 1
    for i in range(2000):
        call(model, "moelora", i)
    assert calls() == 1  # the last one
    assert sum(map(len, history._lines.values())) <= 1024
    kept.backward()
    with pytest.raises(RuntimeError, match="no longer known"):
        losses[0].backward()


def in_thread(function):
    """What it returns, in a thread of its own."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


@every_run
def test_backward_may_be_called_in_another_thread_than_forward(run):
    found = []
    for how in (at_once, RUNS[run]):
        model = own("moelora", how)
        first = call(model, "moelora", 0)
        in_thread(partial(call, model, "moelora", 1)).backward()
        first.backward()
        found.append(adapter_gradients(model))
    same_gradients(found[1], found[0])


def test_nodes_of_two_threads_that_have_the_same_numbers_are_not_taken_for_one_another():
    model = own("moelora", RUNS["not reentrant"])
    losses = [in_thread(partial(call, model, "moelora", i)) for i in range(2)]
    with pytest.raises(RuntimeError, match="cannot tell for which forward, so that gradients might be wrong"):
        losses[0].backward()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_no_past(copied):
    model = own("moelora", RUNS["reentrant"])
    loss = call(model, "moelora", 0)
    twin = copied(model)
    call(twin, "moelora", 1).backward()
    loss.backward()
    expected = own("moelora")
    call(expected, "moelora", 0).backward()
    same_gradients(adapter_gradients(model), adapter_gradients(expected))


# -- parts of transformers' models that are called by themselves ------------------------------------------------------


def llama(kind, **fields):
    torch.manual_seed(0)
    config = config_of(kind, TARGETS["llama"], task_type="CAUSAL_LM", **fields)
    return get_peft_model(make_model("llama"), config).train()


def checkpointed(model, use_reentrant):
    model.enable_input_require_grads()
    enable_checkpointing(model.get_base_model(), use_reentrant)
    return model


@pytest.mark.parametrize("before", ["nothing", "training", "evaluation"])
@REENTRANT
@every_kind
def test_a_backbone_that_is_called_by_itself_has_the_same_gradients(kind, use_reentrant, before):
    """As reward models and heads of one's own do; what calls before it were told is not for it."""
    inputs = make_inputs("llama")
    body = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    tasks = {"task_ids": [TASKS[1], TASKS[2], TASKS[1]]} if kind == "moelora" else {}
    found = []
    for with_checkpoints in (False, True):
        model = llama(kind)
        if with_checkpoints:
            checkpointed(model, use_reentrant)
        if before == "training":
            model(**inputs, **tasks).loss.backward()
            model.zero_grad()
        elif before == "evaluation":
            with torch.no_grad():
                model.eval()(**inputs, **tasks)
            model.train()
        chosen = model.task(TASKS[0]) if kind == "moelora" else nullcontext()
        with model.routing({"f": 0.3}) if kind == "at_moe" else chosen:
            hidden = model.base_model.model.model(**body).last_hidden_state
        loss = model(**inputs, **tasks).loss
        (hidden.square().mean() + loss).backward()
        found.append(adapter_gradients(model))
    same_gradients(found[1], found[0])


# -- blocks -----------------------------------------------------------------------------------------------------------


@transformers_own_adapter_methods
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("active", ["one", "two", ["one", "two"]])
@pytest.mark.parametrize("router_input", ["token", "prompt"])
@REENTRANT
def test_every_adapter_of_transformers_own_add_adapter_reads_what_enters_blocks(use_reentrant, router_input, active):
    found = []
    for with_checkpoints in (False, True):
        torch.manual_seed(0)
        model = make_model("llama")
        for name in ("one", "two"):
            model.add_adapter(config_of("at_moe", TARGETS["llama"], router_input=router_input), name)
        model.set_adapter(active)
        model.train()
        model.enable_input_require_grads()
        if with_checkpoints:
            enable_checkpointing(model, use_reentrant)
        model(**answered("llama")).loss.backward()
        found.append(adapter_gradients(model))
    same_gradients(found[1], found[0])


PARTS = [(LlamaMLP, CheckpointImpl.REENTRANT), (LlamaMLP, CheckpointImpl.NO_REENTRANT)]
PARTS += [(LlamaAttention, CheckpointImpl.NO_REENTRANT)]


@pytest.mark.parametrize(("part", "mode"), PARTS)
@pytest.mark.parametrize("router_input", ["token", "prompt"])
def test_a_part_of_a_block_runs_again_with_what_the_block_decided(router_input, part, mode):
    found = []
    for wrapped in (False, True):
        model, wrap = llama("at_moe", router_input=router_input), partial(checkpoint_wrapper, checkpoint_impl=mode)
        if wrapped:
            apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrap, check_fn=lambda m: isinstance(m, part))
        losses = [model(**answered("llama", seed=seed), use_cache=False).loss for seed in (0, 1)]
        (losses[0] + 3 * losses[1]).backward()
        gradients = adapter_gradients(model)
        found.append({key.replace("_checkpoint_wrapped_module.", ""): g for key, g in gradients.items()})
    assert all(g.abs().max() > 0 for name, g in found[0].items() if "router" in name)
    same_gradients(found[1], found[0])


def test_code_that_checkpoints_a_part_of_a_block_is_refused_with_the_reason():
    class OfParts(Block):
        def forward(self, hidden):
            return hidden + checkpoint(lambda hidden: self.down(self.up(hidden)), hidden, use_reentrant=False)

    base = Own()
    base.body.layers = nn.ModuleList([OfParts()])
    model = get_peft_model(base, config_of("at_moe", ["up", "down"])).train()
    loss = model(batch(0)).sum()
    with pytest.raises(RuntimeError, match=r"runs again in backward without its block.*torch's checkpoint_wrapper"):
        loss.backward()


@pytest.mark.parametrize("masked", [False, True])
def test_drafts_by_leaving_early_give_the_same_answer(masked, tmp_path):
    """Blocks that drafts have not run read the prompt when drafts are looked at."""
    model = grouped("llama", tmp_path, router_input="prompt")
    with torch.no_grad():
        for _, router in model.base_model.routers():
            router.gate.weight.normal_()
    settings = {"input_ids": make_inputs("llama", batch=1, seed=1)["input_ids"], "max_new_tokens": 12}
    settings |= {"do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    if masked:
        settings["prompt_mask"] = torch.tensor([[True, True, True, False, False]])
    expected = model.generate(**settings)
    assert torch.equal(model.generate(**settings, assistant_early_exit=1), expected)
