"""What a trained gate is worth: an adapter with uniform gates beside the adapter as it is.

Shapes: ... any leading axes · E experts
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from ..config import MoeConfig, PeftMoeType
from ..data import task_key
from ..grouped.config import GroupedMoeConfig
from ..grouped.model import GroupedMoeModel
from ..layer import MoeLinear
from ..metrics import load_metric
from ..tuner import MoeTuner

if TYPE_CHECKING:
    from datasets import Dataset

    from ..data import TaskInfo

SELECTS = ("select", "inference_select")  # what of a router turns scores into weights
# What uniform gates are, by type of the adapter.
MEANING = {
    PeftMoeType.MOELORA: "Uniform gates: each expert gets the same weight, for all tasks.",
    PeftMoeType.MOLORA: "Uniform gates: each token gets all routed experts, as much of each, also where its router "
    "chooses a few of them.",
    PeftMoeType.MEDMOELORA: "Uniform gates: each token gets as much of each expert, a base expert included.",
    PeftMoeType.GROUPEDMOE: "Uniform gates: groups get the same weight, and experts within a group; with flat_routing "
    "all experts. The general expert keeps its share.",
}
Results = Mapping[str, Mapping[str, Any]]  # by task, as `evaluation.score` makes them
Rate = Callable[[int, str], float]  # of a row by its number, and an answer to it
LEVEL = 0.05  # p below which a difference is called more than chance


def even(scores: torch.Tensor) -> torch.Tensor:
    """The same weight 1 / E for each expert, whatever the scores (..., E): a select like `softmax`."""
    return torch.full_like(scores, 1 / scores.shape[-1])


@contextmanager
def uniform_gates(model: PeftModel) -> Iterator[None]:
    """Give all experts that a router of the active adapter weighs the same weight, for the calls in a `with` block.

    MOELoRA, MoLoRA, Med-MoE-LoRA: 1 / E for each, instead of what the router's select makes of the scores; where it
    chooses K of E, all get something now. Shared experts keep their weight of 1, and a base expert is one of the E.
    AT-MoE: groups get the same, and experts within a group; all experts the same with `flat_routing`. λ stays.

    Afterwards everything is as it was. Calls of other threads wait.

    Raises:
        TypeError: a model without an adapter of this package.
        ValueError: several active adapters, no router to make uniform, or an adapter that is merged.
    """
    tuner = model.base_model if isinstance(model, PeftModel) else None
    if not isinstance(tuner, MoeTuner):
        raise TypeError(f"uniform_gates takes a PeftModel with an adapter of peft_moe, not a {type(model).__name__}.")
    if len(tuner.active_adapters) != 1:
        raise ValueError(f"The active adapters are {tuner.active_adapters}; activate one.")
    name = tuner.active_adapters[0]
    layers = [m for m in tuner.model.modules() if isinstance(m, MoeLinear) and name in m.moelora_bank]
    if any(name in layer.merged_adapters for layer in layers):
        raise ValueError(f"Adapter {name!r} is merged, with the weights it had then; call unmerge_adapter() first.")
    config: Any = tuner.peft_config[name]
    with tuner.context.turn():
        if isinstance(tuner, GroupedMoeModel):
            fixed = tuner.context.controls.get(name)
            with tuner.routing(**even_groups(config), mix=fixed.mix if fixed else None, adapter_name=name):
                yield
            return
        routers = {id(router): router for layer in layers if (router := layer.router_of(name)) is not None}
        if not routers:
            raise ValueError(
                f"Adapter {name!r} has one expert in each layer, and no router; there is nothing to change."
            )
        # A router is a gate and a select; another select is all it takes, and layers look at it in each call.
        before = [(r, part, vars(r)[part]) for r in routers.values() for part in SELECTS if part in vars(r)]
        try:
            for router, part, _ in before:
                setattr(router, part, even)
            yield
        finally:
            for router, part, select in before:
                setattr(router, part, select)


def check_can_be_uniform(config: MoeConfig, description: Mapping[str, Any]) -> None:
    """Raise a ValueError for a saved adapter, as `describe` has it, without weights that could be made uniform."""
    adapter = description["adapter"]
    if not description["routers"]:
        raise ValueError(f"{adapter!r} has one expert in each layer, and no router; there is nothing to make uniform.")
    if isinstance(config, GroupedMoeConfig) and sum(map(len, config.names.values())) == 1:
        raise ValueError(f"{adapter!r} has one expert beside the general one; there is nothing to make uniform.")
    if isinstance(config, GroupedMoeConfig) and all(router["mix"] == 0 for router in description["routers"]):
        raise ValueError(f"{adapter!r} has λ = 0, the general expert alone; there is nothing to make uniform.")


def even_groups(config: GroupedMoeConfig) -> dict[str, Any]:
    """Arguments of `set_group_weights` that weigh groups, and experts within each, evenly; or all experts, if the
    router has one softmax over them.
    """
    names, total = config.names, sum(map(len, config.names.values()))
    shares = {g: len(experts) / total if config.flat_routing else 1 / len(names) for g, experts in names.items()}
    within = {group: dict.fromkeys(experts, 1 / len(experts)) for group, experts in names.items()}
    return {"weights": within, "group_weights": shares}


def ablate(
    model: PeftModel,
    *,
    answer: Callable[[], list[str]],
    score: Callable[[list[str]], Results],
    rate: Rate,
    tasks: Sequence[str],
) -> dict[str, Any]:
    """Scores of a model's answers as it is and with uniform gates.

    Args:
        model: with the adapter, active.
        answer: gives the answers of the model as it then is, such as `generate_answers` of some rows.
        score: scores them by task, such as `evaluation.score` of the same rows; `"mean"` is the mean over tasks.
        rate: scores the answer to one row, such as `rate_rows(rows, info)`.
        tasks: names, by row.

    Returns:
        `as_it_is` and `uniform`: what `score` returned; `difference`: by task, uniform minus as it is; `rows`, and how
        many of these have another answer (`changed`); `signs`: by task, and for all rows under `"mean"`, how many rows
        score `better` and `worse` with uniform gates, and `p` of that split; `says`: the same in sentences.
    """
    own = answer()
    with uniform_gates(model):
        others = answer()
    before, after = score(own), score(others)
    changed = {row for row, (a, b) in enumerate(zip(own, others, strict=True)) if a != b}
    changes = {row: rate(row, others[row]) - rate(row, own[row]) for row in changed}
    signs = {task: _signs([value for row, value in changes.items() if tasks[row] == task]) for task in before}
    found = {
        "check": "uniform",
        "as_it_is": before,
        "uniform": after,
        "difference": {task: after[task]["score"] - before[task]["score"] for task in before},
        "rows": len(own),
        "changed": len(changed),
        "signs": signs | {"mean": _signs(list(changes.values()))},
    }
    config: Any = model.active_peft_config
    return found | {"says": [MEANING[config.peft_type], *_of_ablation(found)]}


def rate_rows(examples: Dataset, info: Mapping[str, TaskInfo]) -> Rate:
    """What scores one answer by the metric of its row's task.

    Args:
        examples: rows of `read_examples`.
        info: the tasks' metrics, as for `evaluation.score`.
    """
    keys, references = [task_key(task) for task in examples["task"]], [m[-1]["content"] for m in examples["messages"]]
    names = {key: info[key].metric if key in info else "exact_match" for key in keys}
    metrics = {name: load_metric(name) for name in names.values()}

    def rate(row: int, answer: str) -> float:
        name = names[keys[row]]
        found: Any = metrics[name].compute(predictions=[answer], references=[references[row]])
        return float(found[name])

    return rate


def sign_test(better: int, worse: int) -> float:
    """The chance that a split as uneven as this, either way, comes from fair coins: the exact two-sided sign test."""
    n = better + worse
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(better, worse) + 1)) / 2**n)


def _signs(changes: list[float]) -> dict[str, Any]:
    better, worse = sum(value > 0 for value in changes), sum(value < 0 for value in changes)
    return {"better": better, "worse": worse, "p": sign_test(better, worse)}


def _of_ablation(found: Mapping[str, Any]) -> list[str]:
    signs = dict(found["signs"])
    every = signs.pop("mean")
    shown = every["p"] < LEVEL
    so = "more than chance" if shown else "within chance: these rows do not show that the gates make a difference"
    # with several tasks some are below 0.05 by chance
    beyond = [task for task, sign in signs.items() if sign["p"] < LEVEL / len(signs)]
    by_task = f"is more than chance in {', '.join(beyond)}" if beyond else "is within chance in each of them"
    return [
        f"With uniform gates {found['changed']} of {found['rows']} answers are other ones, and the mean score changes "
        f"by {found['difference']['mean']:+.3f}.",
        f"Row by row {every['worse']} scores are lower with uniform gates and {every['better']} higher, which is {so} "
        f"(exact sign test, p = {every['p']:.2g}).",
        *(
            [f"Of {len(signs)} tasks, each tested at {LEVEL} / {len(signs)}, the difference {by_task}."]
            if len(signs) > 1
            else []
        ),
        "Nothing was trained with uniform gates: this says what the trained gate is worth to these experts, not what "
        "experts that were trained without one would score.",
    ]
