"""Logits where there are labels: the vocabulary head computed for the tokens that are learnt, and for no others.

Shapes: n rows · s tokens · k positions per row

A training row is a question and an answer, and only the answer has labels. A model nevertheless computes logits of all
tokens, and the loss throws most away. transformers' models take `logits_to_keep`, the positions whose logits are
wanted, and `shift_labels`, the labels of these. With both, the loss and its gradients are what they are without: the
same terms, added up in another order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from torch import nn
from torch.nn.functional import pad
from transformers import PreTrainedModel, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_pt_utils import AcceleratorConfig

from .entry import Entry
from .layer import MoeLinear

Collator = Callable[[list[Any]], Any]

IGNORED = -100  # the label of tokens that are not learnt


class AnswerLogitsCollator:
    """Wraps a data collator: asks the model for the logits of tokens that have a label, and for no others.

    Args:
        collator: any that makes `labels` (n, s) with -100 outside of answers, such as `DataCollatorForSeq2Seq`, or a
            `TaskCollator` around it.
        per_row: each row has positions of its own, which `takes_positions_per_row` says whether a model takes. Without
            it all rows have the same: those where any of them has a label.

    Adds `logits_to_keep`, positions (n, k), or (k,) if rows share them, and `shift_labels` (n, k), the label of the
    token that follows each. k is at least 1, and -100 stands where a row has fewer labels. `labels` stays. A batch
    without labels is handed on as it is. The call raises a `ValueError` for labels of any other shape.

    For models of which `why_all_logits` has nothing to say. The logits that a Trainer then sees are (n, k, vocabulary);
    `TrainingArguments(label_names=["shift_labels"])` gives `compute_metrics` the labels that go with them.

    Example:
        `Trainer(model, args, data_collator=AnswerLogitsCollator(DataCollatorForSeq2Seq(tokenizer)), ...)`
    """

    def __init__(self, collator: Collator, *, per_row: bool = True) -> None:
        if not callable(collator):
            raise TypeError(
                f"collator={collator!r} cannot be called; give a data collator such as DataCollatorForSeq2Seq."
            )
        self.collator, self.per_row = collator, per_row

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        batch = self.collator(list(features))
        if batch.get("labels") is None:
            return batch
        following = self._following(batch)
        learnt = following != IGNORED
        if self.per_row:
            longest = max(1, int(learnt.sum(1).max()))
            # stable: positions with a label come first and in order; where they are few, others fill up
            positions = learnt.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
            kept = following.gather(1, positions)
        else:
            positions = learnt.any(0).nonzero()[:, 0]
            positions = positions if len(positions) else positions.new_zeros(1)
            kept = following[:, positions]
        batch["logits_to_keep"], batch["shift_labels"] = positions, kept
        return batch

    def _following(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """(n, s), the label of each token's successor."""
        labels = batch["labels"]
        if not isinstance(labels, torch.Tensor) or labels.dim() != 2 or not len(labels):
            shape = tuple(labels.shape) if isinstance(labels, torch.Tensor) else f"type {type(labels).__name__}"
            raise ValueError(
                f"{type(self.collator).__name__} made labels of {shape}, and answers are found in a tensor (rows, "
                "tokens) with -100 elsewhere; use this collator for causal language models, or leave it out."
            )
        if "shift_labels" in batch:  # some collators know them better, those that pack rows
            return batch["shift_labels"]
        return pad(labels, (0, 1), value=IGNORED)[:, 1:]


def with_answer_logits(
    collator: Collator,
    model: nn.Module,
    args: TrainingArguments | None = None,
    *,
    wanted: Literal["auto", "on", "off"] = "auto",
) -> Collator:
    """The collator, wrapped in an `AnswerLogitsCollator` where that changes nothing but the work.

    Args:
        collator: of the rows to train on.
        model: that is trained, with or without an adapter.
        args: of the Trainer.
        wanted: "auto" wraps it unless `why_all_logits` has a reason not to, "off" never does.

    Raises:
        ValueError: "on", and there is a reason not to.

    Example:
        `Trainer(model, args, data_collator=with_answer_logits(collator, model, args), ...)`
    """
    if wanted == "off":
        return collator
    if reason := why_all_logits(model, args):
        if wanted == "on":
            raise ValueError(f"answer_logits='on', but {reason}; use 'auto' or 'off'.")
        return collator
    return AnswerLogitsCollator(collator, per_row=takes_positions_per_row(model, args))


