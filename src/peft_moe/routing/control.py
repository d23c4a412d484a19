"""What a user has fixed or switched off in a grouped router.

Shapes: E experts · G groups
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any

import torch

# A group's own weight, or the weights of its experts within it.
GroupWeights = Mapping[str, "float | Mapping[str, float]"]

ROUNDING = 1e-6  # that shares of 1 may have


@dataclass(frozen=True)
class Control:
    """Weights as `softmax(scores + bias) · rest + fixed`, for groups and for the experts within their group.

    `control_of` makes one from names. With nothing fixed, bias and fixed are 0 and rest is 1.

    Args:
        group_bias, group_fixed: (G,) -inf for groups that the softmax leaves out; weights that are given.
        group_rest: what the given weights leave for the others.
        expert_bias, expert_fixed, expert_rest: (E,) the same, for each expert in its group.
        mix: λ; None for the adapter's own.
        settled_groups: whether group weights depend on no input.
        settled_experts: by group, the same for the experts in it.
    """

    group_bias: torch.Tensor
    group_fixed: torch.Tensor
    group_rest: float
    expert_bias: torch.Tensor
    expert_fixed: torch.Tensor
    expert_rest: torch.Tensor
    mix: float | None = None
    settled_groups: bool = False
    settled_experts: Mapping[str, bool] = field(default_factory=dict)

    def to(self, device: torch.device) -> Control:
        """The same on a device; kept, so that layers do not move it again."""
        if self.group_bias.device == device:
            return self
        moved = self.__dict__.setdefault("_moved", {})  # a cache, which is no field
        if device not in moved:
            with torch.inference_mode(False):  # a later call may be one of training
                tensors = {name: value.to(device) for name, value in self.fields() if isinstance(value, torch.Tensor)}
            moved[device] = Control(**{**dict(self.fields()), **tensors})
        return moved[device]

    def numbers(self) -> torch.Tensor:
        """All that it says, as numbers (n,)."""
        values = [v for _, v in self.fields() if isinstance(v, (torch.Tensor, float))]
        return torch.cat([torch.as_tensor(v).cpu().double().flatten() for v in values])

    def fields(self) -> list[tuple[str, Any]]:
        """Names and values of its fields."""
        return [(name, getattr(self, name)) for name in self.__dataclass_fields__]

    def free_choices(self, *, static_experts: bool = False) -> list[str]:
        """What still depends on the input, in words; empty if all weights are settled.

        Args:
            static_experts: the experts' scores do not depend on it.
        """
        free = [] if self.settled_groups else ["the weights of the groups"]
        if static_experts:
            return free
        for i, (group, settled) in enumerate(self.settled_experts.items()):
            gets_nothing = self.group_fixed[i] == 0 and (self.group_rest == 0 or self.group_bias[i] != 0)
            if not settled and not gets_nothing:
                free.append(f"the weights within {group!r}")
        return free


def control_of(
    groups: Mapping[str, Sequence[str]],
    weights: GroupWeights | None = None,
    *,
    group_weights: Mapping[str, float] | None = None,
    off: Sequence[str] = (),
    mix: float | None = None,
) -> Control:
    """Check names and numbers, and lay them out.

    Args:
        groups: names of the experts by group, in the adapter's order.
        weights: by group, its own weight, a number; or a mapping of its experts to their weights within it.
        group_weights: by group, its own weight, for groups whose experts `weights` has.
        off: groups (`"style"`) and experts (`"style/concise"`) that get nothing.
        mix: λ, the share of the mixture beside the general expert.

    Groups and experts that are not named share what the named ones leave, as the router says.

    Raises:
        ValueError: an unknown name, a number out of range, weights that add up to more than 1, or to less where nothing
            is left to take the rest, or everything switched off.
    """
    own, within = _sort_out(groups, weights, group_weights)
    off_groups, off_experts = _split_off(groups, off)
    if mix is not None:
        _check_number("mix", mix)
    bias, fixed, rest = _lay_out("the groups", list(groups), own, off_groups)
    expert_bias, expert_fixed, expert_rest, settled = [], [], [], {}
    for group, experts in groups.items():
        given = within.get(group, {})
        if group in off_groups and any(given.values()):
            raise ValueError(f"Group {group!r} is off and has weights {given!r} within; leave one of them out.")
        row_bias, row_fixed, row_rest = _lay_out(f"group {group!r}", experts, given, off_experts[group])
        expert_bias += row_bias
        expert_fixed += row_fixed
        expert_rest += [row_rest] * len(experts)
        settled[group] = _is_settled(row_bias, row_rest)
    tensor = partial(torch.tensor, dtype=torch.float32, device="cpu")  # whatever is the default, such as meta
    with torch.inference_mode(False):  # it may be used in training
        return Control(
            group_bias=tensor(bias),
            group_fixed=tensor(fixed),
            group_rest=rest,
            expert_bias=tensor(expert_bias),
            expert_fixed=tensor(expert_fixed),
            expert_rest=tensor(expert_rest),
            mix=None if mix is None else float(mix),
            settled_groups=_is_settled(bias, rest),
            settled_experts=settled,
        )


def plain(value: Any) -> Any:
    """Mappings, lists, and the numbers in them, as JSON has them."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, set, frozenset)):
        return sorted(value) if isinstance(value, (set, frozenset)) else list(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, (int, float)) else value


