"""The comparisons that the page makes, and the families in which their p-values are corrected, fixed in advance.

What was changed when some results were there is said on the page.

1. The mean score of each method against the LoRA with its parameters: after one epoch, after three, and bare. A family
   for each of these parts.
2. The same by task, a family for each part.
   Of both, methods with fewer than `SEEDS` planned runs are left out: bare, that is all but MOELoRA.
3. Each ablation against the method it changes, and each method with equal gates at test time against itself with its
   own; mean score, instruction protocol, one epoch.

All else is exploratory, and gets no verdict. A comparison whose runs are missing counts in its family as one with
p = 1, so that a verdict on some of the runs is no easier than one on all of them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from grid import ABLATIONS, LONGER, NUMBERS, RANKS, VARIANTS
from records import AT_EQUAL_GATES
from stats import Comparison, Estimate, Study
from verdicts import judge

SEEDS = 3  # that a verdict needs
# The LoRA with the parameters of all experts. AT-MoE's nine of rank 16 are trained before its router, and count.
MATCHED = {
    "moelora": "lora-r16",
    "molora": "lora-like-molora-parameters",
    "medmoelora": "lora-like-medmoelora-parameters",
    "at_moe": "lora-like-at_moe-active",
}
# AT-MoE has read each row three times when its router is trained, and has so its place after three epochs too.
MATCHED_LONGER = {
    **{f"{name}-longer": f"{lora}-longer" for name, lora in MATCHED.items() if f"{name}-longer" in LONGER},
    "at_moe": "lora-like-at_moe-passes",
}
METHODS = tuple(MATCHED)
LONG = (*LONGER, "lora-like-at_moe-passes")  # trained for three epochs
REPEATED = ("at_moe-flat",)  # trained systems whose experts are those of another one
NOT_RUN = Comparison(Estimate(0.0, -1.0, 1.0, 1.0, 2.0, [], "nothing"), 1.0, 1.0)  # its place in a family


@dataclass(frozen=True)
class Part:
    """Systems that are compared with each other, and whose seeds are taken together: a `stats.Study`.

    Args:
        protocol: of its runs.
        matched: the LoRA of each method.
        long: whether its systems are those of three epochs, and of all others AT-MoE alone; None for all.
    """

    protocol: str
    matched: Mapping[str, str]
    long: bool | None = None

    def has(self, system: str) -> bool:
        """Whether a system of its protocol belongs to it."""
        return self.long is None or self.long == (system in LONG) or (self.long and system in self.matched)


ONE, THREE, BARE = "one epoch", "three epochs", "bare"
PARTS = {
    ONE: Part("instruction", MATCHED, long=False),
    THREE: Part("instruction", MATCHED_LONGER, long=True),
    BARE: Part("bare", MATCHED),
}


@dataclass(frozen=True)
class Pair:
    """`name` minus `other`, in one score: a task, "mean", or the mean "without" a task.

    `shared`: whether both have the same trained adapters, seed by seed.
    """

    name: str
    other: str
    target: str = "mean"
    shared: bool = False


# Comparisons without a verdict: the LoRA of the same active rank where it is another one; a LoRA that is told the task.
BESIDE = (
    Pair("molora", "lora-like-molora-active"),
    Pair("moelora", "lora-per-task"),
    Pair("at_moe", "lora-per-task", shared=True),
)
# What each system of a sweep is looked at beside.
BASES = {name: system for name, (system, _) in (NUMBERS | RANKS | VARIANTS).items()}
BASES |= {name: "moelora-r32-n8" for name in NUMBERS if name.startswith("moelora-r32-n32")}
BASES |= {f"{system}-sampled-uniform": f"{system}-sampled-proportional" for system in ("lora-r16", "moelora")}
# Whose general knowledge is compared.
KNOWING = (
    *MATCHED.items(),
    ("at_moe", "lora-like-at_moe-passes"),
    ("medmoelora", "medmoelora-no-base-expert"),
)


def of_methods(part: Part, planned: Mapping[str, int], targets: Iterable[str] = ("mean",)) -> list[Pair]:
    """Each method against the LoRA with its parameters, where both have enough seeds for a verdict.

    Args:
        part: says which LoRA.
        planned: runs by system.
        targets: tasks, "mean", or means without a task.
    """
    pairs = [Pair(*pair) for pair in part.matched.items() if min(planned.get(name, 0) for name in pair) >= SEEDS]
    return [replace(pair, target=target) for target in targets for pair in pairs]


def of_others(planned: Mapping[str, int]) -> list[Pair]:
    """The comparisons without a verdict, of systems that are planned with the same seeds."""
    return [pair for pair in BESIDE if planned.get(pair.name, 0) == planned.get(pair.other, -1)]


def of_sweeps() -> list[Pair]:
    """Each system of a sweep beside its base."""
    return [Pair(name, base) for name, base in BASES.items()]


def of_ablations() -> list[Pair]:
    """Each ablation against what it changes."""
    trained = [Pair(name, system, shared=name in REPEATED) for name, (system, _) in ABLATIONS.items()]
    return trained + [Pair(AT_EQUAL_GATES.format(name), name, shared=True) for name in METHODS]


def compare(study: Study | None, pairs: Iterable[Pair], complete: set[str]) -> dict[Pair, Comparison | None]:
    """The comparisons of systems that are complete; None for others."""
    found: dict[Pair, Comparison | None] = {}
    made: dict[tuple[str, str], Mapping[str, Comparison]] = {}
    for pair in pairs:
        key = pair.name, pair.other
        if study is None or not complete.issuperset(key):
            found[pair] = None
            continue
        if key not in made:
            made[key] = study.compare(*key, shared=pair.shared)
        found[pair] = made[key][pair.target]
    return found


def judged(family: Mapping[Pair, Comparison | None]) -> list[dict[str, Any]]:
    """A family's comparisons with verdicts; those that are missing have no numbers, and None for a verdict."""
    keys = {str(index): comparison or NOT_RUN for index, comparison in enumerate(family.values())}
    verdicts = judge(keys).values() if keys else ()
    return [
        described(pair, comparison) | (asdict(verdict) if comparison else {"verdict": None})
        for (pair, comparison), verdict in zip(family.items(), verdicts, strict=True)
    ]


def described(pair: Pair, comparison: Comparison | None) -> dict[str, Any]:
    """A comparison without verdict."""
    head = {"name": pair.name, "against": pair.other, "target": pair.target}
    return head | (asdict(comparison) if comparison else {"difference": None})


def counts(family: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many of each verdict, and how many are missing."""
    verdicts = [each["verdict"] for each in family]
    named = {name: verdicts.count(name) for name in ("win", "tie", "loss")}
    return named | {"missing": verdicts.count(None), "all": len(verdicts)}
