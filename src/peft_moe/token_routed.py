"""What the methods share whose experts are chosen by the tokens: tasks as labels, balance losses, statistics."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from .checks import check_flag, check_fraction, check_tasks
from .config import MoeConfig, names_of
from .layer import IN_BASE_EXPERTS, MoeLinear
from .losses import BALANCE_LOSSES
from .routing import BalanceTerm, RoutingStatistics, TokenRouter
from .targets import SEQUENCE_FIRST
from .tuner import MoeTuner

# Layers of an encoder-decoder model's decoder that see the encoder's output: keys and values of cross-attention.
OF_ENCODER = re.compile(r"(?i:encdec|encoder_|cross)[^.]*\.(.*\.)?(k|v|key|value)(_proj|_lin)?$")


@dataclass
class TokenRoutedConfig(MoeConfig):
    """Fields of the configs whose experts are chosen by the tokens; use one of its subclasses.

    Args:
        tasks: names of the tasks, if rows have any: routing does not depend on them, but statistics are then kept per
            task, and the localized loss needs them. Ids come in by `task_ids`.
        balance_loss: `"none"`, or a loss of `peft_moe.losses`: `"switch"`, `"variance"`, `"cv2"`, `"localized"`,
            `"z"`; or several with a coefficient each, such as `{"switch": 0.01, "z": 0.001}`. Each is the mean over
            routed layers of a number per micro-batch, and reaches the gradient with the weight that the micro-batch's
            task loss has.
        balance_coefficient: weight of a loss that is only named.
        expert_groups: for the localized loss, groups of tasks: `{"general": ["chat"], "medical": ["icd", "rad"]}`. The
            experts of a layer are split evenly over the groups, in alphabetical order.
        localized_delta: δ of the localized loss: how much more the experts of a row's group are to get.
    """

    tasks: list[str] | int | None = None
    balance_loss: str | dict[str, float] = "none"
    balance_coefficient: float = 0.01  # ours: no paper states one
    expert_groups: dict[str, list[str]] | None = None
    localized_delta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tasks = check_tasks(self.tasks) if self.tasks is not None else None
        self._check_balance()
        self._check_groups()

    def _check_balance(self) -> None:
        check_fraction("balance_coefficient", self.balance_coefficient, "the weight of a loss")
        check_fraction("localized_delta", self.localized_delta, "how much more a group's experts get", high=0.99)
        known = ["none", *BALANCE_LOSSES]
        names = self.balance_loss if isinstance(self.balance_loss, dict) else [self.balance_loss]
        for name in names:
            if not isinstance(name, str) or name not in (known[1:] if isinstance(self.balance_loss, dict) else known):
                raise ValueError(f"balance_loss={self.balance_loss!r} is not known; use one of {known}.")
        if isinstance(self.balance_loss, dict):
            for name, value in self.balance_loss.items():
                check_fraction(f"balance_loss[{name!r}]", value, "the weight of a loss")

    def _check_groups(self) -> None:
        groups = self.expert_groups
        if groups is not None:
            if not isinstance(groups, dict) or not all(map(_is_group, groups.items())):
                raise ValueError(f"expert_groups={groups!r}; give {{'group': ['task', ...], ...}}.")
            # sorted, as peft writes them: experts go to groups by position, and have to find theirs again when loaded
            self.expert_groups = groups = {group: list(tasks) for group, tasks in sorted(groups.items())}
            in_groups = [task for tasks in groups.values() for task in tasks]
            wrong = sorted({t for t in in_groups if t not in self.task_names or in_groups.count(t) > 1})
            missing = [t for t in self.task_names if t not in in_groups]
            if wrong or missing or not groups or not all(groups.values()):
                raise ValueError(
                    f"expert_groups={groups!r} and tasks={self.tasks!r}: every task belongs to one group, and no "
                    f"group is empty; unknown or twice: {wrong}, missing: {missing}."
                )
        if "localized" in self.coefficients and groups is None:
            raise ValueError(
                f"balance_loss={self.balance_loss!r} compares experts with groups of tasks; give tasks=[...] and "
                "expert_groups={'group': ['task', ...]}."
            )

    @property
    def coefficients(self) -> dict[str, float]:
        """The balance losses that have a weight above 0, and their weights."""
        if isinstance(self.balance_loss, dict):
            return {name: weight for name, weight in self.balance_loss.items() if weight}
        named = self.balance_loss != "none" and self.balance_coefficient
        return {self.balance_loss: self.balance_coefficient} if named else {}

    def routed_at(self, key: str) -> int:
        """Number of experts that the router of a module chooses from, without base and shared ones."""
        raise NotImplementedError(f"{type(self).__name__} does not say how many experts a module has.")

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks by id; none where rows have no labels."""
        return names_of(self.tasks)

    @property
    def default_task(self) -> None:
        """Labels are never made up."""
        return None


def _is_group(entry: tuple[object, object]) -> bool:
    name, tasks = entry
    return isinstance(name, str) and isinstance(tasks, (list, tuple)) and all(isinstance(t, str) for t in tasks)


def balance_terms(config: TokenRoutedConfig) -> list[BalanceTerm]:
    """The balance losses of a config as functions."""
    delta = {"localized": {"delta": config.localized_delta}}
    return [
        BalanceTerm(name, partial(BALANCE_LOSSES[name], **delta.get(name, {})), coefficient)
        for name, coefficient in config.coefficients.items()
    ]


