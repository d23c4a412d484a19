"""The LoRA that comes closest to experts chosen by the input: what it is, what it is measured at, and where it goes."""

import copy
import io
import json
import math

import pytest
import torch
from grouped_helpers import grouped
from helpers import TARGETS, logits, routed_layers
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny_models import TASK_TYPES, VOCAB, make_inputs, make_model
from tiny_text import make_tokenizer, write_data
from torch.utils.data import DataLoader

from peft_moe import MedMoeLoraConfig, MoeLoraConfig, MoLoraConfig, calibrate, fold
from peft_moe.cli import main
from peft_moe.routing import GroupedRouter, TokenRouter
from peft_moe.stand_in import Moments, closest, fingerprint
from peft_moe.training import TaskCollator

KINDS = {
    "molora": (MoLoraConfig, {"r": 4, "num_experts": 4, "top_k": 2}),
    "molora-shared": (MoLoraConfig, {"r": 4, "num_experts": 3, "top_p": 0.6, "num_shared_experts": 1}),
    "medmoe": (MedMoeLoraConfig, {"expert_ranks": [2, 4, 1], "num_experts": 3, "expert_schedule": "uniform"}),
    "medmoe-base": (
        MedMoeLoraConfig,
        {"expert_ranks": [2, 3], "num_experts": 2, "base_expert_mode": "regularized", "expert_schedule": "uniform"},
    ),
}
BLOCKS = {"at-moe": {}, "at-moe-prompt": {"router_input": "prompt"}}


def make(kind, folder, arch="llama", **fields):
    """A tiny model whose routers weigh experts unevenly, in eval mode."""
    if kind in BLOCKS:
        return grouped(arch, folder, **BLOCKS[kind], **fields)
    config, own = KINDS[kind]
    torch.manual_seed(0)
    base = {"task_type": TASK_TYPES[arch], "target_modules": TARGETS[arch], "lora_dropout": 0.0}
    model = get_peft_model(make_model(arch), config(**{**base, "init_lora_weights": False, **own, **fields}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "moelora_router" in name:
                parameter.mul_(20)  # so that weights differ among tokens
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("experts")


def batches_of(arch="llama", n=6, seed=0, seq=8, rows=4):
    """Batches whose second row ends in padding."""
    found = []
    for i in range(n):
        batch = make_inputs(arch, batch=rows, seq=seq, seed=100 * seed + i)
        if "attention_mask" in batch:
            batch["attention_mask"][1, -3:] = 0
        if arch in ("llama", "gpt2", "opt"):
            batch["labels"][1, -3:] = -100
        if arch == "t5":
            batch["labels"][2, -2:] = -100
        found.append(batch)
    return found


def calibrated(kind, folder, arch="llama", **how):
    model = make(kind, folder, arch)
    return model, calibrate(model, batches_of(arch), held_out=batches_of(arch, 2, seed=1), **how)


def layers_by_name(model):
    return {key: layer for key, layer in model.base_model.model.named_modules() if layer in set(routed_layers(model))}


def see_tokens(model, batches, *, encoder_decoder=False):
    """By layer: the inputs (t, in) of its tokens without padding, and what the bank's experts add in rank space (t, R).

    One token and one expert at a time, in float64, from what layers and routers themselves are given and give.
    """
    found, now, handles = {}, {}, []
    layers = layers_by_name(model)

    def enter(key):
        return lambda _, args: now.update(key=key, x=args[0])

    def weigh(_, __, weights):
        key, x, layer = now["key"], now["x"], layers[now["key"]]
        in_decoder = encoder_decoder and key.startswith("decoder") and "EncDecAttention.k" not in key
        in_decoder = in_decoder and "EncDecAttention.v" not in key
        mask = now["batch"]["labels"] != -100 if in_decoder else now["batch"].get("attention_mask")
        weights = weights.expand(*x.shape[:-1], weights.shape[-1]).flatten(0, -2)
        keep = torch.ones(len(weights)) if mask is None else mask.flatten()
        bank = layer.moelora_bank["default"]
        experts = bank.lora_A.weight.detach().double().split(bank.ranks)
        for x_t, weights_t, kept in zip(x.flatten(0, -2).double(), weights.double(), keep, strict=True):
            if kept:
                z = [w * f * (a @ x_t) for a, w, f in zip(experts, weights_t, bank.factors, strict=True)]
                found.setdefault(key, []).append((x_t, torch.cat(z)))

    for key, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(enter(key)))
    for module in model.modules():
        if isinstance(module, (TokenRouter, GroupedRouter)):
            handles.append(module.register_forward_hook(weigh))
    for batch in batches:
        now["batch"] = batch
        logits(model, batch)
    for handle in handles:
        handle.remove()
    return {key: tuple(torch.stack(v) for v in zip(*pairs, strict=True)) for key, pairs in found.items()}


def mean_gate(z, x, a):
    """E[s] ⊙ A from z = s ⊙ A x."""
    return ((z / (x @ a.T)).mean(0)).unsqueeze(1) * a


def matrices(layer):
    bank = layer.moelora_bank["default"]
    return bank.lora_A.weight.detach().double(), bank.lora_B.weight.detach().double()


def error_of(a, b, x, z, bank_b):
    """sqrt(Σ‖d - d'‖² / Σ‖d‖²)."""
    d = z @ bank_b.T
    return float((d - x @ a.T @ b.T).norm() / d.norm())


CASES = [
    *(("llama", kind) for kind in (*KINDS, *BLOCKS)),
    ("gpt2", "molora"),
    ("opt", "at-moe"),
    ("t5", "molora"),
    ("t5", "at-moe"),
    ("bert", "medmoe"),
    ("vit", "molora"),
]


@pytest.mark.parametrize(("arch", "kind"), CASES)
def test_the_stand_in_is_the_least_squares_solution_over_tokens_without_padding(arch, kind, folder):
    damping = 0.003
    model, found = calibrated(kind, folder, arch, damping=damping)
    seen = see_tokens(model, batches_of(arch), encoder_decoder=arch == "t5")
    held_out = see_tokens(model, batches_of(arch, 2, seed=1), encoder_decoder=arch == "t5")
    assert set(seen) == set(found.layers)
    for key, layer in layers_by_name(model).items():
        (x, z), (a, b), stand_in = seen[key], matrices(layer), layer.stand_ins["default"]
        start = mean_gate(z, x, a)
        c, residual = x.T @ x / len(x), (z - x @ start.T).T @ x / len(x)
        expected = start + residual @ torch.linalg.inv(c + damping * c.diagonal().diag())
        torch.testing.assert_close(x @ stand_in.a.double().T, x @ expected.T, rtol=2e-3, atol=2e-4)
        assert torch.equal(stand_in.b, layer.moelora_bank["default"].lora_B.weight)
        x, z = held_out[key]
        assert found.layers[key].rank == sum(layer.moelora_bank["default"].ranks)
        assert found.layers[key].error == pytest.approx(error_of(stand_in.a.double(), b, x, z, b), rel=1e-3)
        assert found.layers[key].mean_gate_error == pytest.approx(error_of(start, b, x, z, b), rel=1e-3)
    assert found.tokens == max(len(x) for x, _ in seen.values())
    assert found.held_out_tokens == max(len(x) for x, _ in held_out.values())


def naive_kl(p, q, keep):
    p, q = p[keep].double().softmax(-1), q[keep].double().softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean())


