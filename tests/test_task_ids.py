"""No path loses task ids: they arrive, or there is an error or a warning that says what to do."""

import copy
import inspect
import io
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers import TASKS, adapter_gradients, config_for, enable_checkpointing, logits, routed, routed_layers
from peft import get_peft_model
from tiny_models import VOCAB, make_inputs, make_model
from torch.utils.checkpoint import checkpoint
from transformers import XLNetConfig, XLNetLMHeadModel

from peft_moe import MoeLoraConfig
from peft_moe.checkpointing import Recomputation
from peft_moe.layer import IN_BASE_EXPERTS, MoeLinear
from peft_moe.routing import TaskGate

IDS = [2, 0, 1]
NAMED = ["def", "icd", "rad"]
GENERATE = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def rows_alone(model, inputs, ids):
    """Each row by itself with its task."""
    rows = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(len(ids))]
    return torch.cat([logits(model, row, task_ids=[task]) for row, task in zip(rows, ids, strict=True)])


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "t5", "vit"])
def test_rows_of_different_tasks_in_one_batch_are_as_each_alone(name):
    model, inputs = routed(name), make_inputs(name)
    together = logits(model, inputs, task_ids=IDS)
    torch.testing.assert_close(together, rows_alone(model, inputs, IDS), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, logits(model, inputs, task_ids=0), atol=1e-4)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, inputs: model(**inputs, task_ids=NAMED),
        lambda model, inputs: model(**inputs, task_ids=torch.tensor(IDS)),
        lambda model, inputs: model(**inputs, task_ids=[[t] for t in IDS]),
        lambda model, inputs: model.forward(**inputs, task_ids=IDS),
        lambda model, inputs: model(inputs["input_ids"], inputs["attention_mask"], task_ids=IDS),
        lambda model, inputs: model.base_model(**inputs, task_ids=IDS),
        lambda model, inputs: model.get_base_model()(**inputs, task_ids=IDS),
        lambda model, inputs: model.get_base_model().forward(**inputs, task_ids=IDS),
        lambda model, inputs: copy.deepcopy(model)(**inputs, task_ids=IDS),
        lambda model, inputs: torch.nn.ModuleDict({"wrapped": model})["wrapped"](**inputs, task_ids=IDS),
        lambda model, inputs: model(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]), task_ids=IDS),
    ],
)  # fmt: skip
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_every_way_to_call_a_model_brings_the_ids(call, task_type):
    model, inputs = routed("llama", task_type=task_type), make_inputs("llama", labels=False)
    expected = logits(model, inputs, task_ids=IDS)
    with torch.no_grad():
        assert torch.equal(call(model, inputs).logits, expected)


def test_a_pickled_model_takes_ids():
    model, inputs = routed("llama"), make_inputs("llama")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, inputs, task_ids=IDS), logits(model, inputs, task_ids=IDS))


def test_a_row_can_have_several_tasks():
    model, inputs = routed("llama"), make_inputs("llama")
    gate = model.base_model.moelora_router["default"]["4"].gate
    mean = gate.embedding.weight[[0, 2]].mean(0)
    several = logits(model, inputs, task_ids=[["icd", "def"], ["rad"], [1]])
    gate.embedding.weight.data[0] = mean
    torch.testing.assert_close(several, logits(model, inputs, task_ids=["icd", "rad", "rad"]))


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_the_weights_of_tasks_are_the_softmax_of_the_gate_and_what_calls_use(scope):
    model = routed("llama", gate_scope=scope, num_experts_pattern={"q_proj": 1})
    found, inputs = model.task_weights(), make_inputs("llama", labels=False)
    layers = {name: layer for name, layer in model.base_model.model.named_modules() if isinstance(layer, MoeLinear)}
    assert list(found) == [name for name, layer in layers.items() if layer.router_of("default") is not None]
    assert len(found) < len(layers)
    for name, weights in found.items():
        gate = layers[name].router_of("default").gate
        for task, of_task in enumerate(weights):
            scores = (gate.proj.weight @ gate.embedding.weight[task]).exp()
            torch.testing.assert_close(of_task, scores / scores.sum())
    expected = logits(model, inputs, task_ids=1)
    for name, weights in found.items():
        bank = layers[name].bank("default")
        bank.lora_B.weight.data *= weights[1].repeat_interleave(torch.tensor(bank.ranks)) * len(weights[1])
    model.base_model.moelora_router.apply(flatten)
    for layer in layers.values():
        layer.apply(flatten)
    torch.testing.assert_close(logits(model, inputs, task_ids=1), expected)
    with pytest.raises(ValueError, match="no adapter 'other'"):
        model.task_weights("other")


