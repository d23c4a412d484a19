"""Gates make one score per expert.

Shapes: n rows of task ids · k tasks per row · T tasks · d embedding size · E experts · in features
"""

from __future__ import annotations

import torch
from torch import nn


class TaskGate(nn.Module):
    """Scores that depend on the task alone: `W_T e_j` (MOELoRA, arXiv 2310.18339, section III), no bias.

    A row with several tasks is scored by the mean of their embeddings.

    Args:
        num_tasks: T.
        num_experts: E.
        embedding_dim: d.
    """

    def __init__(self, *, num_tasks: int, num_experts: int, embedding_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_tasks, embedding_dim)
        self.proj = nn.Linear(embedding_dim, num_experts, bias=False)

    def forward(self, tasks: torch.Tensor) -> torch.Tensor:
        """tasks: ids (n,), or (n, k) padded with -1. Returns scores (n, E) in float32 or wider."""
        tasks = tasks.to(self.embedding.weight.device)
        # Autocast would round the scores to half precision, and folding or merging outside of it would then differ.
        with torch.autocast(tasks.device.type, enabled=False):
            if tasks.dim() == 1:
                e = self.embedding(tasks)
            else:
                given = (tasks >= 0).unsqueeze(-1)
                e = (self.embedding(tasks.clamp_min(0)) * given).sum(1) / given.sum(1)
            scores = self.proj(e)
            return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