@pytest.mark.parametrize("arch", ["llama", "t5", "bert", "vit"])
def test_the_kl_is_that_of_the_merged_model_over_what_is_no_padding(arch, folder):
    model = make("molora", folder, arch)
    held_out = batches_of(arch, 1, seed=1, rows=5)
    found = calibrate(model, batches_of(arch), held_out=held_out)
    routed = logits(model, held_out[0])
    model.merge_adapter()
    merged = logits(model, held_out[0])
    keep = torch.ones(routed.shape[:-1], dtype=torch.bool)
    if arch == "llama":
        keep = held_out[0]["attention_mask"].bool()
    elif arch == "t5":
        keep = held_out[0]["labels"] != -100
    assert found.kl == pytest.approx(naive_kl(routed, merged, keep), rel=1e-3, abs=2e-7)  # of float32 logits
    assert found.kl > 0


def test_without_damping_it_is_the_formula_of_least_squares():
    torch.manual_seed(0)
    x, s, a, b = torch.randn(200, 12), torch.rand(200, 4), torch.randn(4, 12), torch.randn(6, 4)
    moments = Moments(12, 4, x.device)
    moments.add(x, x @ a.T, s, None)
    found, same = closest(a, b, moments, damping=1e-7, rank=None)
    expected = torch.linalg.lstsq(x.double(), (s * (x @ a.T)).double()).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(same, b.double())


