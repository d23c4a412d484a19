"""Time of what happens around training: import, injecting, saving, loading, folding.

    python scripts/bench/lifecycle.py
    python scripts/bench/lifecycle.py --parts import --rounds 11
    python scripts/bench/lifecycle.py --parts adapters --hidden 1024 --rounds 5
    python scripts/bench/lifecycle.py --parts fold --hidden 1024

import: fresh processes that import peft, or peft and then peft_moe, in turns; and the command's help pages.
adapters: `get_peft_model`, `save_pretrained` and `PeftModel.from_pretrained` on a Llama of 32 layers with random
weights, all of its 224 linear layers targeted, against a stock LoRA with as many ranks in all, in turns; read: AT-MoE
made from nine folders, against loading these nine as stock LoRAs. At --hidden 256 the work per module is what counts,
at 1024 the bytes are. fold: an 8-expert MOELoRA adapter, against reading and writing the same files, once with all
files in the cache of the operating system and once without, until what is written is on disk; peak memory is of a
fresh process, beyond what its imports took (Linux).
"""

import argparse
import copy
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median, quantiles
from typing import Any

ROOT = Path(__file__).parents[2]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHARED = {"task_type": "CAUSAL_LM", "target_modules": TARGETS}
METHODS = ["moelora", "molora", "medmoelora", "at_moe"]
PARTS = ["import", "adapters", "fold"]
MIB = 2**20
Row = dict[str, Any]
# What fold does to its files, without folding; and fold itself. Each is given a folder to read and one to write.
WEIGHTS = "adapter_model.safetensors"
COPY = (
    "from safetensors.torch import load_file, save_file; "
    f"save_file(load_file(source + '/{WEIGHTS}'), target + '/{WEIGHTS}', metadata={{'format': 'pt'}})"
)
FOLD = "peft_moe.fold(source, target, task=3, overwrite=True)"


def main() -> None:
    """Measure the parts, print a table of each, write all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "lifecycle.json")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # else peft asks the Hub about a base model
    results: dict[str, dict[str, Row]] = {}
    for part in arguments.parts:
        if part == "import":
            results[part] = measure_import(arguments.rounds)
        elif part == "adapters":
            results[part] = measure_adapters(arguments)
        else:
            results[part] = measure_fold(arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    settings = vars(arguments) | {"output": str(arguments.output)}
    arguments.output.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")


# -- import -----------------------------------------------------------------------------------------------------------


def measure_import(rounds: int) -> dict[str, Row]:
    """Seconds of fresh processes."""
    clock = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
    commands = {
        "import peft": ["-c", clock.format("import peft")],
        "import peft, peft_moe": ["-c", clock.format("import peft, peft_moe")],
        "import peft_moe, after peft": ["-c", "import peft; " + clock.format("import peft_moe")],
        "peft-moe --help": ["-m", "peft_moe.cli", "--help"],
        "peft-moe fold --help": ["-m", "peft_moe.cli", "fold", "--help"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(rounds + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            printed = run_python(*command)
            seconds = float(printed) if command[0] == "-c" else time.perf_counter() - start
            if turn:  # the first writes bytecode, as installing does
                times[name].append(seconds)
    plain, both = times["import peft"], times["import peft, peft_moe"]
    times["difference of the first two"] = [ours - peft for peft, ours in zip(plain, both, strict=True)]
    print("\n| fresh process | seconds | middle half |\n|---|---|---|")
    rows = {}
    for name, values in times.items():
        rows[name] = {"s": median(values), "quartiles": middle_half(values)}
        print(f"| {name} | {median(values):.3f} | {to_text(middle_half(values))} |", flush=True)
    return rows


def run_python(*command: str) -> str:
    """What a fresh interpreter prints last."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command} failed: {done.stderr}")
    return done.stdout.strip().splitlines()[-1]


# -- injecting, saving, loading ---------------------------------------------------------------------------------------


