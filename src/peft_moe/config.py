"""What all expert configs share: the LoRA fields that have a meaning with experts, and the expert fields."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

from peft.utils.other import get_pattern_key

from .checks import (
    as_names,
    check_count,
    check_flag,
    check_layers,
    check_modules,
    check_pattern,
    check_regex,
    check_text,
    check_token_indices,
    is_number,
)
from .saved import SavedConfig


class PeftMoeType(str, enum.Enum):
    """Values of `peft_type`. Members compare and hash like the strings that stand in `adapter_config.json`."""

    MOELORA = "MOELORA"
    MOLORA = "MOLORA"
    MEDMOELORA = "MEDMOELORA"
    GROUPEDMOE = "GROUPEDMOE"


class Experts(NamedTuple):
    """The experts of one layer: the rank of each and the factor on each."""

    ranks: tuple[int, ...]
    scaling: tuple[float, ...]


INITS = (True, False, "normal", "kaiming", "gaussian")
BIASES = ("none", "all", "lora_only")  # peft's


@dataclass
class MoeConfig(SavedConfig):
    """Fields shared by the configs of this package; use one of its subclasses.

    Args:
        target_modules: names of the linear modules to extend: a list of name endings, a regex for whole names, or
            `"all-linear"`. None is every linear layer in the blocks of a transformers model, as the paper has it.
        exclude_modules: modules to leave alone, as a list of name endings or a regex.
        layers_to_transform: layer indices to extend, with `target_modules` given as a list; None for all layers.
        layers_pattern: name of the list of layers, where `layers_to_transform` needs it.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability of dropping an element of an adapter's input, drawn once for all experts of a layer.
        rank_pattern: module name or regex to rank, where it differs from `r`.
        alpha_pattern: module name or regex to alpha, where it differs from `lora_alpha`.
        use_rslora: divide alpha by the square root of the rank (arXiv 2312.03732), not by the rank.
        init_lora_weights: True for the method's own; `"normal"` A ~ N(0, 0.01²); `"kaiming"` A as in peft's LoRA;
            `"gaussian"` A ~ N(0, 1/r²) per expert; B is zero in all of these. False draws B too, so that a new adapter
            changes the output (for tests).
        num_experts: experts per layer; 1 is a plain LoRA with no gate.
        num_experts_pattern: module name or regex to number of experts, where it differs from `num_experts`.
        modules_to_save: modules to train and save whole, such as a new classification head.
        trainable_token_indices: token ids whose embeddings are trained.
        fan_in_fan_out: the base weight is stored (in, out); set by itself for GPT-2's `Conv1D`.
        bias: biases of the base model to train and save with the adapter, as in peft's LoRA: `"none"`, `"all"`, or
            `"lora_only"`, those of the targeted modules. They are one for all experts and tasks.

    Raises:
        ValueError: a value out of range or fields that contradict each other; the message has the value, the rule and a
            remedy.
    """

    alpha_by_rank: ClassVar[bool] = False  # whether lora_alpha may be None, for one that follows each expert's rank

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    init_lora_weights: bool | Literal["normal", "kaiming", "gaussian"] = True
    num_experts: int = 8
    num_experts_pattern: dict[str, int] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"

    def __post_init__(self) -> None:
        self._check_kinds()
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))  # as peft keeps it
        self._check_targets()
        self._check_numbers()

    def _check_kinds(self) -> None:
        """Refuse what is not of the kind that a field is; what peft and JSON take in one form only is put into it."""
        for name in ("task_type", "peft_version", "moe_version", "base_model_name_or_path", "revision"):
            check_text(name, getattr(self, name))
        for name in ("inference_mode", "use_rslora", "fan_in_fan_out"):
            check_flag(name, getattr(self, name))
        for name in ("target_modules", "exclude_modules"):
            if getattr(self, name) is not None:
                check_modules(name, getattr(self, name))
        if self.layers_to_transform is not None:
            check_layers(self.layers_to_transform)
        if isinstance(self.layers_to_transform, tuple):
            self.layers_to_transform = list(self.layers_to_transform)
        if self.layers_pattern is not None and not isinstance(self.layers_pattern, str):
            self.layers_pattern = as_names("layers_pattern", self.layers_pattern, may_be_empty=True)
        for regex in [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or ():
            check_regex("layers_pattern", regex)
        if self.modules_to_save is not None:
            self.modules_to_save = as_names("modules_to_save", self.modules_to_save, may_be_empty=True)
            for regex in self.modules_to_save:
                check_regex("modules_to_save", regex)
        if self.trainable_token_indices is not None:
            check_token_indices(self.trainable_token_indices)
        for name in ("rank_pattern", "alpha_pattern", "num_experts_pattern"):
            setattr(self, name, check_pattern(name, getattr(self, name)))

    def _check_targets(self) -> None:
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} selects among listed modules, and target_modules="
                        f"{self.target_modules!r} is a string; give a list, or put the layers into the regex."
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} names the list that layers_to_transform indexes; "
                "give layers_to_transform too, or neither."
            )

    def _check_numbers(self) -> None:
        check_count("num_experts", self.num_experts, "a number of experts")
        for field_name, what in (("num_experts_pattern", "a number of experts"), ("rank_pattern", "a rank")):
            for key, value in getattr(self, field_name).items():
                check_count(f"{field_name}[{key!r}]", value, what)
        if not is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"lora_dropout={self.lora_dropout!r} is a probability; give a number from 0 up to, not including, 1."
            )
        for name, alpha in [
            *([("lora_alpha", self.lora_alpha)] if self.lora_alpha is not None or not self.alpha_by_rank else []),
            *((f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items()),
        ]:
            if not is_number(alpha) or alpha <= 0:
                raise ValueError(f"{name}={alpha!r} scales the adapter; give a number above 0.")
        named = isinstance(self.init_lora_weights, str) and self.init_lora_weights in INITS
        if not isinstance(self.init_lora_weights, bool) and not named:
            raise ValueError(f"init_lora_weights={self.init_lora_weights!r} is not known; use one of {INITS}.")
        if not isinstance(self.bias, str) or self.bias not in BIASES:
            raise ValueError(f"bias={self.bias!r} is not known; use one of {BIASES}.")

    def experts_at(self, key: str) -> Experts:
        """The experts of the module at `key`, after patterns.

        Raises:
            ValueError: rank and number of experts of that module do not fit.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not say how its experts are made; use one of its subclasses."
        )

    def resolve(self, keys: Sequence[str]) -> None:
        """Settle what depends on the model, given the names of its modules; the result is saved with the adapter."""

    def resolve_layers(self, keys: Sequence[str], targets: Sequence[str]) -> None:
        """The same for what depends on the names of the targeted modules too."""

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks by id; none where the adapter knows no tasks."""
        return []

    @property
    def needs_tasks(self) -> bool:
        """Whether a call has to have a task, which then is one of `task_names`."""
        return False

    def _scaling(self, key: str, rank: int, default_alpha: float | None = None) -> float:
        alpha = self.at(self.alpha_pattern, key, self.lora_alpha if default_alpha is None else default_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    @staticmethod
    def at(pattern: Mapping[str, float], key: str, default: float) -> float:
        """The value of a `*_pattern` field for the module at `key`, matched as peft matches its own."""
        return pattern.get(get_pattern_key(list(pattern), key), default)


def names_of(tasks: list[str] | int | None) -> list[str]:
    """Names of the tasks by id; `"0"`, `"1"`, … where only their number is known."""
    return [str(i) for i in range(tasks)] if isinstance(tasks, int) else tasks or []