def flatten(module):
    """Make the scores of a gate equal."""
    if isinstance(module, TaskGate):
        torch.nn.init.zeros_(module.proj.weight)


# what a call without ids does


def test_a_call_without_a_task_is_an_error_that_lists_them_and_says_how():
    model, inputs = routed("llama"), make_inputs("llama")
    for call in (model, model.get_base_model(), lambda **kw: model.generate(kw["input_ids"], max_new_tokens=1)):
        with pytest.raises(
            ValueError,
            match=r"No task was given.*'icd' \(0\), 'rad' \(1\), 'def' \(2\): pass task_ids= .*set_task.*default_task",
        ):
            call(**inputs)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("mri", "Unknown task 'mri'"),
        ([0, 1], "2 entries and the batch has 3 rows"),
        ([0] * 6, "6 entries and the batch has 3 rows"),
    ],
)
def test_wrong_ids_are_an_error_before_anything_runs(ids, message):
    model, inputs = routed("llama"), make_inputs("llama")
    ran = []
    model.get_input_embeddings().register_forward_hook(lambda *_: ran.append(1))
    for call in (model, model.get_base_model(), lambda **kw: model.generate(kw["input_ids"], task_ids=kw["task_ids"])):
        with pytest.raises(ValueError, match=message):
            call(**inputs, task_ids=ids)
    assert not ran
    logits(model, inputs, task_ids=0)  # and the model is as before


def test_the_task_of_a_call_goes_before_the_chosen_one_and_that_before_the_default():
    model, inputs = routed("llama", default_task="def"), make_inputs("llama")
    by_task = {task: logits(model, inputs, task_ids=task) for task in TASKS}
    assert torch.equal(logits(model, inputs), by_task["def"])
    model.set_task("rad")
    assert torch.equal(logits(model, inputs), by_task["rad"])
    assert torch.equal(logits(model, inputs, task_ids="icd"), by_task["icd"])
    with model.task("icd"):
        assert torch.equal(logits(model, inputs), by_task["icd"])
        with model.task("def"), model.disable_adapter():
            base = logits(model, inputs)
            with model.disable_adapter():
                assert torch.equal(logits(model, inputs), base)
            assert torch.equal(logits(model, inputs), base)
        assert torch.equal(logits(model, inputs), by_task["icd"])
    assert torch.equal(logits(model, inputs), by_task["rad"])
    model.set_task(None)
    assert torch.equal(logits(model, inputs), by_task["def"])
    assert torch.equal(base, logits(make_model("llama"), inputs))


