"""Two processes do what one does: losses, saved adapters, resuming; DDP, FSDP2, and ZeRO where DeepSpeed is there."""

import contextlib
import io
import json
import os
import subprocess
import sys

import pytest
import torch
from distributed_helpers import CONFIGS, ROOT, WORLD, enter, in_processes, make, rows, train
from grouped_helpers import make_experts
from helpers import logits
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import make_inputs, make_model
from torch.distributed.tensor import DTensor
from train import check_best_model
from transformers import Trainer, TrainingArguments, default_data_collator

from peft_moe.routing_images import RoutingImages

METHODS = ["lora", "moelora", "molora", "regularized", "at_moe"]  # the other ways of two of them are slow tests
RESUMED = ["moelora", "at_moe"]
SHOWN = ["molora", "at_moe"]  # whose routers read the rows
STEPS = {"steps": 3, "save_strategy": "steps", "save_steps": 2}
WEIGHTS = "adapter_model.safetensors"


def is_main():
    return os.environ.get("RANK", "0") == "0"


def run(where, method, experts, **settings):
    """Train and leave what was found in the folder `where`."""
    model = make(method, experts)
    losses = train(model, method, where, **settings)
    if is_main():
        tensors = dict([*model.named_parameters(), *model.named_buffers()])
        sizes = {k: (t.to_local() if isinstance(t, DTensor) else t).numel() / t.numel() for k, t in tensors.items()}
        torch.save({"losses": losses, "here": sizes}, where / "found.pt")
    return model


def found(folder):
    return torch.load(folder / "found.pt")


def assert_same_adapter(one, other, *, atol=1e-6):
    one, other = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=atol, msg=lambda message, key=key: key + message)


# the core: both engines in one pair of processes, since importing everything takes most of their time


