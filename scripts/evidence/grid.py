"""The runs of all experiments as data; what is done decides which can be named, so the list grows as results arrive.

Every function here is pure. A system's learning rate is the one with the best mean score on dev, seed 0; if that is the
lowest or the highest that was tried, the next beyond it is tried too. Final runs have that rate and other seeds, and
only they read the test split. Systems outside of the experiment `main` have no search of their own: they take the rate
that the system they change has in the instruction protocol.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from plan import Run, Scores, allowed, make, run_id, searched
from setups import Setup

Flags = dict[str, Any]

LORA: Flags = {"method": "lora", "r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
MOELORA: Flags = LORA | {"method": "moelora", "num_experts": 8}
MOLORA: Flags = MOELORA | {"method": "molora", "top_k": 2}
MEDMOELORA: Flags = {  # as recipes/medmoelora.yaml
    "method": "medmoelora", "expert_schedule": "ascending", "num_experts": 8, "expert_ranks": [8, 16, 32],
    "base_expert_mode": "frozen", "balance_loss": "variance", "balance_coefficient": 0.01, "lora_dropout": 0.0,
}  # fmt: skip
AT_MOE: Flags = {"method": "at_moe", "router_input": "token"}  # and the experts, see experts_of

# MOELoRA of rank 16 has the parameters (but for its gate) and the active rank of lora-r16. Med-MoE-LoRA has all its
# experts at work, and AT-MoE nine of rank 16, so that each has one LoRA of the same size by either measure. AT-MoE has
# read every row three times when it is done: for its task's expert, for the general one, and for its router.
SYSTEMS: dict[str, Flags] = {
    "lora-r16": LORA,
    "lora-per-task": LORA | {"per_device_train_batch_size": 2},  # 63 steps an adapter; 8 would be 16 steps
    "lora-like-molora-parameters": MOLORA | {"match_lora": "parameters"},
    "lora-like-molora-active": MOLORA | {"match_lora": "active"},
    "lora-like-medmoelora-parameters": MEDMOELORA | {"match_lora": "parameters"},
    "lora-like-at_moe-active": LORA | {"r": 144, "lora_alpha": 288},
    "lora-like-at_moe-passes": LORA | {"r": 144, "lora_alpha": 288, "num_train_epochs": 3},
    "moelora": MOELORA,
    "molora": MOLORA,
    "medmoelora": MEDMOELORA,
    "at_moe": AT_MOE,
}
PER_TASK, GENERAL = EXPERTS = ("lora-per-task", "lora-r16")  # whose adapters are AT-MoE's experts
TOLD = ("lora-per-task", "moelora")  # what tells tasks apart where the text does not
ASKED_AGAIN = ("lora-r16", "moelora", "at_moe")  # whose adapters answer composite rows too

Changes = dict[str, tuple[str, Flags]]  # by name, the system that is changed and the changes

ABLATIONS: Changes = {
    # gates of 1/8 that stay: eight experts of rank 2 and scaling 2 are then one of rank 16 and scaling 2/8
    "moelora-equal-gates": ("moelora", {"num_experts": 1, "lora_alpha": 4}),
    "moelora-gate-per-layer": ("moelora", {"gate_scope": "layer"}),
    "molora-k1": ("molora", {"top_k": 1}),
    "molora-k3": ("molora", {"top_k": 3}),
    # 4 experts in each of 30 layers are 120, and the ascending schedule has 110
    "medmoelora-uniform-schedule": ("medmoelora", {"expert_schedule": "uniform", "num_experts": 4}),
    "medmoelora-descending": ("medmoelora", {"expert_schedule": "descending"}),
    "medmoelora-no-base-expert": ("medmoelora", {"adapter_options": '{"num_base_experts": 0}'}),
    "medmoelora-no-balance-loss": ("medmoelora", {"balance_loss": "none"}),
    "at_moe-flat": ("at_moe", {"flat_routing": True}),
}
# Whether what was found after one epoch holds after three, of each method that is trained at once, and of its LoRA.
LONGER: Changes = {
    f"{system}-longer": (system, {"num_train_epochs": 3})
    for lora, method in (
        ("lora-r16", "moelora"),
        ("lora-like-molora-parameters", "molora"),
        ("lora-like-medmoelora-parameters", "medmoelora"),
    )
    for system in (lora, method)
}
# With K = 1 nothing but a balance loss trains MoLoRA's router.
VARIANTS: Changes = {
    "molora-k1-switch": ("molora", {"top_k": 1, "balance_loss": "switch"}),
    "molora-attention-too": ("molora", {"num_experts_pattern": "{}"}),
}
# MOELoRA's experts share rank 32 here, since rank 16 does not split over 32 experts. Its gates are about 1 / N, and the
# scaling, lora_alpha / r, makes up for it: gate · scaling is 1/4, as in the main comparison.
NUMBERS: Changes = {
    **{f"moelora-r32-n{n}": ("moelora", {"r": 32, "lora_alpha": 8 * n, "num_experts": n}) for n in (8, 32)},
    "molora-n32": ("molora", {"num_experts": 32}),
}
# The scaling stays 2. Rank 32 of MOELoRA with 8 experts is among NUMBERS.
RANKS: Changes = {
    **{f"lora-r{r}": ("lora-r16", {"r": r, "lora_alpha": 2 * r}) for r in (8, 64)},
    **{f"moelora-r{r}": ("moelora", {"r": r, "lora_alpha": 2 * r}) for r in (8, 64)},
    "molora-r4": ("molora", {"r": 4, "lora_alpha": 8}),
}
# The largest of both sweeps may need a lower rate than the system that they change: once more at the next lower one.
# A stock LoRA of about rank 64 has a search of its own in the main comparison.
LOWER = "-lower-rate"
NUMBERS |= {f"{name}{LOWER}": NUMBERS[name] for name in ("moelora-r32-n32", "molora-n32")}
RANKS |= {f"moelora-r64{LOWER}": RANKS["moelora-r64"]}
STRATEGIES = ("proportional", "uniform")


def next_runs(setup: Setup, done: Scores) -> list[Run]:
    """The runs that can be named now and are not done."""
    return [run for run in all_runs(setup, done) if run.id not in done]


def all_runs(setup: Setup, done: Scores) -> list[Run]:
    """The runs that can be named now, done ones too, experiment by experiment."""
    return [run for experiment in EXPERIMENTS.values() for run in experiment(setup, done)]


def forecast(setup: Setup, done: Scores) -> list[Run]:
    """All runs there will be if searches that are not done end in the middle; some rates may turn out to be others."""
    guess = dict(done)
    while new := next_runs(setup, guess):
        guess |= {run.id: -1.0 - abs((run.learning_rate or 0.0) - setup.rates[len(setup.rates) // 2]) for run in new}
    return all_runs(setup, guess)


def importance(run: Run) -> int:
    """Where a run stands in the order of work: experiment by experiment, and last what is not told the task, bare."""
    order = list(EXPERIMENTS)
    return len(order) if untold(run.protocol, run.system) else order.index(run.experiment)


def untold(protocol: str, system: str) -> bool:
    """Whether nothing tells a system its task, bare; but for the base model and AT-MoE's experts, which are needed."""
    return protocol == "bare" and system not in ("base", *EXPERTS, *TOLD)