def test_choosing_several_tasks_is_their_mean_for_every_row():
    model, inputs = routed("llama"), make_inputs("llama")
    with model.task(["icd", "def"]):
        chosen = logits(model, inputs)
    # not to the bit: on some CPUs the gate's product rounds differently for one row and for three
    torch.testing.assert_close(chosen, logits(model, inputs, task_ids=[["icd", "def"]] * 3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("choose", [lambda m, t: m.set_task(t), lambda m, t: m.task(t).__enter__()])
def test_choosing_an_unknown_task_is_an_error_and_changes_nothing(choose):
    model, inputs = routed("llama"), make_inputs("llama")
    model.set_task("rad")
    with pytest.raises(ValueError, match="Unknown task 'mri'"):
        choose(model, "mri")
    assert torch.equal(logits(model, inputs), logits(model, inputs, task_ids="rad"))


def test_training_on_the_default_task_warns_once_and_says_what_may_have_been_lost():
    model, inputs = routed("llama", default_task="icd").train(), make_inputs("llama")
    with pytest.warns(
        UserWarning, match=r"Training without task_ids: every row is routed as default_task='icd'.*TaskCollator"
    ):
        model(**inputs)
    model(**inputs)  # once is enough
    quiet = routed("llama", default_task="icd").train()
    quiet.set_task("icd")
    quiet(**inputs)
    quiet(**inputs, task_ids=IDS)


def test_ids_of_one_call_are_not_those_of_the_next():
    model, inputs = routed("t5"), make_inputs("t5")
    model(**inputs, task_ids=IDS)
    with pytest.raises(ValueError, match="No task was given"):
        model(**inputs)
    with pytest.raises(ValueError, match="No task was given"):  # nor of a part of the model that is called by itself
        model.get_base_model().get_encoder()(inputs["input_ids"])
    with model.task("rad"):
        model.get_base_model().get_encoder()(inputs["input_ids"])


def test_an_error_inside_a_call_leaves_no_ids_behind():
    model, inputs = routed("llama"), make_inputs("llama")
    with pytest.raises(IndexError):
        model(input_ids=inputs["input_ids"] + 1000, task_ids=IDS)
    with pytest.raises(ValueError, match="No task was given"):
        model(**inputs)


def test_a_model_with_single_experts_only_needs_no_task():
    model = routed("llama", num_experts=1)
    logits(model, make_inputs("llama"))


def test_task_gates_inside_experts_of_the_base_model_are_refused():
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList([torch.nn.Linear(4, 4)])

    config = MoeLoraConfig(target_modules=r".*experts\.0", r=4, num_experts=2)
    with pytest.raises(ValueError, match=r"'experts\.0' is inside a mixture of experts of the base model"):
        get_peft_model(Experts(), config)
    get_peft_model(Experts(), MoeLoraConfig(target_modules=r".*experts\.0", r=4, num_experts=1))


@pytest.mark.parametrize("name", ["experts.3.wi", "mlp.experts.expert_3.wi", "experts.0"])
def test_names_of_experts_are_recognised(name):
    assert IN_BASE_EXPERTS.search(name)
    assert not IN_BASE_EXPERTS.search("model.layers.3.mlp.wi")


def test_models_with_the_sequence_first_take_one_task_per_call():
    sizes = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32}
    base = XLNetLMHeadModel(XLNetConfig(vocab_size=VOCAB, **sizes)).eval()
    model = get_peft_model(base, config_for("llama", target_modules=["layer_1"])).eval()
    inputs = {"input_ids": make_inputs("llama", batch=2, seq=4)["input_ids"]}
    logits(model, inputs, task_ids="icd")
    with pytest.raises(ValueError, match="layers of a xlnet model do not see the rows of a batch first; give one task"):
        logits(model, inputs, task_ids=["icd", "rad"])


def test_calls_from_several_threads_keep_their_tasks():
    model, inputs = routed("llama"), make_inputs("llama")
    expected = [logits(model, inputs, task_ids=task) for task in TASKS]

    def run(i):
        return torch.equal(logits(model, inputs, task_ids=TASKS[i % 3]), expected[i % 3])

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(run, range(60)))


def test_blocks_of_several_threads_take_turns():
    model, inputs = routed("llama"), make_inputs("llama", labels=False)
    expected = {task: logits(model, inputs, task_ids=task) for task in TASKS}
    inside, other, found = threading.Event(), threading.Event(), {}

    def first():
        with model.task("icd"):
            inside.set()
            assert not other.wait(0.2)  # as long as this block is open, the other is not
            found["icd"] = logits(model, inputs)

    def second():
        inside.wait()
        with model.task("rad"):
            other.set()
            found["rad"] = logits(model, inputs)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(first), pool.submit(second)]:
            done.result()
    assert all(torch.equal(found[task], expected[task]) for task in ("icd", "rad"))
    with pytest.raises(ValueError, match="No task"):  # nothing stays chosen
        logits(model, inputs)


def test_a_thread_that_streams_answers_the_task_of_the_block_it_was_started_in():
    model, inputs = routed("llama"), make_inputs("llama", labels=False)
    with model.task("rad"), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(logits, model, inputs).result(), logits(model, inputs, task_ids="rad"))


