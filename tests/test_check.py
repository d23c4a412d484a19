"""The three checks of an adapter: its size, its gate, and what the gate is worth."""

import json
import sys

import pytest
import torch
from broken_files import METHODS, make_adapter, set_field
from grouped_helpers import grouped_config
from helpers import TARGETS, TASKS, config_for, logits, plain, routed, routed_layers
from kinds import KINDS, config_of, two_adapters
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import make_inputs, make_model
from tiny_text import ANSWERS, make_tokenizer, write_data
from transformers import AutoModelForCausalLM

from peft_moe import MedMoeLoraConfig, MoLoraConfig
from peft_moe.cli import main
from peft_moe.data import read_examples, read_task_info
from peft_moe.evaluation import evaluate_tasks, generate_answers, score
from peft_moe.report.adapter import describe
from peft_moe.report.uniform import MEANING, ablate, even, rate_rows, sign_test, uniform_gates
from peft_moe.report.verify import diversity, parameters


def described(model, folder):
    model.save_pretrained(str(folder))
    return describe(folder)


# parameters


def lora_size(arch, r, targets):
    model = get_peft_model(make_model(arch), LoraConfig(r=r, target_modules=targets, fan_in_fan_out=arch == "gpt2"))
    return model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_moelora_has_the_parameters_of_a_lora_and_those_of_its_gate(arch, scope, tmp_path):
    model = routed(arch, gate_scope=scope, task_embedding_dim=5)
    found = parameters(described(model, tmp_path / "adapter"))
    gates = 1 if scope == "model" else len(routed_layers(model))
    assert found["lora"] == found["experts"] == lora_size(arch, 8, TARGETS[arch])
    assert found["routers"] == {"embedding": gates * len(TASKS) * 5, "proj": gates * 4 * 5}
    assert found["difference"] == gates * (len(TASKS) + 4) * 5
    assert found["trained"] == model.get_nb_trainable_parameters()[0]
    assert found["equal"]
    assert "just as many as a LoRA of total rank 8" in found["says"][0]


