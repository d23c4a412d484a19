"""Config of Med-MoE-LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from typing import Any, ClassVar, Literal

from ..checks import as_names, check_choice, check_count, check_flag, check_fraction
from ..config import Experts, PeftMoeType
from ..routing.gates import COLDEST
from ..schedule import check_schedule, experts_per_layer, layer_of, stacks
from ..token_routed import TokenRoutedConfig

MODES = ("frozen", "regularized", "general")


@dataclass
class MedMoeLoraConfig(TokenRoutedConfig):
    """Med-MoE-LoRA: `h = W0 x + Σ_i softmax(W_g x / τ)_i · (alpha_i / r_i) B_i A_i x` (arXiv 2601.07935, eq. 1 to 5).

    Every token gets all experts of a layer, as much as its router says, with a learnt temperature τ. Deeper layers have
    more experts, experts have different ranks, and a base expert stands for the base model. Defaults are the paper's
    where it states them; see docs/medmoelora.md for the others.

    Args:
        expert_schedule: special experts per layer: `"ascending"`: from 2 to `num_experts` by eq. 2 with γ = 2;
            `"uniform"`: `num_experts` everywhere; `"descending"`: ascending upside down; `{"type": "power", "min": 2,
            "max": 8, "gamma": 1.5}`: eq. 2; `{"type": "bands", "bands": [[0, 10, 2], [10, 19, 4], [19, 32, 8]]}`:
            layers counted from 0, the second number excluded; or a list with a number for each layer. Modules outside
            of numbered layers get `num_experts`.
        experts_per_layer: the schedule as it came out for the model, by stack of layers; set when the adapter is made
            and saved with it.
        num_experts: the largest number of the named schedules.
        num_experts_pattern: module name or regex to number of special experts, against the schedule.
        expert_ranks: ranks r_i, given to the special experts of a layer in turn.
        lora_alpha: None is `2 r_i` for each expert (the paper), a scaling of 2; a number is the alpha of all.
        num_base_experts: base experts in each layer, beside the special ones.
        base_expert_mode: `"frozen"`: the base expert is zero, so its weight is what stays with the base model; it has
            no matrices. `"regularized"`: it is trained, with `base_coefficient · ‖ΔW_base‖²` as a loss. `"general"`:
            it is trained and meant for the rows of `general_tasks`, which a localized loss of weight
            `base_coefficient` pulls to it and keeps from the others.
        base_expert_rank: rank of a trained base expert; None is the smallest of `expert_ranks`.
        base_coefficient: weight of the loss of `base_expert_mode`.
        general_tasks: names of the tasks in `tasks` whose rows are general data.
        temperature: τ at the start.
        learn_temperature: whether τ is trained.
        inference_top_k: outside of training, keep the K experts with the largest weights, renormalised; None for all,
            as in training.

    See `TokenRoutedConfig` and `MoeConfig` for the other fields.

    Raises:
        ValueError: see `MoeConfig`; also a schedule that does not fit the model.

    Example:
        >>> config = MedMoeLoraConfig(task_type="CAUSAL_LM", num_experts=8, expert_ranks=[8, 16, 32])
        >>> model = get_peft_model(base_model, config)
        >>> model(**batch)
    """

    alpha_by_rank: ClassVar[bool] = True

    lora_alpha: float | None = None  # type: ignore[assignment]  # None: by rank
    lora_dropout: float = 0.05
    balance_loss: str | dict[str, float] = "variance"
    expert_schedule: str | dict[str, Any] | list[int] = "ascending"
    experts_per_layer: dict[str, list[int]] | None = None
    expert_ranks: list[int] | int = field(default_factory=lambda: [8, 16, 32])
    num_base_experts: int = 1
    base_expert_mode: Literal["frozen", "regularized", "general"] = "frozen"
    base_expert_rank: int | None = None
    base_coefficient: float = 0.01
    general_tasks: list[str] | None = None
    temperature: float = 1.0
    learn_temperature: bool = True
    inference_top_k: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftMoeType.MEDMOELORA
        self._is_for_one_model = False  # no field: whether experts_per_layer was worked out, and not given or loaded
        check_schedule(self.expert_schedule)
        if isinstance(self.expert_schedule, tuple):
            self.expert_schedule = list(self.expert_schedule)  # as it is when it has been loaded
        self._check_ranks()
        self._check_base()
        check_flag("learn_temperature", self.learn_temperature)
        check_fraction("temperature", self.temperature, "the temperature at the start", low=2 * COLDEST)
        if self.inference_top_k is not None:
            check_count("inference_top_k", self.inference_top_k, "the number of experts per token")
        if "switch" in self.coefficients:
            raise ValueError(
                f"balance_loss={self.balance_loss!r}: 'switch' counts which experts are chosen, and here every token "
                "gets all, so that it has no gradient; use 'variance' or 'cv2'."
            )

    def _check_ranks(self) -> None:
        if not self._ranks:
            raise ValueError("expert_ranks=[] has no rank; give one for all experts, or a list to take in turn.")
        for rank in self._ranks:
            check_count("expert_ranks", rank, "the rank of an expert")
        if isinstance(self.expert_ranks, tuple):
            self.expert_ranks = list(self.expert_ranks)
        if self.experts_per_layer is not None:
            given = self.experts_per_layer
            lists = isinstance(given, dict) and all(
                isinstance(k, str) and isinstance(v, list) for k, v in given.items()
            )
            if not lists:
                raise ValueError(f"experts_per_layer={given!r}; it is set by itself, leave it out.")
            for stack, counts in given.items():
                for i, count in enumerate(counts):
                    check_count(f"experts_per_layer[{stack!r}][{i}]", count, "a number of experts")

    def _check_base(self) -> None:
        check_choice("base_expert_mode", self.base_expert_mode, MODES)
        check_count("num_base_experts", self.num_base_experts, "a number of experts", low=0)
        check_fraction("base_coefficient", self.base_coefficient, "the weight of a loss")
        if self.general_tasks is not None:
            self.general_tasks = as_names("general_tasks", self.general_tasks, may_be_empty=True)
        if self.base_expert_rank is not None:
            check_count("base_expert_rank", self.base_expert_rank, "the rank of the base expert")
        trained = self.base_expert_mode != "frozen"
        if trained and self.num_base_experts == 0:
            raise ValueError(
                f"base_expert_mode={self.base_expert_mode!r} trains base experts, and num_base_experts=0; give 1, or "
                "base_expert_mode='frozen'."
            )
        if self.base_expert_rank is not None and not trained:
            raise ValueError(
                f"base_expert_rank={self.base_expert_rank}: a frozen base expert has no matrices; use base_expert_mode="
                "'regularized' or 'general', or leave the rank out."
            )
        if (self.base_expert_mode == "general") != bool(self.general_tasks):
            raise ValueError(
                f"base_expert_mode={self.base_expert_mode!r} and general_tasks={self.general_tasks!r}: mode "
                "'general' trains the base expert on rows of general data; give both, with tasks=[...], or neither."
            )
        unknown = sorted(set(self.general_tasks or ()) - set(self.task_names))
        if unknown or (self.general_tasks and not set(self.task_names) - set(self.general_tasks)):
            raise ValueError(
                f"general_tasks={self.general_tasks!r} and tasks={self.tasks!r}: general tasks are some of the "
                f"tasks, and not all; unknown: {unknown}."
            )
        if self.base_expert_mode == "general" and "localized" in self.coefficients:
            raise ValueError(
                f"base_expert_mode='general' with balance_loss={self.balance_loss!r}: it brings the localized loss "
                "itself; choose another balance_loss."
            )

    def resolve_layers(self, keys: Sequence[str], targets: Sequence[str]) -> None:
        of_targets = {layer[0] for layer in map(layer_of, targets) if layer}
        lengths = {stack: length for stack, length in stacks(keys).items() if stack in of_targets}
        if self.experts_per_layer is None:
            self._is_for_one_model = True
            self.experts_per_layer = self._scheduled(lengths)
        saved = self._lengths
        if any(saved.get(stack) != length for stack, length in lengths.items()):
            raise ValueError(
                f"experts_per_layer is for layers {saved} and the targeted ones of this model are {lengths}: the "
                "adapter was made for another base model, or for another class of it. To make a new one, leave "
                "experts_per_layer out."
            )

    @property
    def _lengths(self) -> dict[str, int]:
        return {stack: len(counts) for stack, counts in (self.experts_per_layer or {}).items()}

    def _scheduled(self, lengths: Mapping[str, int]) -> dict[str, list[int]]:
        return {
            stack: experts_per_layer(self.expert_schedule, length, self.num_experts, stack=stack or "the model")
            for stack, length in lengths.items()
        }

    def for_model(self, keys: Sequence[str]) -> MedMoeLoraConfig:
        """This config for a model with layers like those that it was made for; else another, as this one was given.

        So one config makes adapters of several models, and of each knows how many experts its layers have.
        """
        if not self._is_for_one_model:
            return self
        lengths = self._lengths
        alike = lengths == stacks(keys) and self.experts_per_layer == self._scheduled(lengths)
        return self if alike else replace(self, experts_per_layer=None)

    def routed_at(self, key: str) -> int:
        """Number of special experts of a module, beside its base experts."""
        layer = layer_of(key)
        stack = (self.experts_per_layer or {}).get(layer[0]) if layer else None
        default = stack[layer[1]] if stack and layer else self.num_experts
        return int(self.at(self.num_experts_pattern, key, default))

    @property
    def base_is_empty(self) -> bool:
        """Whether base experts have no matrices."""
        return self.base_expert_mode == "frozen"

    def experts_at(self, key: str) -> Experts:
        ranks = tuple(islice(cycle(self._ranks), self.routed_at(key)))
        rank = int(self.at(self.rank_pattern, key, 0))
        if rank:
            ranks = (rank,) * len(ranks)
        if not self.base_is_empty:
            ranks = (self.base_expert_rank or min(self._ranks),) * self.num_base_experts + ranks
        alphas = [self.lora_alpha or 2 * r for r in ranks]
        return Experts(ranks, tuple(self._scaling(key, r, alpha) for r, alpha in zip(ranks, alphas, strict=True)))

    @property
    def _ranks(self) -> list[int]:
        return list(self.expert_ranks) if isinstance(self.expert_ranks, (list, tuple)) else [self.expert_ranks]
