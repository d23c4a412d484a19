"""Scores (..., E) to expert weights (..., E): pure functions."""

import torch


def softmax(scores: torch.Tensor) -> torch.Tensor:
    """Every expert takes part; the weights of a row add up to 1. MOELoRA (arXiv 2310.18339), the softmax over W_T e_j."""
    return scores.softmax(-1)
