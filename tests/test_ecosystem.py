"""With the libraries around peft: the stock Trainer, the Hub, and a real model."""

import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload
from datasets import Dataset
from grouped_helpers import grouped
from helpers import checkpointing, logits, routed
from peft import PeftModel, get_peft_model
from tiny_models import make_inputs
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from peft_moe import MoeLoraConfig, fold

IDS = [2, 0, 1]


def rows(task_ids):
    inputs = make_inputs("llama", batch=6)
    return Dataset.from_dict({k: v.tolist() for k, v in inputs.items()} | task_ids)


def arguments(directory, **more):
    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": 3,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
    }
    return TrainingArguments(output_dir=str(directory), disable_tqdm=True, **{**settings, **more})


def test_the_stock_trainer_keeps_a_task_ids_column_without_being_told(tmp_path):
    model = routed("llama")
    before = model.base_model.moelora_router["default"]["4"].gate.embedding.weight.clone()
    Trainer(model, arguments(tmp_path), train_dataset=rows({"task_ids": [0, 2] * 3})).train()
    after = model.base_model.moelora_router["default"]["4"].gate.embedding.weight
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False, True, False]


def test_a_trainer_without_task_ids_stops_with_the_tasks_and_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"'icd' \(0\).*column of the dataset.*remove_unused_columns=False"):
        Trainer(routed("llama"), arguments(tmp_path), train_dataset=rows({})).train()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_trainer_with_accumulation_and_checkpointing_is_trainer_without(tmp_path, use_reentrant):
    trained = []
    settings = [
        {"per_device_train_batch_size": 6},
        {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 3,
            **checkpointing(use_reentrant),
        },
    ]
    for setting in settings:
        model = routed("llama")
        Trainer(
            model,
            arguments(tmp_path, optim="sgd", learning_rate=0.1, **setting),
            train_dataset=rows({"task_ids": [0, 1, 2] * 2}),
        ).train()
        trained.append({n: p for n, p in model.named_parameters() if p.requires_grad})
    for name, parameter in trained[0].items():
        torch.testing.assert_close(trained[1][name], parameter, rtol=1e-4, atol=1e-6)


def test_copies_for_several_gpus_in_one_process_are_refused_with_the_remedy():
    """Needs GPUs to come about; this is what torch's `replicate` calls of each module."""
    with pytest.raises(RuntimeError, match=r"DataParallel copies a model.*accelerate launch.*CUDA_VISIBLE_DEVICES=0"):
        [module._replicate_for_data_parallel() for module in routed("llama").modules()]


@pytest.mark.slow
def test_an_adapter_goes_to_the_hub_and_comes_back_bit_by_bit(run_with_hub):
    done = run_with_hub(
        """
import torch
from helpers import config_for, logits
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from tiny_models import make_inputs, make_model
from peft_moe.cli import main

ids = [2, 0, 1]
make_model("llama").push_to_hub("local/base")
base = type(make_model("llama")).from_pretrained("local/base")
model, inputs = get_peft_model(base, config_for("llama")).eval(), make_inputs("llama")
expected, rad = logits(model, inputs, task_ids=ids), logits(model, inputs, task_ids="rad")
model.push_to_hub("local/routed", private=True)
pulled = AutoPeftModelForCausalLM.from_pretrained("local/routed").eval()
assert torch.equal(logits(pulled, inputs, task_ids=ids), expected)
assert main(["fold", "local/routed", "--task", "rad", "--out", "rad"]) == 0
stock = PeftModel.from_pretrained(make_model("llama"), "rad").eval()
assert torch.allclose(logits(stock, inputs), rad, atol=1e-5)
stock.push_to_hub("local/rad")
pulled = PeftModel.from_pretrained(make_model("llama"), "local/rad").eval()
assert torch.equal(logits(pulled, inputs), logits(stock, inputs))
print("done")
"""
    )
    assert done.stdout.strip().endswith("done")


@pytest.mark.long
def test_loading_without_peft_moe_fails_and_importing_it_is_the_remedy(tmp_path):
    routed("llama").save_pretrained(tmp_path / "adapter")
    load = "from peft import PeftConfig; print(type(PeftConfig.from_pretrained('adapter')).__name__)"
    without = subprocess.run([sys.executable, "-c", load], cwd=tmp_path, capture_output=True, text=True)
    assert "KeyError: 'MOELORA'" in without.stderr
    with_it = subprocess.run(
        [sys.executable, "-c", f"import peft_moe; {load}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert with_it.stdout.strip() == "MoeLoraConfig"


@pytest.mark.long
def test_smollm2_learns_answers_saves_folds_and_merges(smollm2, tmp_path):
    """On a real model: two tasks with the same inputs and different answers, which only the task id tells apart."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    answers = {"icd": " circulatory", "rad": " ultrasound"}
    config = MoeLoraConfig(
        task_type="CAUSAL_LM", tasks=list(answers), target_modules="all-linear", lora_dropout=0.0, r=8, num_experts=4
    )
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(smollm2), config)
    texts = [f"Atrial fibrillation seen on echo.{answers[task]}" for task in answers]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].clone()
    labels[:, :-1] = -100  # one token of answer
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(12):
        loss = model.train()(**batch, labels=labels, task_ids=list(answers)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05
    model.eval()
    prompt = {k: v[:, :-1] for k, v in batch.items()}
    new = model.generate(**prompt, task_ids=list(answers), max_new_tokens=1, do_sample=False)[:, -1]
    assert torch.equal(new, batch["input_ids"][:, -1])
    model.save_pretrained(tmp_path / "adapter")
    expected = {task: logits(model, prompt, task_ids=task) for task in answers}
    for task in answers:
        fold(tmp_path / "adapter", tmp_path / task, task=task)
        stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(smollm2), tmp_path / task).eval()
        torch.testing.assert_close(logits(stock, prompt), expected[task], rtol=1e-3, atol=1e-3)
    merged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(smollm2), tmp_path / "adapter"
    ).merge_and_unload(task="rad")
    torch.testing.assert_close(logits(merged.eval(), prompt), expected["rad"], rtol=1e-3, atol=1e-3)


def test_offloaded_weights_give_the_same_logits():
    model, inputs = routed("llama"), make_inputs("llama", labels=False)
    expected = logits(model, inputs, task_ids=["icd", "rad", "def"])
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(logits(model, inputs, task_ids=["icd", "rad", "def"]), expected)


@pytest.mark.parametrize("router_input", ["token", "prompt"])
def test_offloaded_routers_of_blocks_give_the_same_logits(router_input, tmp_path):
    model, inputs = grouped("llama", tmp_path, router_input=router_input), make_inputs("llama", labels=False)
    expected = logits(model, inputs)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(logits(model, inputs), expected)
