"""Runs over calibration batches with an eye on an adapter's banks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple, cast

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import nn
from torch.nn.functional import kl_div, linear

from .bank import ExpertBank
from .layer import MoeLinear
from .routing import TokenRouter, keep_mask
from .stand_in import Moments, StandIn
from .tuner import MoeTuner

Batch = Mapping[str, Any]
# What is called with a layer's name, and with x (..., in), weights and output (..., out) of its bank; what it returns
# takes the output's place.
Hook = Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor], "torch.Tensor | None"]


class Measured(NamedTuple):
    """How far stand-ins, and mean weights, are from what is routed.

    Args:
        errors: by layer, of either, `sqrt(E‖d - d'‖² / E‖d‖²)`.
        kl: of either, mean KL of the predictions in nats; None if there are none.
        tokens: how many this is the mean over.
    """

    errors: dict[str, tuple[float, float]]
    kl: tuple[float, float] | None
    tokens: int


@dataclass(frozen=True)
class Watch:
    """The banks of an adapter in some layers, looked at while the model runs.

    Args:
        model: the model.
        tuner: its tuner.
        adapter: name of the adapter.
        layers: by name.
    """

    model: PeftModel
    tuner: MoeTuner
    adapter: str
    layers: Mapping[str, MoeLinear]

    def bank(self, key: str) -> ExpertBank:
        """The bank in a layer."""
        return cast(ExpertBank, self.layers[key].moelora_bank[self.adapter])

    def run(self, batch: Batch, hook: Hook) -> Any:
        """The model's outputs, with a hook called after each bank."""
        device = next((p.device for p in self.model.parameters() if not p.is_meta), torch.device("cpu"))
        with ExitStack() as stack:
            for key in self.layers:

                def watch(_: nn.Module, args: tuple[Any, ...], output: Any, key: str = key) -> Any:
                    return hook(key, args[0], args[1], output)

                stack.enter_context(self.bank(key).register_forward_hook(watch))
            return self.model(**send_to_device(dict(batch), device))

    def groups(self, max_memory: int) -> list[Watch]:
        """Layers whose sums fit into so many bytes together; one by one if a single one does not."""
        groups: list[dict[str, MoeLinear]] = [{}]
        used = 0
        for key, layer in self.layers.items():
            size = Moments.size(layer.in_features, self.bank(key).lora_A.weight.shape[0])
            if groups[-1] and used + size > max_memory:
                groups.append({})
                used = 0
            groups[-1][key], used = layer, used + size
        return [Watch(self.model, self.tuner, self.adapter, group) for group in groups]

    def collect(self, batches: Iterable[Batch]) -> dict[str, Moments]:
        """What the tokens of some batches leave of them, by layer.

        Raises:
            ValueError: no token reached a layer.
        """
        moments: dict[str, Moments] = {}

        def add(key: str, x: torch.Tensor, weights: torch.Tensor, _: torch.Tensor) -> None:
            bank = self.bank(key)
            h = bank.lora_A(x)
            s = bank.scaled_weights(h, weights)
            if key not in moments:
                moments[key] = Moments(x.shape[-1], h.shape[-1], x.device)
            keep = self.layers[key].tokens_that_count(self.adapter, x)
            moments[key].add(x.flatten(0, -2), h.flatten(0, -2), s.flatten(0, -2), keep)

        for batch in batches:
            self.run(batch, add)
        self._check_reached({key: sums.count for key, sums in moments.items()}, "batches")
        return moments

    def measure(
        self, batches: Iterable[Batch], stand_ins: Mapping[str, StandIn], means: Mapping[str, torch.Tensor]
    ) -> Measured:
        """Compare what is routed with stand-ins and with mean weights (R,), both by layer.

        Raises:
            ValueError: no token reached a layer.
        """
        # by layer, sums on its device, so that nothing waits for it: ‖d‖², ‖d - d'‖² by stand-in and by mean weights
        squares: dict[str, torch.Tensor] = {}
        counts: dict[str, torch.Tensor] = {}
        divergences = []

        def by_stand_in(key: str, x: torch.Tensor, *_: Any) -> torch.Tensor:
            return linear(linear(x, stand_ins[key].a), stand_ins[key].b)

        def by_mean(key: str, x: torch.Tensor, *_: Any) -> torch.Tensor:
            h = self.bank(key).lora_A(x)
            return cast(torch.Tensor, self.bank(key).lora_B(h * means[key].to(h)))

        def compare(key: str, x: torch.Tensor, _: torch.Tensor, d: torch.Tensor) -> None:
            keep = self.layers[key].tokens_that_count(self.adapter, x)
            keep = d.new_ones(d.shape[:-1].numel(), dtype=torch.bool) if keep is None else keep
            found = [
                rest.flatten(0, -2).float().square().sum(-1).masked_fill(~keep, 0.0).sum()
                for rest in (d, d - by_stand_in(key, x), d - by_mean(key, x))
            ]
            squares[key] = squares.get(key, 0.0) + torch.stack(found)
            counts[key] = counts.get(key, 0) + keep.sum()

        for batch in batches:
            routed = _logits(self.run(batch, compare))
            if routed is not None:
                keep = _keep(routed, batch, in_decoder=self.tuner.is_encoder_decoder)
                others = (
                    _kl(routed, cast(torch.Tensor, _logits(self.run(batch, h))), keep) for h in (by_stand_in, by_mean)
                )
                divergences.append(torch.stack([keep.sum(), *others]).tolist())
        self._check_reached(counts, "held_out")
        errors = {}
        for key in self.layers:
            norm, *rest = squares[key].tolist()
            error, mean_error = ((value / norm) ** 0.5 if norm else inf if value else 0.0 for value in rest)
            errors[key] = error, mean_error
        n, *kl = map(sum, zip(*divergences, strict=True)) if divergences else (0,)
        return Measured(errors, (kl[0] / n, kl[1] / n) if n else None, max(map(int, counts.values())))

    def _check_reached(self, counts: Mapping[str, torch.Tensor], what: str) -> None:
        missed = [key for key in self.layers if key not in counts or not counts[key]]
        if missed:
            raise ValueError(
                f"No token of {what} reached {missed[0]!r}; give batches that use all adapted layers, or leave such "
                "layers out of the adapter with exclude_modules."
            )


@contextmanager
def as_it_was(model: PeftModel, tuner: MoeTuner) -> Iterator[None]:
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
        each = kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        total += each.masked_fill(~kept, 0.0).sum()
    return total