def measure_adapters(arguments: argparse.Namespace) -> dict[str, Row]:
    """Milliseconds of each method beside a stock LoRA."""
    from peft import LoraConfig

    base = make_base(arguments.hidden, arguments.layers)
    rows: dict[str, Row] = {}
    print("\n| | parameters | stock LoRA, ms | ms | ratio | middle half of the ratios |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        loras = [f"{folder}/expert{i}" for i in range(9)]
        save_lora(base, loras)
        for method in arguments.methods:
            make = make_config(method, loras[0])
            rank, parameters = mean_rank(base, make())
            stock = partial(LoraConfig, **SHARED, r=rank, lora_alpha=2 * rank)
            steps = ("inject", "save", "load")
            times = compare(
                partial(lifecycle, base, stock), partial(lifecycle, base, make), rounds=arguments.rounds, steps=steps
            )
            for step in steps:
                report(rows, f"{method}, {step}", times[step], parameters)
        if "at_moe" in arguments.methods:
            times = compare(
                partial(load_all, base, loras), partial(read_all, base, loras), rounds=arguments.rounds, steps=("read",)
            )
            report(rows, "at_moe, read", times["read"], parameters)
    return rows


def report(rows: dict[str, Row], name: str, pair: tuple[list[float], list[float]], parameters: int) -> None:
    """Keep and print a row."""
    row = rows[name] = summary(*pair) | {"parameters": parameters}
    cells = f"{parameters / 1e6:.1f} M | {row['reference_ms']:.0f} | {row['ms']:.0f} | {row['ratio']:.2f}"
    print(f"| {name} | {cells} | {to_text(row['ratio_quartiles'])} |", flush=True)


def make_base(hidden: int, layers: int) -> Any:
    """A Llama with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
    )
    return LlamaForCausalLM(config)


def fresh(base: Any) -> Any:
    """The modules of a base model anew, with the same tensors."""
    tensors = {id(t): t for t in chain(base.parameters(), base.buffers())}
    return copy.deepcopy(base, tensors)


def save_lora(base: Any, folders: Iterable[str]) -> None:
    """A stock LoRA of rank 16, saved in each folder."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(fresh(base), LoraConfig(**SHARED, r=16, lora_alpha=32, init_lora_weights=False))
    for folder in folders:
        model.save_pretrained(folder)


def make_config(method: str, lora: str) -> Callable[[], Any]:
    """Makes the config of a method; its routers are everywhere, also in attention."""
    from peft_moe import GroupedMoeConfig, MedMoeLoraConfig, MoeLoraConfig, MoLoraConfig, read_expert

    if method == "at_moe":
        expert = read_expert(lora)
        groups = {group: {f"{group}{i}": expert for i in range(n)} for group, n in {"a": 3, "b": 3, "c": 2}.items()}
        return partial(GroupedMoeConfig, task_type="CAUSAL_LM", groups=groups, general_expert=expert)
    makers: dict[str, Callable[[], Any]] = {
        "moelora": partial(MoeLoraConfig, **SHARED, r=64, lora_alpha=128, num_experts=8, tasks=8),
        "molora": partial(MoLoraConfig, **SHARED, num_experts_pattern={}),
        "medmoelora": partial(MedMoeLoraConfig, **SHARED),
    }
    return makers[method]


def mean_rank(base: Any, config: Any) -> tuple[int, int]:
    """Ranks per module, and numbers in the adapter's banks and routers."""
    from peft import get_peft_model

    from peft_moe.bank import ExpertBank

    model = get_peft_model(fresh(base), config)
    ranks = [sum(module.ranks) for module in model.modules() if isinstance(module, ExpertBank)]
    tensors = chain(model.named_parameters(), model.named_buffers())
    return round(sum(ranks) / len(ranks)), sum(t.numel() for name, t in tensors if "moelora_" in name)


def lifecycle(base: Any, make: Callable[[], Any]) -> list[float]:
    """Seconds of injecting, saving and loading an adapter."""
    from peft import PeftModel, get_peft_model

    with tempfile.TemporaryDirectory() as folder:
        config, bare = make(), fresh(base)
        model, inject = timed(lambda: get_peft_model(bare, config))
        _, save = timed(lambda: model.save_pretrained(folder))
        bare = fresh(base)
        _, load = timed(lambda: PeftModel.from_pretrained(bare, folder))
    return [inject, save, load]


def load_all(base: Any, folders: list[str]) -> list[float]:
    """Seconds of loading stock LoRAs into one model."""
    from peft import PeftModel

    def load() -> None:
        model = PeftModel.from_pretrained(bare, folders[0], adapter_name="e0")
        for i, folder in enumerate(folders[1:], 1):
            model.load_adapter(folder, f"e{i}")

    bare = fresh(base)
    return [timed(load)[1]]


def read_all(base: Any, folders: list[str]) -> list[float]:
    """Seconds of making an AT-MoE adapter of the same stock LoRAs."""
    from peft import get_peft_model

    from peft_moe import GroupedMoeConfig

    def make() -> Any:
        groups = {"a": folders[:3], "b": folders[3:6], "c": folders[6:8]}
        named = {group: {Path(folder).name: folder for folder in part} for group, part in groups.items()}
        return get_peft_model(bare, GroupedMoeConfig(task_type="CAUSAL_LM", groups=named, general_expert=folders[8]))

    bare = fresh(base)
    return [timed(make)[1]]


def compare(
    reference: Callable[[], list[float]], ours: Callable[[], list[float]], *, rounds: int, steps: Iterable[str]
) -> dict[str, tuple[list[float], list[float]]]:
    """By step, the seconds of both in each round, after one that does not count."""
    found = []
    for turn in range(rounds + 1):
        pair = {which: which() for which in ((reference, ours) if turn % 2 else (ours, reference))}
        if turn:
            found.append((pair[reference], pair[ours]))
    return {step: ([a[i] for a, _ in found], [b[i] for _, b in found]) for i, step in enumerate(steps)}


# -- folding ----------------------------------------------------------------------------------------------------------


def measure_fold(arguments: argparse.Namespace) -> dict[str, Row]:
    """Milliseconds and memory of `fold`, beside reading and writing the same files."""
    from peft import get_peft_model

    from peft_moe import MoeLoraConfig

    base = make_base(arguments.hidden, arguments.layers)
    model = get_peft_model(base, MoeLoraConfig(**SHARED, r=64, lora_alpha=128, num_experts=8, tasks=8))
    rows: dict[str, Row] = {}
    print("\n| | file, MiB | read + write, ms | fold, ms | ratio | middle half of the ratios | peak, MiB |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        source, target = f"{folder}/adapter", f"{folder}/out"
        os.mkdir(target)
        model.save_pretrained(source)
        size = Path(source, WEIGHTS).stat().st_size / MIB
        del model, base
        names = {"source": source, "target": target}
        peaks = [peak(code, names) for code in (COPY, FOLD)]
        for name, run in (("fold, in the cache", run_cached), ("fold, from and to disk", run_on_disk)):
            steps = [partial(run, code, names) for code in (COPY, FOLD)]
            pair = compare(*steps, rounds=arguments.rounds, steps=["fold"])["fold"]
            row = rows[name] = summary(*pair) | {"file_mib": size, "reference_peak_mib": peaks[0], "peak_mib": peaks[1]}
            cells = f"{size:.0f} | {row['reference_ms']:.0f} | {row['ms']:.0f} | {row['ratio']:.2f}"
            memory = f"{peaks[0]:.0f} and {peaks[1]:.0f}"
            print(f"| {name} | {cells} | {to_text(row['ratio_quartiles'])} | {memory} |", flush=True)
    return rows


def run_cached(code: str, names: dict[str, str]) -> list[float]:
    """Seconds of a piece of code."""
    import peft_moe

    return [timed(lambda: exec(code, {"peft_moe": peft_moe, **names}))[1]]


def run_on_disk(code: str, names: dict[str, str]) -> list[float]:
    """Seconds of a piece of code that finds nothing of what it reads in memory, until what it writes is on disk."""
    import peft_moe

    def run() -> None:
        exec(code, {"peft_moe": peft_moe, **names})
        with open(f"{names['target']}/{WEIGHTS}", "rb") as file:
            os.fsync(file.fileno())

    with open(f"{names['source']}/{WEIGHTS}", "rb") as file:
        os.fsync(file.fileno())  # pages that are not on disk yet are kept
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return [timed(run)[1]]


def peak(code: str, names: dict[str, str]) -> float:
    """MiB that a piece of code takes at most in a fresh process beyond what was there, pages of files included."""
    lines = [
        "import re, peft_moe",
        "from pathlib import Path",
        "size = lambda what: int(re.search(what + r':\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])",
        *(f"{name} = {value!r}" for name, value in names.items()),
        "Path('/proc/self/clear_refs').write_text('5')  # the peak, of the imports so far, starts anew",
        "before = size('VmRSS')",
        code,
        "print((size('VmHWM') - before) / 1024)",
    ]
    return float(run_python("-c", "\n".join(lines)))


# -- figures ----------------------------------------------------------------------------------------------------------


def timed(step: Callable[[], Any]) -> tuple[Any, float]:
    """What a step returns, and its seconds."""
    gc.collect()  # of what came before
    start = time.perf_counter()
    result = step()
    return result, time.perf_counter() - start


def summary(reference: list[float], ours: list[float]) -> Row:
    """Medians, and the ratios between times of the same round."""
    ratios = [b / a for a, b in zip(reference, ours, strict=True)]
    return {
        "reference_ms": 1e3 * median(reference),
        "ms": 1e3 * median(ours),
        "ratio": median(ratios),
        "ratio_quartiles": middle_half(ratios),
    }


def middle_half(values: list[float]) -> list[float]:
    """The first and the third quartile."""
    low, _, high = quantiles(values, n=4)
    return [low, high]


def to_text(ends: list[float]) -> str:
    """The ends of a range."""
    return f"{ends[0]:.2f} to {ends[1]:.2f}"


if __name__ == "__main__":
    main()
