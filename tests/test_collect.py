"""What routers give, collected over rows: beside plain forwards of one row at a time, token by token."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from kinds import config_of
from peft import LoraConfig, get_peft_model
from tiny_models import make_model
from tiny_text import INPUTS, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_moe import MedMoeLoraConfig, MoLoraConfig
from peft_moe.data import encode
from peft_moe.layer import MoeLinear
from peft_moe.report.collect import collect
from peft_moe.report.pieces import pieces
from peft_moe.report.results import Routing
from peft_moe.routing import GroupedRouter, TokenRouter
from peft_moe.routing.measures import divergence

TASKS = ["icd", "rad", "def"]


def rows_of(tasks=TASKS, count=7):
    """Rows of different lengths, whose tasks come in turn."""
    return Dataset.from_list(
        [
            {
                "task": tasks[i % len(tasks)],
                "messages": [
                    {"role": "user", "content": " ".join(INPUTS[: 1 + (3 * i) % 7])},
                    {"role": "assistant", "content": "broad needle small"[: 5 if i % 2 else None]},
                ],
            }
            for i in range(count)
        ]
    )


def adapted(kind, tmp_path, arch="llama", **fields):
    torch.manual_seed(0)
    config = (
        kind(task_type="CAUSAL_LM", **fields) if isinstance(kind, type) else config_of(kind, arch, tmp_path, **fields)
    )
    return get_peft_model(make_model(arch), config).eval()


def token_kind(kind, **fields):
    return lambda tmp_path: adapted(
        kind,
        tmp_path,
        **{"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, "lora_dropout": 0.0} | fields,
    )


MODELS = {
    "moelora": lambda path: adapted("moelora", path),
    "moelora by layer": lambda path: adapted("moelora", path, gate_scope="layer", default_task=None),
    "moelora in gpt2": lambda path: adapted("moelora", path, "gpt2"),
    "molora": lambda path: adapted("molora", path),
    "molora top p": lambda path: adapted("molora", path, top_p=0.6),
    "molora in opt": lambda path: adapted("molora", path, "opt"),
    "molora with a shared expert": token_kind(MoLoraConfig, r=2, num_experts=3, num_shared_experts=1),
    "medmoelora": lambda path: adapted("medmoelora", path),
    "medmoelora top 2": lambda path: adapted("medmoelora", path, inference_top_k=2),
    "at_moe": lambda path: adapted("at_moe", path),
    "at_moe per prompt": lambda path: adapted("at_moe", path, router_input="prompt", learn_mix=True),
}


def asked(model, row, told):
    """Weights of every layer for a row that comes alone: {layer: (s, E)} from `layer.weights` in a plain forward."""
    found, hooks = {}, []

    def note(name):
        def hook(layer, args):
            x = args[0]
            weights = layer.weights("default", x)
            router = layer.router_of("default")
            if getattr(router, "base_is_empty", False):  # the rest is for the base model alone
                assert router.num_base == 1
                rest = 1 - weights.sum(-1, keepdim=True)
                weights = torch.cat([rest * (rest > 1e-6), weights], dim=-1)
            if weights is not None:
                found[name] = weights.reshape(-1, weights.shape[-1]).expand(len(row["input_ids"]), -1)

        return hook

    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, MoeLinear):
            hooks.append(layer.register_forward_pre_hook(note(name)))
    with torch.no_grad():
        labels = torch.tensor([row["labels"]])
        model(input_ids=torch.tensor([row["input_ids"]]), labels=labels, **({"task_ids": [told]} if told else {}))
    for hook in hooks:
        hook.remove()
    return found


def naive(model, rows):
    """By layer: the sums that a report is about, added up in Python, a token at a time."""
    config = model.peft_config["default"]
    told = config.task_names if config.needs_tasks else None
    sums = {}
    for row, encoded in zip(rows, encode(rows, make_tokenizer(), tasks=told), strict=True):
        for name, weights in asked(model, encoded, row["task"] if told else None).items():
            for task in (None, row["task"] if isinstance(row["task"], str) else "+".join(row["task"])):
                e = weights.shape[-1]
                found = sums.setdefault(name, {}).setdefault(
                    task, {"tokens": 0, "entropy": 0.0, **{key: [0.0] * e for key in ("load", "top1", "chosen")}}
                )
                for token in weights.double().tolist():
                    found["tokens"] += 1
                    total = sum(token)
                    found["entropy"] -= sum(w / total * math.log(w / total) for w in token if w > 0)
                    found["top1"][token.index(max(token))] += 1
                    for i, weight in enumerate(token):
                        found["load"][i] += weight
                        found["chosen"][i] += weight > 0
    return sums


@pytest.mark.parametrize("kind", MODELS)
def test_sums_are_those_of_rows_that_come_alone(kind, tmp_path):
    model, rows = MODELS[kind](tmp_path), rows_of()
    expected = naive(model, rows)
    routing, _ = collect(model, make_tokenizer(), rows, batch_size=3, progress=False)
    assert routing.rows == len(rows)
    assert routing.tasks == sorted(TASKS)
    names = {layer["name"] for layer in routing.layers}
    assert names == ({name.rsplit(".", 2)[0] for name in expected} if "at_moe" in kind else set(expected))
    for layer in routing.layers:
        inside = [name for name in expected if name == layer["name"] or name.startswith(layer["name"] + ".")]
        for name in inside:  # all layers of a block have the same weights
            drop = 1 if "shared" in kind else 0
            compare(layer, expected[name], drop)


def compare(layer, expected, drop):
    whole = expected[None]
    assert layer["tokens"] == whole["tokens"]
    load = whole["load"][drop:]
    close(layer["load"], [value / sum(load) for value in load])
    close(layer["chosen"], [value / whole["tokens"] for value in whole["chosen"][drop:]])
    close([layer["chosen_per_token"]], [sum(whole["chosen"][drop:]) / whole["tokens"]])
    close([layer["effective_experts"]], [math.exp(-sum(v / sum(load) * math.log(v / sum(load)) for v in load if v))])
    if not drop:  # a shared expert is part of these in the reference
        close(layer["top1"], [value / whole["tokens"] for value in whole["top1"]])
        close([layer["entropy"]], [whole["entropy"] / whole["tokens"]])
    assert list(layer["tasks"]) == sorted(task for task in expected if task)
    for task, values in layer["tasks"].items():
        own = expected[task]["load"][drop:]
        assert values["tokens"] == expected[task]["tokens"]
        close(values["load"], [value / sum(own) for value in own])


def close(found, expected):
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_task_gate_gives_each_task_its_own_load(tmp_path):
    model = adapted("moelora", tmp_path)
    routing, samples = collect(model, make_tokenizer(), rows_of(), progress=False)
    gate = next(m for m in model.modules() if isinstance(m, MoeLinear)).router_of("default")
    for layer in routing.layers:
        for task, values in layer["tasks"].items():
            weights = gate.of_tasks(torch.tensor([TASKS.index(task)]))[0]
            close(values["load"], weights.tolist())
    for sample in samples:
        assert all(weights.shape[0] == 1 for weights in sample.weights)


def test_rows_of_several_tasks_count_as_a_task_of_their_own(tmp_path):
    rows = rows_of(tasks=[["icd"], ["icd", "rad"], ["def"]])
    model = adapted("moelora", tmp_path)
    routing, samples = collect(model, make_tokenizer(), rows, progress=False)
    assert routing.tasks == ["def", "icd", "icd+rad"]
    gate = next(m for m in model.modules() if isinstance(m, MoeLinear)).router_of("default")
    close(routing.layers[0]["tasks"]["icd+rad"]["load"], gate.of_tasks(torch.tensor([[0, 1]]))[0].tolist())
    assert {sample.task for sample in samples} == set(routing.tasks)


@pytest.mark.parametrize("kind", ["moelora", "molora", "at_moe", "at_moe per prompt"])
def test_padding_does_not_count(kind, tmp_path):
    model = MODELS[kind](tmp_path)
    one, _ = collect(model, make_tokenizer(), rows_of(), batch_size=1, progress=False)
    all_at_once, _ = collect(model, make_tokenizer(), rows_of(), batch_size=7, progress=False)
    assert one.tokens == all_at_once.tokens == one.layers[0]["tokens"]
    for first, second in zip(one.layers, all_at_once.layers, strict=True):
        close(first["load"], second["load"])
        close([first["entropy"]], [second["entropy"]])


def test_groups_of_at_moe_have_names_and_loads(tmp_path):
    model = adapted("at_moe", tmp_path)
    routing, _ = collect(model, make_tokenizer(), rows_of(), progress=False)
    assert routing.method == "AT-MoE"
    assert routing.groups == ["f", "s"]
    assert [layer["name"] for layer in routing.layers] == ["model.layers.0", "model.layers.1"]
    for layer in routing.layers:
        assert layer["experts"] == ["f/a", "f/b", "s/c", "general"]
        assert layer["group_of"] == [0, 0, 1, -1]
        assert layer["module"] == ""
        assert layer["ranks"] == [2, 4, 3, 5]
        close([sum(layer["group_load"])], [1.0])
        general = layer["load"][-1]  # the general expert has 1 - λ of all, and the groups the rest
        close([layer["load"][0] + layer["load"][1]], [layer["group_load"][0] * (1 - general)])
        close([general], [0.5])


def test_new_routers_of_at_moe_are_found_to_decide_nothing(tmp_path):
    for flat in (False, True):  # as they start, all scores are zero
        model = adapted("at_moe", tmp_path, flat_routing=flat, init_lora_weights=True)
        routing, _ = collect(model, make_tokenizer(), rows_of(), progress=False)
        found = {finding["title"]: finding["level"] for finding in routing.findings}
        assert found["Routing is uniform"] == "bad"
        assert found["Tasks have the same mean load"] == "note"


@pytest.mark.parametrize("mode", ["empty", "general"])
def test_base_experts_have_names_and_a_share(mode, tmp_path):
    fields = {"target_modules": ["q_proj"], "num_experts": 2, "num_base_experts": 2, "expert_ranks": 3}
    if mode == "general":
        fields |= {"base_expert_mode": "general", "tasks": TASKS, "general_tasks": ["def"]}
    model = adapted(MedMoeLoraConfig, tmp_path, init_lora_weights=False, **fields)
    seen = []
    router = next(m for m in model.modules() if isinstance(m, TokenRouter))
    hook = router.gate.register_forward_hook(lambda gate, args, scores: seen.append(scores.softmax(-1)[0]))
    rows = rows_of(count=1)
    ids = encode(rows, make_tokenizer(), tasks=None)[0]["input_ids"]
    model(input_ids=torch.tensor([ids]))
    hook.remove()
    routing, samples = collect(model, make_tokenizer(), rows, progress=False)
    layer = routing.layers[0]
    assert layer["experts"] == ["base 0", "base 1", "0", "1"]
    assert len(layer["ranks"]) == len(layer["similarity"]) == 4
    close(layer["load"], seen[0].mean(0).tolist())
    torch.testing.assert_close(samples[0].weights[0], seen[0].detach(), rtol=1e-5, atol=1e-6)
    assert (layer["ranks"][0] == 0) is (mode == "empty")


def test_layers_with_one_expert_are_left_out(tmp_path):
    model = adapted("molora", tmp_path, num_experts_pattern={"q_proj": 1})
    routing, _ = collect(model, make_tokenizer(), rows_of(), progress=False)
    assert all("q_proj" not in layer["name"] for layer in routing.layers)
    assert [layer["block"] for layer in routing.layers] == [0, 0, 0, 1, 1, 1]
    assert routing.layers[0]["module"] == "self_attn.v_proj"
    with pytest.raises(ValueError, match="no layer with a router"):
        collect(adapted("molora", tmp_path, num_experts=1, top_k=1), make_tokenizer(), rows_of(), progress=False)


@pytest.mark.parametrize("kind", ["moelora", "molora", "at_moe", "at_moe per prompt"])
def test_samples_have_the_weights_of_their_tokens(kind, tmp_path):
    model, rows, tokenizer = MODELS[kind](tmp_path), rows_of(), make_tokenizer()
    routing, samples = collect(model, tokenizer, rows, samples=3, sample_tokens=6, batch_size=2, progress=False)
    assert [sample.task for sample in samples] == sorted(TASKS)
    told = model.peft_config["default"].task_names if kind == "moelora" else None
    encoded = encode(rows, tokenizer, tasks=told)
    for sample in samples:
        at = TASKS.index(sample.task)  # the first row of each task
        ids = encoded[at]["input_ids"]
        assert "".join(sample.tokens) == tokenizer.decode(ids)[-len("".join(sample.tokens)) :]
        assert len(sample.tokens) == min(6, len(ids))
        assert sample.cut == len(ids) - len(sample.tokens)
        answer = sum(label != -100 for label in encoded[at]["labels"])
        assert sample.prompt_tokens == max(0, len(sample.tokens) - answer)
        alone = asked(model, encoded[at], sample.task if told else None)
        for layer, weights in zip(routing.layers, sample.weights, strict=True):
            expected = next(w for name, w in alone.items() if f"{name}.".startswith(layer["name"] + "."))
            assert weights.dtype == torch.float32
            torch.testing.assert_close(
                weights.expand(len(sample.tokens), -1), expected[-len(sample.tokens) :], rtol=1e-4, atol=1e-5
            )


def test_what_a_row_has_lost_at_its_start_is_told(tmp_path):
    model, rows = adapted("molora", tmp_path), rows_of(count=3)
    lengths = [len(ids) for ids in encode(rows, make_tokenizer(), tasks=None)["input_ids"]]
    with pytest.warns(UserWarning, match="lost the start of their prompt"):
        _, samples = collect(model, make_tokenizer(), rows, max_length=8, sample_tokens=4, progress=False)
    whole = dict(zip(TASKS, lengths, strict=True))
    assert [sample.cut for sample in samples] == [whole[sample.task] - len(sample.tokens) for sample in samples]
    assert all(sample.cut for sample in samples)


def test_experts_with_the_same_weight_share_the_top_1(tmp_path):
    model = adapted("molora", tmp_path, top_k=4)
    with torch.no_grad():
        for router in (m for m in model.modules() if isinstance(m, TokenRouter)):
            for parameter in router.gate.parameters():
                parameter.zero_()
    routing, _ = collect(model, make_tokenizer(), rows_of(), progress=False)
    assert {share for layer in routing.layers for share in layer["top1"]} == {0.25}


@pytest.mark.parametrize("kind", ["molora", "at_moe per prompt"])
def test_chance_is_as_far_as_tasks_are_apart_whose_rows_are_drawn(kind, tmp_path):
    model, rows = MODELS[kind](tmp_path), rows_of(count=24)
    routing, _ = collect(model, make_tokenizer(), rows, progress=False)
    alone = rows.remove_columns("task").add_column("task", [str(i) for i in range(24)])
    by_row, _ = collect(model, make_tokenizer(), alone, progress=False)
    assert all(layer["chance_divergence"] is None for layer in by_row.layers)  # one row of each
    random, found = np.random.default_rng(0), []
    for layer in by_row.layers:
        weights = np.array([np.array(task["load"]) * task["tokens"] for task in layer["tasks"].values()])
        for _ in range(100):
            sums = weights[random.permutation(24)].reshape(3, 8, -1).sum(1)
            found.append(divergence((sums / sums.sum(1, keepdims=True)).tolist()))
    chances = [layer["chance_divergence"] for layer in routing.layers]
    assert np.mean(chances) == pytest.approx(np.mean(found), rel=0.3)


def test_chance_has_no_part_where_the_task_decides(tmp_path):
    routing, _ = collect(adapted("moelora", tmp_path), make_tokenizer(), rows_of(), progress=False)
    assert [layer["chance_divergence"] for layer in routing.layers] == pytest.approx(
        [0.0] * len(routing.layers), abs=1e-9
    )


def test_rows_without_tasks_are_looked_at_too(tmp_path):
    rows = rows_of().remove_columns("task").add_column("task", [""] * 7)
    routing, samples = collect(adapted("molora", tmp_path), make_tokenizer(), rows, progress=False)
    assert routing.tasks == []
    assert {sample.task for sample in samples} == {None}
    assert all(layer["tasks"] == {} and layer["chance_divergence"] is None for layer in routing.layers)


def test_no_samples_and_the_same_ones_twice(tmp_path):
    model = adapted("molora", tmp_path)
    assert collect(model, make_tokenizer(), rows_of(), samples=0, progress=False)[1] == []
    once, again = (collect(model, make_tokenizer(), rows_of(), progress=False)[1] for _ in range(2))
    assert [sample.tokens for sample in once] == [sample.tokens for sample in again]
    assert len(once) == 7  # all rows there are


def traces(model):
    """What watching would leave behind."""
    routers = [m for m in model.modules() if isinstance(m, (TokenRouter, GroupedRouter)) or hasattr(m, "of_tasks")]
    left = [bool(module._forward_hooks or module._forward_pre_hooks) for module in model.modules()]
    return any(left), [getattr(router, "seen", None) for router in routers], [m.training for m in model.modules()]


@pytest.mark.parametrize("kind", ["moelora", "molora", "medmoelora", "at_moe", "at_moe per prompt"])
def test_nothing_is_left_behind_also_after_an_error(kind, tmp_path):
    model = MODELS[kind](tmp_path)
    model.train()
    model.base_model.model.model.layers[0].eval()  # a part in another mode stays there
    before = traces(model)
    collect(model, make_tokenizer(), rows_of(), progress=False)
    assert traces(model) == before

    def fail(*args):
        raise KeyboardInterrupt

    hook = model.base_model.model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        collect(model, make_tokenizer(), rows_of(), progress=False)
    hook.remove()
    assert traces(model) == before
    assert not model.base_model.context.open


def test_statistics_of_training_do_not_have_it(tmp_path):
    model = adapted("molora", tmp_path)
    model.base_model.record_routing()
    collect(model, make_tokenizer(), rows_of(), progress=False)
    assert model.base_model.routing_statistics() == {}
    model(input_ids=torch.tensor([[3, 4, 5]]))
    assert {values["tokens"] for values in model.base_model.routing_statistics().values()} == {3}


def test_other_models_and_rows_are_refused(tmp_path):
    model, tokenizer = adapted("moelora", tmp_path), make_tokenizer()
    with pytest.raises(TypeError, match="LlamaForCausalLM has no adapter of peft_moe"):
        collect(make_model("llama"), tokenizer, rows_of(), progress=False)
    stock = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="no adapter of peft_moe"):
        collect(stock, tokenizer, rows_of(), progress=False)
    with pytest.raises(ValueError, match=r"tasks \['other'\] that are not among"):
        collect(model, tokenizer, rows_of(tasks=["icd", "other"]), progress=False)
    for name, value in {"batch_size": 0, "max_length": 0, "samples": -1, "sample_tokens": 0}.items():
        with pytest.raises(ValueError, match=f"{name}={value}"):
            collect(model, tokenizer, rows_of(), progress=False, **{name: value})
    with model.base_model.task("icd"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="is merged, and routes nothing"):
        collect(model, tokenizer, rows_of(), progress=False)


def test_a_router_that_gives_no_numbers_is_an_error(tmp_path):
    model = adapted("molora", tmp_path)
    with torch.no_grad():
        next(m for m in model.modules() if isinstance(m, TokenRouter)).gate.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite"):
        collect(model, make_tokenizer(), rows_of(), progress=False)


def test_a_second_adapter_is_looked_at_by_its_name(tmp_path):
    model = adapted("molora", tmp_path)
    model.add_adapter("other", config_of("molora", "llama", tmp_path, other=True))
    model.set_adapter("other")
    routing, _ = collect(model, make_tokenizer(), rows_of(), progress=False)
    assert routing.adapter == "other"
    assert {len(layer["experts"]) for layer in routing.layers} == {6}  # and not the shared one


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_routing_is_read_as_it_was_written(tmp_path):
    for kind in ("moelora", "at_moe"):
        routing, _ = collect(adapted(kind, tmp_path), make_tokenizer(), rows_of(), progress=False)
        routing.write(tmp_path / "routing.json")
        assert Routing.read(tmp_path / "routing.json") == routing
        assert json.loads((tmp_path / "routing.json").read_text()) == routing.to_dict()


SPOILT = {
    "format": (lambda d: d.update(format=2), "no routing of format 1 but 2"),
    "rows": (lambda d: d.update(rows="7"), "rows is '7'"),
    "tasks": (lambda d: d.update(tasks=[1]), "tasks is no list of names"),
    "layers": (lambda d: d.update(layers=[3]), r"layers\[0\] is '3'"),
    "experts": (lambda d: d["layers"][0].update(experts=["0"]), r"layers\[0\].ranks has 4 entries and not 1"),
    "load": (lambda d: d["layers"][0]["load"].pop(), r"layers\[0\].load has 3 entries and not 4"),
    "number": (lambda d: d["layers"][0]["load"].__setitem__(0, "x"), r"layers\[0\].load has 'x', which is no number"),
    "task load": (lambda d: d["layers"][0]["tasks"]["icd"].pop("load"), r"tasks\['icd'\].load is 'None'"),
    "similarity": (lambda d: d["layers"][0]["similarity"].__setitem__(0, [1]), "similarity has 1 entries and not 4"),
    "finding": (lambda d: d["findings"][0].pop("text"), r"findings\[0\].text is 'None'"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_file_is_an_error_that_says_where(what, tmp_path):
    routing, _ = collect(adapted("moelora", tmp_path), make_tokenizer(), rows_of(), progress=False)
    data = copy.deepcopy(routing.to_dict())
    spoil, message = SPOILT[what]
    spoil(data)
    (tmp_path / "routing.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as error:
        Routing.read(tmp_path / "routing.json")
    assert "routing.json" in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"format": 1, "rows": NaN}', "[" * 100_000])
def test_what_is_no_report_is_an_error(text, tmp_path):
    (tmp_path / "routing.json").write_text(text)
    with pytest.raises(ValueError, match="routing.json"):
        Routing.read(tmp_path / "routing.json")


# -- pieces of text ---------------------------------------------------------------------------------------------------


def byte_level():
    """A tokenizer whose tokens are single bytes, and a word."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "</s>", "th", "the"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


@pytest.mark.parametrize(
    "text", ["the cat", "naïve: 37 °C", "日本語 text", "🩺 and 👩‍⚕️", "a\n\tb  c", "\ufffd here", "<b>"]
)
def test_pieces_joined_are_the_text_and_no_character_is_torn(text):
    tokenizer = byte_level()
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    found = pieces(ids, tokenizer)
    assert len(found) == len(ids)
    assert "".join(found) == text + "</s>"
    assert found[-1] == "</s>"
    assert sum("\ufffd" in piece for piece in found) == text.count("\ufffd")


def test_pieces_from_the_middle_of_a_character_on():
    tokenizer = byte_level()
    ids = tokenizer("x語y")["input_ids"]
    assert [pieces(ids, tokenizer, start=start) for start in range(6)] == [
        ["x", "", "", "語", "y"],
        ["", "", "語", "y"],
        ["", "語", "y"],
        ["語", "y"],
        ["y"],
        [],
    ]


def test_a_character_that_never_ends_is_shown_as_such():
    tokenizer = byte_level()
    ids = tokenizer("x語")["input_ids"][:-1]
    assert pieces(ids, tokenizer)[0] == "x"
    assert "".join(pieces(ids, tokenizer)) == tokenizer.decode(ids)


def test_words_keep_the_spaces_between_them():
    tokenizer = make_tokenizer()
    assert pieces(tokenizer("<user> ash elm </s>")["input_ids"], tokenizer) == ["<user>", " ash", " elm", " </s>"]
