"""TRL's trainers take our configs as `peft_config`, as they take LoRA's: SFT, DPO and GRPO."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from grouped_helpers import grouped_config
from helpers import TASKS, TARGETS, adapter_gradients, logits, routed_layers
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import make_inputs, make_model
from tiny_text import make_tokenizer
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from peft_moe import MedMoeLoraConfig, MoeLoraConfig, MoLoraConfig
from peft_moe.callbacks import BalanceScale
from peft_moe.rollouts import TaskRollouts
from peft_moe.routing import GroupedRouter, TaskRouter
from peft_moe.training import TaskCollator

pytestmark = [
    # TRL 1.16 calls transformers 5.23 by old names
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing[_a-z]*` is deprecated:FutureWarning"),
]

HOW = ["sft", "dpo", "grpo"]
KINDS = ["moelora", "molora", "medmoe", "at_moe", "at_moe by prompt"]
# Tasks come in another order than the adapter has them; prompts of different lengths, so that some are padded.
ROWS = [("ash", "rad"), ("the elm", "icd"), ("Name the fir", "def"), ("the the oak", "icd")]
ANSWERS = ["broad", "needle small", "tall", "large large"]
TASK_OF = {word: TASKS.index(task) for text, task in ROWS for word in text.split()[-1:]}


def rows(how):
    prompts = [{"prompt": text, "task_ids": task} for text, task in ROWS]
    if how == "sft":
        return Dataset.from_list([p | {"completion": f" {a}"} for p, a in zip(prompts, ANSWERS, strict=True)])
    if how == "dpo":
        pairs = zip(ANSWERS, ANSWERS[::-1], strict=True)
        return Dataset.from_list(
            [p | {"chosen": f" {a}", "rejected": f" {b} box"} for p, (a, b) in zip(prompts, pairs, strict=True)]
        )
    return Dataset.from_list(prompts)


def config_of(kind, tmp_path, **fields):
    common = {"task_type": "CAUSAL_LM", "init_lora_weights": False}
    if kind.startswith("at_moe"):
        fields = {"router_input": "prompt" if "prompt" in kind else "token"} | fields
        return grouped_config("llama", tmp_path / "loras", **common | fields)
    common |= {"target_modules": TARGETS["llama"], "num_experts": 4, "lora_dropout": 0.0}
    cls = {"moelora": MoeLoraConfig, "molora": MoLoraConfig, "medmoe": MedMoeLoraConfig}[kind]
    common |= {"moelora": {"tasks": TASKS, "r": 8}, "molora": {}, "medmoe": {"balance_loss": "none"}}[kind]
    return cls(**common | fields)


class TaskGRPO(TaskRollouts, GRPOTrainer):
    pass


class TaskRLOO(TaskRollouts, RLOOTrainer):
    pass


def long_answers(completion_ids, **columns):
    return [float(sum(ids)) for ids in completion_ids]


def make_trainer(how, folder, *, tasks=False, model=None, reward=long_answers, cls=None, data=None, **settings):
    """A trainer of a tiny model; `tasks` brings the rows' tasks to the model in the way that its kind of trainer has."""
    given = {name: settings.pop(name) for name in ("peft_config", "callbacks") if name in settings}
    arguments = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    if tasks:
        arguments["remove_unused_columns"] = False
    given["train_dataset"] = rows(how) if data is None else data
    given["processing_class"] = make_tokenizer()
    model = make_model("llama") if model is None else model
    if how in ("sft", "dpo"):
        trainer_cls, config_cls, collator = {
            "sft": (SFTTrainer, SFTConfig, DataCollatorForLanguageModeling),
            "dpo": (DPOTrainer, DPOConfig, DataCollatorForPreference),
        }[how]
        if tasks:
            given["data_collator"] = TaskCollator(collator(pad_token_id=0), TASKS)
        return trainer_cls(model, args=config_cls(**arguments | settings), **given)
    arguments |= {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
    trainer_cls = cls or (TaskGRPO if tasks else GRPOTrainer)
    config_cls = RLOOConfig if issubclass(trainer_cls, RLOOTrainer) else GRPOConfig
    return trainer_cls(model, reward_funcs=reward, args=config_cls(**arguments | settings), **given)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


class Gradients(TrainerCallback):
    """Keeps the gradients that the optimiser gets."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.found = adapter_gradients(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", HOW)
def test_the_trainer_trains_routers_and_experts_and_nothing_else(how, kind, tmp_path):
    config = config_of(kind, tmp_path)
    trainer = make_trainer(how, tmp_path, peft_config=config, tasks=kind == "moelora")
    model = trainer.model
    before = weights(model)
    trainer.train()
    assert len(losses(trainer)) == 3
    assert all(math.isfinite(loss) for loss in losses(trainer))
    if how != "grpo":
        assert losses(trainer)[-1] < losses(trainer)[0]
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert changed == trained
    assert any("moelora_router" in name for name in changed)
    assert any("moelora_bank" in name for name in changed) != kind.startswith("at_moe")  # whose LoRAs are frozen

    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(make_model("llama"), str(tmp_path / "adapter"))
    inputs, task = make_inputs("llama", labels=False), {"task_ids": "def"} if kind == "moelora" else {}
    torch.testing.assert_close(logits(loaded.eval(), inputs, **task), logits(model.eval(), inputs, **task))


@pytest.mark.parametrize("kind", ["moelora", "molora", "medmoe"])
@pytest.mark.parametrize("how", HOW)
def test_one_expert_is_trained_as_a_stock_lora_is(how, kind, tmp_path):
    fields = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": TARGETS["llama"]}
    found = {}
    for name, peft_config in ("stock", LoraConfig(**fields)), ("ours", one_expert(kind, fields)):
        trainer = make_trainer(how, tmp_path / name, peft_config=peft_config)
        start_from_the_same(trainer.model, name)
        torch.manual_seed(0)
        trainer.train()
        found[name] = losses(trainer), pairs(trainer.model, name)
    assert found["ours"][0] == pytest.approx(found["stock"][0], rel=1e-5, abs=1e-7)
    for key, (a, b) in found["stock"][1].items():
        torch.testing.assert_close(found["ours"][1][key][0], a)
        torch.testing.assert_close(found["ours"][1][key][1], b)


def one_expert(kind, fields):
    if kind == "medmoe":
        ours = {"expert_schedule": "uniform", "expert_ranks": 4, "num_base_experts": 0, "balance_loss": "none"}
        fields = {name: value for name, value in fields.items() if name != "r"} | ours | {"lora_dropout": 0.0}
        return MedMoeLoraConfig(**fields, num_experts=1)
    if kind == "moelora":
        return MoeLoraConfig(**fields, num_experts=1, tasks=TASKS, lora_dropout=0.0)
    return MoLoraConfig(**fields, num_experts=1, lora_dropout=0.0)


def pairs(model, name):
    """A and B of each adapted layer."""
    if name == "ours":
        banks = {
            key: layer.moelora_bank["default"] for key, layer in model.named_modules() if hasattr(layer, "moelora_bank")
        }
        return {key: (bank.lora_A.weight, bank.lora_B.weight) for key, bank in banks.items()}
    layers = {key: layer for key, layer in model.named_modules() if hasattr(layer, "lora_A")}
    return {key: (x.lora_A["default"].weight, x.lora_B["default"].weight) for key, x in layers.items()}


@torch.no_grad()
def start_from_the_same(model, name):
    generator = torch.Generator().manual_seed(1)
    for _, pair in sorted(pairs(model, name).items()):
        for weight in pair:
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
