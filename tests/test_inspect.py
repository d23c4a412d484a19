"""What is in an adapter, from its files alone."""

import json
import math
import os
import re
import subprocess
import sys
from io import StringIO

import pytest
import torch
from broken_files import METHODS, cut, edit, lose_routers, make_adapter, one_tensor, poison, set_field, to_pickle
from grouped_helpers import grouped_config
from helpers import TARGETS, TASKS, routed, routed_layers
from kinds import KINDS, config_of
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file
from tiny_models import make_model

from peft_moe import MoLoraConfig, __version__
from peft_moe.cli import main
from peft_moe.report.adapter import describe
from peft_moe.report.contents import Contents
from peft_moe.report.layout import clean
from peft_moe.report.tables import show_adapter

WEIGHTS = "adapter_model.safetensors"


def adapted(kind, arch, folder, **fields):
    torch.manual_seed(0)
    return get_peft_model(make_model(arch), config_of(kind, arch, folder, **fields)).eval()


def saved(model, folder):
    model.save_pretrained(str(folder))
    return folder


def described(model, tmp_path):
    return describe(saved(model, tmp_path / "adapter"))


def shown(description, *, width=110, each=False):
    file = StringIO()
    plain = {"markup": False, "emoji": False, "highlight": False}
    show_adapter(description, Console(file=file, width=width, **plain), each=each)
    return file.getvalue()