def test_the_damping_is_features_over_tokens_unless_it_is_given(folder):
    model, found = calibrated("molora", folder)
    first = values(model)
    assert found.damping is None
    for features in (32, 64):
        again = calibrate(model, batches_of(), held_out=batches_of("llama", 2, seed=1), damping=features / found.tokens)
        assert again.damping == features / found.tokens
        same = [torch.equal(first[k].a, now.a) for k, now in values(model).items() if now.a.shape[1] == features]
        assert all(same)
        assert len(same) == (6 if features == 32 else 2)


def test_directions_that_no_token_has_get_the_mean_gate():
    torch.manual_seed(0)
    x, s, a, b = torch.randn(50, 12), torch.rand(50, 4), torch.randn(4, 12), torch.randn(6, 4)
    x[:, 8:] = 0
    moments = Moments(12, 4, x.device)
    moments.add(x, x @ a.T, s, None)
    found, _ = closest(a, b, moments, damping=0.01, rank=None)
    torch.testing.assert_close(found[:, 8:], (s.mean(0).unsqueeze(1) * a)[:, 8:].double())


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_lower_rank_is_the_best_of_that_rank(rank):
    torch.manual_seed(0)
    x, s, a, b = torch.randn(300, 12) @ torch.randn(12, 12), torch.rand(300, 6), torch.randn(6, 12), torch.randn(9, 6)
    moments = Moments(12, 6, x.device)
    moments.add(x, x @ a.T, s, None)
    full_a, full_b = closest(a, b, moments, damping=1e-6, rank=None)
    low_a, low_b = closest(a, b, moments, damping=1e-6, rank=rank)
    assert (low_a.shape, low_b.shape) == ((rank, 12), (9, rank))

    d = ((s * (x @ a.T)) @ b.T).double()

    def off(matrix):
        return float((d - x.double() @ matrix.T).norm())

    best = off(low_b @ low_a)
    # the optimum among all matrices of that rank (reduced rank regression)
    answers = x.double() @ (full_b @ full_a).T
    _, _, v = torch.linalg.svd(answers, full_matrices=False)
    assert best == pytest.approx(off(v[:rank].T @ v[:rank] @ full_b @ full_a), rel=1e-5)
    u, values, w = torch.linalg.svd(full_b @ full_a)
    assert best < off((u[:, :rank] * values[:rank]) @ w[:rank])
    for _ in range(20):
        other_a = low_a + 0.05 * torch.randn_like(low_a) * low_a.norm()
        assert best < off((low_b + 0.05 * torch.randn_like(low_b)) @ other_a)


def test_compression_to_the_full_rank_or_a_higher_one_changes_nothing(folder):
    model, found = calibrated("medmoe", folder)
    full = {key: layer.stand_ins["default"].a.clone() for key, layer in layers_by_name(model).items()}
    for rank in (sum((2, 4, 1)), 64):
        again = calibrate(model, batches_of(), held_out=batches_of("llama", 2, seed=1), rank=rank)
        assert again == found
        assert all(torch.equal(full[key], la.stand_ins["default"].a) for key, la in layers_by_name(model).items())


def test_compression_reports_the_rank_and_its_own_error(folder):
    model, full = calibrated("molora", folder)
    low = calibrate(model, batches_of(), held_out=batches_of("llama", 2, seed=1), rank=2)
    assert {layer.rank for layer in low.layers.values()} == {2}
    assert low.error > full.error
    assert low.mean_gate_error == full.mean_gate_error
    assert {tuple(la.stand_ins["default"].b.shape) for la in routed_layers(model)} >= {(32, 2), (64, 2)}


@pytest.mark.parametrize("kind", [*KINDS, *BLOCKS])
def test_least_squares_is_never_worse_than_the_mean_gate_on_its_own_tokens(kind, folder):
    model = make(kind, folder)
    found = calibrate(model, batches_of(), held_out=batches_of(), damping=1e-4)
    assert all(0 < layer.error <= layer.mean_gate_error for layer in found.layers.values())
    assert found.error < found.mean_gate_error


@pytest.mark.parametrize("method", ["least_squares", "mean_gate"])
@pytest.mark.parametrize("kind", ["molora", "medmoe", "at-moe", "at-moe-prompt"])
def test_routing_that_never_changes_is_met_exactly(kind, method, folder):
    model = make(kind, folder, **({"init_lora_weights": True} if kind in BLOCKS else {}))
    if kind in KINDS:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "moelora_router" in name:
                    parameter.zero_()
    batches = batches_of()
    found = calibrate(model, batches, method=method)
    assert found.error < 1e-5
    assert found.kl < 1e-6
    expected = logits(model, batches[0])
    torch.testing.assert_close(logits(model.merge_and_unload(), batches[0]), expected, rtol=1e-4, atol=1e-4)


