"""Which tokens of a call are its rows' prompts, for routers that look at prompts and must not see answers.

A call is the outermost one of `forward` or `generate`, of the adapted model or of the `PeftModel` around it. The first
`forward` in it marks the prompts; those inside that one see the same. `generate` has a `forward` for each step.

Shapes: n rows · s tokens
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from .packing import refuse_packing
from .routing import Batch, Prompt, check_prompt_mask, prompt_before_labels

if TYPE_CHECKING:
    from .tuner import MoeTuner

TOKEN = "or use router_input='token'."


def for_generate(tuner: MoeTuner, model: Any, batch: Batch, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the context is to be told of the prompts of `generate`, or of one inside it that makes drafts.

    Args:
        tuner: the tuner.
        model: whose `generate` it is.
        batch: its input.
        arguments: all its arguments by name.

    Raises:
        ValueError: a `prompt_mask` that does not fit.
    """
    context, cache = tuner.context, _cache_among(arguments)
    if context.open and (known := context.prompt_in(cache)) is not None:  # a draft goes on
        return {"prompt": known}
    prompt_mask = context.prompt_mask if context.open else arguments.get("prompt_mask")
    if prompt_mask is not None:
        check_prompt_mask(prompt_mask, batch.rows, batch.tokens)
    # forwards may get masks in other forms: for caches of a fixed size, one over all of the cache
    seen = batch.mask if batch.mask is not None else _unpadded(model, arguments)
    if seen is not None and batch.tokens is not None:
        seen = seen[:, -batch.tokens :]
        prompt_mask = seen if prompt_mask is None else prompt_mask.bool() & seen
    to_come = _tokens_to_read(batch, cache)
    return {"prompt": Prompt(None if tuner.is_encoder_decoder else to_come), "prompt_mask": prompt_mask}


def for_forward(
    tuner: MoeTuner, batch: Batch, arguments: Mapping[str, Any], *, training: bool
) -> tuple[Batch, dict[str, Any]]:
    """The batch of the first `forward` of a call with its prompts marked, and what the context is to be told of them.

    Args:
        tuner: the tuner.
        batch: its input.
        arguments: all its arguments by name.
        training: whether it is a training call.

    Raises:
        ValueError: prompts cannot be told from answers, or several are packed into a row.
    """
    context = tuner.context
    given, labels, cache = arguments.get("prompt_mask"), arguments.get("labels"), _cache_among(arguments)
    if not context.open:  # generate makes positions of its own
        refuse_packing(
            batch,
            arguments,
            f"router_input='prompt' has one decision for a row; turn off packing and padding-free batches, {TOKEN}",
        )
    if given is not None:
        states = arguments.get("encoder_outputs")
        check_prompt_mask(given, batch.rows, batch.tokens if states is None else states[0].shape[1])
    mask = given if given is not None or not context.open else _part_of(context.prompt_mask, batch, context.prompt)
    if mask is not None:
        marked = batch.with_prompt(mask)
    else:
        marked = _by_labels(tuner, batch, labels, arguments.get("shift_labels"), training=training)
    told: dict[str, Any] = {"prompt_mask": mask}
    if not context.open and given is None and labels is None:
        told["prompt"] = _in_cache(tuner, cache)
    return marked, told


def _by_labels(tuner: MoeTuner, batch: Batch, labels: Any, shift_labels: Any, *, training: bool) -> Batch:
    """The batch with what comes before labels marked; all of it where the model makes no text."""
    if not tuner.is_causal:
        return batch
    if labels is None and shift_labels is not None:  # the label of each next token; beside labels, perhaps of a few
        labels = pad(shift_labels, (1, 0), value=-100)[:, :-1]
    if labels is None:
        if training:
            raise ValueError(
                "router_input='prompt' must not see answers in training, and without labels it cannot tell them from "
                "prompts; pass labels, or prompt_mask= (batch, tokens), true for the prompt. For losses that are "
                "computed outside of the model, router_input='token' needs neither."
            )
        return batch
    prompt = prompt_before_labels(labels, batch.mask)
    if training and not torch.compiler.is_compiling() and not tuner.looked_at_labels:
        tuner.looked_at_labels = True  # once: looking waits for the device
        if bool((prompt.sum(1) <= 1).all()):
            warnings.warn(
                "Rows have labels from their first token on, so that no prompt is left and router_input='prompt' "
                f"sees the first token only; give prompts the label -100, {TOKEN}",
                UserWarning,
                stacklevel=2,
            )
    return batch.with_prompt(prompt)