def _sort_out(
    groups: Mapping[str, Sequence[str]], weights: GroupWeights | None, group_weights: Mapping[str, float] | None
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The groups' own weights, and those of the experts within them."""
    for name, given in (("weights", weights), ("group_weights", group_weights)):
        if not isinstance(given, (Mapping, type(None))):
            raise ValueError(f"{name}={given!r} is no mapping; give {{'group': weight, ...}}.")
    own = dict(group_weights or {})
    within: dict[str, dict[str, float]] = {}
    for group, value in (weights or {}).items():
        if isinstance(value, Mapping):
            within[group] = dict(value)
        elif group in own:
            raise ValueError(f"Group {group!r} has two weights, {value!r} and {own[group]!r}; give one.")
        else:
            own[group] = value
    for group in [*own, *within]:
        _check_name(group, list(groups), "group")
    return own, within


def _lay_out(
    where: str, names: Sequence[str], given: Mapping[str, float], off: set[str]
) -> tuple[list[float], list[float], float]:
    """Bias and fixed weight of each name, and what is left for the free ones."""
    for name, value in given.items():
        _check_name(name, names, f"member of {where}")
        _check_number(f"The weight of {name!r}", value)
        if name in off and value:
            raise ValueError(f"{name!r} is switched off and has the weight {value!r}; leave one of them out.")
    total = math.fsum(map(float, given.values()))
    free = [name for name in names if name not in given and name not in off]
    if total > 1 + ROUNDING:
        raise ValueError(
            f"The weights given in {where} add up to {total:g}; they are shares, so give at most 1 in all."
        )
    if not free and not given:
        raise ValueError(f"Everything in {where} is switched off; leave one on, or use mix=0 for the general expert.")
    if not free and total < 1 - ROUNDING:
        raise ValueError(
            f"The weights given in {where} add up to {total:g} and nothing else is on to take the rest; give weights "
            "that add up to 1."
        )
    rest = max(0.0, 1 - total) if total < 1 - ROUNDING else 0.0
    # where nothing is left to share the softmax may be anything finite
    bias = [-math.inf if free and rest and name not in free else 0.0 for name in names]
    return bias, [float(given.get(name, 0.0)) for name in names], rest


def _is_settled(bias: Sequence[float], rest: float) -> bool:
    """Whether a softmax has nothing to share out, or only one to give it to."""
    return rest == 0 or sum(b == 0 for b in bias) == 1


def _split_off(groups: Mapping[str, Sequence[str]], off: Sequence[str]) -> tuple[set[str], dict[str, set[str]]]:
    if isinstance(off, str) or not isinstance(off, Iterable):
        raise ValueError(f"off={off!r} is no list; give a list of groups and of 'group/expert'.")
    whole: set[str] = set()
    parts: dict[str, set[str]] = {group: set() for group in groups}
    for name in off:
        group, slash, expert = str(name).partition("/")
        _check_name(group, list(groups), "group")
        if slash:
            _check_name(expert, groups[group], f"expert of {group!r}")
            parts[group].add(expert)
        else:
            whole.add(group)
    # a group without experts is off as a whole
    whole |= {group for group, experts in groups.items() if parts[group] == set(experts)}
    return whole, {group: set() if group in whole else experts for group, experts in parts.items()}


def _check_name(name: str, known: Sequence[str], what: str) -> None:
    if name not in known:
        raise ValueError(f"{name!r} is no {what}; there are {list(known)}.")


def _check_number(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ValueError(f"{what} is {value!r}; weights are shares, so give a number from 0 to 1.")
