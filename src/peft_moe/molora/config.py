"""Config of MoLoRA."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND

from ..checks import check_count, check_flag, check_fraction
from ..config import Experts, PeftMoeType
from ..token_routed import TokenRoutedConfig

# Modules inside whatever a model calls its attention (self_attn, attention, SelfAttention, encoder_attn, …), except for
# a feed-forward layer in there; and projections by their names, which some models have without such a parent.
ATTENTION = r"[^.]*(?i:attn|attention)[^.]*\.(?!(.*\.)?(mlp|ffn?|feed_forward)\.).+|(q|k|v|o|qkv)_proj"


@dataclass
class MoLoraConfig(TokenRoutedConfig):
    """MoLoRA: `h = W0 x + Σ_{i ∈ top K} softmax_K(W_g x + b)_i · (alpha / r) B_i A_i x` (MING-MOE, arXiv 2404.09027).

    A router in each layer chooses K experts for each token by what the layer sees of it. Defaults are those of the
    paper: 8 experts of rank 16, of which a token gets 2, in the feed-forward layers, and a plain LoRA of rank 16 in
    attention; alpha 32, dropout 0.05, no balance loss.

    Args:
        r: rank of EACH expert.
        num_experts: experts per layer, not counting shared ones; no more than `top_k` of them is dense routing.
        num_experts_pattern: module name or regex to number of experts. None: 1 in attention, where the whole model is
            targeted (`target_modules` None or `"all-linear"`), as in the paper; where modules are listed, all get
            `num_experts`.
        top_k: experts per token, K.
        top_p: instead of K, the fewest experts whose probabilities add up to `top_p` (arXiv 2403.07652).
        router_bias: whether the router has the bias b.
        router_jitter: in training, the router's input is multiplied by numbers from [1 - jitter, 1 + jitter].
        num_shared_experts: experts of rank r beside the routed ones, with weight 1 for every token (MedCare, arXiv
            2406.17484).

    See `TokenRoutedConfig` and `MoeConfig` for the other fields.

    Raises:
        ValueError: see `MoeConfig`.

    Example:
        >>> config = MoLoraConfig(task_type="CAUSAL_LM", r=16, num_experts=8, top_k=2)
        >>> model = get_peft_model(base_model, config)
        >>> model(**batch)
    """

    r: int = 16
    lora_dropout: float = 0.05
    num_experts_pattern: dict[str, int] | None = None  # type: ignore[assignment]  # None until the model is known
    top_k: int = 2
    top_p: float | None = None
    router_bias: bool = True
    router_jitter: float = 0.0
    num_shared_experts: int = 0

    def __post_init__(self) -> None:
        recipe = self.num_experts_pattern is None
        super().__post_init__()
        self.num_experts_pattern = None if recipe else self.num_experts_pattern
        self.peft_type = PeftMoeType.MOLORA
        check_count("r", self.r, "the rank of an expert")
        check_count("top_k", self.top_k, "the number of experts per token")
        check_flag("router_bias", self.router_bias)
        check_fraction("router_jitter", self.router_jitter, "how far the router's input is moved", high=0.99)
        check_count("num_shared_experts", self.num_shared_experts, "a number of experts", low=0)
        if self.top_p is not None:
            check_fraction("top_p", self.top_p, "a sum of probabilities", low=0.01, high=1)
        self._check_selection()

    def _check_selection(self) -> None:
        most = max(self.num_experts, *(self.num_experts_pattern or {"": 1}).values())
        if self.num_shared_experts and most == 1:
            raise ValueError(
                f"num_shared_experts={self.num_shared_experts} stand beside routed experts, and num_experts=1 has "
                f"none; a plain LoRA of the same size has r={self.r * (self.num_shared_experts + 1)}."
            )
        if self.num_experts > 1 and not self.num_experts_pattern:
            self.check_switch(self.num_experts)
        if self.top_p is None and self.top_k == 1 < most:
            rest = "only the balance loss trains it" if self.coefficients else "it stays as it was drawn"
            warnings.warn(
                "top_k=1: the weight of the one expert is 1 whatever its score, so the task loss gives the router no "
                f"gradient; {rest}. Use top_k=2 or more.",
                UserWarning,
                stacklevel=4,
            )

    def check_switch(self, num_experts: int) -> None:
        """Raise a ValueError if a switch loss would have no gradient in a layer with this number of experts."""
        dense = self.top_k >= num_experts if self.top_p is None else self.top_p == 1
        if dense and "switch" in self.coefficients:
            chosen = f"top_k={self.top_k} of {num_experts} experts" if self.top_p is None else "top_p=1"
            raise ValueError(
                f"balance_loss={self.balance_loss!r}: 'switch' counts which experts are chosen, and {chosen} chooses "
                "all, so that it has no gradient; use 'variance' or 'cv2', or choose fewer."
            )

    def resolve(self, keys: Sequence[str]) -> None:
        if self.num_experts_pattern is not None:
            return
        whole = self.target_modules is None or self.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND
        self.num_experts_pattern = {ATTENTION: 1} if whole and self.has_attention(keys) else {}

    @staticmethod
    def has_attention(keys: Sequence[str]) -> bool:
        """Whether a model has modules inside something called attention."""
        return any(MoLoraConfig.at({ATTENTION: 1}, key, 0) for key in keys)

    def routed_at(self, key: str) -> int:
        """Number of experts that the router of a module chooses from; 1 is no router."""
        return int(self.at(self.num_experts_pattern or {}, key, self.num_experts))

    def experts_at(self, key: str) -> Experts:
        r = int(self.at(self.rank_pattern, key, self.r))
        n = self.routed_at(key)
        n += self.num_shared_experts if n > 1 else 0
        return Experts(ranks=(r,) * n, scaling=(self._scaling(key, r),) * n)
