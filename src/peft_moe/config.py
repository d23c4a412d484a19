"""What all expert configs share: the LoRA fields that have a meaning with experts, and the expert fields."""

from __future__ import annotations

import enum
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

from peft import PeftConfig
from peft.utils.other import get_pattern_key


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
class MoeConfig(PeftConfig):
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
        super().__post_init__()
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        self.num_experts_pattern = self.num_experts_pattern or {}
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # as peft keeps it
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        self._check_targets()
        self._check_numbers()

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
        if not isinstance(self.lora_dropout, (int, float)) or not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"lora_dropout={self.lora_dropout!r} is a probability; give a number from 0 up to, not including, 1."
            )
        for name, alpha in [
            *([("lora_alpha", self.lora_alpha)] if self.lora_alpha is not None or not self.alpha_by_rank else []),
            *((f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items()),
        ]:
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
                raise ValueError(f"{name}={alpha!r} scales the adapter; give a number above 0.")
        if not any(self.init_lora_weights is init for init in INITS[:2]) and self.init_lora_weights not in INITS[2:]:
            raise ValueError(f"init_lora_weights={self.init_lora_weights!r} is not known; use one of {INITS}.")
        if self.bias not in BIASES:
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


def check_tasks(tasks: object) -> list[str] | int:
    """The value of a `tasks` field; raise a ValueError unless it is a list of unique names or a number."""
    if isinstance(tasks, int):
        check_count("tasks", tasks, "a number of tasks or a list of names")
        return tasks
    # a set has no order that would outlive this process
    if not isinstance(tasks, (list, tuple)) or not tasks or not all(isinstance(t, str) and t for t in tasks):
        raise ValueError(f"tasks={tasks!r}; give a list of the tasks' names, or how many there are.")
    names = list(tasks)
    twice = sorted({t for t in names if names.count(t) > 1})
    if twice:
        raise ValueError(f"tasks names {twice} more than once; a task has one id, so name each once.")
    return names


def names_of(tasks: list[str] | int | None) -> list[str]:
    """Names of the tasks by id; `"0"`, `"1"`, … where only their number is known."""
    return [str(i) for i in range(tasks)] if isinstance(tasks, int) else tasks or []


def check_fraction(name: str, value: object, what: str, *, low: float = 0, high: float = math.inf) -> None:
    """Raise a ValueError unless `value` is a number with `low <= value <= high`, finite."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high:  # type: ignore[operator]
        limits = f"from {low:g} up" if math.isinf(high) else f"from {low:g} to {high:g}"
        raise ValueError(f"{name}={value!r} is {what}; give a number {limits}.")


def check_flag(name: str, value: object) -> None:
    """Raise a ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is a yes or no; give True or False.")


def check_count(name: str, value: object, what: str) -> None:
    """Raise a ValueError unless `value` is a whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} is {what}; give a whole number from 1 up.")


def warn_unmatched(pattern: dict[str, int], keys: list[str]) -> None:
    """Warn of `num_experts_pattern` keys that no targeted module has, as peft does for `rank_pattern`."""
    unmatched = [p for p in pattern if not any(get_pattern_key([p], key) == p for key in keys)]
    if unmatched:
        warnings.warn(
            f"num_experts_pattern keys {unmatched} match no targeted module and have no effect.",
            RuntimeWarning,
            stacklevel=2,
        )
