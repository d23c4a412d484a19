"""What the routers of AT-MoE decided, with names.

Shapes: L blocks · n rows · s tokens · G groups
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..routing import Decision
from .config import GroupedMoeConfig


@dataclass(frozen=True)
class Explanation:
    """Weights by block, group and expert, on the CPU in float32.

    Args:
        blocks: names of the blocks, or of linear layers that have a router of their own.
        groups: names of the experts by group.
        group_weights: by block, (n, s, G) for decisions per token, or (n, G) per prompt: weights of the groups.
        within: by block, (n, s, E) or (n, E): weights of the experts within their group, in the order of `groups`.
        mix: by block, λ: the share of the mixture; the general expert has the rest.
        masks: by block, (n, s), true for tokens that are no padding; None where all count.
    """

    blocks: tuple[str, ...]
    groups: dict[str, list[str]]
    group_weights: dict[str, torch.Tensor]
    within: dict[str, torch.Tensor]
    mix: dict[str, float]
    masks: dict[str, torch.Tensor | None]

    @classmethod
    def of(cls, config: GroupedMoeConfig, seen: Mapping[str, Sequence[Decision]]) -> Explanation:
        """From what routers noted, the last of each."""
        last = {key: decisions[-1] for key, decisions in seen.items()}
        return cls(
            blocks=tuple(last),
            groups=config.names,
            group_weights={key: d.groups.float().cpu() for key, d in last.items()},
            within={key: d.within.float().cpu() for key, d in last.items()},
            mix={key: float(d.mix) for key, d in last.items()},
            masks={key: None if d.mask is None else d.mask.cpu() for key, d in last.items()},
        )

    @property
    def per_token(self) -> bool:
        """Whether decisions are per token, not per prompt."""
        return any(weights.dim() == 3 for weights in self.group_weights.values())

    def weights(self, block: str) -> dict[str, dict[str, torch.Tensor]]:
        """The weight of each expert in the mixture, group times within: {group: {expert: (n, s) or (n,)}}."""
        groups = self.group_weights[block].unbind(-1)
        parts = self.within[block].split([len(names) for names in self.groups.values()], dim=-1)
        return {
            group: {name: share * column for name, column in zip(names, part.unbind(-1), strict=True)}
            for (group, names), share, part in zip(self.groups.items(), groups, parts, strict=True)
        }

    def means(self, row: int | None = None) -> dict[str, dict[str, dict[str, float]]]:
        """Means over tokens that are no padding, and over rows or for one: {block: {group: {expert: weight}}}."""
        found = {}
        for block in self.blocks:
            mask = self.masks[block]
            found[block] = {
                group: {name: self._mean(values, mask, row) for name, values in experts.items()}
                for group, experts in self.weights(block).items()
            }
        return found

    @staticmethod
    def _mean(values: torch.Tensor, mask: torch.Tensor | None, row: int | None) -> float:
        mask = torch.ones_like(values) if mask is None or values.dim() == 1 else mask.to(values)
        values = values * mask
        if row is not None:
            return float(values[row].sum() / mask[row].sum())
        return float(values.sum() / mask.sum())

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain lists and numbers, which JSON can hold."""
        return {
            block: {
                "groups": dict(zip(self.groups, self.group_weights[block].movedim(-1, 0).tolist(), strict=True)),
                "experts": {
                    group: {name: values.tolist() for name, values in experts.items()}
                    for group, experts in self.weights(block).items()
                },
                "mix": self.mix[block],
                "mask": None if (mask := self.masks[block]) is None else mask.tolist(),
            }
            for block in self.blocks
        }

    def __str__(self) -> str:
        """A table: the mean weight of each expert in the mixture, a line per block."""
        names = [f"{group}/{name}" for group, experts in self.groups.items() for name in experts]
        lines = [["block", *names, "λ"]]
        for block, groups in self.means().items():
            values = [value for experts in groups.values() for value in experts.values()]
            lines.append([block, *(f"{value:.3f}" for value in values), f"{self.mix[block]:.3f}"])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )
