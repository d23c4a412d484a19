"""Models whose weights accelerate keeps on the CPU or on disk: what is no call works on them as elsewhere."""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from grouped_helpers import grouped_config
from helpers import TARGETS, config_for, logits
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import make_inputs, make_model

from peft_moe import MoLoraConfig, calibrate, fold
from peft_moe.offloading import onloaded

COMMON = {"target_modules": TARGETS["llama"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
CONFIGS = {
    "lora": lambda folder: LoraConfig(**COMMON),
    "moelora": lambda folder: config_for(default_task="rad"),
    "moelora, a gate per layer": lambda folder: config_for(default_task="rad", gate_scope="layer"),
    "one expert": lambda folder: MoLoraConfig(**COMMON, num_experts=1, bias="all"),
    "calibrated": lambda folder: MoLoraConfig(**COMMON, num_experts=4, num_experts_pattern={"down_proj": 1}),
    "at_moe": lambda folder: grouped_config(
        "llama", folder, group_weights={"weights": {"f": {"a": 0.25}, "s": 0.5}, "mix": 0.75}
    ),
}
INPUTS = make_inputs("llama", labels=False)


@pytest.fixture
def make(tmp_path):
    """Makes the same model each time, calibrated where that is what fixes its experts."""

    def new(kind):
        torch.manual_seed(0)
        model = get_peft_model(make_model("llama"), CONFIGS[kind](tmp_path)).eval()
        if kind == "calibrated":
            calibrate(model, [INPUTS, make_inputs("llama", labels=False, seed=3)])
        return model

    return new


def offload(model, where, folder):
    """Weights stay on the meta device between calls."""
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        options = {"main_device": "cpu", "offload_dir": str(folder / "offload"), "force_hooks": True}
        dispatch_model(model, {"base_model": "disk"}, **options)
    adapter = [p for name, p in model.named_parameters() if "moelora_" in name or "lora_" in name]
    assert adapter
    assert all(p.is_meta for p in adapter)


@pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")
@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_offloaded_models_merge_and_unmerge_as_others_do(kind, safe_merge, where, make, tmp_path):
    plain, model = make(kind), make(kind)
    before = logits(model, INPUTS)
    plain.merge_adapter(safe_merge=safe_merge)
    expected = logits(plain, INPUTS)
    offload(model, where, tmp_path)
    model.merge_adapter(safe_merge=safe_merge)
    assert all(p.is_meta for p in model.parameters())
    torch.testing.assert_close(logits(model, INPUTS), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, INPUTS), before)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    torch.testing.assert_close(logits(merged, INPUTS), expected)


# not one that is calibrated, which is refused because it has changed
@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind not in ("lora", "calibrated")])
def test_offloaded_weights_that_are_not_finite_are_refused_before_anything_is_merged(kind, make, tmp_path):
    model = make(kind)
    broken = [module for module in model.modules() if hasattr(module, "moelora_bank")][-1]
    with torch.no_grad():
        broken.bank("default").lora_B.weight[0, 0] = torch.inf
    offload(model, "cpu", tmp_path)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert not any(getattr(module, "merged", False) for module in model.modules())
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")
@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "lora"])
def test_offloaded_models_fold_as_others_do(kind, where, make, tmp_path):
    plain, model = make(kind), make(kind)
    task = {"task": "rad"} if "moelora" in kind else {}
    fold(plain, tmp_path / "expected", **task)
    offload(model, where, tmp_path)
    fold(model, tmp_path / "found", **task)
    expected, found = (
        PeftModel.from_pretrained(make_model("llama"), tmp_path / name).eval() for name in ("expected", "found")
    )
    assert torch.equal(logits(found, INPUTS), logits(expected, INPUTS))


def test_a_model_on_the_meta_device_that_nobody_offloaded_cannot_be_folded(tmp_path):
    model = get_peft_model(make_model("llama"), config_for()).to("meta")
    with pytest.raises(ValueError, match=r"on the meta device.*give the folder"):
        fold(model, tmp_path / "folded", task="rad")
    assert not (tmp_path / "folded").exists()


def test_what_is_brought_back_twice_stays_until_the_first_is_done(make, tmp_path):
    model = make("moelora")
    offload(model, "cpu", tmp_path)
    bank = next(module for module in model.modules() if hasattr(module, "moelora_bank")).bank("default")
    with onloaded(bank):
        with onloaded(bank):
            pass
        assert not bank.lora_A.weight.is_meta
    assert bank.lora_A.weight.is_meta
