"""Token ids as pieces of text that, joined, read as the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what decoding makes of the first bytes of a character


def pieces(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, *, start: int = 0) -> list[str]:
    """A piece of text for each token from `start` on: what it adds to the text of those before it.

    Tokens that are only a part of a character add nothing; the one that completes it has it. Special tokens are shown
    as they are written, such as "</s>".

    Args:
        ids: of the whole row.
        tokenizer: that made them.
        start: the first that is wanted.
    """
    found = []
    shown = _text(ids[:start], tokenizer).rstrip(UNFINISHED)
    for end in range(start + 1, len(ids) + 1):
        text = _text(ids[:end], tokenizer)
        whole = text if end == len(ids) else text.rstrip(UNFINISHED)
        # some decoders write what came before differently, once more has come
        common = _common(shown, whole)
        found.append(whole[common:])
        if len(whole) > len(shown) or common < len(shown):
            shown = whole
    return found


def _common(first: str, second: str) -> int:
    """How many characters both begin with."""
    if second.startswith(first):
        return len(first)
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
