"""The stock LoRA that a method is to be compared with: of the same number of parameters, or of the same rank at work.

Independent comparisons find mixtures of LoRA experts level with a LoRA of the same size more often than their papers
do, so a score without that LoRA's beside it says little.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from .config import MoeConfig
from .medmoe import MedMoeLoraConfig
from .molora import MoLoraConfig
from .outline import Layer, base_of, is_conv1d, outline, tuner_of
from .schedule import layer_of
from .targets import modules_outside_adapters

By = Literal["parameters", "active"]

# Fields that mean the same in a stock LoRA.
CARRIED = (
    "task_type", "revision", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "lora_dropout", "use_rslora", "bias", "trainable_token_indices",
)  # fmt: skip


class Match(NamedTuple):
    """A stock LoRA that matches a method, and how well.

    Args:
        config: the LoRA's.
        ranks: its rank by name of the layer.
        parameters: numbers in its A and B.
        of_method: numbers that the method trains beside what both train (`modules_to_save`, tokens, biases): experts,
            those of AT-MoE too where they are frozen by now, and routers.
    """

    config: LoraConfig
    ranks: dict[str, int]
    parameters: int
    of_method: int

    @property
    def difference(self) -> int:
        """What the LoRA has more than the method; below 0 if it has less."""
        return self.parameters - self.of_method

    def __str__(self) -> str:
        low, high = min(self.ranks.values()), max(self.ranks.values())
        rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
        sign = f"{abs(self.difference):,} {'more' if self.difference > 0 else 'fewer'}"
        rest = "just as many" if not self.difference else f"{sign} ({self.difference / self.of_method:+.3%})"
        return (
            f"a stock LoRA of {rank} in {len(self.ranks)} layers, {self.parameters:,} parameters, and the method has "
            f"{self.of_method:,}: {rest}"
        )


def matched_lora_config(config: MoeConfig, model: nn.Module, match: By = "parameters") -> LoraConfig:
    """The stock LoRA to compare a method with, on the same layers and with the same scaling.

    Shapes are read and nothing else: the model stays as it is, may be on the meta device, and the method's adapter is
    not made. In a layer from `in` to `out` features, a rank is `in + out` parameters.

    `"parameters"`: as many as the method trains, or as few less as ranks allow. These are its experts' `Σ r_i (in +
    out)` and its routers, of which a shared one is spread over its layers in proportion to `in + out`. That makes an
    exact rank for each layer; each is rounded down or up, such that the total comes closest to the method's and not
    above it. Experts of AT-MoE count although they are frozen: they were trained before, the general one too, and the
    comparison is with all of that.

    `"active"`: in each layer, the rank that is at work for one token. MOELoRA: r. MoLoRA: `(top_k + num_shared_experts)
    · r` where there is a router, r elsewhere. Med-MoE-LoRA: the sum of the experts' ranks; with `inference_top_k`, of
    that many largest, which is the most that can be at work outside of training. AT-MoE: the sum of the experts' ranks,
    with the general one; weights that `group_weights` has fixed, and groups it has switched off, change nothing in it.

    The factor on `B A` is the method's, alpha over rank, and where experts of a layer have different ones their mean
    weighted by rank. What a router multiplies it by is not in it. `init_lora_weights` is stock LoRA's own, unless the
    method's is False or `"gaussian"`, which both know.

    Args:
        config: of one of this package's methods; it is not changed.
        model: the base model, or a `PeftModel`, whose base is taken.
        match: what is to be the same.

    Returns:
        a config for `get_peft_model` with this base model: `rank_pattern` and `alpha_pattern` have names of its layers,
        from `^` to the end, so that no other name matches. `match_lora` returns the counts too.

    Raises:
        ValueError: a stock LoRA's config; an unknown `match`; no layer is targeted; the number of experts at work
            differs from token to token (MoLoRA's `top_p`) with `"active"`; what `get_peft_model` says of the config.

    Example:
        >>> config = MoLoraConfig(task_type="CAUSAL_LM", r=16, num_experts=8, top_k=2)
        >>> model = get_peft_model(base_model, matched_lora_config(config, base_model))
    """
    return match_lora(config, model, match).config


def match_lora(config: MoeConfig, model: nn.Module, match: By = "parameters") -> Match:
    """`matched_lora_config`, with the LoRA's ranks and the exact numbers of parameters beside the config."""
    tuner_of(config)  # refuses what is no config of ours
    if match not in get_args(By):
        raise ValueError(f"match={match!r} is not known; use one of {list(get_args(By))}.")
    given = config
    config, layers = outline(given, model)
    active = match == "active"
    ranks = {layer.key: _active_rank(config, layer) for layer in layers} if active else ranks_of_size(layers)
    lora = _lora_config(given, config, layers, ranks)
    _settle_targets(lora, config, ranks, [key for key, _ in modules_outside_adapters(base_of(model))])
    count = sum(ranks[layer.key] * layer.per_rank for layer in layers)
    return Match(lora, ranks, count, int(sum(layer.parameters for layer in layers)))


def _active_rank(config: MoeConfig, layer: Layer) -> int:
    ranks = layer.experts.ranks
    if isinstance(config, MoLoraConfig) and len(ranks) > 1:
        if config.top_p is not None:
            raise ValueError(
                f"top_p={config.top_p} gives tokens different numbers of experts, so that no one rank is at work; use "
                "match='parameters', or top_k."
            )
        return sum(ranks[: min(config.top_k, config.routed_at(layer.key)) + config.num_shared_experts])
    if isinstance(config, MedMoeLoraConfig) and config.inference_top_k is not None:
        return sum(sorted(ranks, reverse=True)[: config.inference_top_k])
    return layer.rank


def ranks_of_size(layers: Sequence[Layer]) -> dict[str, int]:
    """Whole ranks for layers whose exact ones have parts, such that the total comes closest from below."""
    exact = {layer.key: layer.parameters / layer.per_rank for layer in layers}
    ranks = {key: int(rank) for key, rank in exact.items()}
    left = int(sum((exact[layer.key] - ranks[layer.key]) * layer.per_rank for layer in layers))
    to_round: dict[int, list[str]] = {}
    for layer in sorted(layers, key=lambda layer: ranks[layer.key] - exact[layer.key]):  # the largest parts first
        if ranks[layer.key] != exact[layer.key]:
            to_round.setdefault(layer.per_rank, []).append(layer.key)
    for cost, number in fill({cost: len(keys) for cost, keys in to_round.items()}, left).items():
        for key in to_round[cost][:number]:
            ranks[key] += 1
    return ranks


def fill(available: Mapping[int, int], room: int) -> dict[int, int]:
    """How many to take of each size, of as many as there are, to fill the room as far as possible.

    Args:
        available: size to number.
        room: what the sum may not exceed.
    """
    mask, sums = (1 << (room + 1)) - 1, 1  # bit s of sums: a sum of s can be reached
    before: list[tuple[int, int, int]] = []
    for size, number in available.items():
        before.append((size, number, sums))
        step, rest = 1, number
        while rest:  # 1, 2, 4, … of them at once, and what is left: every number up to all of them
            step = min(step, rest)
            sums |= (sums << size * step) & mask
            step, rest = 2 * step, rest - step
    reached, taken = sums.bit_length() - 1, {}
    for size, number, without in reversed(before):
        taken[size] = next(n for n in range(number + 1) if n * size <= reached and without >> (reached - n * size) & 1)
        reached -= taken[size] * size
    return taken


def _lora_config(given: MoeConfig, config: MoeConfig, layers: Sequence[Layer], ranks: Mapping[str, int]) -> LoraConfig:
    """The LoRA of these ranks; `config` is settled for the model, and `given` is not."""
    alphas = {layer.key: _alpha(config, layer, ranks[layer.key]) for layer in layers}
    r, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    fields: dict[str, Any] = {name: _copied(getattr(config, name)) for name in CARRIED}
    init = given.init_lora_weights
    return LoraConfig(
        **fields,
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft takes fractions
        rank_pattern=exact_pattern({key: rank for key, rank in ranks.items() if rank != r}),
        alpha_pattern=exact_pattern({key: value for key, value in alphas.items() if value != alpha}),
        fan_in_fan_out=any(map(is_conv1d, layers)),
        modules_to_save=_copied(given.modules_to_save),  # peft adds to it
        init_lora_weights=init if init is False or init == "gaussian" else True,
    )


def _alpha(config: MoeConfig, layer: Layer, rank: int) -> float:
    """The alpha that gives a rank the factor of the layer's experts."""
    ranks, factors = layer.experts
    factor = sum(r * s for r, s in zip(ranks, factors, strict=True)) / layer.rank
    alpha = round(factor * (rank**0.5 if config.use_rslora else rank), 12)
    return int(alpha) if alpha == int(alpha) else alpha


def _copied(value: Any) -> Any:
    """A set as a list that is the same each time, and a list as another one."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return type(value)(value) if isinstance(value, (list, dict)) else value


def exact_pattern(values: Mapping[str, float]) -> dict[str, Any]:
    """A `rank_pattern` or `alpha_pattern` that gives these modules their values and matches no other name.

    peft looks for the end of a name. One key has the layers of a stack that have the same value.
    """
    found: dict[str, Any] = {}
    for value in dict.fromkeys(values.values()):
        for regex in regexes_of([key for key, own in values.items() if own == value]):
            found[f"^{regex}"] = value
    return found


def regexes_of(keys: Sequence[str]) -> list[str]:
    """Regexes of whole names: the same module of several layers of a stack is one."""
    indices: dict[tuple[str, str], list[str]] = {}
    whole: Callable[[str], str] = re.escape
    for key in keys:
        layer = layer_of(key)
        stack, index = ("", "") if layer is None else (f"{layer[0]}." if layer[0] else "", str(layer[1]))
        if not key.startswith(f"{stack}{index}"):  # such as "007"
            stack, index = "", ""
        indices.setdefault((stack, key[len(stack) + len(index) :]), []).append(index)
    return [
        f"{whole(stack)}{found[0] if len(found) == 1 else '(?:' + '|'.join(found) + ')'}{whole(rest)}"
        for (stack, rest), found in indices.items()
    ]


def _settle_targets(lora: LoraConfig, config: MoeConfig, ranks: Mapping[str, int], keys: Sequence[str]) -> None:
    """Name the layers one by one if the method's fields would have stock LoRA adapt others too."""
    if {key for key in keys if check_target_module_exists(config, key)} != set(ranks):
        lora.target_modules = "|".join(regexes_of(list(ranks)))
        lora.exclude_modules = lora.layers_to_transform = lora.layers_pattern = None
