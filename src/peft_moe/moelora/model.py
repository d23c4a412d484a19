"""The MOELoRA tuner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from functools import cache
from typing import cast

import torch
from torch import nn

from ..folding import StateDict, WeightsAt, filled
from ..layer import IN_BASE_EXPERTS, MoeLinear
from ..routing import TaskGate, TaskRouter, softmax
from ..routing.tasks import Task, encode_choice
from ..tuner import MoeTuner
from .config import MoeLoraConfig


class MoeLoraModel(MoeTuner):
    """Extends the linear layers of a model with LoRA experts that are weighed by the task (arXiv 2310.18339).

    Made by `get_peft_model(model, MoeLoraConfig(...))`; its methods can be called on the `PeftModel`.
    """

    uses_shared_state = True

    def check_routing(self, config: MoeLoraConfig, keys: list[str]) -> None:
        for key in keys:
            if len(config.experts_at(key).ranks) > 1 and IN_BASE_EXPERTS.search(key):
                raise ValueError(
                    f"Target module {key!r} is inside a mixture of experts of the base model, whose inputs are tokens "
                    "picked from all rows, so that a row's task is not known there; use "
                    "exclude_modules=r'.*\\.experts\\..*', or num_experts_pattern={r'.*\\.experts\\..*': 1}: plain "
                    "LoRA."
                )

    def build_router(
        self, config: MoeLoraConfig, adapter_name: str, *, key: str, in_features: int
    ) -> tuple[TaskRouter | None, bool]:
        num_experts = len(config.experts_at(key).ranks)
        if num_experts == 1:
            return None, False
        if config.gate_scope == "layer":
            return new_router(config, num_experts), False
        if adapter_name not in self.moelora_router:
            self.moelora_router[adapter_name] = nn.ModuleDict()
        shared = cast(nn.ModuleDict, self.moelora_router[adapter_name])
        if str(num_experts) not in shared:
            shared[str(num_experts)] = new_router(config, num_experts)
        return cast(TaskRouter, shared[str(num_experts)]), True

    @staticmethod
    def initialisation(config: MoeLoraConfig) -> bool | str:
        return "normal" if config.init_lora_weights is True else config.init_lora_weights  # as the authors' code

    def routes_by_task(self, adapter_names: Sequence[str]) -> bool:
        return any(self._is_routed(name) for name in adapter_names)

    def set_task(self, task: Task | Sequence[Task] | None) -> None:
        """Choose the task of all later calls that bring no `task_ids`; None takes the choice back.

        Args:
            task: a name or id; or several, for the mean of their embeddings.

        Raises:
            ValueError: unknown task.
        """
        self.context.choose(task, self.active_adapters)

    @contextmanager
    def task(self, task: Task | Sequence[Task]) -> Iterator[None]:
        """Choose the task of the calls in a `with` block; takes what `set_task` takes.

        Blocks of several threads take turns. A call of another thread that has neither a block nor `task_ids` of its
        own is answered under the task of the block that is open.
        """
        with self.context.chosen(task, self.active_adapters):
            yield

    @torch.no_grad()
    def task_weights(self, adapter_name: str | None = None) -> dict[str, torch.Tensor]:
        """What the gate gives experts for each task: softmax(W_T e_j), MOELoRA, arXiv 2310.18339, section III.

        Args:
            adapter_name: by default the active one.

        Returns a tensor (T, E) for each routed layer, by its name: a row for each task, in the order of the config's
        `tasks`, of weights that add up to 1. With `gate_scope="model"` all layers of as many experts have the same.

        Raises:
            ValueError: no such adapter.

        Example:
            `next(iter(model.task_weights().values()))`
        """
        name = self.active_adapters[0] if adapter_name is None else self.known_adapters([adapter_name])[0]
        tasks = torch.arange(len(cast(MoeLoraConfig, self.peft_config[name]).task_names))
        return {
            key: router.of_tasks(tasks)
            for key, layer in self.model.named_modules()
            if isinstance(layer, MoeLinear) and isinstance(router := layer.router_of(name), TaskRouter)
        }

    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        task: Task | Sequence[Task] | None = None,
    ) -> None:
        """Add adapters to the base weights, exactly, for one task.

        Args:
            adapter_names, safe_merge: as in peft.
            task: the task; None for the one chosen with `set_task` or `default_task`.

        What is merged already stays as it is, as in peft.

        Raises:
            ValueError: no task was chosen, or an unknown one, or another one than an adapter is merged for; nothing is
                merged then.
        """
        with self._for_one_task(task, adapter_names):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        task: Task | Sequence[Task] | None = None,
    ) -> nn.Module:
        """The base model with adapters merged in, exactly, for one task; arguments as in `merge_adapter`."""
        with self._for_one_task(task, adapter_names):
            return super().merge_and_unload(progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names)

    @contextmanager
    def _for_one_task(self, task: Task | Sequence[Task] | None, adapter_names: list[str] | None) -> Iterator[None]:
        """Choose a task for work on the weights, after checking that every routed adapter has one."""
        names = self.known_adapters(adapter_names)
        with self.context.chosen(task, names) if task is not None else nullcontext():
            for name in names:
                if self._is_routed(name):
                    self._check_merged(name, self.context.one_task(name))
            yield

    def _check_merged(self, adapter_name: str, asked: torch.Tensor) -> None:
        """Raise a ValueError if an adapter is merged for other tasks than those asked for, ids (1,) or (1, k)."""
        merged = self.context.merged.get(adapter_name)
        if merged is None or _shares(asked) == _shares(merged):
            return
        names = cast(MoeLoraConfig, self.peft_config[adapter_name]).task_names
        there, wanted = ([names[i] for i in ids.flatten().tolist()] for ids in (merged, asked))
        raise ValueError(
            f"Adapter {adapter_name!r} is merged into the base weights for {there}, and {wanted} is asked for now; "
            f"call model.unmerge_adapter() first, or pass task={there if there[1:] else there[0]!r} to leave it merged."
        )

    def _is_routed(self, adapter_name: str) -> bool:
        layers = (m for m in self.model.modules() if isinstance(m, self.tuner_layer_cls))
        return any(layer.router_of(adapter_name) is not None for layer in layers)


def _shares(ids: torch.Tensor) -> dict[int, Fraction]:
    """How much of the mean of embeddings each task is, from ids (1,) or (1, k)."""
    counts = Counter(ids.flatten().tolist())
    return {task: Fraction(count, counts.total()) for task, count in counts.items()}


def new_router(config: MoeLoraConfig, num_experts: int) -> TaskRouter:
    """A task router for layers with this number of experts, with new weights."""
    gate = TaskGate(num_tasks=len(config.task_names), num_experts=num_experts, embedding_dim=config.task_embedding_dim)
    return TaskRouter(gate=gate, select=softmax)


@torch.no_grad()
def weights_of_task(config: MoeLoraConfig, state_dict: StateDict, task: Task | Sequence[Task]) -> WeightsAt:
    """The weights of a saved adapter's experts under a task, or under several, by the mean of their embeddings.

    Raises:
        ValueError: unknown task.
    """
    ids = encode_choice(task, config.task_names)

    @cache
    def empty_router(num_experts: int) -> TaskRouter:
        with torch.device("meta"):
            return new_router(config, num_experts)

    @cache  # since most modules share a router
    def weights_of(num_experts: int, at: str) -> torch.Tensor:
        router = filled(empty_router(num_experts), state_dict, at)
        return router.of_tasks(ids.to(router.gate.embedding.weight.device))[0]

    def weights_at(key: str) -> torch.Tensor | None:
        n = len(config.experts_at(key).ranks)
        if n == 1:
            return None
        own = config.gate_scope == "layer"
        return weights_of(n, f"base_model.model.{key}.moelora_router." if own else f"base_model.moelora_router.{n}.")

    return weights_at