def is_kept(run: Run) -> bool:
    """Whether a run's adapter stays on the disk when the run is done, since others may need it."""
    if run.experiment != "main" or not run.trains:
        return False
    again = run.system in ASKED_AGAIN and run.purpose == "final" and run.protocol == "instruction"
    return run.system in EXPERTS or again


def main(setup: Setup, done: Scores) -> Iterator[Run]:
    """Every system in both protocols: the search of its rate, then final runs.

    Bare, one LoRA stands for all that are not told the task, whatever their size.
    """
    for protocol in setup.protocols:
        yield base(setup, protocol, "main", setup.data, ("general",) if protocol == "instruction" else ())
        for system in (name for name in SYSTEMS if protocol != "bare" or not name.startswith("lora-like")):
            rates, chosen = searched(setup, done, protocol, system)
            runs = [(rate, 0, "search") for rate in rates]
            seeds = setup.seeds_of("untold" if untold(protocol, system) else "main")
            runs += [(chosen, seed, "final") for seed in seeds] if chosen else []
            for rate, seed, purpose in runs:
                found = flags_of(setup, done, system, SYSTEMS[system], protocol, seed)
                if found is None:
                    continue
                settings, needs = found
                measure = measured(system, protocol) if purpose == "final" else ()
                parts = setup.tasks if system == PER_TASK else ()
                fields = {"protocol": protocol, "purpose": purpose, "parts": parts, "measure": measure}
                after = follows(setup, protocol, system, own=purpose == "final")
                yield make(setup, "main", system, rate, seed, settings, needs=needs, after=after, **fields)


def measured(system: str, protocol: str) -> tuple[str, ...]:
    """What is measured of a system's final run beside its answers.

    General knowledge is asked of one adapter for all tasks, after training with instructions. Bare, equal gates are
    asked of the one method that is told the task.
    """
    asked = protocol == "instruction" and system not in (PER_TASK, "lora-like-molora-active")
    general = ("general",) if asked else ()
    if system.startswith("lora"):
        return general
    return (("uniform",) if protocol == "instruction" or system in TOLD else ()) + ("routing", *general)


def base(setup: Setup, protocol: str, experiment: str, data: str, measure: tuple[str, ...]) -> Run:
    """The base model, asked as it is."""
    name = "base" if experiment == "main" else f"base-{experiment}"
    settings = {"model_name_or_path": setup.model, "dataset": data, "protocol": protocol}
    used = ("dtype", "max_new_tokens", "per_device_eval_batch_size")
    settings |= {flag: setup.common[flag] for flag in used}
    return Run(
        f"{protocol}/{name}", experiment, name, protocol, None, None, "final", settings,
        measure=allowed(setup, measure), limit=setup.limit,
    )  # fmt: skip


