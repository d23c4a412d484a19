"""Run an adapted model over rows and add up what its routers do.

Shapes: n rows · s tokens · E experts · G groups · T tasks
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers.utils.logging import tqdm

from ..card_methods import method_of
from ..checks import check_count
from ..data import encode, task_key
from ..grouped import GroupedMoeConfig
from ..routing import Router, prompt_before_labels
from ..tuner import MoeTuner
from .findings import findings
from .pieces import pieces
from .places import Place, Watch, places_of
from .results import Routing, Sample, Samples

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["Routing", "Sample", "Samples", "collect"]


@torch.no_grad()
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
        expert, the share of all weight; `top1` and `chosen`: the share of tokens that weigh it most, and that give it
        any weight; `entropy`: nats, the mean over tokens of the entropy of a token's weights; `effective_experts`:
        exp(entropy of load); `chosen_per_token`; `group_load`: by group, its mean weight in the mixture; `tasks`: by
        task, `tokens`, `load`, `entropy`; `similarity`: cosines between the experts' updates.

    The model is left in the mode it came in.

    Raises:
        TypeError: the model has no adapter of ours.
        ValueError: no routed layer, several active adapters or a merged one, rows of a task that the adapter does not
            have, an answer longer than max_length, sizes below 1, or weights that are no numbers.

    Example:
        >>> routing, rows = collect(model, tokenizer, read_examples("data/medmulti/tiny", split="dev"))
    """
    check_count("batch_size", batch_size, "the number of rows run at once")
    check_count("samples", samples, "the number of rows kept token by token", low=0)
    check_count("sample_tokens", sample_tokens, "the number of tokens kept of each")
    tuner, adapter = _adapter_of(model)
    places, skipped = places_of(tuner, adapter)
    if skipped:
        warnings.warn(
            f"{len(skipped)} routed layers are inside experts of the base model, which see tokens picked from all "
            f"rows, and are left out, such as {skipped[0]!r}.",
            stacklevel=2,
        )
    if not places:
        raise ValueError(f"Adapter {adapter!r} has no layer with a router that can be looked at, so nothing to report.")
    config: Any = tuner.peft_config[adapter]
    told = config.task_names if config.needs_tasks else None
    encoded = encode(examples, tokenizer, tasks=told, max_length=max_length)
    keys = [task_key(task) if task else None for task in examples["task"]]
    tasks = sorted({key for key in keys if key is not None})
    sums = _Sums([place.router for place in places], tasks, chosen := _spread(keys, samples))
    watch = Watch([place.router for place in places], sums.add)
    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]["input_ids"]), reverse=True)
    with ExitStack() as stack:
        stack.enter_context(tuner.context.turn())
        stack.enter_context(_evaluating(model))
        stack.enter_context(watch.on())
        for start in tqdm(range(0, len(order), batch_size), desc="Looking at routers", disable=not progress):
            rows = order[start : start + batch_size]
            batch = _padded([encoded[row] for row in rows], tokenizer, model.device)
            mask = batch["attention_mask"].bool()
            lengths = [len(encoded[row]["input_ids"]) for row in rows]
            sums.begin(rows, [keys[row] for row in rows], mask, lengths, keep=sample_tokens)
            labels = batch.pop("labels")
            if told is not None:
                batch["task_ids"] = [examples[row]["task"] for row in rows]
            if tuner.reads_prompts:
                batch["prompt_mask"] = prompt_before_labels(labels, mask)
            with watch.batch(*mask.shape):
                model(**batch, **_options(tuner))
    layers = [place.describe() | sums.read(place) | {"similarity": place.similarity()} for place in places]
    routing = Routing(
        adapter=adapter,
        method=method_of(config).name,
        base_model=str(config.base_model_name_or_path or ""),
        rows=len(encoded),
        tokens=sum(map(len, encoded["input_ids"])),
        tasks=tasks,
        groups=list(config.names) if isinstance(config, GroupedMoeConfig) else None,
        layers=layers,
    )
    routing.findings.extend(findings(routing.to_dict()))
    kept = [_sample(row, keys[row], encoded[row], tokenizer, sample_tokens, places, sums) for row in chosen]
    return routing, kept


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


def _padded(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> dict[str, Any]:
    """Padded on the right, as in training."""
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    values = {"input_ids": pad, "attention_mask": 0, "labels": -100}
    return {
        name: pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=value).to(device)
        for name, value in values.items()
    }


def _spread(keys: Sequence[str | None], count: int) -> list[int]:
    """So many rows, taken from the tasks in turn, each task's in their order; sorted by task and row."""
    rows: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        rows.setdefault(key or "", []).append(row)
    turns = [(turn, key, row) for key, of_task in rows.items() for turn, row in enumerate(of_task)]
    return [row for _, row in sorted((key, row) for _, key, row in sorted(turns)[:count])]