@pytest.mark.parametrize("other", [False, True], ids=["usual", "other"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_is_counted_beside_a_lora_of_its_total_ranks(kind, other, tmp_path):
    model = get_peft_model(make_model("llama"), config_of(kind, "llama", tmp_path, other=other))
    found = parameters(described(model, tmp_path / "adapter"))
    lora = 0
    for layer in routed_layers(model):
        lora += sum(layer.bank("default").ranks) * (layer.in_features + layer.out_features)
    assert found["lora"] == found["experts"] == sum(row["lora"] for row in found["by_rank"]) == lora
    assert sum(row["layers"] for row in found["by_rank"]) == len(routed_layers(model))
    assert found["trained"] == model.get_nb_trainable_parameters()[0]
    assert found["difference"] == found["trained"] - lora
    assert found["experts_are_trained"] == (kind != "at_moe")
    each = sum(layer.in_features + layer.out_features for layer in routed_layers(model))
    assert found["rank_of_equal_size"] == pytest.approx(found["trained"] / each)


def test_whole_modules_are_counted_apart(tmp_path):
    model = routed("bert")  # whose head is saved and trained whole
    found = parameters(described(model, tmp_path / "adapter"))
    head = sum(p.numel() for p in model.base_model.model.classifier.modules_to_save["default"].parameters())
    assert found["other"] == head
    assert found["difference"] == sum(found["routers"].values())


def test_a_file_of_other_ranks_than_its_config_says_is_not_the_size_of_its_lora(tmp_path, capsys):
    folder = tmp_path / "adapter"
    routed("llama").save_pretrained(str(folder))  # of r=8
    set_field(folder, r=4)
    found = parameters(describe(folder, strict=False))
    assert found["lora"] == lora_size("llama", 4, TARGETS["llama"])
    assert found["experts"] == 2 * found["lora"]
    assert not found["equal"]
    assert main(["check", "parameters", str(folder)]) == 1
    out, error = capsys.readouterr()
    assert "NOT as many as a LoRA of total rank 4" in " ".join(out.split())
    assert "NOT as many as" in error
    with pytest.raises(ValueError, match="saved with another config"):
        describe(folder)


# diversity


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_the_diversity_of_gates_is_their_largest_weight_less_the_smallest(scope, tmp_path):
    model = routed("llama", gate_scope=scope)
    found = diversity(described(model, tmp_path / "adapter"))
    layers = {key: m for key, m in model.base_model.model.named_modules() if m in routed_layers(model)}
    over_experts, over_tasks = [], []
    for gate in found["gates"]:
        key = gate["name"] if scope == "layer" else next(iter(layers))
        weights = layers[key].router_of("default").of_tasks(torch.arange(3)).tolist()
        for i, task in enumerate(TASKS):
            expected = max(weights[i]) - min(weights[i])
            over_experts.append((expected, task, gate["name"]))
            assert gate["tasks"][task]["difference"] == pytest.approx(expected)
        for i in range(4):
            column = [row[i] for row in weights]
            over_tasks.append((max(column) - min(column), str(i), gate["name"]))
            assert gate["experts"][str(i)]["difference"] == pytest.approx(max(column) - min(column))
        assert gate["even"] == 0.25
    assert len(found["gates"]) == (1 if scope == "model" else len(layers))
    for key, differences in (("over_experts", over_experts), ("over_tasks", over_tasks)):
        largest = max(differences)
        assert found[key] == {"difference": pytest.approx(largest[0]), "of": largest[1], "gate": largest[2]}


def test_a_gate_without_a_difference_has_a_diversity_of_zero(tmp_path):
    model = routed("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate.embedding" in name:
                parameter.zero_()
    found = diversity(described(model, tmp_path / "adapter"))
    assert found["over_experts"]["difference"] == found["over_tasks"]["difference"] == 0


def test_one_task_has_no_other_to_differ_from(tmp_path):
    found = diversity(described(routed("llama", tasks=["only"]), tmp_path / "adapter"))
    assert "There is one task" in found["says"][-1]


@pytest.mark.parametrize("method", METHODS[1:])
def test_gates_that_read_the_input_are_left_to_the_report(method, tmp_path, capsys):
    make_adapter(method, tmp_path).save_pretrained(str(tmp_path / "adapter"))
    assert main(["check", "diversity", str(tmp_path / "adapter")]) == 1
    assert f"peft-moe report {tmp_path / 'adapter'} --data FILE --out DIR" in capsys.readouterr().err


def test_a_plain_lora_has_no_gate_to_look_at(tmp_path, capsys):
    routed("llama", num_experts=1).save_pretrained(tmp_path / "adapter")
    assert main(["check", "diversity", str(tmp_path / "adapter")]) == 1
    assert "one expert in each layer, and no gate" in capsys.readouterr().err


@pytest.mark.parametrize(("check", "function"), [("parameters", parameters), ("diversity", diversity)])
def test_the_commands_show_the_numbers_and_give_them_as_json(check, function, tmp_path, capsys):
    found = function(described(routed("llama", tasks=["[b]x[/b]", "\x1b[31my"]), tmp_path / "adapter"))
    assert main(["check", check, str(tmp_path / "adapter")]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    for sentence in found["says"]:
        assert sentence.split(".")[0][:60].split("(")[0].strip() in " ".join(text.split())
    assert ("[b]x[/b]" in text) == (check == "diversity")
    assert main(["check", check, str(tmp_path / "adapter"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found))


# uniform gates


def weights_of(kind, layer, config):
    """What uniform gates are to give each expert of a bank, by loops over names."""
    bank, router = layer.bank("default"), layer.router_of("default")
    if router is None:
        return [1.0]
    if kind == "at_moe":
        mix = config.start_mix
        groups, found = config.names, []
        for experts in groups.values():
            for _ in experts:
                if config.flat_routing:
                    found.append(mix / sum(map(len, groups.values())))
                else:
                    found.append(mix / len(groups) / len(experts))
        return [*found, 1 - mix] if config.general_expert is not None else found
    if kind == "molora":
        routed_ones = len(bank.ranks) - config.num_shared_experts
        return [1.0] * config.num_shared_experts + [1 / routed_ones] * routed_ones
    empty = config.num_base_experts if kind == "medmoelora" and config.base_is_empty else 0
    return [1 / (len(bank.ranks) + empty)] * len(bank.ranks)


def with_even_experts(kind, model, arch):
    """The base model with all that experts add under even weights in its own weights, expert by expert."""
    config, reference = model.peft_config["default"], make_model(arch)
    modules = dict(reference.named_modules())
    for key, layer in model.base_model.model.named_modules():
        if layer not in routed_layers(model):
            continue
        bank, delta, at = layer.bank("default"), 0.0, 0
        for rank, factor, weight in zip(bank.ranks, bank.factors, weights_of(kind, layer, config), strict=True):
            a, b = bank.lora_A.weight[at : at + rank], bank.lora_B.weight[:, at : at + rank]
            delta, at = delta + weight * factor * (b @ a).detach(), at + rank
        modules[key].weight.data += delta.T if layer.fan_in_fan_out else delta
    return reference


CASES = {
    "moelora": {},
    "moelora by layer": {"gate_scope": "layer", "num_experts_pattern": {"v_proj": 1}},
    "molora": {},
    "molora shared": {"num_shared_experts": 2},
    "molora top_p": {"top_p": 0.5},
    "medmoelora": {},
    "medmoelora trained base": {"base_expert_mode": "regularized", "inference_top_k": 2},
    "at_moe": {},
    "at_moe by prompt": {"router_input": "prompt", "learn_mix": True},
    "at_moe flat": {"flat_routing": True, "mix": 0.75},
    "at_moe alone": {"general_expert": None},
}


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("case", CASES)
def test_uniform_gates_give_experts_the_same_weight_and_leave_no_trace(case, arch, tmp_path):
    kind, fields = case.split()[0], CASES[case]
    if arch == "gpt2" and "num_experts_pattern" in fields:
        fields = fields | {"num_experts_pattern": {"c_attn": 1}}
    torch.manual_seed(0)
    model = get_peft_model(make_model(arch), config_of(kind, arch, tmp_path, **fields)).eval()
    inputs = make_inputs(arch)
    before = logits(model, inputs)
    expected = logits(with_even_experts(kind, model, arch), inputs)
    assert not torch.allclose(before, expected, atol=1e-4)
    state, attributes = {k: v.clone() for k, v in model.state_dict().items()}, routers_of(model)
    with uniform_gates(model):
        torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
        with plain():
            torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(**inputs).logits.detach(), expected, rtol=1e-4, atol=1e-5)  # with a gradient
    assert torch.equal(logits(model, inputs), before)
    assert routers_of(model) == attributes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(KeyboardInterrupt), uniform_gates(model):
        raise KeyboardInterrupt
    assert torch.equal(logits(model, inputs), before)
    assert routers_of(model) == attributes


def routers_of(model):
    """What routers are made of that is no tensor, and what is fixed."""
    routers = [layer.router_of("default") for layer in routed_layers(model)]
    selects = [{k: v for k, v in vars(router).items() if "select" in k} for router in routers if router is not None]
    return selects, dict(model.base_model.context.controls)


def test_generation_goes_by_uniform_gates_too(tmp_path):
    for kind in KINDS:
        torch.manual_seed(0)
        model = get_peft_model(make_model("llama"), config_of(kind, "llama", tmp_path)).eval()
        inputs = make_inputs("llama", labels=False)
        options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        expected = with_even_experts(kind, model, "llama").generate(**inputs, **options)
        own = model.generate(**inputs, **options)
        with uniform_gates(model):
            found = model.generate(**inputs, **options)
        for step, other in zip(found.logits, expected.logits, strict=True):
            torch.testing.assert_close(step, other, rtol=1e-4, atol=1e-5)
        again = model.generate(**inputs, **options)
        assert all(torch.equal(a, b) for a, b in zip(own.logits, again.logits, strict=True))


def test_what_a_user_has_fixed_comes_back_and_its_mix_stays(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(make_model("llama"), grouped_config("llama", tmp_path)).eval()
    inputs = make_inputs("llama")
    model.set_group_weights({"f": {"a": 1.0}}, group_weights={"f": 1.0}, mix=0.8)
    before = logits(model, inputs)
    with model.routing({"f": {"a": 0.5, "b": 0.5}, "s": {"c": 1.0}}, group_weights={"f": 0.5, "s": 0.5}, mix=0.8):
        expected = logits(model, inputs)
    with uniform_gates(model):
        torch.testing.assert_close(logits(model, inputs), expected)
    assert torch.equal(logits(model, inputs), before)


def test_only_the_active_adapter_is_changed(tmp_path):
    model, inputs = two_adapters(("molora", "molora"), "llama", tmp_path), make_inputs("llama")
    with uniform_gates(model):
        model.set_adapter("two")
        inside = logits(model, inputs)
    assert torch.equal(logits(model, inputs), inside)


def test_models_without_gates_to_change_are_refused(tmp_path):
    lora = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"]))
    for model in (make_model("llama"), lora):
        with pytest.raises(TypeError, match="takes a PeftModel with an adapter of peft_moe"), uniform_gates(model):
            pass
    model = routed("llama")
    model.merge_adapter(task="icd")
    with pytest.raises(ValueError, match="is merged, .*unmerge_adapter"), uniform_gates(model):
        pass
    one = routed("llama", num_experts=1)
    with pytest.raises(ValueError, match="one expert in each layer, and no router"), uniform_gates(one):
        pass
    several = routed("llama")
    several.add_adapter("second", config_for("llama"))
    several.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="activate one"), uniform_gates(several):
        pass


@pytest.mark.parametrize("scores", [torch.randn(2, 3, 5), torch.full((4, 2), torch.inf)])
def test_an_even_select_adds_up_to_one_whatever_the_scores(scores):
    weights = even(scores)
    assert weights.shape == scores.shape
    assert (weights == 1 / scores.shape[-1]).all()


def test_an_ablation_compares_two_sets_of_answers():
    model = routed("llama", default_task="icd")
    inputs, seen = make_inputs("llama"), []

    def answer():
        seen.append(logits(model, inputs))
        return [["a", "b", "c"], ["a", "x", "c"]][len(seen) - 1]

    def rate(answers):
        right = sum(a == b for a, b in zip(answers, "abc", strict=True)) / 3
        return {"t": {"metric": "m", "score": right, "n": 3}, "mean": {"score": right, "n": 3}}

    right = "abc".__getitem__
    found = ablate(
        model, answer=answer, score=rate, rate=lambda row, text: float(text == right(row)), tasks=["t", "t", "t"]
    )
    assert (found["rows"], found["changed"]) == (3, 1)
    assert found["signs"]["t"] == found["signs"]["mean"] == {"better": 0, "worse": 1, "p": 1.0}
    assert "within chance" in found["says"][2]
    assert found["difference"] == {"t": pytest.approx(-1 / 3), "mean": pytest.approx(-1 / 3)}
    assert torch.equal(seen[0], logits(model, inputs))
    assert not torch.allclose(seen[1], seen[0])


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [(0, 0, 1.0), (0, 1, 1.0), (1, 1, 1.0), (0, 5, 0.0625), (0, 6, 0.03125), (9, 1, 0.021484375), (5, 3, 0.7265625)],
)
def test_the_sign_test_is_exact(better, worse, p):
    """p of fair coins, counted on paper: (0, 5) is 2 / 2^5, (9, 1) is 2 (1 + 10) / 2^10."""
    assert sign_test(better, worse) == sign_test(worse, better) == p


@pytest.mark.parametrize(("wrong", "says"), [(5, "within chance: these rows do not show"), (6, "more than chance")])
def test_what_is_chance_follows_from_the_answers(wrong, says):
    model, seen = routed("llama", default_task="icd"), []

    def answer():
        seen.append(["x" if seen and row < wrong else "a" for row in range(20)])
        return seen[-1]

    def score(answers):
        right = sum(a == "a" for a in answers) / 20
        return {"t": {"metric": "m", "score": right, "n": 20}, "mean": {"score": right, "n": 20}}

    found = ablate(model, answer=answer, score=score, rate=lambda row, text: float(text == "a"), tasks=["t"] * 20)
    said = " ".join(found["says"])
    assert f"Row by row {wrong} scores are lower with uniform gates and 0 higher, which is {says}" in said


# the command


@pytest.fixture
def world(tmp_path):
    """A base model with a tokenizer, and data of the tasks leaf and size."""
    make_model("llama").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    write_data(tmp_path / "data")
    return tmp_path


def adapter_of(kind, world):
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(world / "base")
    fields = {"target_modules": TARGETS["llama"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    config = {
        "moelora": lambda: config_for("llama", tasks=sorted(ANSWERS), lora_alpha=64),
        "molora": lambda: MoLoraConfig(**fields, num_experts=4, r=4, lora_dropout=0.0),
        "medmoelora": lambda: MedMoeLoraConfig(**fields, num_experts=4, expert_ranks=4, lora_dropout=0.0),
        "at_moe": lambda: grouped_config("llama", world / "experts", check_base_model=False),
    }[kind]()
    get_peft_model(base, config).save_pretrained(str(world / kind))
    return str(world / kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_scores_both_ways(kind, world, capsys):
    adapter, data = adapter_of(kind, world), str(world / "data")
    options = ["--data", data, "--limit", "3", "--max-new-tokens", "4", "--batch-size", "4"]
    assert main(["check", "uniform", adapter, *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    examples = read_examples(data, split="test").shuffle(seed=0)
    examples = examples.select([i for task in ("leaf", "size") for i in rows_of(examples, task)[:3]])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world / "base"), adapter)
    tokenizer, info = make_tokenizer(), read_task_info(data)
    sizes = {"batch_size": 4, "max_new_tokens": 4, "progress": False}
    assert found["as_it_is"] == evaluate_tasks(model, tokenizer, examples, info, **sizes)
    own = generate_answers(model, tokenizer, examples, **sizes)
    with uniform_gates(model):
        others = generate_answers(model, tokenizer, examples, **sizes)
    assert found["uniform"] == score(others, examples, info)
    assert found["changed"] == sum(a != b for a, b in zip(own, others, strict=True))
    rate = rate_rows(examples, info)
    worse = sum(rate(row, a) > rate(row, b) for row, (a, b) in enumerate(zip(own, others, strict=True)))
    assert found["signs"]["mean"]["worse"] == worse
    ranked = [result["score"] for task, result in found["as_it_is"].items() if task != "mean"]
    assert sum(rate(row, a) for row, a in enumerate(own)) / 6 == pytest.approx(sum(ranked) / len(ranked))
    assert (found["rows"], found["limit"], found["as_it_is"]["leaf"]["n"]) == (6, 3, 3)
    assert main(["check", "uniform", adapter, *options]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "uniform gates" in text
    assert MEANING[describe(adapter)["peft_type"]] in text
    assert "Nothing was trained with uniform gates" in text


def rows_of(examples, task):
    return [i for i, name in enumerate(examples["task"]) if name == task]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "0"], "--limit=0 is no count"),
        (["--batch-size", "0"], "--batch-size=0"),
        (["--split", "other"], "has no split 'other'"),
        (["--data", "nowhere"], "No data at"),
        (["--base-model", "nowhere"], "tasks ['leaf', 'size'] that are not among the adapter's"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_said_before_the_base_model_is_loaded(options, message, world, capsys):
    routed("llama").save_pretrained(str(world / "adapter"))  # of other tasks, and without a base model
    command = ["check", "uniform", str(world / "adapter"), "--data", str(world / "data"), *options]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]


def test_what_cannot_be_scored_is_said_before_the_work(world, capsys, monkeypatch):
    adapter = adapter_of("molora", world)
    command = ["check", "uniform", adapter, "--data", str(world / "data"), "--base-model", "nowhere"]
    tasks = world / "data" / "tasks.json"
    tasks.write_text(tasks.read_text().replace("accuracy", "macro_f1").replace("exact_match", "macro_f1"))
    with monkeypatch.context() as patch:
        for module in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
            patch.delitem(sys.modules, module)
        patch.setitem(sys.modules, "sklearn", None)  # Python's own way to make an import fail
        assert main(command) == 1
    assert "peft-moe: This metric needs scikit-learn; install it" in capsys.readouterr().err
    for path in (world / "data").iterdir():
        path.write_text(path.read_text().replace('"leaf"', '"mean"'))
    assert main(command) == 1
    assert "A task is called 'mean'" in capsys.readouterr().err


def test_an_adapter_without_a_router_is_refused_before_the_work(world, capsys):
    routed("llama", num_experts=1).save_pretrained(str(world / "adapter"))
    assert main(["check", "uniform", str(world / "adapter"), "--data", str(world / "data")]) == 1
    assert "nothing to make uniform" in capsys.readouterr().err
