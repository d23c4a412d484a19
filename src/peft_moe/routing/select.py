"""Scores (..., E) to expert weights (..., E): pure functions."""

import torch


def softmax(scores: torch.Tensor) -> torch.Tensor:
    """Weights of all experts that add up to 1: the softmax over W_T e_j of MOELoRA (arXiv 2310.18339, section III)."""
    return scores.softmax(-1)