def flags_of(
    setup: Setup, done: Scores, system: str, flags: Flags, protocol: str, seed: int
) -> tuple[Flags, tuple[str, ...]] | None:
    """A system's flags and the runs it needs; None for AT-MoE while the rates of its experts are not chosen.

    Its experts are the adapters of lora-per-task and lora-r16 of the same protocol and seed.
    """
    if flags["method"] != "at_moe":
        return flags, ()
    ids = []
    for expert in EXPERTS:
        rate = searched(setup, done, protocol, expert)[1]
        if rate is None:
            return None
        ids.append(run_id(protocol, expert, rate, seed))
    per_task, general = map(setup.adapter, ids)
    groups = {group: {task: f"{per_task}/{task}" for task in tasks} for group, tasks in setup.groups.items()}
    return flags | {"groups": groups, "general_expert": general}, tuple(ids)


def follows(setup: Setup, protocol: str, system: str, *, own: bool = True) -> tuple[str, ...]:
    """What the ids of searches begin with that a system's runs follow from: its own, and those of AT-MoE's experts."""
    systems = ((system,) if own else ()) + (EXPERTS if SYSTEMS[system]["method"] == "at_moe" else ())
    where = protocol if protocol == "instruction" or setup.search_bare else "instruction"
    return tuple(f"{where}/{name}/" for name in systems)


def changed(
    setup: Setup, done: Scores, experiment: str, name: str, system: str, changes: Mapping[str, Any], **fields: Any
) -> Iterator[Run]:
    """Final runs of a changed system, with the rate that the system has in the instruction protocol, or the next."""
    rate = searched(setup, done, "instruction", system)[1]
    if rate and name.endswith(LOWER):
        rate = max((lower for lower in setup.all_rates if lower < rate), default=rate / 3)
    for seed in setup.seeds_of(experiment) if rate else ():
        found = flags_of(setup, done, system, SYSTEMS[system], "instruction", seed)
        if found is not None:
            fields |= {"needs": found[1], "after": follows(setup, "instruction", system)}
            yield make(setup, experiment, name, rate, seed, found[0] | changes, **fields)


def changes_of(experiment: str, changes: Changes) -> Callable[[Setup, Scores], Iterator[Run]]:
    """An experiment that changes systems. General knowledge is what Med-MoE-LoRA's base expert is there for."""

    def runs(setup: Setup, done: Scores) -> Iterator[Run]:
        for name, (system, change) in changes.items():
            measure = () if system.startswith("lora") or change.get("num_experts") == 1 else ("routing",)
            if name == "medmoelora-no-base-expert":
                measure += ("general",)
            yield from changed(setup, done, experiment, name, system, change, measure=measure)

    return runs


def sampling(setup: Setup, done: Scores) -> Iterator[Run]:
    """Tasks of unequal sizes, drawn by each strategy; the steps are the same."""
    for system in ("lora-r16", "moelora"):
        for strategy in STRATEGIES:
            change = {"dataset": setup.unequal_data, "mixing": strategy}
            yield from changed(setup, done, "sampling", f"{system}-sampled-{strategy}", system, change)


def held_out(setup: Setup, done: Scores) -> Iterator[Run]:
    """Each task left out of training once, and then asked.

    MOELoRA has no id for it. It is told all its tasks at once, for which its config takes the mean of their embeddings,
    and asked again with equal gates, which is the record's "uniform".
    """
    for system in ("lora-r16", "moelora"):
        for task in setup.held_out or setup.tasks:
            change = {"train_tasks": [other for other in setup.tasks if other != task]}
            measure = ("uniform",) if system == "moelora" else ()
            fields = {"scored": (task,), "measure": measure}
            yield from changed(setup, done, "held_out", f"{system}-without-{task}", system, change, **fields)


def composite(setup: Setup, done: Scores) -> Iterator[Run]:
    """Instructions that need two tasks at once: asked of what was trained on single tasks, and on these.

    MOELoRA is told both tasks of a row, for which its config takes the mean of their embeddings.
    """
    yield base(setup, "instruction", "composite", setup.composite_data, ())
    on_composites = {"dataset": setup.composite_data}
    for system in ASKED_AGAIN:
        rate = searched(setup, done, "instruction", system)[1]
        for run in changed(setup, done, "composite", f"{system}-of-single-tasks", system, on_composites):
            trained = run_id("instruction", system, rate, run.seed)
            if run.seed in setup.seeds_of("main"):
                yield Run.of(run.to_dict() | {"adapter": trained, "needs": (trained,)})
    for system in ASKED_AGAIN:
        measure = () if system.startswith("lora") else ("routing",)
        name = f"{system}-of-composites"
        yield from changed(setup, done, "composite", name, system, on_composites, measure=measure)


EXPERIMENTS: dict[str, Callable[[Setup, Scores], Iterator[Run]]] = {
    "main": main,
    "longer": changes_of("longer", LONGER),
    "ablations": changes_of("ablations", ABLATIONS),
    "composite": composite,
    "held_out": held_out,
    "sampling": sampling,
    "variants": changes_of("variants", VARIANTS),
    "experts": changes_of("experts", NUMBERS),
    "rank": changes_of("rank", RANKS),
}
