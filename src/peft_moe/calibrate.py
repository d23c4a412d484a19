"""Make adapters whose experts are chosen by the input mergeable, as closely as a LoRA can be to them.

No weight matrix does what a router does that reads its input. `calibrate` looks at real inputs and puts beside each
such bank the LoRA that comes closest to it over them (see `stand_in`), and says how close that is. `merge_adapter`,
`merge_and_unload`, peft's `convert_to_lora` and `fold` then use these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import inf
from statistics import mean
from typing import Any, Literal, cast, get_args

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import nn
from transformers.utils.logging import tqdm

from .bank import ExpertBank
from .config import check_count
from .layer import MoeLinear
from .routing import TaskRouter, TokenRouter, keep_mask
from .stand_in import Moments, StandIn, closest
from .tuner import MoeTuner

Method = Literal["least_squares", "mean_gate"]
Batch = Mapping[str, Any]


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
        damping: ε.
        tokens: how many the calibration batches have, without padding.
        held_out_tokens: the same for the batches that errors were measured on.
        layers: by module, the error of its stand-in. Layers with one expert are not in it: they are exact.
        kl: mean over held-out tokens of `KL(routed ‖ stand-ins)` of what the model predicts, in nats; None for a model
            whose outputs are no logits of several classes.
        mean_gate_kl: the same for mean weights.
    """

    adapter: str
    method: Method
    damping: float
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
            lines.append("  Mean weights come closer: more batches, a larger damping or a higher rank may help.")
        return "\n".join(lines)


