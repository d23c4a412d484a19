"""Rows of one batch with different adapters: each does what it does when it comes alone with its adapter active."""

import threading

import pytest
import torch
from helpers import TARGETS, logits, routed_layers
from kinds import KINDS, config_of, two_adapters
from peft import LoraConfig, get_peft_model
from tiny_models import PAD, make_inputs, make_model

NAMES = ["two", "one", "__base__", "two"]
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5}
ARCHS = ["llama", "gpt2", "opt", "t5", "bert"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("loras")


def padded(arch: str, *, labels: bool = False) -> dict[str, torch.Tensor]:
    """Four rows, of which one is padded on the left."""
    inputs = make_inputs(arch, batch=4, seq=6, labels=labels)
    inputs["input_ids"][1, :2], inputs["attention_mask"][1, :2] = PAD, 0
    return inputs


def each_alone(model, inputs, call, names=NAMES, per_row=None) -> list[torch.Tensor]:
    """What `call` makes of each row with its adapter active, or without any."""
    found = []
    for i, name in enumerate(names):
        row = {key: value[i : i + 1] for key, value in inputs.items()}
        fields = {key: values[i] for key, values in (per_row or {}).items() if values[i] is not None}
        if name == "__base__":
            with model.disable_adapter():
                found.append(call(**row))
        else:
            model.set_adapter(name)
            found.append(call(**row, **fields))
    model.set_adapter("one")
    return found


def close(mixed, alone):
    torch.testing.assert_close(mixed, torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_each_row_alone(kind, arch, folder):
    model, inputs = two_adapters((kind, kind), arch, folder), padded(arch)
    mixed = logits(model, inputs, adapter_names=NAMES)
    alone = each_alone(model, inputs, lambda **row: logits(model, row))
    close(mixed, alone)
    assert not torch.allclose(alone[0], alone[3], atol=1e-4)  # adapters and rows do differ
    close(logits(model, inputs, adapter_names=("two",) * 4), [logits_of_active(model, "two", inputs)])
    with model.disable_adapter():
        base = logits(model, inputs)
    assert torch.equal(logits(model, inputs, adapter_names=["__base__"] * 4), base)
    assert torch.equal(logits(model, inputs), logits_of_active(model, "one", inputs))  # nothing stays behind


def logits_of_active(model, name, inputs) -> torch.Tensor:
    model.set_adapter(name)
    found = logits(model, inputs)
    model.set_adapter("one")
    return found


GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several beams returned": {"num_beams": 4, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
    "without a cache": {"use_cache": False},
}


@pytest.mark.parametrize("way", GENERATION)
@pytest.mark.parametrize(
    ("kind", "arch"), [*((kind, "llama") for kind in KINDS), ("at_moe", "opt"), ("molora", "gpt2"), ("at_moe", "t5")]
)
def test_generated_tokens_are_those_of_each_row_alone(kind, arch, way, folder):
    model, inputs = two_adapters((kind, kind), arch, folder), padded(arch)
    inputs.pop("decoder_input_ids", None)
    settings = GREEDY | GENERATION[way]
    mixed = model.generate(**inputs, adapter_names=NAMES, **settings)
    alone = each_alone(model, inputs, lambda **row: model.generate(**row, **settings))
    assert torch.equal(mixed, torch.cat(alone))


def test_beams_and_returned_sequences_may_come_from_the_generation_config(folder):
    """Where stock LoRA counts beams by the argument alone."""
    model, inputs = two_adapters(("moelora", "moelora"), "llama", folder), padded("llama")
    settings = {"num_beams": 3, "num_return_sequences": 3}
    expected = model.generate(**inputs, adapter_names=NAMES, **GREEDY, **settings)
    for name, value in (GREEDY | settings).items():
        setattr(model.generation_config, name, value)
    assert torch.equal(model.generate(**inputs, adapter_names=NAMES), expected)


def test_rows_of_an_adapter_have_its_tasks(folder):
    model, inputs = two_adapters(("moelora", "moelora"), "llama", folder), padded("llama")
    tasks = ["u", "icd", None, "v"]
    alone = each_alone(model, inputs, lambda **row: logits(model, row), per_row={"task_ids": tasks})
    close(logits(model, inputs, adapter_names=NAMES, task_ids=tasks), alone)
    close(logits(model, inputs, adapter_names=NAMES, task_ids=torch.tensor([0, 0, -1, 1])), alone)
    generated = model.generate(**inputs, adapter_names=NAMES, task_ids=tasks, num_beams=2, **GREEDY)
    alone = each_alone(
        model, inputs, lambda **row: model.generate(**row, num_beams=2, **GREEDY), per_row={"task_ids": tasks}
    )
    assert torch.equal(generated, torch.cat(alone))
    # one for all, by its place; a task of the one adapter, and the other's default
    alone = each_alone(model, inputs, lambda **row: logits(model, row), per_row={"task_ids": [0, 0, None, 0]})
    close(logits(model, inputs, adapter_names=NAMES, task_ids=0), alone)
    alone = each_alone(model, inputs, lambda **row: logits(model, row), per_row={"task_ids": [None, "icd", None, None]})
    close(logits(model, inputs, adapter_names=NAMES, task_ids=[None, "icd", None, None]), alone)
    model.set_task(1)
    alone = each_alone(model, inputs, lambda **row: logits(model, row))
    close(logits(model, inputs, adapter_names=NAMES), alone)


TASK_ERRORS = {
    "of the other adapter": (["icd", "icd", None, "v"], "Unknown task 'icd'; this adapter knows 'u'"),
    "for all, which one does not know": ("icd", "Unknown task 'icd'; this adapter knows 'u'"),
    "for some rows of an adapter": (["u", "icd", None, None], r"a task for some of an adapter's rows \[0, 3\]"),
    "too few": (["u", "icd"], "task_ids has 2 entries and the batch has 4 rows"),
}


@pytest.mark.parametrize("case", TASK_ERRORS)
def test_tasks_that_rows_cannot_have_are_refused(case, folder):
    model = two_adapters(("moelora", "moelora"), "llama", folder)
    task_ids, message = TASK_ERRORS[case]
    with pytest.raises(ValueError, match=message):
        model(**padded("llama"), adapter_names=NAMES, task_ids=task_ids)


def test_a_task_where_no_adapter_knows_any_is_refused(folder):
    model = two_adapters(("molora", "molora"), "llama", folder)
    with pytest.raises(ValueError, match="adapter 'two' knows no tasks"):
        model(**padded("llama"), adapter_names=NAMES, task_ids=["u", None, None, None])


@pytest.mark.parametrize("fields", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 7]}])
def test_modules_that_are_saved_whole_and_trained_embeddings_are_each_rows_own(fields, folder):
    model, inputs = two_adapters(("moelora", "moelora"), "llama", folder, **fields), padded("llama")
    inputs["input_ids"][:, 3] = 5
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name or "trainable_tokens_delta" in name:
            torch.manual_seed(len(name) + ("two" in name.split(".")))
            torch.nn.init.normal_(parameter, std=0.1)
    close(logits(model, inputs, adapter_names=NAMES), each_alone(model, inputs, lambda **row: logits(model, row)))
    settings = GREEDY | {"num_beams": 2, "num_return_sequences": 2}
    alone = each_alone(model, inputs, lambda **row: model.generate(**row, **settings))
    assert torch.equal(model.generate(**inputs, adapter_names=NAMES, **settings), torch.cat(alone))