def matches_by_group(tasks: Sequence[str], groups: Sequence[Sequence[str]], num_experts: int) -> torch.Tensor:
    """(T, E) bool: the experts, split evenly over the groups, that are meant for each task."""
    group_of_task = torch.tensor([next(g for g, names in enumerate(groups) if task in names) for task in tasks])
    group_of_expert = torch.arange(num_experts) * len(groups) // num_experts
    return group_of_task.unsqueeze(1) == group_of_expert


class TokenRoutedTuner(MoeTuner):
    """Adds to the tuner what routers that read their input allow and do not allow."""

    @classmethod
    def balance(cls, config: TokenRoutedConfig) -> list[BalanceTerm]:
        """The balance losses of a config's routers."""
        return balance_terms(config)

    def check_routing(self, config: TokenRoutedConfig, keys: list[str]) -> None:
        if not self.balance(config):
            return
        groups = len(config.expert_groups or ())
        few = next((key for key in keys if 1 < config.routed_at(key) < groups), None)
        if "localized" in config.coefficients and few is not None:
            raise ValueError(
                f"expert_groups has {groups} groups, and {few!r} has {config.routed_at(few)} experts, so that a "
                "group would have none; give each layer at least one expert per group."
            )
        model_type = self.get_model_config(self.model).get("model_type")
        inside = next((key for key in keys if IN_BASE_EXPERTS.search(key)), None)
        if model_type in SEQUENCE_FIRST:
            why = f"the layers of a {model_type} model do not see the rows of a batch first"
        elif inside is not None:
            why = f"the inputs of {inside!r} are tokens picked from all rows"
        else:
            return
        raise ValueError(
            f"The balance losses {[term.name for term in self.balance(config)]} leave padding out, and {why}, so that "
            "it cannot be told from text; use balance_loss='none', or exclude such modules."
        )

    def reads_decoder(self, key: str) -> bool:
        """Whether the module at `key` sees the decoder's tokens, in a model that has an encoder too."""
        return self.is_encoder_decoder and "decoder" in key.split(".") and not OF_ENCODER.search(key)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if self.recording:
            self.record_routing(adapters=[adapter_name])

    # balance losses

    @property
    def balance_loss(self) -> torch.Tensor | None:
        """The balance losses of the last training call, weighted and summed, without gradient; None if it has none."""
        ledger = self.context.last_ledger
        return None if ledger is None or not ledger.charged else ledger.total().detach()

    def set_balance_scale(self, scale: float) -> None:
        """Say how much a call weighs in a loss that is computed outside of the model: 1 / gradient accumulation steps.

        It then also holds for losses made of TRL's `log_probs`.

        Not needed where the model's own `loss` is used (Trainer), or TRL's `log_probs` for a likelihood (SFTTrainer):
        there the balance loss follows the factor on the loss.

        Raises:
            ValueError: not a number from 0 up.
        """
        check_fraction("scale", scale, "the factor on balance losses")
        self.context.outside.chosen = float(scale)

    # statistics

    def routers(self, adapter_name: str | None = None) -> Iterator[tuple[str, TokenRouter]]:
        """Names of an adapter's routed layers, and their routers; by default of the active adapter."""
        adapter_name = self.active_adapters[0] if adapter_name is None else self.known_adapters([adapter_name])[0]
        for key, layer in self.model.named_modules():
            if isinstance(layer, MoeLinear) and isinstance(router := layer.router_of(adapter_name), TokenRouter):
                yield key, router

    def record_routing(self, enabled: bool = True, adapters: Sequence[str] | None = None) -> None:
        """Start or stop adding up what routers do, except in `generate`; starting again forgets what was added up.

        Args:
            enabled: start or stop.
            adapters: whose routers; None for all adapters.

        Raises:
            ValueError, TypeError: `enabled` is neither True nor False, or `adapters` are none of this model's.
        """
        check_flag("enabled", enabled)
        names = self.known_adapters(list(self.peft_config) if adapters is None else adapters)
        self.recording = enabled
        for adapter in names:
            for _, router in self.routers(adapter):
                if enabled:
                    router.record(cast(TokenRoutedConfig, self.peft_config[adapter]).task_names)
                else:
                    router.statistics = None

    def routing_statistics(
        self, *, training: bool = False, reset: bool = False, adapter_name: str | None = None
    ) -> dict[str, dict[str, Any]]:
        """What an adapter's routers did since recording began, or since the last reset.

        Args:
            training: calls in training mode, or those outside of it.
            reset: start from zero.
            adapter_name: by default the active adapter, the first of several.

        Returns:
            by layer, what `RoutingStatistics.read` describes; layers that were not run are left out.

        Raises:
            ValueError: routing is not being recorded, or there is no such adapter.
        """
        found = {}
        for key, statistics, router in self.recorded(training, adapter_name):
            found[key] = statistics.read(router.num_base)
            if reset:
                statistics.sums = None
        return {key: values for key, values in found.items() if values}

    def recorded(
        self, training: bool, adapter_name: str | None = None
    ) -> Iterator[tuple[str, RoutingStatistics, TokenRouter]]:
        """Layer, statistics and router of an adapter; by default of the active one."""
        if not self.recording:
            raise ValueError("Routing is not being recorded; call model.record_routing() before the calls to look at.")
        if adapter_name is not None and adapter_name not in self.peft_config:
            raise ValueError(f"adapter_name={adapter_name!r}; the model has {sorted(self.peft_config)}.")
        for key, router in self.routers(adapter_name):
            if router.statistics is not None:
                yield key, router.statistics[training], router