# where it goes


def dense(layer):
    stand_in = layer.stand_ins["default"]
    return stand_in.b @ stand_in.a


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but")  # peft's conversion leaves it out
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize(
    ("arch", "kind"), [("llama", "molora"), ("gpt2", "medmoe"), ("opt", "at-moe"), ("t5", "molora")]
)
def test_every_way_of_merging_adds_the_same(arch, kind, rank, folder, tmp_path):
    model, found = calibrated(kind, folder, arch, rank=rank)
    inputs = batches_of(arch, 1, seed=2)[0]
    routed, deltas = logits(model, inputs), {}
    for key, layer in layers_by_name(model).items():
        deltas[key] = dense(layer)
        given = layer.get_delta_weight("default")
        torch.testing.assert_close(given.T if layer.fan_in_fan_out else given, deltas[key])
    weights = [layer.get_base_weight().clone() for layer in routed_layers(model)]
    model.merge_adapter(safe_merge=True)
    merged = logits(model, inputs)
    assert not torch.allclose(merged, routed, atol=1e-4)
    for weight, layer in zip(weights, routed_layers(model), strict=True):
        delta = dense(layer)
        torch.testing.assert_close(layer.get_base_weight(), weight + (delta.T if layer.fan_in_fan_out else delta))
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, inputs), routed, rtol=1e-4, atol=1e-4)
    out = fold(model, tmp_path / "folded")
    stock = PeftModel.from_pretrained(make_model(arch), out).eval()
    assert type(stock.peft_config["default"]) is LoraConfig
    assert stock.peft_config["default"].r == max(layer.rank for layer in found.layers.values())
    torch.testing.assert_close(logits(stock, inputs), merged, rtol=1e-4, atol=1e-4)
    assert all(layer.supports_lora_conversion() for layer in routed_layers(model))
    config, state = convert_to_lora(model, rank=rank or 16)
    for key, delta in deltas.items():
        a, b = (state[f"base_model.model.{key}.lora_{x}.weight"] for x in "AB")
        torch.testing.assert_close(b @ a * config.lora_alpha / config.r, delta, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits(model.merge_and_unload(), inputs), merged, rtol=1e-4, atol=1e-4)


def test_the_card_of_the_folded_adapter_has_the_errors(folder, tmp_path):
    model, found = calibrated("molora", folder, rank=3)
    card = (fold(model, tmp_path / "folded") / "README.md").read_text()
    assert "into a stock LoRA of rank 3" in card
    assert f"least squares from {found.tokens} tokens (damping features / tokens)" in card
    assert f"| error, mean over layers | {found.error:.4f} | {found.mean_gate_error:.4f} |" in card
    assert f"| KL of predictions, nats | {found.kl:.4f} | {found.mean_gate_kl:.4f} |" in card
    for key, layer in found.layers.items():
        assert f"| `{key}` | {layer.error:.4f} | {layer.mean_gate_error:.4f} |" in card
    text = str(found)
    assert f"{found.error:.3f}" in text
    assert f"{found.kl:.4f} nats" in text


def test_weights_that_are_fixed_are_folded_as_they_are_and_the_rest_as_calibrated(folder, tmp_path):
    model = make("at-moe", folder)
    inputs = batches_of()[0]
    control = {"weights": {"f": {"a": 1.0}}}  # the groups are left free
    with model.routing(**control):
        calibrate(model, batches_of())
        model.merge_adapter()
        merged = logits(model, inputs)
        model.unmerge_adapter()
        out = fold(model, tmp_path / "f")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(make_model("llama"), out), inputs), merged)
    with pytest.raises(ValueError, match=r"has changed since it was calibrated; call peft_moe.calibrate\(model"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="has changed since it was calibrated"):
        fold(model, tmp_path / "g")
    assert not (tmp_path / "g").exists()
    # all of it fixed: exact, whatever was calibrated
    fixed = {"weights": {"f": {"a": 1.0}}, "group_weights": {"f": 1.0}}
    with model.routing(**fixed):
        expected = logits(model, inputs)
    exact = fold(model, tmp_path / "h", routing=fixed)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(make_model("llama"), exact), inputs), expected)
    assert "How close it is" not in (exact / "README.md").read_text()


# what comes in


def values(model, name="default"):
    return {key: layer.stand_ins[name] for key, layer in layers_by_name(model).items()}


def same_values(model, other):
    for key, stand_in in values(model).items():
        torch.testing.assert_close(stand_in.a, other[key].a, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stand_in.b, other[key].b)