def _in_cache(tuner: MoeTuner, cache: Any) -> Prompt | None:
    """The prompts that a cache began with; None for a call that begins anew.

    Raises:
        ValueError: it is not known which.
    """
    if cache is None or tuner.is_encoder_decoder:  # whose prompt is what the encoder has read, in each call
        return None
    if _length(cache) == 0:
        return None
    known = tuner.context.prompt_in(cache)
    if known is None:
        raise ValueError(
            f"A cache of {_length(cache)} tokens was given, and router_input='prompt' does not know the prompt that it "
            "began with: it is a copy, or another model made it. Go on with the cache that a call returned, or say "
            f"with prompt_mask= which tokens of this call are the prompt, {TOKEN}"
        )
    if known.names != tuner.context.names:
        raise ValueError(
            f"A call with adapter_names={tuner.context.names} goes on with a cache whose prompt was read with "
            f"{known.names}; give the same, or read the prompt again, in a call without the cache."
        )
    return known


def _unpadded(model: Any, arguments: Mapping[str, Any]) -> torch.Tensor | None:
    """(n, s), true for what is no padding, by the rule that `generate` has where it gets no mask."""
    ids = arguments.get("inputs", arguments.get("input_ids"))
    config = arguments.get("generation_config") or getattr(model, "generation_config", None)
    pad_id, eos = (arguments.get(name, getattr(config, name, None)) for name in ("pad_token_id", "eos_token_id"))
    ends = eos if isinstance(eos, (list, tuple)) else [eos]
    if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or not isinstance(pad_id, int) or pad_id in ends:
        return None
    return ids != pad_id if bool((ids == pad_id).any()) else None


def _tokens_to_read(batch: Batch, cache: Any) -> int | None:
    """How many tokens of a prompt `generate` hands to its model: those that are not in the cache already."""
    if batch.tokens is None:
        return None
    past = _length(cache)
    # the input is all of the text or its new part only; a mask is of all of it in either case
    whole = batch.mask is None or batch.mask.shape[1] == batch.tokens
    return batch.tokens - past if whole and past < batch.tokens else batch.tokens


def _cache_among(arguments: Mapping[str, Any]) -> Any:
    """The cache of keys and values that a call goes on with; None if it gets none."""
    cache = arguments.get("cache")  # its name since transformers 5.24
    return arguments.get("past_key_values") if cache is None else cache


def _length(cache: Any) -> int:
    """How many tokens a cache of keys and values has."""
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def _part_of(mask: torch.Tensor | None, batch: Batch, prompt: Prompt) -> torch.Tensor | None:
    """Which tokens of a forward inside `generate` are the prompt; None if all are.

    Args:
        mask: the same for all of the input.
        batch: of the forward.
        prompt: how much of it is still to be read, at the end of which the forward may have more, such as candidates
            for the answer.
    """
    if prompt.to_come is None or batch.tokens is None or prompt.to_come <= 0:
        return mask
    if mask is None:
        if batch.tokens <= prompt.to_come:
            return None
        mask = torch.ones(batch.rows, prompt.to_come, dtype=torch.bool, device=batch.device)
    part = mask[:, mask.shape[1] - prompt.to_come :][:, : batch.tokens].bool()
    return pad(part, (0, batch.tokens - part.shape[1]))