def why_all_logits(model: nn.Module, args: TrainingArguments | None = None) -> str | None:
    """Why training needs the logits of all tokens; None if those of answers do.

    They do for a causal language model of transformers with transformers' own loss. `args`, of the Trainer that trains
    it, may also have a reason. A Trainer's `compute_loss_func`, which is not in them, needs all logits.

    Example:
        `why_all_logits(AutoModelForCausalLM.from_pretrained("models/SmolLM2-135M-Instruct"))`, which is None
    """
    reason = _why_of_model(model)
    if reason is None and args is not None:
        reason = _why_of_training(args, per_row=takes_positions_per_row(model, args))
    return reason


def takes_positions_per_row(model: nn.Module, args: TrainingArguments | None = None) -> bool:
    """Whether to give the model positions (n, k) as `logits_to_keep`, which it takes from transformers 5.21 on.

    Not under torch.compile, which makes a new graph for each length of `take_along_dim`, which picks them out.
    """
    if hasattr(model, "_orig_mod") or (args is not None and args.torch_compile):
        return False
    code = _code_of_forward(_base_of(model))
    return code is not None and "slice_logits_to_keep" in code.co_names


def _why_of_model(model: nn.Module) -> str | None:
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return f"{model.active_peft_config.peft_type} puts tokens before the row, so that positions move"
    base = _base_of(model)
    name = type(base).__name__
    if not isinstance(base, PreTrainedModel) or base.config.is_encoder_decoder:
        return f"{name} is no decoder of transformers"
    if base.loss_function is not ForCausalLMLoss:
        return f"{name} has a loss of its own"
    # text models of a family that also has others say what these read, and have no configs for it
    if base.input_modalities not in ("text", ("text",), ["text"]) and base.config.sub_configs:
        return f"{name} reads {base.input_modalities}, and positions may count text alone"
    code = _code_of_forward(base)
    if code is None or "loss_function" not in code.co_names or not code.co_flags & inspect.CO_VARKEYWORDS:
        return f"the forward of {name} does not hand shift_labels to transformers' loss"
    # by transformers' own way to write it: others may take numbers only
    if "slice_logits_to_keep" not in code.co_names and "slice_indices" not in code.co_varnames:
        return f"the forward of {name} has no logits_to_keep"
    if isinstance(base.get_output_embeddings(), MoeLinear):
        return "the adapter has experts in the vocabulary head, whose router would see answers only"
    return None


def _why_of_training(args: TrainingArguments, *, per_row: bool) -> str | None:
    if args.label_smoothing_factor:
        return f"label_smoothing_factor={args.label_smoothing_factor} makes the Trainer compare all logits with labels"
    if args.use_liger_kernel:
        return "use_liger_kernel=True computes a loss without logits already"
    loading = cast(AcceleratorConfig, args.accelerator_config)  # made of whatever was given
    if loading.dispatch_batches:
        return "dispatch_batches=True joins batches, whose answers have different lengths"
    if not per_row and (args.n_gpu > 1 or loading.split_batches):
        return "batches are split by rows, and this model's positions have none"
    parallel = getattr(args, "parallelism_config", None)  # newer than the oldest accelerate we work with
    if parallel is not None and (parallel.cp_size > 1 or getattr(parallel, "sp_size", 1) > 1):
        return "rows are split over processes, and positions count whole rows"
    return None


def _base_of(model: nn.Module) -> nn.Module:
    """The model inside of adapters and torch.compile."""
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _code_of_forward(model: nn.Module) -> CodeType | None:
    """Of the forward that a call ends in: an instance may have another than its class, and entries stand before it."""
    forward = model.__dict__.get("forward")
    while isinstance(forward, Entry):
        forward = forward.replaced
    forward = inspect.unwrap(type(model).forward if forward is None else forward)
    return getattr(getattr(forward, "__func__", forward), "__code__", None)
