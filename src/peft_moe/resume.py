"""The last checkpoint that was written to its end."""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

STATE, SCHEDULER, RNG = "trainer_state.json", "scheduler.pt", re.compile(r"rng_state(?:_(\d+))?\.pth")
# A file, or the folder of what FSDP and DeepSpeed shard.
OPTIMIZER = re.compile(r"optimizer\.pt|optimizer\.bin|optimizer_\d+|global_step\d+")


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The checkpoint with the highest step in a Trainer's `output_dir` that training can go on from, or None.

    A process that is killed while the Trainer saves leaves a checkpoint without its last files, or with the half of
    one. `resume_from_checkpoint=True` takes it because its number is the highest, and fails, or goes on with a new
    optimizer where that is what is missing. This leaves such a checkpoint out and logs why; it changes nothing on disk.

    Args:
        output_dir: of the `TrainingArguments`; it need not exist.

    Example:
        >>> trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))  # None starts from scratch
    """
    folder = Path(output_dir)
    named = {
        int(path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name) and path.is_dir()
    }
    for _, path in sorted(named.items(), reverse=True):
        reason = why_incomplete(path)
        if reason is None:
            return str(path)
        logger.warning("%s is left out: %s.", path, reason)
    return None


def why_incomplete(checkpoint: str | os.PathLike[str]) -> str | None:
    """What a checkpoint of an adapter lacks for training to go on from it as if it had not stopped; None if nothing."""
    folder = Path(checkpoint)
    # The Trainer writes it last.
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"it has no whole {STATE}, which is written last"
    if not isinstance(state, dict) or "global_step" not in state:
        return f"its {STATE} names no global_step"
    adapters = [path for path in (folder, *folder.iterdir()) if path.is_dir() and (path / CONFIG_NAME).exists()]
    names = {path.name for path in folder.iterdir()}
    if not adapters and not any(name.startswith("pytorch_model_fsdp") for name in names):  # where FSDP shards them
        return f"it has no {CONFIG_NAME}"
    for reason in filter(None, map(_why_no_adapter, adapters)):
        return reason
    optimizers = sorted(filter(OPTIMIZER.fullmatch, names))
    if not optimizers:
        return "it has no optimizer state, as with save_only_model=True"
    processes = {match[1] for name in names if (match := RNG.fullmatch(name))}
    sharded = any((folder / name).is_dir() for name in optimizers)
    if not (SCHEDULER in names or sharded):
        return f"it has no {SCHEDULER}"
    if processes not in ({None}, {str(i) for i in range(max(2, len(processes)))}):
        return "it lacks the state of random numbers of a process"
    archives = [*optimizers, SCHEDULER, *filter(RNG.fullmatch, names)]
    for path in (folder / name for name in archives):
        # torch's format: the directory of such an archive is its end
        if path.is_file() and not zipfile.is_zipfile(path):
            return f"its {path.name} is cut off"
    return None


def _why_no_adapter(folder: Path) -> str | None:
    try:
        json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except ValueError:
        return f"its {CONFIG_NAME} is cut off"
    if (folder / WEIGHTS_NAME).is_file():
        return None if zipfile.is_zipfile(folder / WEIGHTS_NAME) else f"its {WEIGHTS_NAME} is cut off"
    try:
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt"):  # which looks at the length too
            return None
    except (OSError, SafetensorError):
        return f"it has no whole {SAFETENSORS_WEIGHTS_NAME}"
