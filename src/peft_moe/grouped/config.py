"""Config of AT-MoE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..checks import check_choice, check_count, check_flag, check_fraction, is_number, is_whole
from ..config import Experts, MoeConfig, PeftMoeType
from ..routing import Control, control_of, plain
from .sources import Expert, check_source

GENERAL = "general_expert"
CONTROLS = ("weights", "group_weights", "off", "mix")  # arguments that fix weights


@dataclass
class GroupedMoeConfig(MoeConfig):
    """AT-MoE: `y = W0 x + (λ Σ_g Σ_m W'_G[g] W'_D[g, m] ΔW_gm + (1 - λ) ΔW_general) x` (arXiv 2410.10896, eq. 1).

    Trained LoRAs are the experts ΔW. They stay as they are, and a router in each transformer block is trained to weigh
    groups of them and the experts within each group, by what enters the block. The paper states no values; the defaults
    are ours, and docs/at_moe.md has the reasons.

    Args:
        groups: the experts by group and name: `{"function": {"triage": SOURCE, ...}, "style": {...}}`. A source is a
            folder or Hub id of a stock LoRA; a dict with that as `source` and, if they apply, `revision`, `subfolder`
            and `task` (for a task of a MOELoRA adapter); or None for a new expert. A list of names is new experts.
            When the adapter has been made, every source says what was read: `sha256` of the weights, and the `commit`
            on the Hub.
        general_expert: the source of the general expert; None for no general expert, and λ = 1.
        mix: λ, the share of the mixture beside the general expert, from 0 to 1; None is 0.5, and 1 without one.
        learn_mix: train λ, a number for each block that starts at `mix`.
        router_input: `"token"`: each token is routed by itself; `"prompt"`: a row is routed by the mean over its
            prompt, and its answer's tokens as the prompt was.
        within_group: what weighs experts within a group: `"projection"` of what the router reads (W_D as a matrix);
            `"static"`: numbers that are trained, the same for all inputs.
        flat_routing: one softmax over all experts instead of two; `within_group` then is what weighs them.
        group_temperature, expert_temperature: τ_G and τ_D.
        router_norm: divide what the router reads by its root mean square, token by token.
        train_experts: train the experts too; needed where some are new.
        r, lora_alpha: of new experts.
        lora_dropout: of all experts, with `train_experts`.
        target_modules: of new experts; others adapt what they were trained for, so leave it out where there are none.
        check_base_model: refuse experts that were trained on a base model of another name.
        num_experts: counted from `groups` and `general_expert`; leave it out.
        group_weights: what `set_group_weights(..., store=True)` has fixed: its arguments.
        expert_layout: ranks and scalings of the experts by module, set when the adapter is made and saved with it.
        expert_order: `group/name` of the experts in the order of `groups`, set by itself: a saved config has the names
            in `groups` in alphabetical order.

    See `MoeConfig` for the other fields.

    Raises:
        ValueError: see `MoeConfig`; also sources that are none, and fields that contradict each other.

    Example:
        >>> config = GroupedMoeConfig(
        ...     task_type="CAUSAL_LM",
        ...     groups={"function": {"triage": "me/triage-lora"}, "style": {"concise": "loras/concise"}},
        ...     general_expert={"source": "me/general-lora", "revision": "v2"},
        ... )
        >>> model = get_peft_model(base_model, config)
    """

    num_experts: int | None = None  # type: ignore[assignment]  # None: counted
    r: int = 8
    lora_alpha: float = 16
    groups: dict[str, Any] = field(default_factory=dict)
    general_expert: Any = None
    mix: float | None = None
    learn_mix: bool = False
    router_input: Literal["token", "prompt"] = "token"
    within_group: Literal["projection", "static"] = "projection"
    flat_routing: bool = False
    group_temperature: float = 1.0
    expert_temperature: float = 1.0
    router_norm: bool = True
    train_experts: bool = False
    check_base_model: bool = True
    group_weights: dict[str, Any] | None = None
    expert_layout: list[dict[str, Any]] | None = None
    expert_order: list[str] | None = None

    def __post_init__(self) -> None:
        self._given: dict[str, Any] | None = None  # no field: it is not saved
        self.groups = in_order(check_groups(self.groups), self.expert_order)
        self.expert_order = [f"{group}/{name}" for group, names in self.names.items() for name in names]
        self.general_expert = check_source("The general expert", self.general_expert)
        if self.num_experts is not None and not (is_whole(self.num_experts) and self.num_experts == len(self.sources)):
            raise ValueError(f"num_experts={self.num_experts!r}, and groups name {len(self.sources)}; leave it out.")
        self.num_experts = len(self.sources)
        super().__post_init__()
        self.peft_type = PeftMoeType.GROUPEDMOE
        check_choice("router_input", self.router_input, ("token", "prompt"))
        check_choice("within_group", self.within_group, ("projection", "static"))
        for name in ("learn_mix", "flat_routing", "router_norm", "train_experts", "check_base_model"):
            check_flag(name, getattr(self, name))
        for name in ("group_temperature", "expert_temperature"):
            check_fraction(name, getattr(self, name), "a temperature", low=0.01)
        check_count("r", self.r, "the rank of a new expert")
        self._check_mix()
        self._check_layout()
        self._check_new()
        if self.lora_dropout and not self.train_experts:
            raise ValueError(
                f"lora_dropout={self.lora_dropout!r} drops inputs of experts in training, and these are frozen; set "
                "train_experts=True, or leave it out."
            )
        for name in ("rank_pattern", "alpha_pattern", "num_experts_pattern"):
            if pattern := getattr(self, name):
                raise ValueError(
                    f"{name}={pattern!r}: experts bring their own ranks and alphas; leave the *_pattern fields out."
                )
        if self.group_weights is not None:
            try:
                self.control(self.group_weights)
            except ValueError as error:
                raise ValueError(f"group_weights={self.group_weights!r}: {error}") from None
            self.group_weights = plain(self.group_weights)

    def _check_mix(self) -> None:
        if self.mix is not None:
            check_fraction("mix", self.mix, "the share of the mixture", high=1)
        if self.general_expert is None and (self.learn_mix or self.mix not in (None, 1)):
            raise ValueError(
                f"mix={self.mix!r} and learn_mix={self.learn_mix} share between the mixture and a general expert, and "
                "there is none; give general_expert, or leave them out."
            )
        if self.learn_mix and self.mix in (0, 1):
            raise ValueError(
                f"mix={self.mix!r} is where learn_mix cannot start, a sigmoid is never there; use 0.01 to 0.99."
            )

    def _check_layout(self) -> None:
        """Refuse the field that a saved config brings if it is not as it was written."""
        if self.expert_layout is None:
            return
        whole = (
            isinstance(self.expert_layout, list)
            and self.expert_layout
            and all(
                isinstance(entry, Mapping)
                and entry.keys() == {"ranks", "scaling", "modules"}
                and all(isinstance(values, (list, tuple)) for values in entry.values())
                and all(isinstance(key, str) for key in entry["modules"])
                and all(is_whole(rank) and rank >= 0 for rank in entry["ranks"])
                and all(map(is_number, entry["scaling"]))
                and len(entry["ranks"]) == len(entry["scaling"]) == len(self.sources)
                for entry in self.expert_layout
            )
        )
        if not whole:
            raise ValueError(
                f"expert_layout={self.expert_layout!r} does not say ranks, scaling and modules of {len(self.sources)} "
                "experts; it is written when an adapter is saved: leave it out of a new config, and as it was in a "
                "saved one."
            )

    def _check_new(self) -> None:
        if self.new_experts and not self.train_experts:
            raise ValueError(
                f"Experts {self.new_experts} have no source, and untrained ones add nothing; name trained LoRAs, or "
                "set train_experts=True."
            )
        if self.layers_to_transform is not None and self.target_modules is None and any(self.sources.values()):
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform!r} selects among target_modules, and trained experts "
                "adapt the layers that they were trained for; leave it out."
            )
        if self.target_modules is not None and not self.new_experts and self.expert_layout is None:
            raise ValueError(
                f"target_modules={self.target_modules!r} is for new experts; these adapt the modules that they were "
                "trained for, so leave it out."
            )

    @property
    def names(self) -> dict[str, list[str]]:
        """Names of the experts by group."""
        return {group: list(experts) for group, experts in self.groups.items()}

    @property
    def sources(self) -> dict[str, Any]:
        """The sources in the order of the experts in a layer, by `group/name`, the general one last."""
        found = {f"{g}/{name}": source for g, experts in self.groups.items() for name, source in experts.items()}
        return found | ({GENERAL: self.general_expert} if self.general_expert is not None else {})

    @property
    def new_experts(self) -> list[str]:
        """Those without a source."""
        return [name for name, source in self.sources.items() if source is None]

    @property
    def start_mix(self) -> float:
        """λ at the start."""
        return (1.0 if self.general_expert is None else 0.5) if self.mix is None else self.mix

    def control(self, given: object) -> Control:
        """What `set_group_weights` fixes when it is given these arguments.

        Raises:
            ValueError: they are no such arguments, or contradict each other or the adapter.
        """
        if not isinstance(given, Mapping) or not given.keys() <= set(CONTROLS):
            raise ValueError(
                f"{given!r} fixes no weights; give a mapping of some of {list(CONTROLS)}, as for set_group_weights."
            )
        if given.get("mix") is not None and self.general_expert is None:
            raise ValueError(f"mix={given['mix']!r}: the adapter has no general expert to share with; leave mix out.")
        return control_of(self.names, **given)

    def experts_at(self, key: str) -> Experts:
        for entry in self.expert_layout or ():
            if key in entry["modules"]:
                return Experts(tuple(entry["ranks"]), tuple(entry["scaling"]))
        raise ValueError(
            f"Module {key!r} has no experts in this adapter, which was made for a base model with other modules; "
            "make a new config from the experts' sources."
        )

    def lay_out(self, experts: Sequence[Expert | None], keys: Sequence[str]) -> None:
        """Settle ranks and scalings for the modules at `keys`; None stands for new experts."""
        layout: dict[tuple[tuple[int, ...], tuple[float, ...]], list[str]] = {}
        for key in keys:
            ranks, scaling = [], []
            for expert in experts:
                lora = expert.layers.get(key) if expert else None
                ranks.append(self.r if expert is None else len(lora.a) if lora else 0)
                scaling.append(self._scaling(key, self.r) if expert is None else float(lora.scaling) if lora else 1.0)
            layout.setdefault((tuple(ranks), tuple(scaling)), []).append(key)
        self.expert_layout = [
            {"ranks": list(ranks), "scaling": list(scaling), "modules": modules}
            for (ranks, scaling), modules in layout.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        if any(isinstance(source, Expert) for source in self.sources.values()):
            raise ValueError("The config holds experts that are in memory; make the adapter first, and save that.")
        return dict(super().to_dict())

    def check_layout(self, keys: Sequence[str]) -> None:
        """Raise a ValueError unless the adapter has experts for just the modules at `keys`."""
        known = {key for entry in self.expert_layout or () for key in entry["modules"]}
        if known != set(keys):
            raise ValueError(
                f"The adapter has experts for {len(known)} modules and the model has {len(keys)} of such names; "
                f"they differ in {sorted(known ^ set(keys))[0]!r}. It was made for another base model, or for another "
                "class of it."
            )

    @property
    def is_new(self) -> bool:
        """Whether sources are to be read: not for the config of a saved adapter."""
        return self.expert_layout is None or self._given is not None

    @property
    def as_given(self) -> GroupedMoeConfig:
        """The config as it was before what was read was noted in it, so that it can make another adapter."""
        return self if self._given is None else replace(self, **self._given)

    def note_origins(self, origins: Mapping[str, Any]) -> None:
        """Put what has been read, by name as in `sources`, in the place of the sources."""
        # Experts that are in memory are not kept for another time: the model would hold them twice.
        if self._given is None and not any(isinstance(source, Expert) for source in self.sources.values()):
            fields = ("groups", "general_expert", "target_modules")
            self._given = {name: getattr(self, name) for name in fields} | {"expert_layout": None}
        self.groups = {
            group: {name: origins[f"{group}/{name}"] for name in part} for group, part in self.groups.items()
        }
        self.general_expert = origins.get(GENERAL)


def in_order(groups: dict[str, dict[str, Any]], order: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """The same groups, and experts within them, in the order of a list of `group/name`; None for theirs.

    Raises:
        ValueError: the list has other names.
    """
    if order is None:
        return groups
    names = [f"{group}/{name}" for group, experts in groups.items() for name in experts]
    if not isinstance(order, (list, tuple)) or sorted(map(str, order)) != sorted(names):
        raise ValueError(f"expert_order={order!r} does not have the names that groups have; leave it out.")
    found: dict[str, dict[str, Any]] = {}
    for group, _, name in (entry.partition("/") for entry in order):
        found.setdefault(group, {})[name] = groups[group][name]
    return found


def check_groups(groups: Any) -> dict[str, dict[str, Any]]:
    """The `groups` field with every source in canonical form; raise a ValueError if it is none."""
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(f"groups={groups!r}; give {{'group': {{'expert': 'folder or Hub id', ...}}, ...}}.")
    found = {}
    for group, experts in groups.items():
        if isinstance(experts, (list, tuple)) and all(isinstance(name, str) for name in experts):
            if len(set(experts)) < len(experts):
                raise ValueError(f"groups[{group!r}]={experts!r} names an expert twice.")
            experts = dict.fromkeys(experts)
        if not isinstance(experts, Mapping) or not experts:
            raise ValueError(f"groups[{group!r}]={experts!r}; give a mapping of at least one expert to its source.")
        for name in (group, *experts):
            if not isinstance(name, str) or not name or "/" in name:
                raise ValueError(
                    f"{name!r} in groups is no name; use a text without '/', which stands between group and expert."
                )
        found[group] = {name: check_source(f"Expert {group}/{name}", source) for name, source in experts.items()}
    return found
