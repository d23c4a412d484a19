"""What a report says of the routing is what a loop over tokens finds."""

import json
import math
from functools import partial

import pytest
import torch
from datasets import Dataset
from helpers import TASKS
from kinds import KINDS, config_of
from peft import LoraConfig, get_peft_model
from tiny_models import make_model
from tiny_text import make_tokenizer
from transformers import AutoTokenizer

from peft_moe import MoLoraConfig
from peft_moe.data import encode
from peft_moe.report.collect import Sample, collect, write_tokens
from peft_moe.report.places import places_of

ROWS = [
    ("icd", "Fracture of the left wrist.", "S62"),
    ("rad", "Chest x-ray without findings, patient well.", "no finding"),
    ("def", "Fever.", "high temperature"),
    ("icd", "Cough since a week, patient is 67 years old.", "R05"),
    ("rad", "Left knee.", "no fracture at all"),
]
CASES = [(kind, other) for kind in KINDS for other in (False, True)]


def examples(rows=ROWS):
    return Dataset.from_list(
        [
            {"task": t, "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for t, q, a in rows
        ]
    )


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def model_of(kind, tmp_path, *, other=False, **fields):
    torch.manual_seed(0)
    tasks = {"tasks": TASKS, "default_task": None} if kind == "moelora" else {}
    return get_peft_model(make_model("llama"), config_of(kind, "llama", tmp_path, other=other, **tasks | fields))


def row_by_row(model, tokenizer, rows):
    """The weights (s, E) of every place, one unpadded row at a time."""
    config = model.active_peft_config
    places = places_of(model.get_base_model(), "default", getattr(config, "names", None))
    names = config.task_names
    found = {place.name: [] for place in places}
    for row, (task, *_) in zip(encode(examples(rows), tokenizer, tasks=None), rows, strict=True):
        ids = torch.tensor([row["input_ids"]])
        told = {"task_ids": [task]} if task in names else {}
        if getattr(config, "router_input", "") == "prompt":
            told["prompt_mask"] = torch.tensor([row["labels"]]) == -100
        seen = {}
        watched = [place.watched(partial(seen.__setitem__, place.name)) for place in places]
        for one in watched:
            one.__enter__()
        with torch.no_grad():
            model.eval()(input_ids=ids, **told)
        for one in watched:
            one.__exit__(None, None, None)
        for name, weights in seen.items():
            found[name].append(weights.reshape(-1, weights.shape[-1]).expand(ids.shape[1], -1).double())
    return found


@pytest.mark.parametrize(("kind", "other"), CASES)
def test_sums_are_those_of_a_loop_over_unpadded_rows(kind, other, tmp_path, tokenizer):
    model = model_of(kind, tmp_path, other=other)
    routing, _ = collect(model, tokenizer, examples(), batch_size=3, progress=False)
    expected = row_by_row(model, tokenizer, ROWS)
    assert [layer["name"] for layer in routing["layers"]] == list(expected)
    for layer in routing["layers"]:
        weights = torch.cat(expected[layer["name"]])
        e = weights.shape[1]
        assert len(layer["experts"]) == len(layer["ranks"]) == e
        assert layer["tokens"] == len(weights) == routing["tokens"]
        share = weights.sum(0) / weights.sum()
        torch.testing.assert_close(torch.tensor(layer["load"]).double(), share, atol=1e-5, rtol=1e-5)
        chosen = (weights > 0).double().mean(0)
        torch.testing.assert_close(torch.tensor(layer["chosen"]).double(), chosen, atol=1e-6, rtol=0)
        top = [sum(int(token.argmax()) == i for token in weights) / len(weights) for i in range(e)]
        assert layer["top1"] == pytest.approx(top, abs=1e-6)
        entropies = [-sum(x * math.log(x) for x in (token / token.sum()).tolist() if x > 0) for token in weights]
        assert layer["entropy"] == pytest.approx(sum(entropies) / len(entropies), abs=1e-4)
        assert layer["effective_experts"] == pytest.approx(math.exp(-(share * share.log()).nan_to_num().sum()), 1e-4)
        for task, values in layer["tasks"].items():
            own = torch.cat([w for w, row in zip(expected[layer["name"]], ROWS, strict=True) if row[0] == task])
            assert values["tokens"] == len(own)
            assert values["load"] == pytest.approx((own.sum(0) / own.sum()).tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_the_last_tokens_of_rows_of_all_tasks(kind, tmp_path, tokenizer):
    model = model_of(kind, tmp_path)
    routing, samples = collect(model, tokenizer, examples(), samples=3, sample_tokens=6, progress=False)
    assert sorted(sample.task for sample in samples) == ["def", "icd", "rad"]
    expected = row_by_row(model, tokenizer, ROWS[:3])
    encoded = encode(examples(ROWS[:3]), tokenizer, tasks=None)
    for at, sample in enumerate(samples):
        assert sample.task == ROWS[at][0]
        ids = encoded[at]["input_ids"][-6:]
        assert "".join(sample.tokens) == tokenizer.decode(ids)
        assert len(sample.tokens) == len(ids)
        assert sample.prompt_tokens == sum(label == -100 for label in encoded[at]["labels"][-6:])
        for layer, weights in zip(routing["layers"], sample.weights, strict=True):
            whole = expected[layer["name"]][at][-6:].float()
            torch.testing.assert_close(weights.expand_as(whole), whole, atol=1e-5, rtol=1e-5)


def test_a_character_of_several_tokens_is_with_the_last_of_them(smollm2):
    tokenizer, sample = AutoTokenizer.from_pretrained(smollm2), Sample("icd", [], 0, [])
    ids = tokenizer("Fièvre 🤒 élevée")["input_ids"]
    write_tokens(sample, {"input_ids": ids, "labels": [-100] * len(ids)}, tokenizer, 100)
    assert "".join(sample.tokens) == "Fièvre 🤒 élevée"
    assert len(sample.tokens) == sample.prompt_tokens == len(ids)
    assert any("🤒" in piece for piece in sample.tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_left_as_it_was_also_after_an_error(kind, tmp_path, tokenizer):
    model = model_of(kind, tmp_path).train()
    hooks = [len(m._forward_hooks) for m in model.modules()]
    collect(model, tokenizer, examples(), progress=False)
    assert model.training

    def fail(*_):
        raise RuntimeError("in the middle")

    handle = model.get_base_model().model.layers[-1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        collect(model, tokenizer, examples(), progress=False)
    handle.remove()
    assert model.training
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


def test_json_can_hold_it(tmp_path, tokenizer):
    routing, _ = collect(model_of("at_moe", tmp_path), tokenizer, examples(), progress=False)
    assert json.loads(json.dumps(routing, allow_nan=False)) == routing
    assert routing["groups"]
    assert all(sum(layer["group_load"]) <= 1 + 1e-6 for layer in routing["layers"])


def test_layers_of_one_expert_are_left_out_and_a_model_of_these_is_refused(tmp_path, tokenizer):
    config = MoLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], num_experts=1, top_k=1)
    with pytest.raises(ValueError, match="no routing to look at"):
        collect(get_peft_model(make_model("llama"), config), tokenizer, examples(), progress=False)


def test_another_adapter_is_refused(tokenizer):
    model = get_peft_model(make_model("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="an adapter of peft_moe"):
        collect(model, tokenizer, examples(), progress=False)


def test_a_task_that_the_adapter_needs_and_does_not_know_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="summary"):
        collect(model_of("moelora", tmp_path), tokenizer, examples([("summary", "a", "b")]), progress=False)


def test_tasks_that_are_mere_labels_need_not_be_known(tmp_path, tokenizer):
    rows = [("summary", "Fever.", "b"), ("letter", "Cough.", "c")]
    routing, _ = collect(model_of("molora", tmp_path), tokenizer, examples(rows), progress=False)
    assert routing["tasks"] == ["letter", "summary"]


@pytest.mark.parametrize("size", [{"batch_size": 0}, {"sample_tokens": 0}, {"batch_size": 1.5}])
def test_sizes_are_counts(size, tmp_path, tokenizer):
    with pytest.raises((ValueError, TypeError), match=next(iter(size))):
        collect(model_of("molora", tmp_path), tokenizer, examples(), progress=False, **size)