def test_a_task_that_was_chosen_in_inference_can_be_trained():
    model, inputs = routed("llama"), make_inputs("llama")
    with torch.inference_mode():
        model.set_task("icd")
        model(**inputs)
    model.train()(**inputs).loss.backward()
    assert adapter_gradients(model)


@pytest.mark.parametrize(
    "same",
    [
        ["rad"] * 3, [["rad", "rad"]] * 3, torch.tensor([[1]] * 3), torch.tensor([[1, -1]] * 3),
        torch.tensor([[False, True, False]] * 3), 1,
    ],
    ids=str,
)  # fmt: skip
def test_a_merged_task_can_be_asked_for_in_any_form(same):
    model, inputs = routed("llama"), make_inputs("llama", labels=False)
    model.merge_adapter(task="rad")
    assert torch.equal(logits(model, inputs, task_ids=same), logits(model, inputs, task_ids="rad"))
    for other in ("icd", ["rad", "icd", "rad"], [["rad", "icd"]] * 3, torch.tensor([[1, 0], [1, -1], [1, -1]])):
        with pytest.raises(ValueError, match="other tasks were asked for"):
            logits(model, inputs, task_ids=other)


def test_several_merged_tasks_can_be_asked_for_in_any_order():
    model, inputs = routed("llama"), make_inputs("llama", labels=False)
    model.merge_adapter(task=["icd", "rad"])
    assert torch.equal(
        logits(model, inputs, task_ids=[["rad", "icd"]] * 3), logits(model, inputs, task_ids=[["icd", "rad"]] * 3)
    )
    for other in ("icd", [["icd", "rad", "rad"]] * 3):  # a mean in another proportion
        with pytest.raises(ValueError, match="other tasks were asked for"):
            logits(model, inputs, task_ids=other)


def test_rows_are_counted_for_models_that_are_called_by_keyword():
    class Custom(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = torch.nn.Linear(4, 4)

        def forward(self, features):
            return self.lin(features)

    model = get_peft_model(Custom(), MoeLoraConfig(target_modules=["lin"]))
    with pytest.raises(ValueError, match="2 entries and the batch has 4 rows"):
        model(features=torch.zeros(4, 4), task_ids=[0, 1])


def test_a_default_task_can_be_set_later():
    model, inputs = routed("llama"), make_inputs("llama")
    model.peft_config["default"].default_task = "rad"
    assert torch.equal(logits(model, inputs), logits(model, inputs, task_ids="rad"))


# generation


def left_padded(lengths=(5, 3, 4)):
    inputs = make_inputs("llama", batch=len(lengths), seq=max(lengths), labels=False)
    mask = torch.stack([(torch.arange(max(lengths)) >= max(lengths) - n).long() for n in lengths])
    return {"input_ids": inputs["input_ids"] * mask, "attention_mask": mask}


VARIANTS = [
    {},
    {"use_cache": False},
    {"num_beams": 3},
    {"num_beams": 2, "num_return_sequences": 2},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5"])
def test_generating_for_a_left_padded_batch_of_tasks_is_as_each_row_alone(name, variant):
    model = routed(name)
    inputs = left_padded() if name != "t5" else make_inputs("t5", labels=False)
    inputs.pop("decoder_input_ids", None)
    together = model.generate(**inputs, **GENERATE, **variant, task_ids=NAMED)
    n = len(together) // 3
    for i, task in enumerate(NAMED):
        kept = inputs["attention_mask"][i].bool()
        row = {k: v[i : i + 1, kept] for k, v in inputs.items()}
        alone = model.generate(**row, **GENERATE, **variant, task_ids=task)
        assert torch.equal(together[i * n : (i + 1) * n, -6:], alone[:, -6:])


def test_sampled_return_sequences_keep_the_task_of_their_row():
    model = routed("llama")
    inputs = left_padded()
    torch.manual_seed(0)
    together = model.generate(
        **inputs, **{**GENERATE, "do_sample": True, "top_k": 0}, num_return_sequences=4, task_ids=IDS
    )
    ids = torch.tensor(IDS).repeat_interleave(4)
    mask = torch.cat([inputs["attention_mask"].repeat_interleave(4, 0), torch.ones(12, 6, dtype=torch.long)], 1)
    scores = logits(model, {"input_ids": together, "attention_mask": mask}, task_ids=ids)
    torch.manual_seed(0)  # the draws of generate again, from a full forward with the ids repeated by hand
    for position in range(5, 11):
        drawn = torch.multinomial(scores[:, position - 1].softmax(-1), 1)[:, 0]
        assert torch.equal(drawn, together[:, position])


def test_every_route_to_generate_brings_the_ids():
    inputs = left_padded()
    for task_type in ("CAUSAL_LM", None):
        model = routed("llama", task_type=task_type)
        expected = model.generate(**inputs, **GENERATE, task_ids=NAMED)
        assert torch.equal(model.base_model.generate(**inputs, **GENERATE, task_ids=NAMED), expected)
        assert torch.equal(model.get_base_model().generate(**inputs, **GENERATE, task_ids=NAMED), expected)
        with model.task("def"):
            row = {k: v[:1] for k, v in inputs.items()}
            assert torch.equal(model.generate(**row, **GENERATE), expected[:1])


def test_decoding_with_a_cache_is_the_full_forward():
    model, inputs = routed("llama"), left_padded()
    new = model.generate(**inputs, **GENERATE, task_ids=IDS)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 6, dtype=torch.long)], 1)
    greedy = logits(model, {"input_ids": new, "attention_mask": mask}, task_ids=IDS).argmax(-1)
    assert torch.equal(greedy[:, 4:-1], new[:, 5:])


