"""The router of AT-MoE: one for all linear layers of a transformer block.

Shapes: n rows · s tokens · d features of what enters the block · E experts · G groups
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .. import kernels
from .batch import Batch
from .call import View
from .control import Control, control_of
from .gates import GroupedGate, wide
from .router import TaskRouter, TokenRouter, spread_over_rows
from .select import grouped


class Decision(NamedTuple):
    """What a router decided for each token or prompt.

    Args:
        groups: (..., G) weights of the groups.
        within: (..., E) weights of the experts, each group's summing up to 1.
        mix: λ, the share of the mixture beside the general expert.
        mask: (n, s) the tokens that count, for decisions per token; None if all do.
    """

    groups: torch.Tensor
    within: torch.Tensor
    mix: torch.Tensor | float
    mask: torch.Tensor | None = None


class GroupedRouter(nn.Module):
    """Says how much of each expert a token or a prompt gets, by what enters the block (AT-MoE, arXiv 2410.10896).

    `λ · W'_G[g] · W'_D[g, m]` for expert m of group g, and `1 - λ` for the general expert, which comes last.

    The block calls `read` with what enters it, and its linear layers then get the weights by `forward`.

    Args:
        gate: makes scores.
        groups: names of the experts by group.
        has_general: there is a general expert.
        per_prompt: one decision for a row, from the mean over its prompt, instead of one for each token.
        normalize: divide each token's features by their root mean square, so that tokens count alike.
        reads_encoder: in a decoder, the prompt is what the encoder has read.
        name: what it keeps its prompts under, beside those of other routers.
        owned: a linear layer alone has it, which reads its own input.
        in_decoder: the layer is in the decoder of an encoder-decoder model, whose padding is another.
    """

    def __init__(
        self,
        *,
        gate: GroupedGate,
        groups: Mapping[str, Sequence[str]],
        has_general: bool,
        name: str = "",
        per_prompt: bool = False,
        normalize: bool = True,
        reads_encoder: bool = False,
        owned: bool = False,
        in_decoder: bool = False,
    ) -> None:
        super().__init__()
        self.gate = gate
        self.sizes = tuple(len(experts) for experts in groups.values())
        self.name = name
        self.has_general, self.per_prompt, self.normalize = has_general, per_prompt, normalize
        self.reads_encoder, self.owned, self.in_decoder = reads_encoder, owned, in_decoder
        self._free = control_of(groups)
        self.now: torch.Tensor | None = None  # weights of the block that is being run
        self._laid_out: _Layout | None = None
        self.seen: list[Decision] | None = None  # while somebody wants to know

    def read(self, e: torch.Tensor, view: View) -> None:
        """Decide, for the span of a block's forward; `leave` ends it.

        Args:
            e: (n, s, d), or (n s, d), what enters the block; in a decoder that looks at prompts, the encoder's output.
            view: the call.
        """
        self.now = self._weights(e, view)

    def leave(self) -> None:
        """Forget the decision."""
        self.now = None

    @contextmanager
    def decided(self, weights: torch.Tensor | None) -> Iterator[None]:
        """Have decided already, for the span of a `with` block in which a part of a block runs, perhaps again."""
        before, self.now = self.now, weights
        try:
            yield
        finally:
            self.now = before

    def forward(self, x: torch.Tensor, view: View) -> torch.Tensor:
        """Weights for the input x (..., in) of a linear layer, as (..., E + 1) that broadcasts against it.

        Raises:
            RuntimeError: the layer's block has not been entered.
            ValueError: x is neither the block's tokens nor rows of them.
        """
        weights = self._weights(x, view) if self.owned else self.now
        if weights is None:
            raise _outside(again=view.again)
        weights = weights.to(x.device)
        if self.per_prompt:
            return spread_over_rows(weights, x, view.batch, "prompts")
        if weights.shape[:-1] == x.shape[:-1]:
            return weights
        if x.dim() == 2 and weights.shape[:-1].numel() == x.shape[0]:  # some layers flatten (n, s)
            return weights.flatten(0, -2)
        raise ValueError(
            f"A routed layer got an input of shape {tuple(x.shape)} in a block that was entered by "
            f"{tuple(weights.shape[:-1])} tokens, and cannot tell which token is which; use router_input='prompt', or "
            "leave the layer's experts out."
        )

    def constant(self, control: Control | None) -> torch.Tensor | None:
        """The weights (E + 1,) if they depend on no input under this control, else None."""
        if self.free_choices(control):
            return None
        nothing = torch.zeros(self.gate.in_features, device=next(self.parameters()).device)
        return self._combine(self._decide(nothing, control))

    def free_choices(self, control: Control | None) -> list[str]:
        """What depends on the input under this control, in words."""
        mix = self.gate.fixed_mix if control is None or control.mix is None else control.mix
        if self.has_general and mix == 0:  # the general expert alone
            return []
        if self.gate.static and not self.gate.num_groups:
            return []
        return (control or self._free).free_choices(static_experts=self.gate.static)

    def _weights(self, e: torch.Tensor, view: View) -> torch.Tensor:
        if self.gate.device != torch.device("meta"):  # where accelerate offloads the gate, whose hooks move inputs
            e = e.to(self.gate.device)  # where a model is spread over devices, the block moves its input later
        if e.shape[-1] != self.gate.in_features:
            raise ValueError(
                f"A block is entered by {e.shape[-1]} features, and its router, made for the block's first linear "
                f"layer, reads {self.gate.in_features}; leave this block's experts out."
            )
        return self._of_prompts(e, view) if self.per_prompt else self._of_tokens(e, view)

    def _of_tokens(self, e: torch.Tensor, view: View) -> torch.Tensor:
        """(..., E + 1) for e (..., d)."""
        if view.control is None and self.seen is None and self._is_simple(e):
            return self._in_few_operations(e)
        decision = self._decide(e, view.control, self._scale(e))
        if self.seen is not None:
            shape, mask = (view.batch or Batch(rows=e.shape[0])).tokens_of(e, in_decoder=self.in_decoder)
            groups, within = decision.groups.reshape(*shape, -1), decision.within.reshape(*shape, -1)
            self.seen.append(Decision(groups, within, decision.mix, mask))
        return self._combine(decision)

    def _is_simple(self, e: torch.Tensor) -> bool:
        """Whether weights are softmaxes of what a product gives, and no gradient is wanted."""
        if torch.is_grad_enabled() or self.gate.fixed_mix is None or self.gate.static:
            return False
        return kernels.may_fuse(e) and kernels.is_bare(self.gate, GroupedGate)

    def _in_few_operations(self, e: torch.Tensor) -> torch.Tensor:
        """The same as deciding and combining, which take some 35 operations; of one token, each costs as much as many.

        The experts' scores are laid out as the paper's W_D, a matrix whose short rows are padded with -inf.
        """
        with torch.autocast(e.device.type, enabled=False):
            scale = self._scale(e)
            wide_e, weight = wide(e).flatten(0, -2) if e.dim() > 1 else wide(e).unsqueeze(0), self.gate.weight
            scores = F.linear(wide_e, wide(weight).to(wide_e.dtype))  # type: ignore[arg-type]  # there unless static
            scores = scores if scale is None else scores * scale.reshape(-1, 1)
            if (
                self._laid_out is None
                or self._laid_out.pad.device != e.device
                or self._laid_out.pad.dtype != scores.dtype
            ):
                self._laid_out = _Layout.of(self, scores)
            pad, into, back, rest = self._laid_out
            scores = torch.addmm(pad, scores, into)
            if self.gate.num_groups:
                g = len(self.sizes)
                within = scores[:, g:].unflatten(-1, (g, -1)).softmax(-1)
                weights = (within * scores[:, :g].softmax(-1).unsqueeze(-1)).flatten(1)
            else:
                weights = scores.softmax(-1)
            return torch.addmm(rest, weights, back).view(*e.shape[:-1], len(rest))

    def _of_prompts(self, e: torch.Tensor, view: View) -> torch.Tensor:
        """(n, E + 1): by the prompts in e, or as it was when they were read."""
        prompt = view.prompt
        if prompt is None:
            raise RuntimeError(
                "router_input='prompt' needs to know the rows' prompts, and a part of the model was called by itself; "
                "call the adapted model, or use router_input='token'."
            )
        if view.prompt_done:
            if self.name not in prompt.read:
                raise RuntimeError(
                    "A call goes on with a cache whose prompt this adapter has not read, because another did; read the "
                    "prompt again, in a call without the cache."
                )
            control, mean, weights = prompt.read[self.name]
            return weights if control is view.control else self._combine(self._decide(mean, view.control))
        total, count = self._sum(e, view)
        keep = prompt if not view.again else None
        if keep is not None:
            total, count = keep.add(self.name, total, count)
        mean = total / count.clamp_min(1)
        decision = self._decide(mean, view.control)
        if self.seen is not None:
            self.seen.append(decision)
        weights = self._combine(decision)
        if keep is not None:
            keep.read[self.name] = view.control, mean.detach(), weights.detach()
        return weights

    def _scale(self, e: torch.Tensor) -> torch.Tensor | None:
        """What gives each token a root mean square of 1, (..., 1): a few tokens, such as the first, have huge ones."""
        if not self.normalize:
            return None
        dtype = torch.promote_types(e.dtype, torch.float32)
        square = torch.linalg.vector_norm(e, dim=-1, keepdim=True, dtype=dtype).square()
        return (square / e.shape[-1] + 1e-6).rsqrt()

    def _sum(self, e: torch.Tensor, view: View) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum (n, d) over the tokens of each row's prompt, and their number (n, 1)."""
        batch = view.batch or Batch(rows=e.shape[0])
        shape, mask = batch.prompt_of(e, in_decoder=self.in_decoder and not self.reads_encoder)
        e = e.reshape(*shape, -1)
        with torch.autocast(e.device.type, enabled=False):
            scale, e = self._scale(e), wide(e)
            counts = e.new_ones(shape) if mask is None else mask.to(e.dtype)  # (n, s)
            weight = counts if scale is None else counts * scale.squeeze(-1)
            return (weight.unsqueeze(1) @ e).squeeze(1), counts.sum(1, keepdim=True)

    def _decide(self, e: torch.Tensor, control: Control | None, scale: torch.Tensor | None = None) -> Decision:
        groups, experts, mix = self.gate(e, scale)
        control = (control or self._free).to(experts.device)
        weights, within = grouped(groups, experts, sizes=self.sizes, control=control)
        return Decision(weights, within, mix if control.mix is None else control.mix)

    def _combine(self, decision: Decision) -> torch.Tensor:
        """One weight per expert, and that of the general expert last."""
        parts = decision.within.split(self.sizes, dim=-1)
        of_group = decision.groups.split(1, dim=-1)
        weights = torch.cat([group * part for group, part in zip(of_group, parts, strict=True)], dim=-1)
        if not self.has_general:
            return weights
        general = 1 - decision.mix + torch.zeros_like(weights[..., :1])
        return torch.cat([decision.mix * weights, general], dim=-1)