@torch.no_grad()
def calibrate(
    model: PeftModel,
    batches: Iterable[Batch],
    *,
    held_out: Iterable[Batch] | None = None,
    rank: int | None = None,
    method: Method = "least_squares",
    damping: float = 0.01,
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
        damping: ε, beside features of mean square 1.
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
    layers = _layers_to_calibrate(tuner, name)
    with _as_it_was(model, tuner):
        train, test = _split(batches, held_out)
        stand_ins: dict[str, StandIn] = {}
        means: dict[str, torch.Tensor] = {}
        groups, tokens = list(_groups(layers, name, max_memory)), 0
        for i, group in enumerate(groups, start=1):
            note = f"Calibrating {i}/{len(groups)}" if len(groups) > 1 else "Calibrating"
            moments = _collect(model, group, name, tqdm(train, desc=note, disable=not progress))
            for key, layer in group.items():
                sums = moments.pop(key)  # its memory is needed for the next layer's solution
                tokens = max(tokens, int(sums.count))
                means[key] = sums.mean_gate()
                stand_ins[key] = _stand_in(key, layer, name, sums, method, damping, rank)
        errors, kl, mean_kl, held_out_tokens = _measure(
            model, tuner, layers, name, stand_ins, means, tqdm(test, desc="Measuring", disable=not progress)
        )
    for key, layer in layers.items():
        layer.stand_ins[name] = stand_ins[key]
    result = Calibration(name, method, float(damping), tokens, held_out_tokens, errors, kl, mean_kl)
    tuner.calibrations[name] = result
    return result


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


def _check_arguments(method: str, rank: int | None, damping: float, max_memory: int) -> None:
    if method not in get_args(Method):
        raise ValueError(f"method={method!r} is not known; use one of {list(get_args(Method))}.")
    if rank is not None:
        check_count("rank", rank, "the rank of the stand-ins")
    check_count("max_memory", max_memory, "a number of bytes")
    if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 < damping < float("inf"):
        raise ValueError(f"damping={damping!r}; use a number above 0, such as 0.01.")


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


# -- runs over the batches --------------------------------------------------------------------------------------------


@contextmanager
def _as_it_was(model: PeftModel, tuner: MoeTuner) -> Iterator[None]:
    """Eval mode, without compiled graphs that know no hooks, and calls keep their masks; all is put back at the end."""
    modes = {module: module.training for module in model.modules()}
    statistics = {module: module.statistics for module in modes if isinstance(module, TokenRouter)}
    recording = tuner.recording
    random = torch.random.fork_rng(devices=[])  # which DataLoaders draw from
    with tuner.context.turn(), torch.compiler.set_stance("force_eager"), random:
        model.eval()
        tuner.recording = True
        for router in statistics:
            router.statistics = None
        try:
            yield
        finally:
            tuner.recording = recording
            for router, kept in statistics.items():
                router.statistics = kept
            for module, training in modes.items():
                module.training = training


def _groups(layers: Mapping[str, MoeLinear], name: str, max_memory: int) -> Iterator[dict[str, MoeLinear]]:
    """Layers whose sums fit into memory together; one by one if a single one does not."""
    group: dict[str, MoeLinear] = {}
    used = 0
    for key, layer in layers.items():
        size = Moments.size(layer.in_features, _bank(layer, name).lora_A.weight.shape[0])
        if group and used + size > max_memory:
            yield group
            group, used = {}, 0
        group[key], used = layer, used + size
    yield group


def _bank(layer: MoeLinear, name: str) -> ExpertBank:
    return cast(ExpertBank, layer.moelora_bank[name])


def _run(model: nn.Module, batch: Batch) -> Any:
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    return model(**send_to_device(dict(batch), device))


# What is called with a layer's name, the layer, x (..., in), weights and output (..., out) of its bank; what it returns
# takes the output's place.
Hook = Callable[[str, MoeLinear, torch.Tensor, torch.Tensor, torch.Tensor], "torch.Tensor | None"]


@contextmanager
def _watching(layers: Mapping[str, MoeLinear], name: str, hook: Hook) -> Iterator[None]:
    """Call a hook after each bank."""
    with ExitStack() as stack:
        for key, layer in layers.items():

            def watch(_: nn.Module, args: tuple[Any, ...], output: Any, key: str = key, layer: Any = layer) -> Any:
                return hook(key, layer, args[0], args[1], output)

            stack.enter_context(_bank(layer, name).register_forward_hook(watch))
        yield


def _collect(
    model: PeftModel, layers: Mapping[str, MoeLinear], name: str, batches: Iterable[Batch]
) -> dict[str, Moments]:
    moments: dict[str, Moments] = {}

    def add(key: str, layer: MoeLinear, x: torch.Tensor, weights: torch.Tensor, _: torch.Tensor) -> None:
        bank = _bank(layer, name)
        h = bank.lora_A(x)
        s = bank.scaled_weights(h, weights)
        if key not in moments:
            moments[key] = Moments(x.shape[-1], h.shape[-1], x.device)
        moments[key].add(x.flatten(0, -2), h.flatten(0, -2), s.flatten(0, -2), layer.tokens_that_count(name, x))

    with _watching(layers, name, add):
        for batch in batches:
            _run(model, batch)
    _check_reached(layers, {key: sums.count for key, sums in moments.items()}, "batches")
    return moments


def _check_reached(layers: Iterable[str], counts: Mapping[str, torch.Tensor], what: str) -> None:
    missed = [key for key in layers if key not in counts or not counts[key]]
    if missed:
        raise ValueError(
            f"No token of {what} reached {missed[0]!r}; give batches that use all adapted layers, or leave such layers "
            "out of the adapter with exclude_modules."
        )


def _stand_in(
    key: str, layer: MoeLinear, name: str, moments: Moments, method: Method, damping: float, rank: int | None
) -> StandIn:
    a, b = _bank(layer, name).lora_A.weight, _bank(layer, name).lora_B.weight
    try:
        new_a, new_b = closest(a, b, moments, damping=damping, rank=rank, mean_gate=method == "mean_gate")
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    return StandIn(new_a.to(a.dtype), new_b.to(b.dtype, copy=True), layer.fingerprint(name))


def _measure(
    model: PeftModel,
    tuner: MoeTuner,
    layers: Mapping[str, MoeLinear],
    name: str,
    stand_ins: Mapping[str, StandIn],
    means: Mapping[str, torch.Tensor],
    batches: Iterable[Batch],
) -> tuple[dict[str, LayerError], float | None, float | None, int]:
    """Errors by layer, KL of stand-ins and of mean weights, and the number of tokens they are measured on."""
    # by layer, sums on its device, so that nothing waits for it: ‖d‖², ‖d - d'‖² by stand-in and by mean weights
    squares: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}

    def by_stand_in(key: str, layer: MoeLinear, x: torch.Tensor, *_: Any) -> torch.Tensor:
        return nn.functional.linear(nn.functional.linear(x, stand_ins[key].a), stand_ins[key].b)

    def by_mean(key: str, layer: MoeLinear, x: torch.Tensor, *_: Any) -> torch.Tensor:
        bank = _bank(layer, name)
        h = bank.lora_A(x)
        return cast(torch.Tensor, bank.lora_B(h * means[key].to(h)))

    def compare(key: str, layer: MoeLinear, x: torch.Tensor, weights: torch.Tensor, d: torch.Tensor) -> None:
        keep = layer.tokens_that_count(name, x)
        keep = d.new_ones(d.shape[:-1].numel(), dtype=torch.bool) if keep is None else keep
        found = [
            rest.flatten(0, -2).float().square().sum(-1).masked_fill(~keep, 0.0).sum()
            for rest in (d, d - by_stand_in(key, layer, x), d - by_mean(key, layer, x))
        ]
        squares[key] = squares.get(key, 0.0) + torch.stack(found)
        counts[key] = counts.get(key, 0) + keep.sum()

    divergences = []
    for batch in batches:
        with _watching(layers, name, compare):
            routed = _logits(_run(model, batch))
        if routed is None:
            continue
        keep = _keep(routed, batch, in_decoder=tuner.is_encoder_decoder)
        found = [keep.sum()]
        for hook in (by_stand_in, by_mean):
            with _watching(layers, name, hook):
                found.append(_kl(routed, cast(torch.Tensor, _logits(_run(model, batch))), keep))
        divergences.append(torch.stack(found).tolist())
    _check_reached(layers, counts, "held_out")
    errors = {}
    for key in layers:
        norm, *rest = squares[key].tolist()
        error, mean_error = ((value / norm) ** 0.5 if norm else inf if value else 0.0 for value in rest)
        errors[key] = LayerError(stand_ins[key].a.shape[0], error, mean_error)
    n, kl, mean_kl = (sum(column) for column in zip(*divergences, strict=True)) if divergences else (0, 0.0, 0.0)
    return errors, kl / n if n else None, mean_kl / n if n else None, max(int(count) for count in counts.values())


