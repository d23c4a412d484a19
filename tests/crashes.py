"""A process is killed at every moment of its work on a folder: by SIGKILL, or by the kernel in the midst of a write.

Run by test_crash.py and test_resume.py, since it forks: `python tests/crashes.py FOLDER STRIDE NAME ...`. The children
share what the parent has imported. Prints what happened; an assertion ends it.
"""

import json
import os
import re
import resource
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import torch
from broken_files import METHODS, make_adapter, make_config
from helpers import TARGETS, logits
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import make_inputs, make_model
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from peft_moe import fold
from peft_moe.resume import last_complete_checkpoint

CHANGES = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"}
INPUTS = make_inputs("llama")


def killed(work, folder: Path, *, before: int | None = None, writing: int | None = None) -> bool:
    """Do some work in a child that dies before its n-th change below a folder, or where a file exceeds so many bytes.

    Returns whether it died; if there are fewer changes, it does not.
    """
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        if writing is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, and the write fails instead
            resource.setrlimit(resource.RLIMIT_FSIZE, (writing, writing))
        seen = 0

        def audit(event, arguments):
            nonlocal seen
            if event in CHANGES and isinstance(arguments[0], str | os.PathLike):
                reads = event == "open" and (arguments[1] is None or "r" in arguments[1])
                if str(folder) in str(arguments[0]) and not reads:
                    seen += 1
                    if seen == before:
                        os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        try:
            work()
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)


def every_moment(work, folder: Path, restore, check, sizes, stride: int) -> int:
    """Kill the work at each of its changes and within files of so many bytes; `check` looks at what it leaves.

    With a stride, at one of so many changes.
    """
    kills = 0
    for writing in sizes[::stride]:
        restore()
        if killed(work, folder, writing=writing):
            check()
            kills += 1
    before = 1
    while True:
        restore()
        if not killed(work, folder, before=before):
            return kills
        check()
        kills, before = kills + 1, before + stride


def outputs(folder: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(make_model("llama"), folder), INPUTS)