def show_routing(where, method, experts):
    """Evaluate twice in training, at a learning rate of 0, and leave what each process printed of the routing."""
    model, said = make(method, experts), io.StringIO()
    arguments = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0, "use_cpu": True}
    arguments |= {"per_device_eval_batch_size": 2, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    arguments |= {"accelerator_config": {"use_configured_state": "RANK" in os.environ}}
    trainer = Trainer(
        model,
        TrainingArguments(str(where), **arguments),
        train_dataset=rows(method, 8),
        eval_dataset=rows(method, 8),
        data_collator=default_data_collator,
    )
    trainer.add_callback(RoutingImages(trainer, images=False))
    with contextlib.redirect_stdout(said):
        trainer.train()
    where.mkdir(exist_ok=True)
    rank = os.environ.get("RANK", "0")
    (where / f"{method}-{rank}.txt").write_text(said.getvalue(), encoding="utf-8")


def run_engines(folder):
    for engine in ("ddp", "fsdp2"):
        for method in METHODS:
            enter(engine)
            run(folder / engine / method, method, folder, **STEPS)
    for method in SHOWN:
        enter("ddp")
        show_routing(folder / "two", method, folder)
    for method in RESUMED:  # one process has saved, two go on
        enter("ddp")
        run(folder / "from_one" / method, method, folder, resume=str(folder / "one" / method / "checkpoint-2"), steps=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of one process and of two."""
    folder = tmp_path_factory.mktemp("distributed")
    make_experts("llama", folder)
    for method in METHODS:
        run(folder / "one" / method, method, folder, **STEPS)
    for method in SHOWN:
        show_routing(folder / "alone", method, folder)
    in_processes(WORLD, run_engines, folder)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_have_the_losses_and_gradient_norms_of_one_and_save_its_adapter(folder, engine, method):
    one, two = folder / "one" / method, folder / engine / method
    assert len(found(two)["losses"]) == 3
    torch.testing.assert_close(torch.tensor(found(two)["losses"]), torch.tensor(found(one)["losses"]))
    for place in (".", "checkpoint-2"):
        assert_same_adapter(one / place, two / place)
    last, earlier = load_file(two / WEIGHTS), load_file(two / "checkpoint-2" / WEIGHTS)
    assert any(not torch.equal(last[key], earlier[key]) for key in last)


@pytest.mark.long
@pytest.mark.parametrize("method", SHOWN)
def test_the_main_process_alone_says_what_the_routers_of_both_did(folder, method):
    def lines(of):
        text = (folder / of).read_text(encoding="utf-8")
        return [line for line in text.splitlines() if line.startswith("routing at step")]

    assert lines(f"two/{method}-1.txt") == []
    assert lines(f"two/{method}-0.txt") == lines(f"alone/{method}-0.txt")  # of the same rows, in one process
    assert len(lines(f"two/{method}-0.txt")) == 2


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_what_two_processes_saved_loads_into_a_plain_model(folder, engine, method):
    inputs = make_inputs("llama")
    inputs |= {"task_ids": torch.arange(3)} if method == "moelora" else {}
    plain, two = (
        PeftModel.from_pretrained(make_model("llama"), str(folder / place / method)).eval() for place in ("one", engine)
    )
    torch.testing.assert_close(logits(two, inputs), logits(plain, inputs))


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_fsdp2_splits_base_and_trained_weights_and_leaves_frozen_experts_whole(folder, method):
    here = found(folder / "fsdp2" / method)["here"]
    matrices = {key: share for key, share in here.items() if key.endswith((".weight", ".embedding"))}
    frozen = {key for key in matrices if method == "at_moe" and "moelora_bank" in key}
    assert all(0.4 <= share <= 0.7 for key, share in matrices.items() if key not in frozen), matrices
    assert all(matrices[key] == 1 for key in frozen)
    assert bool(frozen) == (method == "at_moe")


@pytest.mark.long
@pytest.mark.parametrize("method", RESUMED)
def test_two_processes_go_on_from_a_checkpoint_of_one(folder, method):
    one, two = folder / "one" / method, folder / "from_one" / method
    torch.testing.assert_close(torch.tensor(found(two)["losses"]), torch.tensor(found(one)["losses"][2:]))
    assert_same_adapter(one, two)


@pytest.mark.long
@pytest.mark.parametrize("method", RESUMED)
def test_one_process_goes_on_from_a_checkpoint_of_two(folder, method, tmp_path):
    run(tmp_path, method, folder, resume=str(folder / "ddp" / method / "checkpoint-2"), steps=3)
    one = folder / "one" / method
    torch.testing.assert_close(torch.tensor(found(tmp_path)["losses"]), torch.tensor(found(one)["losses"][2:]))
    assert_same_adapter(one, tmp_path)


# what is not whole is not saved


@pytest.mark.parametrize(
    ("method", "part"),
    [("moelora", "lora_A"), ("moelora", "router"), ("molora", "router"), ("regularized", "lora_B")],
)
def test_an_adapter_that_is_not_whole_is_refused_and_nothing_is_written(method, part, tmp_path):
    """As ZeRO-3 leaves parameters between calls."""
    model = make(method, tmp_path)
    name, parameter = next((n, p) for n, p in model.named_parameters() if part in n and p.requires_grad)
    parameter.data = torch.empty(0)
    with pytest.raises(ValueError, match=rf"{name}.*shape \(0,\).*trainer\.save_model"):
        model.save_pretrained(str(tmp_path / "out"))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_flattened_matrix_is_refused_too(tmp_path):
    """As FSDP1 leaves them between calls."""
    model = make("molora", tmp_path)
    bank = next(p for n, p in model.named_parameters() if "lora_B" in n)
    bank.data = bank.data.flatten()
    with pytest.raises(ValueError, match=r"is not whole in this process.*lora_B"):
        model.save_pretrained(str(tmp_path / "out"))


def test_a_split_model_cannot_choose_the_best_by_answers_and_the_script_says_so_first(tmp_path):
    settings = {"output_dir": str(tmp_path), "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"save_strategy": "steps", "save_steps": 1}
    check_best_model(TrainingArguments(**settings, metric_for_best_model="loss"))
    with pytest.raises(ValueError, match=r"metric_for_best_model='mean'.*cannot generate.*--load_best_model_at_end"):
        check_best_model(TrainingArguments(**settings, metric_for_best_model="mean"))


# more engines and settings; each started once


VARIANTS = {
    "checkpointed_by_fsdp": ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}),
    "checkpointed_by_transformers": ({}, {"gradient_checkpointing": True}),
    "one_process_loads": ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_SYNC_MODULE_STATES": "true"}, {}),
}
ALL = list(CONFIGS)
# accelerate takes all that a state dict has for split parameters then, and frozen experts are buffers
NOT_TRIED = {("one_process_loads", "at_moe")}


def run_variants(folder):
    for name, (environment, settings) in VARIANTS.items():
        for method in [method for method in ALL if (name, method) not in NOT_TRIED]:
            enter("fsdp2", **environment)
            run(folder / name / method, method, folder, steps=3, **settings)
    for method in ALL:
        enter("fsdp2", ACCELERATE_MIXED_PRECISION="bf16")
        run(folder / "bf16" / method, method, folder, steps=3, bf16=True)
    for method in ALL:
        enter("fsdp2")
        run(folder / "fsdp2" / method, method, folder, **STEPS)


def go_on_with_fsdp2(folder, source, target):
    for method in ALL:
        enter("fsdp2")
        last = str(folder / source / method / "checkpoint-2")
        run(folder / target / method, method, folder, resume=last, **STEPS)


def start_with_fsdp2(folder, target):
    for method in ALL:
        enter("fsdp2")
        run(folder / target / method, method, folder, **STEPS)


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variants")
    make_experts("llama", folder)
    for method in ALL:
        run(folder / "one" / method, method, folder, **STEPS)
    in_processes(WORLD, run_variants, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"), [(name, method) for name in VARIANTS for method in ALL if (name, method) not in NOT_TRIED]
)
def test_other_settings_of_fsdp_train_the_same_adapter(variants, name, method):
    one, two = variants / "one" / method, variants / name / method
    torch.testing.assert_close(torch.tensor(found(two)["losses"]), torch.tensor(found(one)["losses"]))
    if (name, method) == ("checkpointed_by_fsdp", "lora"):
        assert not load_file(two / WEIGHTS)  # peft looks for names with FSDP's wrapper in them, and saves nothing
    else:
        assert_same_adapter(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("method", ALL)
def test_fsdp2_in_bf16_stays_near_and_saves_float32(variants, method):
    one, two = variants / "one" / method, variants / "bf16" / method
    for (loss, _), (expected, _) in zip(found(two)["losses"], found(one)["losses"], strict=True):
        assert loss == pytest.approx(expected, rel=0.02)
    saved = load_file(two / WEIGHTS)
    assert {t.dtype for key, t in saved.items()} == {torch.float32}
    assert {k: t.shape for k, t in saved.items()} == {k: t.shape for k, t in load_file(one / WEIGHTS).items()}


@pytest.mark.slow
def test_checkpoints_of_fsdp2_are_gone_on_with_by_another_number_of_processes(variants):
    in_processes(1, go_on_with_fsdp2, variants, "fsdp2", "two_to_one")
    in_processes(1, start_with_fsdp2, variants, "fsdp2_of_one")
    in_processes(WORLD, go_on_with_fsdp2, variants, "fsdp2_of_one", "one_to_two")
    for method in ALL:
        one = variants / "one" / method
        for name in ("two_to_one", "one_to_two"):
            losses = found(variants / name / method)["losses"]
            torch.testing.assert_close(torch.tensor(losses), torch.tensor(found(one)["losses"][2:]))
            assert_same_adapter(one, variants / name / method)


# without the Trainer


def save_and_load_state(folder):
    from accelerate import Accelerator

    for engine in ("ddp", "fsdp2"):
        for method in METHODS:
            enter(engine)
            accelerator = Accelerator(cpu=True)
            batch = default_data_collator(list(rows(method, 2)))
            saved = []
            for again in (False, True):  # what is read in the second time is another model
                model = make(method, folder)
                optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
                prepared, optimizer = accelerator.prepare(model, optimizer)
                state = folder / "states" / engine / method
                if again:
                    accelerator.load_state(str(state))
                accelerator.backward(prepared(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
                if not again:
                    accelerator.save_state(str(state))
                    accelerator.backward(prepared(**batch).loss)
                    optimizer.step()
                weights = accelerator.get_state_dict(prepared)
                if accelerator.is_main_process:
                    unwrapped = accelerator.unwrap_model(prepared)
                    unwrapped.save_pretrained(str(state.parent / f"{method}_{again}"), state_dict=weights)
                saved.append(state.parent / f"{method}_{again}")
                accelerator.free_memory()
            if is_main():
                assert_same_adapter(*saved)
            torch.distributed.barrier()


@pytest.mark.slow
def test_a_loop_of_ones_own_saves_and_loads_its_state_in_two_processes(tmp_path):
    make_experts("llama", tmp_path)
    in_processes(WORLD, save_and_load_state, tmp_path)
    for engine in ("ddp", "fsdp2"):
        assert len(list((tmp_path / "states" / engine).glob("*_True"))) == len(METHODS)


# ZeRO, where DeepSpeed is installed: CI does not


def run_zero(folder, stage):
    for method in ALL:
        enter(f"zero{stage}")
        run(folder / f"zero{stage}" / method, method, folder, **STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_the_same_adapter(stage, tmp_path, monkeypatch):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; docs/distributed.md says how")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    make_experts("llama", tmp_path)
    in_processes(WORLD, run_zero, tmp_path, stage)
    for method in ALL:
        one, two = tmp_path / "one" / method, tmp_path / f"zero{stage}" / method
        run(one, method, tmp_path, **STEPS)
        torch.testing.assert_close(torch.tensor(found(two)["losses"]), torch.tensor(found(one)["losses"]))
        assert_same_adapter(one, two)


# the files in accelerate/, launched with the script


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_accelerate_launches_the_script_with_our_files(engine, smollm2, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate/{engine}.yaml"]
    launch += ["--main_process_port", "0", *(["tests/launch_on_cpu.py"] if engine == "fsdp2" else [])]
    flags = ["--model_name_or_path", str(smollm2), "--output_dir", str(tmp_path), "--max_steps", "2"]
    flags += ["--max_rows_per_task", "2", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1"]
    flags += ["--num_train_epochs", "1", "--eval_strategy", "no", "--save_strategy", "no", "--report_to", "none"]
    flags += ["--load_best_model_at_end", "false", "--max_length", "64", "--use_cpu", "true"]
    done = subprocess.run(
        [*launch, "scripts/train.py", "recipes/moelora.yaml", *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "MOELORA"
    assert all(t.numel() for t in load_file(tmp_path / WEIGHTS).values())