class _Layout(NamedTuple):
    """Constants that put scores into a matrix with a row for each group, and weights back into a list.

    Args:
        pad: (G + G m,) -inf where a row is shorter than m, the largest group; without groups, (E,).
        into: (G + E, G + G m), of the temperatures.
        back: (G m, E + 1), of λ.
        rest: (E + 1,), 1 - λ for the general expert.
    """

    pad: torch.Tensor
    into: torch.Tensor
    back: torch.Tensor
    rest: torch.Tensor

    @classmethod
    def of(cls, router: GroupedRouter, like: torch.Tensor) -> _Layout:
        gate, sizes = router.gate, router.sizes
        g, most, mix = len(sizes), max(sizes), 1.0 if not router.has_general else float(gate.fixed_mix or 0.0)
        experts = [g_ * most + i for g_, size in enumerate(sizes) for i in range(size)]  # where each has its place
        if not gate.num_groups:
            g, most, experts = 0, 0, list(range(sum(sizes)))
        e, columns = len(experts), g * most if g else len(experts)
        pad, into = like.new_full((g + columns,), -math.inf), like.new_zeros(g + e, g + columns)
        back, rest = like.new_zeros(columns, e + router.has_general), like.new_zeros(e + router.has_general)
        for i in range(g):
            pad[i], into[i, i] = 0.0, 1 / gate.group_temperature
        for i, place in enumerate(experts):
            pad[g + place], into[g + i, g + place], back[place, i] = 0.0, 1 / gate.expert_temperature, mix
        if router.has_general:
            rest[-1] = 1 - mix
        return cls(pad, into, back, rest)


def _outside(*, again: bool) -> RuntimeError:
    """The error for a layer that has nobody to decide for it."""
    if not again:
        return RuntimeError(
            "A layer was called outside of its block, whose input says how its experts are weighed; call the block or "
            "the model."
        )
    return RuntimeError(
        "A layer runs again in backward without its block, whose input says how its experts are weighed: code of the "
        "model's own checkpoints a part of a block. Checkpoint whole blocks, with "
        "model.gradient_checkpointing_enable() where it is transformers', or put torch's checkpoint_wrapper around "
        "that part and call the adapted model."
    )


Router = TaskRouter | TokenRouter | GroupedRouter
