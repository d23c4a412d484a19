"""Runs the same training in one process and in two, on gloo, with the settings of the files in accelerate/."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from datasets import Dataset
from grouped_helpers import grouped_config
from helpers import TARGETS, TASKS
from launch_on_cpu import configure_cpu
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import make_inputs, make_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from peft_moe import MedMoeLoraConfig, MoeLoraConfig, MoLoraConfig

WORLD = 2
ROOT = Path(__file__).parent.parent
# what accelerate and torch read from the environment; taken out between two runs in one process
OURS = ("ACCELERATE_", "FSDP_")

COMMON = {"task_type": "CAUSAL_LM", "target_modules": TARGETS["llama"], "lora_dropout": 0.0, "init_lora_weights": False}
BALANCE = {"balance_loss": {"cv2": 0.5, "z": 0.03}}
CONFIGS: dict[str, Callable[[Path], Any]] = {
    "lora": lambda experts: LoraConfig(**COMMON, r=4),
    "moelora": lambda experts: MoeLoraConfig(**COMMON, r=8, num_experts=4, tasks=TASKS),
    "molora": lambda experts: MoLoraConfig(**COMMON, r=4, num_experts=4, **BALANCE),
    "medmoe": lambda experts: MedMoeLoraConfig(**COMMON, expert_ranks=[2, 4], num_experts=4, **BALANCE),
    "regularized": lambda experts: MedMoeLoraConfig(
        **COMMON, expert_ranks=[2, 4], num_experts=4, base_expert_mode="regularized", base_coefficient=0.3
    ),
    "at_moe": lambda experts: grouped_config("llama", experts),
    "at_moe_trained": lambda experts: grouped_config("llama", experts, train_experts=True),
}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment_of(engine: str) -> dict[str, str]:
    """What `accelerate launch --config_file accelerate/<engine>.yaml` tells the processes it starts."""
    path = ROOT / "accelerate" / f"{engine}.yaml"
    line = ["--config_file", str(path), "--main_process_port", str(free_port()), "script.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(line))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, environment = prepare_deepspeed_cmd_env(args)
        return {key: value for key, value in environment.items() if key.startswith(OURS)}
    return {key: value for key, value in prepare_multi_gpu_env(args).items() if key.startswith(OURS)}


def enter(engine: str, **changes: str) -> None:
    """Let accelerate start anew in this process, as under this engine."""
    for key in [key for key in os.environ if key.startswith(OURS)]:
        del os.environ[key]
    os.environ.update({**environment_of(engine), **changes})
    AcceleratorState._reset_state(reset_partial_state=True)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        configure_cpu()


def make(method: str, experts: Path, **changes) -> PeftModel:
    """A tiny Llama in training with an adapter that adds something."""
    torch.manual_seed(0)
    config = CONFIGS[method](experts)
    for name, value in changes.items():
        setattr(config, name, value)
    return get_peft_model(make_model("llama"), config).train()


def rows(method: str, count: int) -> Dataset:
    """Rows of different lengths; with tasks for MOELoRA."""
    inputs = make_inputs("llama", batch=count, seq=8, seed=7)
    inputs["attention_mask"] = (torch.arange(8) < 8 - torch.arange(count).unsqueeze(1) % 4).long()
    inputs["labels"][inputs["attention_mask"] == 0] = -100
    if method == "moelora":
        inputs["task_ids"] = torch.arange(count) % len(TASKS)
    return Dataset.from_list([{key: value[i].tolist() for key, value in inputs.items()} for i in range(count)])


class Losses(TrainerCallback):
    """Keeps what the Trainer logs of each step."""

    def __init__(self) -> None:
        self.found: list[tuple[float, float]] = []

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.found.append((logs["loss"], float(logs["grad_norm"])))


def train(
    model: nn.Module, method: str, folder: Path, *, steps: int = 3, resume: str | None = None, **settings
) -> list[tuple[float, float]]:
    """Losses and gradient norms of the steps, of four rows each however many processes there are."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2 // world,
        "max_steps": steps,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-4,  # so that rounding does not become a step where a gradient is next to nothing
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "disable_tqdm": True,
        **settings,
    }
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        arguments |= {"ddp_backend": "gloo"}
    else:
        arguments |= {"use_cpu": True, "accelerator_config": {"use_configured_state": "RANK" in os.environ}}
    kept = Losses()
    trainer = Trainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=rows(method, 16),
        data_collator=default_data_collator,
        callbacks=[kept],
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    del trainer
    gc.collect()
    return kept.found


def _rank(rank: int, world: int, port: int, work: Callable[..., None], arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    work(*arguments)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def in_processes(world: int, work: Callable[..., None], *arguments: Any) -> None:
    """Call `work(*arguments)` in so many processes that make one group."""
    torch.multiprocessing.spawn(_rank, (world, free_port(), work, arguments), nprocs=world)
