"""CPU time of a system's runs, apart for each kind of CPU, as one with wider vectors is faster."""

from collections.abc import Sequence
from statistics import mean

from records import Finals, Record

FIRST = "AVX2"  # of all runs whose records were made before they named it


def vectors(record: Record) -> str:
    """The vector instructions of a record's CPU, as PyTorch names them."""
    return str(record["machine"].get("vectors", FIRST))


def times(finals: Finals) -> dict[str, dict[str, float | None]]:
    """Mean CPU seconds by kind of CPU.

    `train_cpu` is of all stages, those of the adapters that a run starts from too, and None where no run of a stage was
    made on such a CPU; `answer_cpu` is of the answers.
    """
    stages = [finals.done, *map(list, zip(*finals.needs, strict=True))]
    found = {}
    for kind in sorted({vectors(record) for record in finals.done}):
        trained = [mean_seconds(stage, "train_cpu", kind) for stage in stages]
        known = [seconds for seconds in trained if seconds is not None]
        found[kind] = {
            "train_cpu": sum(known) if len(known) == len(stages) else None,
            "answer_cpu": mean_seconds(finals.done, "answer_cpu", kind),
        }
    return found


def mean_seconds(records: Sequence[Record], name: str, kind: str) -> float | None:
    """The mean over the records of a kind of CPU; None if there is none."""
    found = [record["seconds"].get(name, 0.0) for record in records if vectors(record) == kind]
    return mean(found) if found else None
