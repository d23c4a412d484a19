"""Run an adapted model over rows and add up what its routers do.

Shapes: n rows · s tokens · E experts · G groups · T tasks
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers.utils.logging import tqdm

from ..card_methods import method_of
from ..checks import check_count
from ..data import tokenize
from ..grouped import GroupedMoeConfig
from ..routing import prompt_before_labels
from ..tuner import MoeTuner
from .findings import findings
from .pieces import pieces
from .places import Place, Watch, places_of
from .results import Routing, Sample, Samples
from .row_sums import RowSums
from .rows import Rows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["Routing", "Rows", "Sample", "Samples", "collect", "look_at"]


def collect(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Dataset,
    *,
    batch_size: int = 8,
    max_length: int = 1024,
    samples: int = 8,
    sample_tokens: int = 128,
    progress: bool = True,
) -> tuple[Routing, Samples]:
    """What the routers of an adapter give each expert, over the prompts and answers of some rows.

    Every routed layer is a place of its own, also where layers share MOELoRA's gate: its weights are the same in all
    of them, but the experts are not. AT-MoE decides once for a block, and so has one place for each block, whose
    similarity is that of the experts' updates in all layers of the block, and whose ranks are the largest there.
    Layers with one expert route nothing and are left out; so are shared experts, which every token gets whole. Base
    experts are there, also those without matrices, whose share goes to the base model alone. Padding does not count.
    For AT-MoE per prompt, each token of a row counts with the weights that the row's prompt has led to.

    Args:
        model: a causal language model with one active adapter of ours, not merged.
        tokenizer: the one the model was trained with.
        examples: rows of `read_examples`.
        batch_size: rows run at once.
        max_length: tokens of a row; longer ones lose the start of their prompt.
        samples: rows to keep token by token, spread over the tasks.
        sample_tokens: tokens of these, the last of the row.
        progress: show a progress bar.

    Returns:
        sums over the rows, and the rows that are kept. `Routing.layers` has for each place: `name`, `block` (its
        number, or None), `module` (the rest of the name), `experts` (names), `ranks`, `group_of`; `tokens`; `load`: by
        expert, the share of all weight; `top1` and `chosen`: the share of tokens that weigh it most (experts with the
        same weight share it), and that give it any weight; `entropy`: nats, the mean over tokens of the entropy of a
        token's weights; `effective_experts`: exp(entropy of load); `chosen_per_token`; `group_load`: by group, its mean
        weight in the mixture; `tasks`: by task, `tokens`, `load`, `entropy`; `chance_divergence`: bits that the tasks
        would be apart if none differed, from how rows of a task differ (None if a task has one row); `similarity`:
        cosines between the experts' updates.

    The model is left in the mode it came in.

    Raises:
        TypeError: the model has no adapter of ours.
        ValueError: no routed layer, several active adapters or a merged one, rows of a task that the adapter does not
            have, an answer longer than max_length, sizes below 1, or weights that are no numbers.

    Example:
        >>> routing, rows = collect(model, tokenizer, read_examples("data/medmulti/tiny", split="dev"))
    """
    _check_sizes(batch_size, samples, sample_tokens)
    tuner, adapter = _adapter_of(model)
    config: Any = tuner.peft_config[adapter]
    rows = Rows.of(examples, tokenizer, config, max_length=max_length)
    return look_at(model, rows, batch_size=batch_size, samples=samples, sample_tokens=sample_tokens, progress=progress)


def look_at(
    model: PeftModel,
    rows: Rows,
    *,
    batch_size: int = 8,
    samples: int = 8,
    sample_tokens: int = 128,
    progress: bool = True,
) -> tuple[Routing, Samples]:
    """`collect` for rows that are made already; arguments, result and errors as there."""
    _check_sizes(batch_size, samples, sample_tokens)
    tuner, adapter = _adapter_of(model)
    places = _places(tuner, adapter)
    chosen = rows.spread(samples)
    sums = RowSums([place.router for place in places], rows.tasks, chosen, keep=sample_tokens)
    _run(model, tuner, rows, places, sums, batch_size=batch_size, progress=progress)
    config: Any = tuner.peft_config[adapter]
    routing = Routing(
        adapter=adapter,
        method=method_of(config).name,
        base_model=str(config.base_model_name_or_path or ""),
        rows=len(rows.encoded),
        tokens=sum(map(len, rows.encoded["input_ids"])),
        tasks=rows.tasks,
        groups=list(config.names) if isinstance(config, GroupedMoeConfig) else None,
        layers=[place.describe() | sums.read(place) | {"similarity": place.similarity()} for place in places],
    )
    routing.findings.extend(findings(routing.to_dict()))
    return routing, [_sample(row, rows, sample_tokens, places, sums) for row in chosen]


def _check_sizes(batch_size: int, samples: int, sample_tokens: int) -> None:
    check_count("batch_size", batch_size, "the number of rows run at once")
    check_count("samples", samples, "the number of rows kept token by token", low=0)
    check_count("sample_tokens", sample_tokens, "the number of tokens kept of each")


def _places(tuner: MoeTuner, adapter: str) -> list[Place]:
    """Where an adapter routes; a warning of places that cannot be looked at, and an error if there are no others."""
    places, skipped = places_of(tuner, adapter)
    if skipped:
        warnings.warn(
            f"{len(skipped)} routed layers are inside experts of the base model, which see tokens picked from all "
            f"rows, and are left out, such as {skipped[0]!r}.",
            stacklevel=3,
        )
    if not places:
        raise ValueError(f"Adapter {adapter!r} has no layer with a router that can be looked at, so nothing to report.")
    return places


@torch.no_grad()
def _run(
    model: PeftModel,
    tuner: MoeTuner,
    rows: Rows,
    places: Sequence[Place],
    sums: RowSums,
    *,
    batch_size: int,
    progress: bool,
) -> None:
    """Call the model with all rows, the longest first, and add up what its routers give."""
    watch = Watch([place.router for place in places], sums.add)
    lengths = [len(ids) for ids in rows.encoded["input_ids"]]
    order = sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True)
    with ExitStack() as stack:
        stack.enter_context(tuner.context.turn())
        stack.enter_context(_evaluating(model))
        stack.enter_context(watch.on())
        for start in tqdm(range(0, len(order), batch_size), desc="Looking at routers", disable=not progress):
            some = order[start : start + batch_size]
            batch = rows.padded(some, model.device)
            mask, labels = batch["attention_mask"].bool(), batch.pop("labels")
            counting = rows.counting(some, mask)
            sums.begin(some, [rows.keys[row] for row in some], counting, [lengths[row] for row in some])
            if rows.told:
                batch["task_ids"] = [rows.examples[row]["task"] for row in some]
            if tuner.reads_prompts:
                batch["prompt_mask"] = prompt_before_labels(labels, mask)
            with watch.batch(*mask.shape):
                model(**batch, **_options(tuner))


def _adapter_of(model: Any) -> tuple[MoeTuner, str]:
    """The tuner of a model and the name of its active adapter."""
    tuner = model.base_model if isinstance(model, PeftModel) else None
    if not isinstance(tuner, MoeTuner):
        raise TypeError(f"{type(model).__name__} has no adapter of peft_moe; load one with PeftModel.from_pretrained.")
    active = list(tuner.active_adapters)
    if len(active) != 1:
        raise ValueError(f"The active adapters are {active}; choose one with model.set_adapter(name).")
    if active[0] in tuner.context.in_base:
        raise ValueError(f"Adapter {active[0]!r} is merged, and routes nothing; call model.unmerge_adapter() first.")
    return tuner, active[0]


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _options(tuner: MoeTuner) -> dict[str, Any]:
    """What spares a call the parts that nobody looks at, where the model knows it."""
    known = inspect.signature(type(tuner.model).forward).parameters
    return {name: value for name, value in {"use_cache": False, "logits_to_keep": 1}.items() if name in known}


def _sample(row: int, rows: Rows, most: int, places: Sequence[Place], sums: RowSums) -> Sample:
    encoded = rows.encoded[row]
    ids, labels = encoded["input_ids"], encoded["labels"]
    start = max(0, len(ids) - most)
    whole = sum(map(len, tokenize(rows.examples[row]["messages"], rows.tokenizer)))
    return Sample(
        task=rows.keys[row],
        tokens=pieces(ids, rows.tokenizer, start=start),
        prompt_tokens=sum(label == -100 for label in labels[start:]),
        weights=[sums.kept[place.router][row].cpu() for place in places],
        cut=whole - (len(ids) - start),
    )