@pytest.mark.parametrize(("max_memory", "groups"), [(1, 8), (13_000, 6)])
def test_little_memory_means_more_runs_and_the_same_result(max_memory, groups, folder):
    model, found = calibrated("molora", folder)
    runs, first = [], values(model)
    handle = model.register_forward_hook(lambda *_: runs.append(1))
    again = calibrate(model, batches_of(), held_out=batches_of("llama", 2, seed=1), max_memory=max_memory)
    handle.remove()
    same_values(model, first)
    assert again.tokens == found.tokens
    assert again.kl == pytest.approx(found.kl, rel=1e-3)
    assert len(runs) == 6 * groups + 3 * 2  # one for what was routed, stand-ins and mean weights each


def test_batches_come_as_a_list_an_iterator_a_loader_or_shuffled(folder):
    model, found = calibrated("molora", folder)
    first, held_out = values(model), batches_of("llama", 2, seed=1)
    rows = [{k: v[i] for k, v in batch.items()} for batch in batches_of() for i in range(4)]
    sources = [
        iter(batches_of()),
        (batch for batch in batches_of()),
        DataLoader(rows, batch_size=4),
        DataLoader(rows, batch_size=4, shuffle=True),
    ]
    for source in sources:
        again = calibrate(model, source, held_out=iter(held_out), max_memory=50_000)
        same_values(model, first)
        assert again.error == pytest.approx(found.error, rel=1e-3)


def test_every_fifth_batch_is_held_out_and_the_second_of_two(folder):
    model, batches = make("molora", folder), batches_of(n=7)
    found = calibrate(model, iter(batches))
    first = values(model)
    assert found == calibrate(model, [*batches[:4], *batches[5:]], held_out=[batches[4]])
    same_values(model, first)
    assert calibrate(model, batches[:2]) == calibrate(model, batches[:1], held_out=batches[1:2])


def test_without_masks_all_tokens_count(folder):
    model = make("molora", folder)
    batches = [{"input_ids": batch["input_ids"]} for batch in batches_of(n=3)]
    found = calibrate(model, batches)
    assert (found.tokens, found.held_out_tokens) == (2 * 4 * 8, 4 * 8)


@pytest.mark.parametrize("kind", ["molora", "at-moe"])
def test_the_numbers_in_padding_do_not_matter(kind, folder):
    model, found = calibrated(kind, folder)
    first = values(model)

    def poisoned(batches):
        for batch in batches:
            batch["input_ids"][1, -3:] = torch.randint(3, VOCAB, (3,))
        return batches

    again = calibrate(model, poisoned(batches_of()), held_out=poisoned(batches_of("llama", 2, seed=1)))
    same_values(model, first)
    assert again.kl == pytest.approx(found.kl, rel=1e-3)


def test_collated_batches_with_tasks_are_taken(folder):
    model = make("molora", folder, tasks=["icd", "rad"])
    rows = [{k: v[i] for k, v in b.items()} | {"task_ids": i % 2} for b in batches_of() for i in range(4)]

    def stack(features):
        return {key: torch.stack([f[key] for f in features]) for key in features[0]}

    found = calibrate(model, DataLoader(rows, batch_size=4, collate_fn=TaskCollator(stack)))
    assert found.error < 1


def test_a_base_in_half_precision_and_calls_under_autocast(folder):
    torch.manual_seed(0)
    config = MoLoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS["llama"], init_lora_weights=False, r=4)
    half = get_peft_model(make_model("llama").bfloat16(), config).eval()
    found = calibrate(half, batches_of(), held_out=batches_of())
    assert {layer.stand_ins["default"].a.dtype for layer in routed_layers(half)} == {torch.float32}
    assert found.error < found.mean_gate_error
    half.merge_and_unload()
    model, expected = calibrated("molora", folder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = calibrate(model, batches_of(), held_out=batches_of("llama", 2, seed=1))
    assert inside.error == pytest.approx(expected.error, rel=0.05)


def test_compiled_modules_are_watched_all_the_same(folder):
    model, found = calibrated("molora", folder)
    for layer in routed_layers(model)[:2]:
        layer.compile(backend="eager")  # whose graph knows no hooks that come later
    logits(model, batches_of("llama", 1)[0])
    again = calibrate(model, batches_of(), held_out=batches_of("llama", 2, seed=1))
    assert again.kl == pytest.approx(found.kl, rel=1e-3)
    assert again.error == pytest.approx(found.error, rel=1e-3)


def test_the_report_says_if_mean_weights_come_closer(folder):
    model = make("molora", folder)
    assert "Mean weights come closer" not in str(calibrate(model, batches_of(), held_out=batches_of()))
    few = calibrate(model, batches_of(n=1, rows=2), held_out=batches_of(seed=1), damping=1e-5)
    assert few.error > few.mean_gate_error
    assert str(few).endswith("Mean weights come closer: more batches or a higher rank may help.")


# what is refused


def run(model, batches=None, **fields):
    return calibrate(model, batches_of(n=2) if batches is None else batches, **fields)


def with_nan(model):
    with torch.no_grad():
        routed_layers(model)[-1].moelora_bank["default"].lora_A.weight[0, 0] = math.nan


def second_active(model):
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])


