"""What all runs have in common: the model, the rows, learning rates to try, seeds, and flags of training."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "models/SmolLM2-135M-Instruct"  # from scripts/get_model.py

# Flags of scripts/train.py for every run. The scores are not made by it, but by measure.py, from the saved adapter.
COMMON: dict[str, Any] = {
    "dtype": "float32",  # the same on every machine; bfloat16 is faster on some CPUs and many times slower on others
    "max_length": 1220,
    "max_new_tokens": 48,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 32,
    "num_train_epochs": 1,
    "train_sampling_strategy": "group_by_length",
    "optim": "adamw_torch",
    "weight_decay": 0.0,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,  # of all steps
    "logging_steps": 10,
    "log_routing": "no",
    "eval_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
}


@dataclass(frozen=True)
class Setup:
    """The size of the experiment.

    Args:
        model: folder of the base model.
        data: folder of the rows, with tasks.json; paths start at the repository.
        folder: what runs write that is not a result: adapters, logs, derived rows.
        groups: the tasks by group, in the order of tasks.json. AT-MoE's groups are these.
        rates: learning rates to try in any case, rising. With one there is no search, and it is used.
        beyond: rates below these, falling, and above these, rising, tried in turn while the best one lies at that edge.
        seeds: of final runs, by experiment; "" for all others, "untold" for what is not told the task, bare.
        protocols: of the experiment main; the others use "instruction".
        search_bare: search rates for the bare protocol too; otherwise it uses those of "instruction".
        held_out: tasks that are left out of training, one at a time; empty for each task.
        common: flags of training for all runs.
        general: whether general knowledge is measured.
        limit: answer and route the first rows of each task only; None for all.
        composites: arguments of scripts/make_composites.py.
        inputs: train on the rows of so many inputs of each group, the same for all of its tasks; None for all.
        unequal: training rows of the largest and of the smallest task, where tasks have unequal sizes.
        only: patterns of ids to run where the command names none; empty for all.
        source: folder that the model is made from, without its system prompt; None where the model is there as it is.
    """

    model: str
    data: str
    folder: str
    groups: Mapping[str, tuple[str, ...]]
    rates: tuple[float, ...] = (1e-3, 3e-3)
    beyond: tuple[tuple[float, ...], tuple[float, ...]] = ((3e-4, 1e-4), (1e-2, 3e-2))
    seeds: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: {"": (1, 2, 3)})
    protocols: tuple[str, ...] = ("instruction", "bare")
    search_bare: bool = True
    held_out: tuple[str, ...] = ()
    common: Mapping[str, Any] = field(default_factory=lambda: COMMON)
    general: bool = True
    limit: int | None = None
    composites: tuple[str, ...] = ()
    inputs: int | None = None
    unequal: tuple[int, int] = (250, 20)
    only: tuple[str, ...] = ()
    source: str | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, group by group."""
        return tuple(task for tasks in self.groups.values() for task in tasks)

    @property
    def all_rates(self) -> tuple[float, ...]:
        """Every learning rate that may be tried."""
        return (*self.rates, *self.beyond[0], *self.beyond[1])

    @property
    def train_data(self) -> str:
        """Folder of the rows for training; dev and test are those of `data`."""
        return self.data if self.inputs is None else f"{self.folder}/data/of-{self.inputs}-inputs"

    @property
    def composite_data(self) -> str:
        """Folder of rows that need two tasks at once."""
        return f"{self.folder}/data/composite"

    @property
    def unequal_data(self) -> str:
        """Folder of the rows with tasks of unequal sizes."""
        return f"{self.folder}/data/unequal"

    def adapter(self, run_id: str) -> str:
        """Folder of the adapter of a run."""
        return f"{self.folder}/adapters/{run_id}"

    def seeds_of(self, experiment: str) -> tuple[int, ...]:
        """Seeds of an experiment's final runs."""
        return self.seeds.get(experiment, self.seeds[""])


def full() -> Setup:
    """The experiment that the page reports, cut to a night on two cores.

    Training has half of the inputs, the bare protocol takes the other's rates, and what only looks around has one seed.
    """
    data, folder = "data/medmulti/mini", "runs/evidence"
    once = dict.fromkeys(("composite", "held_out", "sampling", "variants", "experts", "rank", "untold"), (1,))
    return Setup(
        f"{folder}/model",
        data,
        folder,
        read_groups(ROOT / data),
        seeds={"": (1, 2, 3), **once},
        search_bare=False,
        held_out=("icd_chronic", "rad_modality", "def_system"),
        inputs=125,
        composites=("--test", "20"),
        source=SOURCE,
    )


def quick() -> Setup:
    """A few minutes to see that every step works; what it measures means nothing."""
    data, folder = "data/medmulti/tiny", "runs/evidence-quick"
    few = {"max_rows_per_task": 2, "max_steps": 2, "per_device_train_batch_size": 1, "max_new_tokens": 4}
    systems = ("base", "lora-r16", "lora-per-task", "moelora", "molora", "medmoelora", "at_moe")
    return Setup(
        f"{folder}/model",
        data,
        folder,
        read_groups(ROOT / data),
        rates=(1e-3,),
        seeds={"": (1,)},
        protocols=("instruction",),
        common=COMMON | few | {"logging_steps": 1},
        general=False,  # takes longer than all else
        limit=1,
        composites=("--train", "2", "--dev", "1", "--test", "1", "--single", "2"),
        unequal=(16, 4),
        only=(
            *(f"instruction/{system}" for system in systems[:1]),
            *(f"instruction/{system}/*" for system in systems[1:]),
            "*/lora-like-molora-active/*",
            "*/moelora-sampled-uniform/*",
            "*/moelora-without-icd_chapter/*",
            "*/at_moe-of-composites/*",
            "*/moelora-of-single-tasks/*",
        ),
        source=SOURCE,
    )


def read_groups(data: Path) -> dict[str, tuple[str, ...]]:
    """The tasks of a data folder by their group."""
    groups: dict[str, tuple[str, ...]] = {}
    for name, task in json.loads((data / "tasks.json").read_text(encoding="utf-8"))["tasks"].items():
        groups[task["group"]] = (*groups.get(task["group"], ()), name)
    return groups