def test_an_adapter_without_such_modules_has_the_base_models(folder):
    model, inputs = two_adapters(("molora", "molora"), "llama", folder), padded("llama")
    model.add_adapter("three", config_of("molora", "llama", folder, modules_to_save=["lm_head"]))
    torch.nn.init.normal_(model.get_base_model().lm_head.modules_to_save["three"].weight, std=0.1)
    names = ["three", "one", "__base__", "three"]
    alone = each_alone(model, inputs, lambda **row: logits(model, row), names)
    for active in ("one", "three"):
        model.set_adapter(active)
        close(logits(model, inputs, adapter_names=names), alone)


def merged(model):
    model.merge_adapter(["one"])
    return model


ERRORS = {
    "training": (lambda model: model.train(), NAMES),
    "a name there is not": (lambda model: model, ["two", "one", "x", "y"]),
    "too few names": (lambda model: model, ["two", "one"]),
    "merged": (merged, NAMES),
}


@pytest.mark.parametrize("kind", ["moelora", "at_moe"])
@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_those_of_stock_lora(case, kind, folder):
    prepare, names = ERRORS[case]
    lora = get_peft_model(make_model("llama"), LoraConfig(target_modules=TARGETS["llama"]), adapter_name="one")
    lora.add_adapter("two", LoraConfig(target_modules=TARGETS["llama"]))
    model = two_adapters((kind, kind), "llama", folder)
    if kind == "at_moe":
        model.set_group_weights({"f": {"a": 1.0}, "s": 0.5}, mix=0.5)
    inputs = padded("llama", labels=True)
    with pytest.raises(ValueError) as of_lora:
        prepare(lora.eval())(**inputs, adapter_names=names)
    with pytest.raises(ValueError) as of_ours:
        prepare(model)(**inputs, adapter_names=names)
    assert str(of_ours.value) == str(of_lora.value)


