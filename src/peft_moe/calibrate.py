"""Make adapters whose experts are chosen by the input mergeable, as closely as a LoRA can be to them.

No weight matrix does what a router does that reads its input. `calibrate` looks at real inputs and puts beside each
such bank the LoRA that comes closest to it over them (see `stand_in`), and says how close that is. `merge_adapter`,
`merge_and_unload`, peft's `convert_to_lora` and `fold` then use these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Literal, get_args

import torch
from peft import PeftModel
from transformers.utils.logging import tqdm

from .checks import check_count
from .layer import MoeLinear
from .routing import TaskRouter
from .stand_in import Moments, StandIn, closest
from .tuner import MoeTuner
from .watch import Batch, Watch, as_it_was

Method = Literal["least_squares", "mean_gate"]


@dataclass(frozen=True)
class LayerError:
    """How far the stand-in of a layer is from its bank on held-out tokens.

    Args:
        rank: of the stand-in.
        error: `sqrt(E‖d - d'‖² / E‖d‖²)`, where d is what the bank adds to the layer's output and d' what the stand-in
            adds; 0 is exact, 1 as wrong as adding nothing.
        mean_gate_error: the same for the bank with each expert's mean weight.
    """

    rank: int
    error: float
    mean_gate_error: float


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` did and how close it came.

    Args:
        adapter: its name.
        method: how stand-ins were made.
        damping: ε; None for features / tokens.
        tokens: how many the calibration batches have, without padding.
        held_out_tokens: the same for the batches that errors were measured on.
        layers: by module, the error of its stand-in. Layers with one expert are not in it: they are exact.
        kl: mean over held-out tokens of `KL(routed ‖ stand-ins)` of what the model predicts, in nats; None for a model
            whose outputs are no logits of several classes.
        mean_gate_kl: the same for mean weights.
    """

    adapter: str
    method: Method
    damping: float | None
    tokens: int
    held_out_tokens: int
    layers: dict[str, LayerError]
    kl: float | None
    mean_gate_kl: float | None

    @property
    def error(self) -> float:
        """Mean of the layers' errors."""
        return mean(layer.error for layer in self.layers.values())

    @property
    def mean_gate_error(self) -> float:
        """The same for mean weights."""
        return mean(layer.mean_gate_error for layer in self.layers.values())

    def __str__(self) -> str:
        worst = max(self.layers, key=lambda key: self.layers[key].error)
        lines = [
            f"Stand-ins for {len(self.layers)} layers of adapter {self.adapter!r} by {self.method}, from {self.tokens} "
            f"tokens; measured on {self.held_out_tokens} others:",
            f"  error per layer: mean {self.error:.3f}, at most {self.layers[worst].error:.3f} ({worst}); by mean "
            f"weights {self.mean_gate_error:.3f}",
        ]
        if self.kl is not None and self.mean_gate_kl is not None:
            lines.append(f"  KL of the predictions: {self.kl:.4f} nats; by mean weights {self.mean_gate_kl:.4f}")
        if self.error > self.mean_gate_error:
            lines.append("  Mean weights come closer: more batches or a higher rank may help.")
        return "\n".join(lines)


@torch.no_grad()
def calibrate(
    model: PeftModel,
    batches: Iterable[Batch],
    *,
    held_out: Iterable[Batch] | None = None,
    rank: int | None = None,
    method: Method = "least_squares",
    damping: float | None = None,
    adapter_name: str | None = None,
    max_memory: int = 2 << 30,
    progress: bool = False,
) -> Calibration:
    """Find the LoRA that comes closest to an adapter whose experts are chosen by its input.

    With z(x) = s(x) ⊙ A x over the inputs of a layer, its stand-in is `A' = E[z xᵀ] (E[x xᵀ] + εI)⁻¹`, `B' = B`: a LoRA
    of the same total rank. The model routes as before until it is merged; stand-ins are not saved with the adapter,
    and are refused once the adapter's weights have changed.

    Args:
        model: with the adapter active and not merged; it is run on the batches without gradient and left as it was.
        batches: arguments of the model, `model(**batch)`, such as a DataLoader has: what the merged model will see.
            They are run once, or several times if `max_memory` asks for it. An iterator is read into a list.
        held_out: batches to measure errors on; None to keep every fifth of `batches` for that.
        rank: compress the stand-ins to this rank, by the singular values of their outputs; None for no compression.
            Those of a lower rank are left as they are.
        method: `"mean_gate"` gives each expert its mean weight instead, for comparison.
        damping: ε, beside features of mean square 1; None for features / tokens, so that few tokens do not decide much
            and many decide all.
        adapter_name: by default the active adapter.
        max_memory: bytes for the sums `E[x xᵀ]` (in × in for each layer) that are kept at once; layers whose sums do
            not fit wait for another run over the batches. To solve for a layer takes four times its own sums more.
        progress: show a progress bar.

    Returns:
        how close the stand-ins are; print it.

    Raises:
        TypeError: not a `PeftModel` with one of our adapters, or batches that are no mappings.
        ValueError: an adapter that is exact without it, is not active, disabled or merged; no batches; a layer that no
            token reached.

    Example:
        >>> print(calibrate(model, DataLoader(rows, batch_size=8, collate_fn=collator)))
        >>> model.merge_and_unload()  # or fold(model, "as-lora")
    """
    tuner, name = _adapter_of(model, adapter_name)
    _check_arguments(method, rank, damping, max_memory)
    watch = Watch(model, tuner, name, _layers_to_calibrate(tuner, name))
    show = partial(tqdm, disable=not progress)
    with as_it_was(model, tuner):
        train, test = _split(batches, held_out)
        stand_ins: dict[str, StandIn] = {}
        means: dict[str, torch.Tensor] = {}
        groups, tokens = watch.groups(max_memory), 0
        for i, group in enumerate(groups, start=1):
            note = f"Calibrating {i}/{len(groups)}" if len(groups) > 1 else "Calibrating"
            moments = group.collect(show(train, desc=note))
            for key in group.layers:
                sums = moments.pop(key)  # its memory is needed for the next layer's solution
                tokens = max(tokens, int(sums.count))
                means[key] = sums.mean_gate()
                stand_ins[key] = _stand_in(key, watch, sums, method, damping, rank)
        measured = watch.measure(show(test, desc="Measuring"), stand_ins, means)
    for key, layer in watch.layers.items():
        layer.stand_ins[name] = stand_ins[key]
    errors = {key: LayerError(stand_ins[key].a.shape[0], *both) for key, both in measured.errors.items()}
    kl, mean_kl = measured.kl or (None, None)
    result = Calibration(name, method, damping, tokens, measured.tokens, errors, kl, mean_kl)
    tuner.calibrations[name] = result
    return result


