"""What a router did, added up on the device and read when asked.

Shapes: n rows · s tokens · E experts · T tasks
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..losses import Routed

# An expert with less than this part of an even share of the weight is called dead.
DEAD = 0.01


class RoutingStatistics:
    """Sums over calls of one router; adding to them waits for no device.

    Args:
        num_experts: E.
        terms: names of the balance losses.
        tasks: names of the tasks.
    """

    def __init__(self, num_experts: int, terms: Sequence[str] = (), tasks: Sequence[str] = ()) -> None:
        self.num_experts, self.terms, self.tasks = num_experts, tuple(terms), tuple(tasks)
        # one vector, so that it is added, reduced over processes and read at once
        self.sums: torch.Tensor | None = None
        self.length = 3 * num_experts + 3 + 2 * len(self.terms) + len(self.tasks) * (num_experts + 1)

    @torch.no_grad()
    def add(self, routed: Routed, terms: Mapping[str, torch.Tensor], ids: torch.Tensor | None) -> None:
        """Add one call.

        Args:
            routed: what the router did.
            terms: its balance losses.
            ids: the rows' tasks (n,) or (n, k) padded with -1.
        """
        # Few operations, of which small ones cost most: a column for everything that is summed over tokens.
        weights = routed.weights.float()
        tied = weights == weights.amax(-1, keepdim=True)  # experts of the same largest weight share the top 1
        top1 = tied / tied.sum(-1, keepdim=True)
        before = torch.special.entr(routed.scores.float().softmax(-1)).sum(-1, keepdim=True)
        after = torch.special.entr(weights).sum(-1, keepdim=True)
        columns = torch.cat([weights, top1, (weights > 0).float(), before, after, torch.ones_like(after)], dim=-1)
        if routed.mask is not None:
            columns = columns * routed.mask.unsqueeze(-1)
        rows = columns.sum(1)  # (n, 3 E + 3)
        parts = [rows.sum(0)]
        if self.terms:
            zero, one = weights.new_zeros(()), weights.new_ones(())
            numbers = [terms[name].float() if name in terms else zero for name in self.terms]
            parts.append(torch.stack(numbers + [one if name in terms else zero for name in self.terms]))
        if self.tasks:
            parts.append(self._of_tasks(rows[:, : self.num_experts], rows[:, -1], ids))
        sums = torch.cat(parts) if len(parts) > 1 else parts[0]
        self.sums = sums if self.sums is None else self.sums.add_(sums)

    def _of_tasks(self, load: torch.Tensor, tokens: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
        """Per task, the weight of each expert and the tokens: (T · (E + 1),)."""
        total = load.new_zeros(len(self.tasks), self.num_experts + 1)
        if ids is not None and (len(ids) == 1 or len(load) % len(ids) == 0):
            ids = ids.to(load.device).reshape(len(ids), -1)
            ids = ids.expand(len(load), -1) if len(ids) == 1 else ids.repeat_interleave(len(load) // len(ids), dim=0)
            rows = torch.cat([load, tokens.unsqueeze(1)], dim=1)
            for column in ids.T:  # one for each of a row's tasks
                total.index_add_(0, column.clamp_min(0), rows * (column >= 0).unsqueeze(1))
        return total.flatten()

    def read(self, num_base: int = 0, sums: torch.Tensor | None = None) -> dict[str, Any]:
        """The sums as plain numbers; waits for the device. Empty if nothing was routed.

        Args:
            num_base: base experts, which are never called dead.
            sums: the sums to read, such as those of all processes; by default its own.

        Returns:
            `tokens`; by expert, `load`: its share of the weight, `top1`: share of tokens that weigh it most,
            `chosen`: share of tokens that get any of it; `entropy_before` and `entropy_after` selection, in nats,
            mean over tokens; `effective_experts`: exp(entropy of load); `chosen_per_token`; `dead`: experts with less
            than a hundredth of an even share; `balance`: by name, mean over the calls that had it, without
            coefficient; `tasks`: by name, `tokens` and `load`.
        """
        sums = self.sums if sums is None else sums
        if sums is None:
            return {}
        e = self.num_experts
        values = sums.cpu().double()
        load, top1, chosen, numbers = values[:e], values[e : 2 * e], values[2 * e : 3 * e], values[3 * e :]
        tokens, n = numbers[2].item(), len(self.terms)
        if tokens == 0:
            return {}
        share = load / load.sum()
        per_task = numbers[3 + 2 * n :].view(len(self.tasks), e + 1)
        return {
            "tokens": int(tokens),
            "load": share.tolist(),
            "top1": (top1 / tokens).tolist(),
            "chosen": (chosen / tokens).tolist(),
            "entropy_before": numbers[0].item() / tokens,
            "entropy_after": numbers[1].item() / tokens,
            "effective_experts": torch.special.entr(share).sum().exp().item(),
            "chosen_per_token": chosen.sum().item() / tokens,
            "dead": [i for i in range(num_base, e) if share[i] < DEAD / e],
            "balance": {
                name: (numbers[3 + i] / numbers[3 + n + i]).item()
                for i, name in enumerate(self.terms)
                if numbers[3 + n + i] > 0
            },
            "tasks": {
                name: {"tokens": int(row[e].item()), "load": (row[:e] / row[:e].sum()).tolist()}
                for name, row in zip(self.tasks, per_task, strict=True)
                if row[e] > 0
            },
        }