def _logits(outputs: Any) -> torch.Tensor | None:
    """(..., classes), if the outputs have them."""
    logits = getattr(outputs, "logits", None)
    return logits if isinstance(logits, torch.Tensor) and logits.shape[-1] > 1 else None


def _keep(logits: torch.Tensor, batch: Batch, *, in_decoder: bool) -> torch.Tensor:
    """(...) true for predictions that count: those of tokens that are no padding; all where there are no such."""
    labels = batch.get("labels")
    mask = keep_mask(batch.get("decoder_attention_mask" if in_decoder else "attention_mask"))
    if mask is None and in_decoder and isinstance(labels, torch.Tensor):
        mask = labels != -100
    if mask is not None and mask.shape == logits.shape[:-1]:
        return mask.to(logits.device)
    return logits.new_ones(logits.shape[:-1], dtype=torch.bool)


def _kl(p: torch.Tensor, q: torch.Tensor, keep: torch.Tensor, chunk: int = 256) -> torch.Tensor:
    """Sum over predictions of KL(p ‖ q) between logits (..., classes), over those to keep (...)."""
    total = torch.zeros((), device=p.device)
    parts = (p.flatten(0, -2).split(chunk), q.flatten(0, -2).split(chunk), keep.flatten().split(chunk))
    for p_part, q_part, kept in zip(*parts, strict=True):  # in float32 a few at a time
        # some models give -inf to what they never say, and 0 · -inf is no number
        log_p, log_q = (v.float().clamp_min(-1e30).log_softmax(-1) for v in (p_part, q_part))
        each = nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        total += each.masked_fill(~kept, 0.0).sum()
    return total