# gradient checkpointing, compile


def gradients_with(name, use_reentrant, losses):
    model = routed(name, target_modules=None).train()
    if use_reentrant is not None:
        enable_checkpointing(model.get_base_model(), use_reentrant)
    losses(model).backward()
    return adapter_gradients(model)


def one_forward(model):
    return model(**make_inputs("llama"), task_ids=IDS).loss


def two_forwards(model):
    """As preference training does: two batches and a reference pass before one backward."""
    first = model(**make_inputs("llama"), task_ids=IDS).loss
    with torch.no_grad(), model.disable_adapter(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "None of the inputs have requires_grad"
        )  # reentrant checkpointing without a graph
        reference = model(**make_inputs("llama", seed=1)).loss
    second = model(**make_inputs("llama", seed=1), task_ids=0).loss
    return first * 2 - second + reference


def chosen_meanwhile(model):
    with model.task("def"):
        loss = model(**make_inputs("llama")).loss
    model.set_task("icd")
    return loss


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("losses", [one_forward, two_forwards, chosen_meanwhile])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_checkpointing_gives_the_same_gradients(name, use_reentrant, losses):
    plain = gradients_with(name, None, losses)
    again = gradients_with(name, use_reentrant, losses)
    assert plain.keys() == again.keys()
    for key in plain:
        torch.testing.assert_close(again[key], plain[key], rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def test_checkpointing_is_wrapped_once_and_unwrapped_at_the_end():
    model = routed("llama").train()
    enable_checkpointing(model.get_base_model())
    for _ in range(3):
        one_forward(model).backward()
    functions = [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
    wrappers = [f for f in functions if isinstance(f, Recomputation)]
    assert wrappers
    assert not any(isinstance(f.checkpoint, Recomputation) for f in wrappers)
    base = model.unload()
    assert not any(isinstance(vars(m).get("_gradient_checkpointing_func"), Recomputation) for m in base.modules())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_model_that_checkpoints_itself_sees_the_ids_of_its_last_forward(use_reentrant):
    class Checkpointed(torch.nn.Module):
        def __init__(self, on):
            super().__init__()
            torch.manual_seed(0)
            self.lin, self.on = torch.nn.Linear(4, 4), on

        def forward(self, x):
            return checkpoint(self.lin, x, use_reentrant=use_reentrant) if self.on else self.lin(x)

    x = torch.randn(3, 4, requires_grad=True)
    gradients = []
    for on in (False, True):
        torch.manual_seed(1)
        model = get_peft_model(
            Checkpointed(on),
            MoeLoraConfig(target_modules=["lin"], init_lora_weights=False, lora_dropout=0.0, default_task=3),
        )
        model(x, task_ids=IDS).sum().backward()
        gradients.append(adapter_gradients(model))
    for key in gradients[0]:
        torch.testing.assert_close(gradients[1][key], gradients[0][key])


@pytest.mark.slow  # test_compile.py has lengths in one graph
def test_a_compiled_model_has_no_breaks_and_no_stale_ids():
    model, inputs = routed("llama"), make_inputs("llama")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for ids in (torch.tensor(IDS), torch.tensor([0, 0, 1]), torch.tensor([1, 2, 0])):
        torch.testing.assert_close(logits(compiled, inputs, task_ids=ids), logits(model, inputs, task_ids=ids))
    for task in TASKS:
        with model.task(task):
            torch.testing.assert_close(logits(compiled, inputs), logits(model, inputs))


@pytest.mark.long
def test_a_compiled_model_trains():
    eager, compiled = routed("llama").train(), routed("llama").train()
    inputs = make_inputs("llama")
    for model, call in ((eager, eager), (compiled, torch.compile(compiled, backend="aot_eager"))):
        call(**inputs, task_ids=torch.tensor(IDS)).loss.backward()
        assert adapter_gradients(model)
    for a, b in zip(adapter_gradients(eager).values(), adapter_gradients(compiled).values(), strict=True):
        torch.testing.assert_close(a, b)


# several adapters, other wrappers


def test_adapters_with_their_own_tasks_take_turns_and_add_up():
    model, inputs = routed("llama"), make_inputs("llama")
    model.add_adapter("other", config_for("llama", tasks=["def", "mri"], r=4, num_experts=2))
    base = logits(make_model("llama"), inputs)
    first = logits(model, inputs, task_ids="def")
    with pytest.raises(ValueError, match="Unknown task 'mri'"):
        logits(model, inputs, task_ids="mri")
    model.set_adapter("other")
    second = logits(model, inputs, task_ids="def")
    logits(model, inputs, task_ids="mri")
    with pytest.raises(ValueError, match="Unknown task 'rad'"):
        logits(model, inputs, task_ids="rad")
    model.base_model.set_adapter(["default", "other"])
    both = logits(model, inputs, task_ids="def")
    assert not torch.allclose(both, first, atol=1e-4)
    assert not torch.allclose(both, second, atol=1e-4)
    (layer, *_), x = routed_layers(model), torch.randn(3, 5, 32)
    with model.task("def"), torch.no_grad():
        expected = layer.base_layer(x) + x @ layer.get_delta_weight("default").T + x @ layer.get_delta_weight("other").T
        torch.testing.assert_close(layer(x), expected)
    assert base.shape == both.shape


def test_a_tuner_inside_another_is_told_too():
    inputs = make_inputs("llama")
    inner = routed("llama", target_modules=["q_proj"])
    alone = logits(inner, inputs, task_ids=IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of wrapping a PeftModel
        outer = get_peft_model(inner, MoeLoraConfig(target_modules=["gate_proj"], tasks=TASKS)).eval()
    torch.testing.assert_close(logits(outer, inputs, task_ids=IDS), alone)  # the new bank adds nothing yet


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps one state per process, with the precision that the first to ask for it wanted."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
def test_accelerate_prepare_keeps_the_ids():
    model, inputs = routed("llama"), make_inputs("llama")
    expected = logits(model, inputs, task_ids=IDS)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(model)
    torch.testing.assert_close(logits(prepared, inputs, task_ids=IDS), expected, rtol=0.1, atol=0.1)
    with pytest.raises(ValueError, match="No task was given"):
        logits(prepared, inputs)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(logits(unwrapped, inputs, task_ids=IDS), expected)


def test_the_base_model_says_that_it_takes_task_ids_so_that_trainer_keeps_the_column():
    model = routed("llama")
    before = inspect.signature(make_model("llama").forward)
    signature = inspect.signature(model.get_base_model().forward)
    assert [p for p in signature.parameters if p != "task_ids"] == list(before.parameters)
    assert "task_ids" in signature.parameters
    assert inspect.signature(model.unload().forward) == before
