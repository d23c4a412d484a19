"""The batch that a call is about.

Shapes: n rows · s tokens
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Batch:
    """Shape of the input of the call that layers are run for, as far as its arguments show it.

    Args:
        rows: length of the first axis.
        tokens: length of the second axis of token ids or embeddings; None for other inputs.
        images: the input has four or more axes, and layers may see several windows per row.
        device: where it is.
        mask: (n, s), true for tokens that are no padding; None if the call has no mask.
        decoder_mask: the same for the decoder of an encoder-decoder model.
        prompt: (n, s), true for the tokens of the prompt; None if all tokens belong to it.
    """

    rows: int
    tokens: int | None = None
    images: bool = False
    device: torch.device | None = None
    mask: torch.Tensor | None = None
    decoder_mask: torch.Tensor | None = None
    prompt: torch.Tensor | None = None

    def explains(self, rows: int, axes: int) -> bool:
        """Whether a layer's input with these rows and number of axes keeps the order of this batch."""
        flattened = axes == 2 and self.tokens is not None and rows == self.rows * self.tokens
        return rows == self.rows or flattened or (self.images and rows % self.rows == 0)

    def with_prompt(self, prompt: torch.Tensor) -> Batch:
        """The same with the tokens (n, s) of prompts marked."""
        return replace(self, prompt=prompt.bool())

    def tokens_of(self, x: torch.Tensor, *, in_decoder: bool) -> tuple[torch.Size, torch.Tensor | None]:
        """A layer's input as rows of tokens: its leading axes as (n, s), and the mask (n, s) of the tokens that count.

        An input that the call's mask does not fit, such as the patches of an image, has no padding.
        """
        if self.tokens is not None and x.shape[:-1] == (self.rows * self.tokens,):  # OPT flattens (n, s)
            shape = torch.Size((self.rows, self.tokens))
        else:
            rows = x.shape[0] if x.dim() > 1 else 1
            shape = torch.Size((rows, x.shape[1:-1].numel()))
        mask = self.decoder_mask if in_decoder else self.mask
        if mask is None or mask.shape[1] < shape[1] or shape[0] % mask.shape[0]:
            return shape, None
        if mask.shape[1] > shape[1] and (in_decoder or shape[1] != self.tokens):
            return shape, None
        return shape, _as_rows(mask, shape, x.device)  # with a cache, the mask covers earlier tokens too

    def prompt_of(self, x: torch.Tensor, *, in_decoder: bool) -> tuple[torch.Size, torch.Tensor | None]:
        """The same, with the mask (n, s) of the tokens that belong to the prompt and are no padding.

        Raises:
            ValueError: the layer sees other tokens than the call has, so that it cannot be told which these are.
        """
        shape, mask = self.tokens_of(x, in_decoder=in_decoder)
        prompt, padding = (None, self.decoder_mask) if in_decoder else (self.prompt, self.mask)
        if (prompt is not None and prompt.shape[1] != shape[1]) or (padding is not None and mask is None):
            raise ValueError(
                f"A layer sees {shape[1]} tokens of {shape[0]} rows and the call has {self.tokens} of {self.rows}, so "
                "that it cannot be told which belong to the prompt; use router_input='token'."
            )
        if prompt is None:
            return shape, mask
        prompt = _as_rows(prompt, shape, x.device)
        return shape, prompt if mask is None else prompt & mask


def _as_rows(mask: torch.Tensor, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """The last columns of a mask, repeated as rows were."""
    mask = mask[:, -shape[1] :].to(device)
    return mask if len(mask) == shape[0] else mask.repeat_interleave(shape[0] // len(mask), dim=0)


def check_prompt_mask(mask: Any, rows: int, tokens: int | None) -> None:
    """Raise a ValueError unless a mask of prompts fits a batch."""
    fits = isinstance(mask, torch.Tensor) and not mask.is_floating_point() and mask.shape == (rows, tokens)
    if fits and mask.device.type == "cpu" and not torch.compiler.is_compiling() and not mask.any(1).all():
        raise ValueError("prompt_mask leaves a row without a prompt; mark at least one token of each row.")
    if not fits:
        shape = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else f"type {type(mask).__name__}"
        raise ValueError(
            f"prompt_mask of {shape}; give bool (batch, tokens), true for the tokens of the prompt, which is "
            f"({rows}, {tokens}) here."
        )


def prompt_before_labels(labels: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(n, s), true for a row's tokens before its first label; its first token always, which nothing predicts.

    Args:
        labels: (n, s), -100 where there is none.
        mask: (n, s), true for tokens that are no padding.
    """
    there = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
    first = there & (there.cumsum(1) == 1)
    return there & ((labels != -100).cumsum(1) == 0) | first


def keep_mask(mask: Any) -> torch.Tensor | None:
    """An attention mask in any of transformers' forms as (n, s), true for tokens that are no padding.

    Args:
        mask: (n, s) with 0 for padding; or (n, s, s) or (n, heads, s, s), boolean or added to scores, where a token
            that no query sees is padding; or a dict of these, of which the first is taken.
    """
    if isinstance(mask, dict):  # by kind of attention
        mask = next(iter(mask.values()), None)
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 3, 4):
        return None
    if mask.dim() == 2:
        return mask != 0
    if mask.shape[-2] != mask.shape[-1]:  # keys of a cache, used or not, beside those of this call
        return None
    seen = (mask == 0 if mask.is_floating_point() else mask.bool()).any(-2)
    return seen if seen.dim() == 2 else seen[:, 0]