@pytest.mark.parametrize("other", [False, True], ids=["usual", "other"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_and_counts_are_those_of_the_model(kind, arch, other, tmp_path):
    model = adapted(kind, arch, tmp_path, other=other)
    found = described(model, tmp_path)
    layers = {key: m for key, m in model.base_model.model.named_modules() if m in routed_layers(model)}
    assert {layer["name"] for layer in found["layers"]} == set(layers)
    for layer in found["layers"]:
        there = layers[layer["name"]]
        bank, router = there.bank("default"), there.router_of("default")
        assert (layer["in_features"], layer["out_features"]) == (there.in_features, there.out_features)
        assert [rank for rank in layer["ranks"] if rank or kind == "at_moe"] == list(bank.ranks)
        assert [factor for factor in layer["scaling"] if factor is not None] == list(bank.factors)
        assert len(layer["experts"]) == len(layer["ranks"]) == len(set(layer["experts"]))
        assert (layer["router"] is None) == (router is None)
        stack = f"{layer['stack']}." if layer["stack"] else ""
        assert layer["name"] == f"{stack}{layer['block']}.{layer['module']}"
    counts = found["parameters"]
    assert counts["trained"] == model.get_nb_trainable_parameters()[0]
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    assert counts["total"] == sum(t.numel() for t in tensors.values())
    assert counts["routers"] == sum(t.numel() for name, t in tensors.items() if "router" in name)
    assert counts["routers"] == sum(sum(router["parameters"].values()) for router in found["routers"])
    assert sorted(name for r in found["routers"] for name in r["layers"]) == sorted(
        layer["name"] for layer in found["layers"] if layer["router"]
    )
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_blocks_come_in_the_order_of_their_numbers(tmp_path):
    torch.manual_seed(0)
    base = make_model("llama")
    base.model.layers.extend([base.model.layers[0] for _ in range(9)])  # 11 blocks, whose names sort as 0, 1, 10, 2
    model = get_peft_model(base, MoLoraConfig(target_modules=["q_proj"], num_experts=2))
    found = described(model, tmp_path)
    assert [layer["block"] for layer in found["layers"]] == sorted(layer["block"] for layer in found["layers"])


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_the_weights_of_tasks_are_those_that_the_router_gives(scope, tmp_path):
    model = routed("llama", gate_scope=scope, num_experts_pattern={"down_proj": 2, "v_proj": 1})
    found = described(model, tmp_path)
    routers = {router["name"]: router for router in found["routers"]}
    assert len(routers) == {"model": 2, "layer": 6}[scope]  # a gate for 4 experts, one for 2; or one for each layer
    layers = dict(model.base_model.model.named_modules())
    for layer in found["layers"]:
        router = layers[layer["name"]].router_of("default")
        if router is None:
            assert layer["router"] is None
            continue
        for i, task in enumerate(TASKS):
            expected = router.of_tasks(torch.tensor([i]))[0].tolist()
            assert routers[layer["router"]]["weights"][task] == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["molora", "medmoelora"])
@pytest.mark.parametrize("other", [False, True], ids=["usual", "other"])
def test_token_gates_are_described_by_their_rows(kind, other, tmp_path):
    model = adapted(kind, "llama", tmp_path, other=other)
    found = described(model, tmp_path)
    gates = {key: router.gate for key, router in model.base_model.routers()}
    assert {router["name"] for router in found["routers"]} == set(gates)
    for router in found["routers"]:
        gate = gates[router["name"]]
        norms = [math.sqrt(sum(float(value) ** 2 for value in row)) for row in gate.weight.tolist()]
        assert router["norms"] == pytest.approx(norms)
        assert len(router["experts"]) == len(norms)
        assert router["bias"] == (None if gate.bias is None else pytest.approx(gate.bias.tolist()))
        assert router["temperature"] == (None if gate.temperature is None else pytest.approx(gate.temperature.item()))
        assert router["temperature_learnt"] == (kind == "medmoelora")


def test_experts_that_stand_apart_have_names_of_their_own(tmp_path):
    molora = described(adapted("molora", "llama", tmp_path, num_experts=2, num_shared_experts=2), tmp_path)
    assert molora["layers"][0]["experts"] == ["shared 0", "shared 1", "0", "1"]
    assert molora["routers"][0]["experts"] == ["0", "1"]
    medmoe = described(adapted("medmoelora", "llama", tmp_path, num_experts=2, expert_ranks=[2, 4]), tmp_path)
    assert medmoe["layers"][0]["experts"] == ["base 0", "0", "1"]
    assert medmoe["layers"][0]["ranks"] == [0, 2, 4]  # a frozen base expert has no matrices
    assert medmoe["routers"][0]["experts"] == ["base 0", "0", "1"]
    at_moe = described(adapted("at_moe", "llama", tmp_path), tmp_path)
    assert at_moe["layers"][0]["experts"] == ["f/a", "f/b", "s/c", "general"]
    assert at_moe["groups"] == {"f": ["a", "b"], "s": ["c"]}


GROUP_GATES = [{}, {"within_group": "static"}, {"flat_routing": True}, {"learn_mix": True}, {"router_input": "prompt"}]


@pytest.mark.parametrize("arch", ["llama", "t5"])
@pytest.mark.parametrize("fields", GROUP_GATES, ids=str)
def test_group_gates_are_described_by_their_rows(fields, arch, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(make_model(arch), grouped_config(arch, tmp_path, **fields))
    found = described(model, tmp_path)
    there, modules = dict(model.base_model.routers()), dict(model.base_model.model.named_modules())
    assert {router["name"] for router in found["routers"]} == set(there)
    for layer in found["layers"]:  # those of a cross-attention that reads the encoder have routers of their own
        assert there[layer["router"]] is modules[layer["name"]].router_of("default")
    for router in found["routers"]:
        gate = there[router["name"]].gate
        rows = [] if gate.weight is None else [row.norm().item() for row in gate.weight]
        assert (router["group_norms"] or []) + (router["expert_norms"] or []) == pytest.approx(rows)
        assert router["expert_scores"] == (pytest.approx(gate.expert_bias.tolist()) if gate.static else None)
        assert router["mix"] == pytest.approx(0.5)
        assert router["weights"] is None


def test_weights_that_are_fixed_and_where_experts_came_from_are_told(tmp_path):
    model = adapted("at_moe", "llama", tmp_path)
    model.set_group_weights({"f": {"a": 0.25, "b": 0.75}}, group_weights={"f": 1.0}, mix=0.8, store=True)
    found = described(model, tmp_path)
    assert found["fixed"]["mix"] == 0.8
    for router in found["routers"]:
        assert router["mix"] == 0.8
        assert router["weights"] == pytest.approx([0.2, 0.6, 0.0, 0.2])
    origins = {origin["name"]: origin for origin in found["provenance"]["experts"]}
    assert list(origins) == ["f/a", "f/b", "s/c", "general"]
    assert origins["f/a"]["source"] == str(tmp_path / "llama" / "a")
    assert re.fullmatch("[0-9a-f]{64}", origins["general"]["sha256"])
    text = shown(found)
    assert "Weights of experts, whatever the input" in text
    assert origins["s/c"]["sha256"][:16] in text


def test_no_more_is_loaded_than_routers(tmp_path):
    folder = saved(make_adapter("molora", tmp_path), tmp_path / "adapter")
    loaded = Contents.of(folder / WEIGHTS).routers
    assert loaded
    assert all("moelora_router" in name for name in loaded)
    edit(folder, lambda tensors: poison(tensors, torch.nan))  # in an expert, which is not looked at
    set_field(folder, base_model_name_or_path="no/such-model")
    assert describe(folder)["base_model"] == "no/such-model"


def poison_router(tensors):
    tensors[one_tensor(tensors, "gate")].view(-1)[0] = torch.nan


# What is done to an adapter's folder, and what the error says.
BREAKS = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "is no adapter: it has no adapter_config.json"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json of .* is no JSON"),
    "no type": (lambda f: set_field(f, peft_type="X"), "adapter of type 'X', which peft does not know"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "There is no adapter_model.safetensors in"),
    "a pickle": (to_pickle, "are a pickle file .*can run any code"),
    "cut": (lambda f: cut(f, 0.5), "cannot be read .*fetch it or save it anew"),
    "without experts": (lambda f: edit(f, dict.clear), "have no '….moelora_bank.lora_A.weight'"),
    "without routers": (lambda f: edit(f, lose_routers), "does not have what its config says"),
    "NaN in a gate": (lambda f: edit(f, poison_router), "numbers that are NaN, infinite or whole"),
    "one matrix less": (
        lambda f: edit(f, lambda t: t.pop(one_tensor(t))),
        r"lora_B \(\) at .*saved with another config",
    ),
    "one tensor more": (
        lambda f: edit(f, lambda t: t.update({one_tensor(t).replace("_B", "_C"): torch.ones(2)})),
        "no place for '.*lora_C.weight' of the file",
    ),
}


@pytest.mark.parametrize("broken", BREAKS)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_broken_is_named(method, broken, tmp_path, capsys):
    folder = saved(make_adapter(method, tmp_path), tmp_path / "adapter")
    change, message = BREAKS[broken]
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        describe(folder)
    assert main(["inspect", str(folder)]) == 1
    out, error = capsys.readouterr()
    assert not out
    assert error.startswith("peft-moe: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("method", "field"), [("moelora", {"r": 16}), ("molora", {"r": 4}), ("molora", {"num_experts": 3})]
)
def test_a_config_that_does_not_fit_the_weights_is_an_error(method, field, tmp_path):
    folder = saved(make_adapter(method, tmp_path), tmp_path / "adapter")
    set_field(folder, **field)
    with pytest.raises(ValueError, match="saved with another config"):
        describe(folder)


def test_a_stock_lora_and_what_is_no_adapter_are_told_apart(tmp_path, capsys):
    lora = get_peft_model(make_model("llama"), LoraConfig(target_modules=TARGETS["llama"]))
    lora.save_pretrained(tmp_path / "lora")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "lora": "is a LORA adapter",
        "empty": "is no adapter",
        "nowhere": "There is no adapter_config.json in a folder or Hub repository called",
    }.items():
        assert main(["inspect", str(tmp_path / name)]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_the_command_shows_it_and_gives_it_as_json(method, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # in fewer, names of modules take two lines
    folder = saved(make_adapter(method, tmp_path), tmp_path / "adapter")
    found = describe(folder)
    assert main(["inspect", str(folder)]) == 0
    text = capsys.readouterr().out
    assert found["method"] in text
    assert found["provenance"]["moe_version"] == __version__
    assert f"and peft_moe {__version__}, in format 1" in text
    assert f"{found['parameters']['total']:,}" in text
    assert "mlp: down_proj, gate_proj" in text
    assert main(["inspect", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert main(["inspect", str(folder), "--each"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > len(text.splitlines())


def test_layers_that_are_alike_share_a_line(tmp_path):
    found = described(routed("llama", rank_pattern={"layers.1.*q_proj": 4}), tmp_path)
    lines = shown(found).splitlines()
    assert [line.split()[:4] for line in lines if "self_attn.q_proj" in line] == [
        ["self_attn.q_proj", "0", "1", "4"],
        ["self_attn.q_proj", "1", "1", "4"],
    ]
    assert any("v_proj" in line and "0-1" in line for line in lines)
    each = shown(found, each=True)
    assert sum(line.startswith(("self_attn", "mlp")) for line in each.splitlines()) == len(found["layers"])


def test_a_table_shows_every_weight_however_narrow_the_terminal_is(tmp_path):
    found = described(routed("llama", r=24, num_experts=24), tmp_path)
    weights = [f"{weight:.3f}" for weight in found["routers"][0]["weights"]["rad"]]
    for width in (40, 80, 200):
        text = shown(found, width=width)
        lines = [re.sub(r"^rad\s+", "", line).split() for line in text.splitlines() if re.match(r"rad +\d", line)]
        assert [weight for line in lines for weight in line] == weights
        assert max(len(line) for line in text.splitlines()) <= width


STEERING = "\x1b[31mred\x1b[0m \x07\r\u202e [bold]b[/bold] :smile:"


def test_names_steer_neither_the_terminal_nor_the_layout(tmp_path, capsys):
    folder = saved(routed("llama", tasks=[STEERING, "b"]), tmp_path / "adapter")
    set_field(folder, base_model_name_or_path=STEERING)
    assert main(["inspect", str(folder)]) == 0
    text = capsys.readouterr().out
    assert not {c for c in text if not c.isprintable()} - {"\n"}
    assert text.count(r"\x1b[31mred\x1b[0m \x07\r\u202e [bold]b[/bold] :smile:") >= 2  # the base model and a task
    assert main(["inspect", str(folder), "--json"]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert json.loads(text)["tasks"][0] == STEERING


@pytest.mark.parametrize(
    ("text", "expected"), [("a b", "a b"), ("é λ 中", "é λ 中"), ("\x00\n", r"\x00\n"), (None, "None")]
)
def test_texts_are_cleaned(text, expected):
    assert clean(text) == expected


def test_a_plain_lora_in_each_layer_has_no_router(tmp_path):
    found = described(adapted("molora", "llama", tmp_path, num_experts=1), tmp_path)
    assert found["routers"] == []
    assert all(layer["router"] is None for layer in found["layers"])
    assert "There is no router" in shown(found)


@pytest.mark.long
def test_an_adapter_on_the_hub_is_read_at_a_revision(run_with_hub):
    run_with_hub(
        "import contextlib, io, json\n"
        "from helpers import routed\n"
        "from huggingface_hub import HfApi\n"
        "from peft_moe.cli import main\n"
        "def inspect(*options):\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        assert main(['inspect', 'local/adapter', '--json', *options]) == 0\n"
        "    return json.loads(out.getvalue())\n"
        "routed('llama').push_to_hub('local/adapter')\n"
        "first = HfApi().model_info('local/adapter').sha\n"
        "routed('llama', tasks=['x']).save_pretrained('other')\n"
        "HfApi().upload_folder(repo_id='local/adapter', folder_path='other')\n"
        "last = HfApi().model_info('local/adapter').sha\n"
        "assert inspect()['tasks'] == ['x']\n"
        "assert inspect()['provenance']['commit'] == last != first\n"
        "assert inspect('--revision', first)['tasks'] == ['icd', 'rad', 'def']\n"
        "assert inspect('--revision', first)['provenance']['commit'] == first\n"
        "assert main(['inspect', 'local/adapter', '--revision', 'no']) == 1\n"
        "assert main(['inspect', 'local/nothing']) == 1\n"
    )


def test_names_that_the_terminal_cannot_show_end_nothing(tmp_path):
    routed("llama", tasks=["诊断", "λ"]).save_pretrained(tmp_path / "a")
    code = "import sys; from peft_moe.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(tmp_path / "a")],
        env=os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert rb"\u8bca\u65ad" in done.stdout