def test_what_is_no_list_of_names_is_refused(folder):
    model = two_adapters(("molora", "molora"), "llama", folder)
    for names in ("one", [0, 1, 2, 3], torch.zeros(4)):
        with pytest.raises(TypeError, match="expected a list of str"):
            model(**padded("llama"), adapter_names=names)


def test_disabled_adapters_stay_so_as_in_stock_lora(folder):
    model, inputs = two_adapters(("at_moe", "at_moe"), "llama", folder), padded("llama")
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs, adapter_names=NAMES), logits(model, inputs))


def test_models_whose_layers_do_not_see_rows_take_one_adapter_at_a_time(folder):
    model, inputs = two_adapters(("molora", "molora"), "llama", folder), padded("llama")
    model.base_model.context.one_task_only = "the layers of a such model do not see the rows of a batch first"
    with pytest.raises(ValueError, match="differ, and the layers of a such model do not see the rows"):
        model(**inputs, adapter_names=NAMES)
    close(logits(model, inputs, adapter_names=["two"] * 4), [logits_of_active(model, "two", inputs)])


def test_a_layer_that_sees_other_rows_says_so(folder):
    model = two_adapters(("molora", "molora"), "llama", folder)
    layer, context = routed_layers(model)[0], model.base_model.context
    with context.mixed(["one", "two", "one"]), context.call(None, active=["one", "two"]):
        layer(torch.zeros(3, 2, 32))
        layer(torch.zeros(6, 2, 32))
        with pytest.raises(ValueError, match="for 3 rows of adapter_names, and cannot tell which row is whose"):
            layer(torch.zeros(4, 2, 32))


@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # of peft, which warns of wrapping a PeftModel
def test_layers_of_a_model_inside_are_not_mixed_silently(folder):
    inner = two_adapters(("molora", "molora"), "llama", folder)
    outer = get_peft_model(inner, config_of("molora", "llama", folder), adapter_name="outer").eval()
    with pytest.raises(ValueError, match="belongs to a PeftModel inside this one"):
        outer(**padded("llama"), adapter_names=["outer", "outer", "outer", "__base__"])