REFUSED = {
    "no mapping": (None, {"batches": [torch.ones(2, 3)]}, TypeError, "batches holds a Tensor; give dicts"),
    "one batch": (None, {"batches": {"input_ids": torch.ones(2)}}, TypeError, "batches is a single batch; give a list"),
    "held out one": (None, {"held_out": {"input_ids": 1}}, TypeError, "held_out is a single batch"),
    "empty": (None, {"batches": []}, ValueError, "batches is empty; give at least one batch"),
    "nothing held out": (None, {"batches": batches_of(n=1)}, ValueError, "held_out is empty; give a second batch"),
    "held out empty": (None, {"held_out": []}, ValueError, "held_out is empty; give at least one batch"),
    "method": (None, {"method": "magic"}, ValueError, r"method='magic' is not known; use one of \['least_squares', 'm"),
    "rank": (None, {"rank": 0}, ValueError, "rank=0 is the rank of the stand-ins; give a whole number from 1"),
    "damping": (None, {"damping": 0.0}, ValueError, "damping=0.0; use a number above 0, such as 0.01, or None"),
    "tiny damping": (None, {"damping": 1e-30}, ValueError, "damping=1e-30 is too small beside the rounding"),
    "memory": (None, {"max_memory": 0}, ValueError, "max_memory=0 is a number of bytes"),
    "name": (None, {"adapter_name": "x"}, ValueError, r"adapter_name='x'; the model has \['default'\]"),
    "two": (second_active, {}, ValueError, r"the active ones are \['default', 'second'\]; call model.set_adapter"),
    "disabled": (lambda m: m.base_model.disable_adapter_layers(), {}, ValueError, "Adapters are disabled; leave"),
    "NaN": (with_nan, {}, ValueError, r"down_proj: .* not finite numbers; look for NaN in the adapter"),
    "all padding": (
        None,
        {"batches": [b | {"attention_mask": b["attention_mask"] * 0} for b in batches_of(n=2)]},
        ValueError,
        "No token of batches reached 'model.layers.0.self_attn.q_proj'; give batches",
    ),
    "held out padding": (
        None,
        {"held_out": [b | {"attention_mask": b["attention_mask"] * 0} for b in batches_of(n=1)]},
        ValueError,
        "No token of held_out reached",
    ),
    "halfway": (None, {"batches": [*batches_of(n=2), {"input_ids": torch.ones(2, 3)}, {}]}, RuntimeError, "indices"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_said_and_the_model_is_left_as_it_was(case, folder):
    change, fields, error, message = REFUSED[case]
    model = make("molora", folder)
    if change:
        change(model)
    model.train()
    routed_layers(model)[0].eval()
    hooks = hooks_of(model)
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    with pytest.raises(error, match=message):
        run(model, **fields)
    assert modes == [module.training for module in model.modules()]
    assert hooks == hooks_of(model) == 0
    assert torch.equal(random, torch.get_rng_state())
    assert not any(layer.stand_ins for layer in routed_layers(model))
    assert not model.base_model.calibrations
    assert not model.base_model.recording


def hooks_of(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_only_experts_that_the_input_chooses_need_it(folder):
    config = MoeLoraConfig(task_type="CAUSAL_LM", tasks=["a", "b"], target_modules=["q_proj"])
    with pytest.raises(ValueError, match="depends on the input.* merge or fold it with task="):
        run(get_peft_model(make_model("llama"), config))
    with pytest.raises(TypeError, match="takes a PeftModel with an adapter of peft_moe, not a LlamaForCausalLM"):
        run(make_model("llama"))
    with pytest.raises(TypeError, match="takes a PeftModel with an adapter of peft_moe"):
        run(get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"])))
    model = make("at-moe", folder)
    model.set_group_weights({"f": {"a": 1.0}}, group_weights={"f": 1.0})
    with pytest.raises(ValueError, match="depends on the input.* merge or fold it as it is"):
        run(model)
    model = make("molora", folder)
    calibrate(model, batches_of(n=2))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"\['default'\] are merged; call model.unmerge_adapter\(\) first"):
        run(model)


def test_a_layer_that_no_token_reaches_is_named(folder):
    model = make("molora", folder)
    routed_layers(model)[-1].enable_adapters(False)
    with pytest.raises(ValueError, match=r"No token of batches reached 'model.layers.1.mlp.down_proj'; give batches"):
        run(model)


def train_a_step(model, inputs):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**inputs).loss.backward()
    optimizer.step()


CHANGES = {
    "trained": train_a_step,
    "loaded": lambda model, _: model.load_state_dict({k: v * 1.01 for k, v in model.state_dict().items()}),
    "one router": lambda model, _: next(p for n, p in model.named_parameters() if "router" in n).data.add_(1e-3),
    "swapped": lambda model, _: routed_layers(model)[0].moelora_bank["default"].lora_A.weight.data[:2].copy_(
        routed_layers(model)[0].moelora_bank["default"].lora_A.weight.data[:2].flip(0).clone()
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_an_adapter_that_has_changed_since_is_not_merged(case, folder, tmp_path):
    model, _ = calibrated("molora", folder)
    CHANGES[case](model, batches_of(n=1)[0])
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: fold(model, tmp_path / "out")):
        with pytest.raises(
            ValueError, match=r"'default' has changed since it was calibrated; call peft_moe.calibrate\("
        ):
            merge()
    assert not any(layer.merged for layer in routed_layers(model))
    assert not (tmp_path / "out").exists()
    calibrate(model, batches_of(n=2))
    model.merge_adapter()


def test_controls_make_it_stale_and_taking_them_back_makes_it_good_again(folder):
    model, _ = calibrated("at-moe", folder)
    model.set_group_weights(off=["s"])
    with pytest.raises(ValueError, match="has changed since it was calibrated"):
        model.merge_adapter()
    model.set_group_weights()
    model.merge_adapter()


def test_fingerprints_do_not_depend_on_where_weights_are_and_see_every_bit():
    torch.manual_seed(0)
    weight = torch.randn(50, 40)
    number = fingerprint([weight])
    assert fingerprint([weight.clone()]) == fingerprint([weight.T.contiguous().T]) == number
    for i in range(20):
        other = weight.clone()
        other.view(torch.int32)[i, i] ^= 1
        assert fingerprint([other]) != number
    assert fingerprint([weight.flip(0)]) != number
    assert fingerprint([weight, weight[:1]]) != fingerprint([weight[:1], weight])
    assert fingerprint([weight * math.nan]) == fingerprint([weight * math.nan])


# what is left behind


def test_the_model_is_as_it_was(folder, tmp_path):
    model, inputs = make("molora", folder), batches_of(n=1)[0]
    model.record_routing()
    logits(model, inputs)
    model.save_pretrained(tmp_path / "before")
    before, statistics = logits(model, inputs), model.routing_statistics()
    state = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    model.train()
    routed_layers(model)[1].eval()
    modes = [module.training for module in model.modules()]
    trained = [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    rows = [{k: v[i] for k, v in batch.items()} for batch in batches_of() for i in range(4)]
    calibrate(model, DataLoader(rows, batch_size=4, shuffle=True))
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert trained == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert hooks_of(model) == 0
    model.eval()
    assert model.base_model.recording
    assert str(model.routing_statistics()) == str(statistics)
    assert torch.equal(logits(model, inputs), before)
    now = get_peft_model_state_dict(model)
    assert list(now) == list(state)
    assert all(torch.equal(now[key], state[key]) for key in state)
    model.save_pretrained(tmp_path / "after")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


def test_a_failing_calibration_leaves_the_one_before(folder):
    model, found = calibrated("molora", folder)
    before = values(model)
    with pytest.raises(ValueError, match="No token"):
        calibrate(model, [b | {"attention_mask": b["attention_mask"] * 0} for b in batches_of(n=2)])
    assert values(model) == before
    assert model.base_model.calibrations == {"default": found}


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_copies_of_a_calibrated_model_merge_too(how, folder):
    model, _ = calibrated("at-moe", folder)
    inputs = batches_of(n=1)[0]
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    torch.testing.assert_close(logits(other.merge_and_unload(), inputs), logits(model.merge_and_unload(), inputs))


def test_each_adapter_has_its_own(folder, tmp_path):
    model = make("molora", folder)
    model.add_adapter("second", MoLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False))
    calibrate(model, batches_of(n=2))
    with pytest.raises(ValueError, match=r"adapter 'second' does alone.*model.set_adapter\('second'\) first"):
        calibrate(model, batches_of(n=2), adapter_name="second")
    with pytest.raises(ValueError, match="Adapter 'second' chooses experts for each token"):
        model.merge_adapter(["default", "second"])
    assert not any(layer.merged for layer in routed_layers(model))
    model.set_adapter("second")
    found = calibrate(model, batches_of(n=2))
    assert list(found.layers) == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    model.merge_adapter(["default", "second"])
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert list(model.base_model.calibrations) == ["second"]
    assert {name for layer in routed_layers(model) for name in layer.stand_ins} == {"second"}
    fold(model, tmp_path / "second")
    model.set_adapter("second")
    model.add_adapter("default", MoLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="Adapter 'default' chooses experts for each token"):
        model.merge_adapter(["default"])


# the command


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base model with its tokenizer, an adapter on it, and data."""
    folder = tmp_path_factory.mktemp("saved")
    make_model("llama").save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    model = make("molora", folder)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    write_data(folder / "data")
    return folder


def test_the_command_calibrates_and_folds(saved, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["fold", str(saved / "adapter"), "--out", str(out), "--calibrate", str(saved / "data"), "--rank", "3"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "Stand-ins for 8 layers of adapter 'default' by least_squares" in printed
    assert f"calibrated: {out}" in printed
    assert "How close it is" in (out / "README.md").read_text()
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["base_model_name_or_path"]) == ("LORA", 3, str(saved / "base"))
    assert all(v.shape[0] == 3 for k, v in load_file(out / "adapter_model.safetensors").items() if "lora_A" in k)
    assert main(command) == 1  # before any work
    answer = capsys.readouterr()
    assert "already" in answer.err
    assert "Stand-ins" not in answer.out


def test_the_command_needs_no_column_of_tasks(saved, tmp_path):
    rows = [json.loads(line) for line in (saved / "data" / "train.jsonl").read_text().splitlines()]
    texts = [{"prompt": row["input"], "completion": row["output"]} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    out = tmp_path / "out"
    command = ["fold", str(saved / "adapter"), "--out", str(out), "--calibrate", str(tmp_path / "rows.jsonl")]
    assert main(command) == 0
    assert (out / "adapter_config.json").exists()
    bare = [{"input": row["input"], "output": row["output"]} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    assert main([*command, "--overwrite"]) == 1
    assert main([*command, "--overwrite", "--protocol", "bare"]) == 0


OPTIONS = {
    "rank without data": (["--rank", "3"], "--rank is for --calibrate DATA, which is not given"),
    "protocol without data": (["--protocol", "bare"], "--protocol is for --calibrate DATA, which is not given"),
    "type without data": (["--dtype", "float32"], "--dtype is for --calibrate DATA, which is not given"),
    "no rows": (["--calibrate", "DATA", "--rows", "0"], "--rows=0 is no count; give a whole number from 1 up"),
    "rank 0": (["--calibrate", "DATA", "--rank", "0"], "--rank=0 is no count"),
    "one row": (["--calibrate", "DATA", "--rows", "1"], "held_out is empty; give a second batch"),
    "no data": (["--calibrate", "nowhere"], "nowhere"),
    "nothing": (
        [],
        "call peft_moe.calibrate(model, batches) before fold(model, ...), or use peft-moe fold ADAPTER",
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_the_command_fails_with_one_line(case, saved, tmp_path, capsys):
    options, message = OPTIONS[case]
    options = [str(saved / "data") if option == "DATA" else option for option in options]
    assert main(["fold", str(saved / "adapter"), "--out", str(tmp_path / "out"), *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "out").exists()


def test_the_command_does_not_calibrate_over_the_adapter(saved, capsys):
    before = (saved / "adapter" / "adapter_model.safetensors").read_bytes()
    command = ["fold", str(saved / "adapter"), "--out", str(saved / "adapter"), "--calibrate", str(saved / "data")]
    assert main([*command, "--overwrite"]) == 1
    assert "holds the adapter that this is made of" in capsys.readouterr().err
    assert (saved / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_the_command_refuses_stock_adapters_before_any_work(saved, tmp_path, capsys):
    get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    command = ["fold", str(tmp_path / "lora"), "--out", str(tmp_path / "out"), "--calibrate", str(saved / "data")]
    assert main(command) == 1
    assert "is a LORA adapter; fold takes adapters of peft_moe" in capsys.readouterr().err