def _sample(
    row: int,
    task: str | None,
    encoded: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    most: int,
    places: Sequence[Place],
    sums: _Sums,
) -> Sample:
    ids, labels = encoded["input_ids"], encoded["labels"]
    start = max(0, len(ids) - most)
    return Sample(
        task=task,
        tokens=pieces(ids, tokenizer, start=start),
        prompt_tokens=sum(label == -100 for label in labels[start:]),
        weights=[sums.kept[place.router][row].cpu() for place in places],
    )


class _Sums:
    """Sums by router and task, on the routers' devices; reading them is the only time that is waited for.

    Args:
        routers: which.
        tasks: names.
        chosen: rows whose weights are kept.
    """

    def __init__(self, routers: Sequence[Router], tasks: Sequence[str], chosen: Sequence[int]) -> None:
        self.tasks, self.chosen = list(tasks), set(chosen)
        # (T + 1, C): the last row is for rows without a task
        self.sums: dict[Router, torch.Tensor] = {}
        self.numbers: dict[Router, torch.Tensor] = {}
        self.kept: dict[Router, dict[int, torch.Tensor]] = {router: {} for router in routers}

    def begin(
        self, rows: list[int], keys: list[str | None], mask: torch.Tensor, lengths: list[int], *, keep: int
    ) -> None:
        """What the next weights are of: rows, their tasks, mask (n, s) and lengths; the last `keep` tokens are kept."""
        index = [self.tasks.index(key) if key is not None else len(self.tasks) for key in keys]
        self.rows, self.keep, self.mask, self.lengths = rows, keep, mask, lengths
        self.index = torch.tensor(index, device=mask.device)

    def add(self, router: Router, weights: torch.Tensor, groups: torch.Tensor | None) -> None:
        """Add what a router gave: weights (n or 1, s or 1, E), and those of groups (n or 1, s or 1, G)."""
        mask, index = self.mask.to(weights.device), self.index.to(weights.device)
        total = weights.sum(-1, keepdim=True)
        shares = weights / total.where(total > 0, torch.ones_like(total))
        top1 = torch.zeros_like(weights).scatter_(-1, weights.argmax(-1, keepdim=True), 1.0) * (weights > 0)
        entropy = torch.special.entr(shares).sum(-1, keepdim=True)
        parts = [weights, top1, (weights > 0).float(), entropy, torch.ones_like(entropy)]
        columns = torch.cat(parts if groups is None else [*parts, groups.expand(*weights.shape[:-1], -1)], dim=-1)
        if columns.shape[1] == 1:  # a row's tokens share the weights
            by_row = columns[:, 0] * mask.sum(1, keepdim=True)
        else:
            by_row = columns.masked_fill(~mask.unsqueeze(-1), 0.0).sum(1)
        if router not in self.sums:
            wide = torch.float32 if by_row.device.type == "mps" else torch.float64
            self.sums[router] = by_row.new_zeros(len(self.tasks) + 1, by_row.shape[1], dtype=wide)
        self.sums[router].index_add_(0, index, by_row.to(self.sums[router].dtype))
        for at in (i for i, row in enumerate(self.rows) if row in self.chosen):
            own = weights[min(at, len(weights) - 1)]
            end = self.lengths[at]
            own = own if len(own) == 1 else own[max(0, end - self.keep) : end]
            self.kept[router][self.rows[at]] = own.clone()

    def read(self, place: Place) -> dict[str, Any]:
        """What a report says of a place; waits for the device once for each router."""
        if place.router not in self.sums:
            raise ValueError(f"The router of {place.name!r} was not asked; is the adapter enabled?")
        if place.router not in self.numbers:
            self.numbers[place.router] = self.sums[place.router].double().cpu()
        values = self.numbers[place.router]
        if not torch.isfinite(values).all():
            raise ValueError(
                f"The router of {place.name!r} gives weights that are NaN or infinite, as after diverged training; "
                "load an earlier checkpoint."
            )
        e, total = len(place.experts), values.sum(0)
        tokens, load = total[3 * e + 1].item(), _shares(total[:e])
        tasks = {
            task: {"tokens": round(row[3 * e + 1].item()), "load": _shares(row[:e]).tolist()}
            | {"entropy": (row[3 * e] / row[3 * e + 1]).item()}
            for task, row in zip(self.tasks, values, strict=False)
            if row[3 * e + 1] > 0
        }
        groups = total[3 * e + 2 :] / tokens
        return {
            "tokens": round(tokens),
            "load": load.tolist(),
            "top1": (total[e : 2 * e] / tokens).tolist(),
            "chosen": (total[2 * e : 3 * e] / tokens).tolist(),
            "entropy": total[3 * e].item() / tokens,
            "effective_experts": torch.special.entr(load).sum().exp().item(),
            "chosen_per_token": total[2 * e : 3 * e].sum().item() / tokens,
            "group_load": groups.tolist() if len(groups) else None,
            "tasks": tasks,
        }


def _shares(load: torch.Tensor) -> torch.Tensor:
    """Parts of their sum; zeros if there is none, as where all experts are switched off."""
    total = load.sum()
    return load / total if total > 0 else torch.zeros_like(load)