def save_over_an_older_save(root: Path, stride: int) -> None:
    """save_pretrained over the same adapter as it was before: what is there is one or the other, at any moment."""
    for method in METHODS:
        old, new, there = root / f"{method}-old", root / f"{method}-new", root / "there" / method
        model = make_adapter(method, root)
        model.save_pretrained(str(old))
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(0.1)
        model.save_pretrained(str(new))
        known = [outputs(old), outputs(new)]
        assert not torch.equal(*known)
        found: Counter[int] = Counter()

        def restore(old=old, there=there):
            shutil.rmtree(there, ignore_errors=True)
            shutil.copytree(old, there)

        def check(there=there, known=known, found=found, model=model):
            now = outputs(there)
            found[[torch.equal(now, one) for one in known].index(True)] += 1
            assert not killed(lambda: model.save_pretrained(str(there)), there)  # and it can be saved again
            assert torch.equal(outputs(there), known[1])

        size = (old / "adapter_model.safetensors").stat().st_size
        sizes = [0, 10, 200, 1000, 3000, size // 2, size - 1]
        kills = every_moment(
            lambda there=there, model=model: model.save_pretrained(str(there)), there, restore, check, sizes, stride
        )
        assert stride > 1 or (0 < found[0] < kills)
        print(f"{method}: killed {kills} times, {found[0]} times the old adapter is there, {found[1]} times the new")


def fold_over_an_older_fold(root: Path, stride: int) -> None:
    """fold with overwrite: the old LoRA, the new one, or none that loads; never weights under another's config."""
    make_adapter("moelora", root).save_pretrained(str(root / "routed"))
    there, old, new = root / "there", root / "old", root / "new"
    make_adapter("moelora", root, seed=1, target_modules=["q_proj"]).save_pretrained(str(root / "less"))
    for other, same_config in (("routed", True), ("less", False)):
        for folder in (old, new):
            shutil.rmtree(folder, ignore_errors=True)
        fold(root / other, old, task="rad")
        fold(root / "routed", new, task="icd")
        known = [outputs(old), outputs(new)]
        found: Counter[str] = Counter()

        def restore():
            for left in root.glob(".there-*"):
                shutil.rmtree(left)
            shutil.rmtree(there, ignore_errors=True)
            shutil.copytree(old, there)

        def check(known=known, found=found):
            if not (there / "adapter_config.json").exists():
                found["none"] += 1
            else:
                now = outputs(there)
                found[("old", "new")[[torch.equal(now, one) for one in known].index(True)]] += 1
            fold(root / "routed", there, task="icd", overwrite=True)
            assert torch.equal(outputs(there), known[1])

        def work():
            fold(root / "routed", there, task="icd", overwrite=True)

        kills = every_moment(work, root, restore, check, [0, 100, 1000, 5000], stride)
        assert stride > 1 or (found["old"] and found["new"])
        assert not (found["none"] and same_config)
        print(f"fold over {other}: killed {kills} times, {dict(found)}")


ROWS = [
    {"input_ids": [3 + i, 4, 5, 6 + i], "labels": [-100, -100, 5, 6 + i], "attention_mask": [1] * 4, "task_ids": i % 3}
    for i in range(20)
]


def make_trainer(config, out: Path, *, with_tasks: bool = True, **arguments) -> Trainer:
    set_seed(0)
    model = get_peft_model(make_model("llama"), config)
    rows = ROWS if with_tasks else [{key: value for key, value in row.items() if key != "task_ids"} for row in ROWS]
    fields = {
        "save_steps": 1,
        "logging_steps": 1,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "report_to": "none",
    }
    fields |= {"disable_tqdm": True, "use_cpu": True, "remove_unused_columns": False, "learning_rate": 0.01, "seed": 3}
    return Trainer(model, TrainingArguments(str(out), **fields | arguments), train_dataset=rows, data_collator=stack)


def stack(rows):
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def losses_of(trainer: Trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def train_with_checkpoints(root: Path, stride: int) -> None:
    """A Trainer that keeps one checkpoint: from what a kill leaves, training ends with the same losses and weights."""
    config = make_config("molora", root, tasks=3, lora_dropout=0.1, balance_loss="switch", router_jitter=0.01)
    straight = make_trainer(config, root / "straight")
    straight.train()
    expected, losses = weights(straight.model), losses_of(straight)
    out = root / "out"
    found: Counter[str] = Counter()

    def restore():
        shutil.rmtree(out, ignore_errors=True)

    def check():
        names = sorted(path.name for path in out.glob("checkpoint-*")) if out.exists() else []
        last = last_complete_checkpoint(out)
        # A checkpoint is only removed when the next one is complete.
        assert last is not None or len(names) < 2, names
        found[f"{Path(last).name if last else 'none'} of {len(names)}"] += 1
        if last is not None and last.endswith("-3"):  # the end; stock Trainer would train a fourth step from there
            loaded = PeftModel.from_pretrained(make_model("llama"), last, is_trainable=True)
        else:
            again = make_trainer(config, out, save_total_limit=1)
            again.train(resume_from_checkpoint=last)
            assert losses_of(again) == losses
            loaded = again.model
        assert all(torch.equal(value, expected[name]) for name, value in weights(loaded).items())

    def work():
        make_trainer(config, out, save_total_limit=1).train()

    kills = every_moment(work, out, restore, check, [100, 2000, 5000, 10_000, 20_000], 2 * stride - 1)
    print(f"Trainer: killed {kills} times; the last complete checkpoint: {dict(found)}")


ACCUMULATING = {"gradient_accumulation_steps": 2}
BALANCED = {"tasks": 3, "balance_loss": {"z": 0.1, "variance": 0.1}}
# Configs by name: method and fields, with arguments of training.
RESUMED: dict[str, tuple[str, dict, dict]] = {
    "LoRA": ("lora", {"lora_dropout": 0.1}, {}),
    "LoRA, accumulating": ("lora", {"lora_dropout": 0.1}, ACCUMULATING),
    "MOELoRA": ("moelora", {"lora_dropout": 0.1}, ACCUMULATING),
    "MOELoRA, gates per layer": ("moelora", {"lora_dropout": 0.1, "gate_scope": "layer"}, {}),
    "MoLoRA": ("molora", {"router_jitter": 0.1, "lora_dropout": 0.1, **BALANCED}, ACCUMULATING),
    "MoLoRA, plain": ("molora", {"tasks": 3}, {}),
    "Med-MoE-LoRA": ("medmoelora", {"lora_dropout": 0.1, **BALANCED, "base_expert_mode": "regularized"}, {}),
    "Med-MoE-LoRA, accumulating": ("medmoelora", {"tasks": 3, "lora_dropout": 0.1}, ACCUMULATING),
    "AT-MoE, per prompt": ("at_moe", {"router_input": "prompt"}, ACCUMULATING),
    "AT-MoE, experts trained": ("at_moe", {"train_experts": True, "lora_dropout": 0.1}, {}),
    "AT-MoE, per token": ("at_moe", {"learn_mix": True}, {}),
    "AT-MoE, gradient checkpointing": ("at_moe", {}, {"gradient_checkpointing": True}),
}


class Killer(TrainerCallback):
    """Kills the process in the middle of a step."""

    def on_substep_end(self, args, state, control, **kwargs):
        self.on_optimizer_step(args, state, control)

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def resume_every_config(root: Path, stride: int) -> None:
    """Train, be killed in the fourth step, go on from the checkpoint after the second: as if nothing had happened."""
    results = {}
    for name, (method, fields, arguments) in list(RESUMED.items())[::stride]:
        folder = root / re.sub(r"\W+", "-", name)
        arguments = {"max_steps": 6, "save_steps": 2, **arguments}

        def trainer(out: Path, method=method, fields=fields, arguments=arguments) -> Trainer:
            if method == "lora":
                config = LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS["llama"], **fields)
            else:
                config = make_config(method, root, **fields)
            return make_trainer(config, out, with_tasks=method not in ("lora", "at_moe"), **arguments)

        straight = trainer(folder / "straight")
        before = weights(straight.model)
        straight.train()

        def die(trainer=trainer, folder=folder) -> None:
            dying = trainer(folder / "killed")
            dying.add_callback(Killer())
            dying.train()

        assert killed(die, folder / "killed")
        last = last_complete_checkpoint(folder / "killed")
        again = trainer(folder / "killed")
        again.train(resume_from_checkpoint=last)
        ends = weights(straight.model), weights(again.model)
        results[name] = {
            "from": Path(last).name,
            "straight": losses_of(straight),
            "resumed": losses_of(again),
            "difference": max(float((a - b).abs().max()) for a, b in zip(*(e.values() for e in ends), strict=True)),
            "trained": sum(not torch.equal(before[key], value) for key, value in ends[0].items()) / len(before),
        }
    print("RESULTS", json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[3:]:
        (Path(sys.argv[1]) / name).mkdir(parents=True)
        globals()[name](Path(sys.argv[1]) / name, int(sys.argv[2]))