def test_a_cache_goes_on_with_the_adapters_that_read_its_prompt(folder):
    model, inputs = two_adapters(("at_moe", "at_moe"), "llama", folder), make_inputs("llama", batch=4, labels=False)
    whole = logits(model, inputs, adapter_names=NAMES)
    ids = inputs["input_ids"]
    prompt = torch.ones_like(ids[:, :3])
    with torch.no_grad():
        first = model(input_ids=ids[:, :3], adapter_names=NAMES)
        rest = model(input_ids=ids[:, 3:], past_key_values=first.past_key_values, adapter_names=NAMES).logits
        marked = torch.cat([prompt, torch.zeros_like(ids[:, 3:])], dim=1).bool()
        expected = model(input_ids=ids, prompt_mask=marked, adapter_names=NAMES).logits
    torch.testing.assert_close(rest, expected[:, 3:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(rest, whole[:, 3:], atol=1e-5)
    again = model(input_ids=ids[:, :3], adapter_names=NAMES).past_key_values
    with pytest.raises(ValueError, match="goes on with a cache whose prompt was read with"):
        model(input_ids=ids[:, 3:], past_key_values=again, adapter_names=NAMES[::-1])
    model.set_adapter("two")
    with pytest.raises(ValueError, match="goes on with a cache whose prompt was read with"):
        model(input_ids=ids[:, 3:], past_key_values=again)


def test_masked_prompts_and_labels_are_each_rows_own(folder):
    model, inputs = two_adapters(("at_moe", "at_moe"), "llama", folder), padded("llama", labels=True)
    inputs["labels"][0, :3] = inputs["labels"][3, :5] = -100
    close(logits(model, inputs, adapter_names=NAMES), each_alone(model, inputs, lambda **row: logits(model, row)))


def test_group_weights_of_an_adapter_are_for_its_rows(folder):
    model, inputs = two_adapters(("at_moe", "at_moe"), "llama", folder), padded("llama")
    before = logits(model, inputs, adapter_names=NAMES)
    with model.routing({"f": {"a": 1.0}}, mix=1.0, adapter_name="two"):
        mixed = logits(model, inputs, adapter_names=NAMES)
        close(mixed, each_alone(model, inputs, lambda **row: logits(model, row)))
    assert torch.equal(mixed[1:3], before[1:3])
    assert not torch.allclose(mixed[0], before[0], atol=1e-5)


def test_gradients_are_those_of_each_row_alone(folder):
    """In eval mode, as stock LoRA allows it."""
    model, inputs = two_adapters(("medmoelora", "medmoelora"), "llama", folder), padded("llama")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(**inputs, adapter_names=NAMES).logits.square().sum().backward()
    mixed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for i, name in enumerate(NAMES):
        row = {key: value[i : i + 1] for key, value in inputs.items()}
        model(**row, adapter_names=[name]).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(mixed[name], parameter.grad, atol=1e-4, rtol=1e-4)


def test_statistics_have_the_rows_of_their_adapter(folder):
    model, inputs = two_adapters(("molora", "molora"), "llama", folder), padded("llama")
    model.record_routing()
    logits(model, inputs, adapter_names=NAMES)
    mixed = {name: model.routing_statistics(adapter_name=name, reset=True) for name in ("one", "two")}
    for name, rows in (("one", [1]), ("two", [0, 3])):
        model.set_adapter(name)
        logits(model, {key: value[rows] for key, value in inputs.items()})
        alone = model.routing_statistics(adapter_name=name, reset=True)
        assert alone.keys() == mixed[name].keys()
        for layer, values in alone.items():
            assert mixed[name][layer]["tokens"] == values["tokens"]
            assert mixed[name][layer]["load"] == pytest.approx(values["load"], abs=1e-5)


def test_calls_of_other_threads_are_not_mixed(folder):
    model, inputs = two_adapters(("moelora", "moelora"), "llama", folder), padded("llama")
    expected, mixed = logits(model, inputs), logits(model, inputs, adapter_names=NAMES)
    wrong = []

    def call(kwargs, right):
        for _ in range(5):
            if not torch.allclose(logits(model, inputs, **kwargs), right, atol=1e-5):
                wrong.append(kwargs)

    threads = [
        threading.Thread(target=call, args=args) for args in (({}, expected), ({"adapter_names": NAMES}, mixed)) * 2
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.long
@pytest.mark.parametrize(
    "kind", ["molora", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("moelora", "medmoelora", "at_moe"))]
)
def test_it_compiles_whole_as_stock_lora_does_not(kind, folder):
    few = {} if kind == "at_moe" else {"target_modules": ["q_proj"]}
    model, inputs = two_adapters((kind, kind), "llama", folder, **few), padded("llama")
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    mixed = logits(compiled, inputs, adapter_names=NAMES)
    torch.testing.assert_close(mixed, logits(model, inputs, adapter_names=NAMES), atol=1e-5, rtol=1e-5)


def test_one_forward_costs_what_its_rows_cost(folder):
    """A bank sees the rows of its adapter and no others."""
    model, inputs = two_adapters(("molora", "molora"), "llama", folder), padded("llama")
    bank, seen = routed_layers(model)[0].moelora_bank["two"], []
    bank.register_forward_hook(lambda _bank, args, _out: seen.append(args[0].shape[0]))
    logits(model, inputs, adapter_names=NAMES)
    assert seen == [2]


def test_half_precision_rounds_as_alone(folder):
    model, inputs = two_adapters(("moelora", "moelora"), "llama", folder), padded("llama")
    model = model.bfloat16()
    close(logits(model, inputs, adapter_names=NAMES), each_alone(model, inputs, lambda **row: logits(model, row)))


def test_a_model_without_task_type_takes_them_too(folder):
    model, inputs = two_adapters(("molora", "molora"), "llama", folder, task_type=None), padded("llama")
    alone = each_alone(model, inputs, lambda **row: logits(model, row))
    close(logits(model, inputs, adapter_names=NAMES), alone)
    generated = model.generate(**inputs, adapter_names=NAMES, **GREEDY)
    assert torch.equal(generated, torch.cat(each_alone(model, inputs, lambda **row: model.generate(**row, **GREEDY))))


def test_packed_rows_are_refused_for_the_adapters_that_rows_have_and_not_for_the_active_one(folder):
    model = get_peft_model(make_model("llama"), config_of("moelora", "llama", folder, default_task=None), "one")
    model.add_adapter("two", config_of("moelora", "llama", folder, other=True))  # with a default
    inputs = make_inputs("llama", batch=2, seq=6, labels=False) | {
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    }
    model.eval()
    logits(model, inputs, adapter_names=["two", "__base__"])
    with pytest.raises(ValueError, match="packed one after the other, and that mixes tasks"):
        logits(model, inputs, adapter_names=["two", "one"])
