"""What experts, layers and blocks are called, in reports and in training alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..schedule import layer_of

GENERAL = "general"  # AT-MoE's expert beside the groups
BASE = "base "  # what names of Med-MoE-LoRA's base experts begin with
SHARED = "shared "  # and those of experts that every token gets whole


def by_number(routed: int, *, base: int = 0, shared: int = 0) -> list[str]:
    """Names of experts that have none: `base 0`, `shared 0`, then `0`, `1`, …; in the order of a bank."""
    apart = [f"{BASE}{i}" for i in range(base)] + [f"{SHARED}{i}" for i in range(shared)]
    return [*apart, *map(str, range(routed))]


def by_group(groups: Mapping[str, Iterable[str]], *, general: bool) -> tuple[list[str], list[int]]:
    """AT-MoE's experts as `group/name`, and the index of each one's group; the general one is last, in group -1."""
    names = [f"{group}/{name}" for group, experts in groups.items() for name in experts]
    group_of = [i for i, experts in enumerate(groups.values()) for _ in experts]
    return names + [GENERAL] * general, group_of + [-1] * general


def parts_of(name: str) -> tuple[str, int | None, str]:
    """What precedes the number of a module's block, the number (None without one), and what follows it."""
    found = layer_of(name)
    if found is None:
        return "", None, name
    stack, block = found
    before = f"{stack}.{block}" if stack else str(block)
    return stack, block, name.removeprefix(before).removeprefix(".")