def _stand_in(
    key: str, watch: Watch, moments: Moments, method: Method, damping: float | None, rank: int | None
) -> StandIn:
    a, b = watch.bank(key).lora_A.weight, watch.bank(key).lora_B.weight
    damping = a.shape[1] / int(moments.count) if damping is None else damping
    try:
        new_a, new_b = closest(a, b, moments, damping=damping, rank=rank, mean_gate=method == "mean_gate")
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    new_a, new_b = new_a.to(a.dtype).to(a.device), new_b.to(b.dtype, copy=True).to(b.device)
    return StandIn(new_a, new_b, watch.layers[key].fingerprint(watch.adapter))


# -- what is asked for ------------------------------------------------------------------------------------------------


def _adapter_of(model: PeftModel, adapter_name: str | None) -> tuple[MoeTuner, str]:
    tuner = model.base_model if isinstance(model, PeftModel) else None
    if not isinstance(tuner, MoeTuner):
        raise TypeError(
            f"calibrate takes a PeftModel with an adapter of peft_moe, not a {type(model).__name__}; unwrap the model "
            "first, or load the adapter with PeftModel.from_pretrained."
        )
    active = tuner.active_adapters
    name = adapter_name or next(iter(active), "default")
    if name not in tuner.peft_config:
        raise ValueError(f"adapter_name={name!r}; the model has {sorted(tuner.peft_config)}.")
    if active != [name]:
        raise ValueError(
            f"calibrate looks at what adapter {name!r} does alone, and the active ones are {active}; call "
            f"model.set_adapter({name!r}) first."
        )
    if not tuner.adapters_enabled:
        raise ValueError("Adapters are disabled; leave model.disable_adapter(), or call model.enable_adapter_layers().")
    if tuner.context.in_base:
        raise ValueError(f"{sorted(tuner.context.in_base)} are merged; call model.unmerge_adapter() first.")
    return tuner, name


def _check_arguments(method: str, rank: int | None, damping: float | None, max_memory: int) -> None:
    if method not in get_args(Method):
        raise ValueError(f"method={method!r} is not known; use one of {list(get_args(Method))}.")
    if rank is not None:
        check_count("rank", rank, "the rank of the stand-ins")
    if isinstance(max_memory, bool) or not isinstance(max_memory, int) or max_memory < 1:
        raise ValueError(f"max_memory={max_memory!r} is a number of bytes; give a whole number from 1.")
    number = isinstance(damping, (int, float)) and not isinstance(damping, bool)
    if damping is not None and not (number and 0 < damping < float("inf")):
        raise ValueError(f"damping={damping!r}; use a number above 0, such as 0.01, or None.")


def _layers_to_calibrate(tuner: MoeTuner, name: str) -> dict[str, MoeLinear]:
    """The layers whose experts the input chooses, by name."""
    layers = {k: m for k, m in tuner.model.named_modules() if isinstance(m, MoeLinear) and name in m.moelora_bank}
    found = {key: layer for key, layer in layers.items() if layer.reads_input(name)}
    if not found:
        by_task = any(isinstance(layer.router_of(name), TaskRouter) for layer in layers.values())
        how = "merge or fold it with task=" if by_task else "merge or fold it as it is"
        raise ValueError(f"Nothing in adapter {name!r} depends on the input, so that a LoRA is the same; {how}.")
    return found


def _split(batches: Iterable[Batch], held_out: Iterable[Batch] | None) -> tuple[Iterable[Batch], Iterable[Batch]]:
    """Batches to calibrate on and to measure on, both of which can be run over again."""
    train, test = _again(batches, "batches"), None if held_out is None else _again(held_out, "held_out")
    if test is None:
        every = list(train)
        few = len(every) < 5
        test = every[1:][-1:] if few else every[4::5]
        train = every[: max(1, len(every) - 1)] if few else [batch for i, batch in enumerate(every) if i % 5 != 4]
    for what, found in (("batches", train), ("held_out", test)):
        first = next(iter(found), None)
        if first is None:
            few_of = "a second batch to measure errors on, or held_out=" if held_out is None else "at least one batch"
            raise ValueError(f"{what} is empty; give {few_of if what == 'held_out' else 'at least one batch'}.")
        if not isinstance(first, Mapping):
            raise TypeError(f"{what} holds a {type(first).__name__}; give dicts of the model's arguments.")
    return train, test


def _again(batches: Iterable[Batch], what: str) -> Iterable[Batch]:
    if isinstance(batches, Mapping):
        raise TypeError(f"{what} is a single batch; give a list of them, or a DataLoader.")
    return list(batches) if isinstance(batches, Iterator) else batches
