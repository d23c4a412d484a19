"""What has no time in it: gradients of the kernels beside numeric ones, kernels beside plain PyTorch, and compiling.

    python scripts/bench/checks.py
    python scripts/bench/checks.py --parts gradcheck equality
    python scripts/bench/checks.py --parts compile --methods molora lora --inductor

gradcheck: float64, every derivative of `kernels.project` with `kernels.add`, and of `dispatch.add_experts`, by central
differences, and torch's own gradcheck and gradgradcheck. equality: a small Llama with random weights, in a training
step on kernels and in plain PyTorch, and both beside plain PyTorch in float64. compile: graphs, graph breaks
(`torch._dynamo.explain`) and recompiles over batches of many lengths, beside stock LoRA. Minutes, on one core.
"""

import argparse
import copy
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from methods import DTYPE_LABELS, LABELS, adapt, config_of, task_ids_of
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_moe import GroupedMoeConfig, kernels, read_expert
from peft_moe.dispatch import add_experts

ROOT = Path(__file__).parents[2]
PARTS = ["gradcheck", "equality", "compile"]
METHODS = ["moelora", "moelora_one_task", "molora", "molora_dense", "medmoelora", "at_moe", "at_moe_prompt", "lora"]
TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]
AUTOCAST = "float32, autocast to bfloat16"
NAMES = LABELS | {
    "molora_dense": "MoLoRA, N=K=8 r=16",
    "at_moe": "AT-MoE, 3 frozen r=4, 8, 6 + general r=8",
    "at_moe_prompt": "AT-MoE, the same, routed per prompt",
    "lora": "stock LoRA",
}
STEP = 1e-6  # of central differences
Row = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def main() -> None:
    """Run the parts, print a table of each, write all of it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--batches", type=int, default=20, help="how many lengths are compiled for")
    parser.add_argument("--inductor", action="store_true", help="compile with inductor, which needs a C++ compiler")
    arguments = parser.parse_args()
    results: dict[str, list[Row]] = {}
    for part in arguments.parts:
        if part == "gradcheck":
            results[part] = report_gradcheck()
        elif part == "equality":
            results[part] = report_equality([method for method in arguments.methods if method != "lora"])
        else:
            backend = "inductor" if arguments.inductor else "aot_eager"
            results[part] = report_compile(arguments.methods, arguments.batches, backend)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        settings = vars(arguments) | {"output": str(arguments.output)}
        arguments.output.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")


def print_row(*cells: Any) -> None:
    """A row of a Markdown table."""
    print(f"| {' | '.join(str(cell) for cell in cells)} |", flush=True)


def print_head(*cells: str) -> None:
    """The head of a Markdown table."""
    print()
    print_row(*cells)
    print("|" + "---|" * len(cells))


# -- gradcheck --------------------------------------------------------------------------------------------------------

# What `kernels_case` is given; sizes are small, so that every derivative can be made numerically.
KERNEL_CASES: dict[str, dict[str, Any]] = {
    "one expert, no router": {},
    "one expert, base without bias": {"bias": False},
    "weights per token": {"rows": 6},
    "weights per row of two tokens": {"rows": 3},
    "one row of weights for all": {"rows": 1},
    "one row of weights, put into A": {"rows": 1, "into_a": True},
    "ranks 1, 0, 3": {"rows": 6, "ranks": (1, 0, 3)},
    "router": {"gate": True},
    "router, dropout": {"gate": True, "dropout": 0.5},
    "router, ranks more than tokens": {"gate": True, "tokens": 2},
    "dropout": {"rows": 3, "dropout": 0.5},
    "base layer called, output not to be written": {"rows": 6, "base": False, "writable": False},
    "base layer called, output written": {"rows": 6, "base": False},
    "frozen x and base": {"gate": True, "frozen": ("x", "weight", "bias")},
    "frozen bank": {"gate": True, "frozen": ("a", "b")},
    "more tokens than one chunk": {"gate": True, "dropout": 0.5, "chunk": 4},
}
DISPATCH_CASES: dict[str, dict[str, Any]] = {
    "dispatch, K=1": {"k": 1},
    "dispatch, K=2": {"k": 2},
    "dispatch, K=E": {"k": 3},
    "dispatch, all tokens to one expert": {"k": 1, "to": 2},
    "dispatch, output written": {"k": 2, "writable": True},
}


def report_gradcheck() -> list[Row]:
    """Gradients of every case beside numeric ones."""
    cases = [(name, *kernels_case(**case)) for name, case in KERNEL_CASES.items()]
    cases += [(name, *dispatch_case(**case)) for name, case in DISPATCH_CASES.items()]
    print_head("float64", "derivatives", "largest deviation from numeric", "gradcheck", "gradgradcheck")
    rows = []
    for name, function, inputs in cases:
        chunk = KERNEL_CASES.get(name, {}).get("chunk", kernels.CHUNK)
        with chunks_of(chunk):
            count, worst = numeric_deviation(function, inputs)
            first = passes(torch.autograd.gradcheck, function, inputs)
            refused = refuses_a_second(function, inputs)
            second = None if refused else passes(torch.autograd.gradgradcheck, function, inputs)
        row = {"case": name, "derivatives": count, "deviation": worst, "gradcheck": first, "gradgradcheck": second}
        rows.append(row)
        print_row(name, count, f"{worst:.1e}", said(first), "refused" if second is None else said(second))
    return rows


def refuses_a_second(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> bool:
    """Whether a second derivative is an error."""
    gradients = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
    try:
        torch.stack([gradient.square().sum() for gradient in gradients]).sum().backward()
    except NotImplementedError:
        return True
    finally:
        for tensor in inputs:
            tensor.grad = None
    return False


def said(passed: bool) -> str:
    """A word for a table."""
    return "passes" if passed else "FAILS"


@contextmanager
def chunks_of(tokens: int) -> Iterator[None]:
    """Kernels that cast so many tokens at once."""
    before, kernels.CHUNK = kernels.CHUNK, tokens
    try:
        yield
    finally:
        kernels.CHUNK = before


def kernels_case(
    *,
    tokens: int = 6,
    ranks: Sequence[int] | None = None,
    rows: int = 0,
    into_a: bool = False,
    gate: bool = False,
    dropout: float = 0.0,
    base: bool = True,
    bias: bool = True,
    writable: bool = True,
    frozen: Sequence[str] = (),
    chunk: int = 0,
) -> tuple[Callable[..., torch.Tensor], list[torch.Tensor]]:
    """A function of the inputs that have a gradient, and these.

    Args:
        tokens: t.
        ranks: of the experts; one expert of rank 4 if there are neither weights nor a gate.
        rows: of weights; 0 for none.
        into_a: A is multiplied by the row of weights.
        gate: weights are a softmax of its scores.
        dropout: probability.
        base: `project` makes the base layer's output, too; else it is an input.
        bias: of the base layer.
        writable: `add` may write into it.
        frozen: inputs that have no gradient.
        chunk: for who calls.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n, m = 5, 7
    ranks = tuple(ranks or ((2, 2, 2) if rows or gate else (4,)))
    scale = zip(ranks, (1.5, 0.5, 2.0), strict=False)
    spread = torch.block_diag(*(torch.full((1, rank), factor, dtype=torch.float64) for rank, factor in scale))
    values = {"x": draw(tokens, n), "a": draw(sum(ranks), n), "b": draw(m, sum(ranks))}
    values |= {"weight": draw(m, n)} | ({"bias": draw(m)} if bias else {}) if base else {"out": draw(tokens, m)}
    values |= {"gate": draw(len(ranks), n)} if gate else {}
    values |= {"weights": draw(rows, len(ranks))} if rows else {}
    kept = torch.rand(tokens, n, generator=generator) >= dropout
    drop = kernels.Dropout(kept, 1 / (1 - dropout)) if dropout else None
    names = [name for name in values if name not in frozen]

    def function(*inputs: torch.Tensor) -> torch.Tensor:
        v = values | dict(zip(names, inputs, strict=True))
        own = (v["weight"], v.get("bias")) if base else None
        each = kernels.each_rank(v.pop("weights"), spread, torch.float64) if into_a else None
        made, z, scores = kernels.project(v["x"], v["a"], base=own, gate=v.get("gate"), dropout=drop, each=each)
        out = made if made is not None else v["out"] * 1  # a leaf cannot be written to
        weights = v.get("weights") if scores is None else scores.softmax(-1)
        return kernels.add(out, z, v["b"], weights=weights, spread=spread, factor=0.7, writable=writable)

    return function, [values[name].requires_grad_() for name in names]


def dispatch_case(
    *, k: int, to: int | None = None, writable: bool = False
) -> tuple[Callable[..., torch.Tensor], list[torch.Tensor]]:
    """The same of `add_experts`: K experts of each token, or all tokens to one expert."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"out": (6, 7), "x": (6, 5), "a": (6, 5), "b": (7, 6), "weights": (6, k)}
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes.values()]
    experts = torch.rand(6, 3, generator=generator).topk(k).indices if to is None else torch.full((6, k), to)

    def function(*inputs: torch.Tensor) -> torch.Tensor:
        out, x, a, b, weights = inputs
        out = out * 1 if writable else out
        return add_experts(out, x, a, b, weights=weights, experts=experts, r=2, writable=writable)

    return function, [tensor.requires_grad_() for tensor in inputs]


def numeric_deviation(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> tuple[int, float]:
    """How many derivatives a function's Jacobian has, and the largest distance of one from its central difference."""
    width = function(*inputs).numel()
    analytic = torch.autograd.functional.jacobian(function, tuple(inputs))
    worst, count = 0.0, 0
    for at, matrix in enumerate(analytic):
        columns = []
        for i in range(inputs[at].numel()):
            ends = []
            for sign in (1, -1):
                moved = [tensor.detach().clone() for tensor in inputs]
                moved[at].view(-1)[i] += sign * STEP
                ends.append(function(*moved).flatten())
            columns.append((ends[0] - ends[1]) / (2 * STEP))
        numeric = torch.stack(columns, 1)
        worst = max(worst, (matrix.reshape(width, -1) - numeric).abs().max().item())
        count += numeric.numel()
    return count, worst


def passes(check: Callable[..., bool], function: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> bool:
    """What a check of torch says, with its own tolerances."""
    return check(function, inputs, raise_exception=False)


# -- kernels and plain PyTorch ----------------------------------------------------------------------------------------


def report_equality(methods: Sequence[str]) -> list[Row]:
    """A training step of each method and type: kernels beside plain PyTorch, and both beside float64."""
    heads = ("kernels, plain", "kernels, float64", "plain, float64")
    print_head("method", "types", *(f"{head}: {what}" for what in ("logits", "gradients") for head in heads))
    rows = []
    for method in methods:
        for label in (*DTYPE_LABELS.values(), AUTOCAST):
            found = compare_types(method, label)
            rows.append({"method": method, "types": label} | found)
            print_row(NAMES[method], label, *(f"{value:.1e}" for value in found.values()))
    return rows


def compare_types(method: str, label: str) -> dict[str, float]:
    """Largest relative distances (Frobenius norms) of a method in some types; each as in the table's head."""
    dtype = next((name for name, text in DTYPE_LABELS.items() if text == label), "fp32")
    base = small_llama(layers=2)
    model = adapted(method, base, TARGETS, dtype).train()
    wide = copy.deepcopy(model).double()
    inputs = batch(method, rows=4, tokens=80, labels=True)
    cast = torch.autocast("cpu", dtype=torch.bfloat16) if label == AUTOCAST else nullcontext()
    with cast:
        fused, plain = training_step(model, inputs, on_kernels=True), training_step(model, inputs, on_kernels=False)
    exact = training_step(wide, inputs, on_kernels=False)
    pairs = {"kernels_plain": (fused, plain), "kernels_float64": (fused, exact), "plain_float64": (plain, exact)}
    return {
        f"{name}_{what}": max(
            distance(one[key], other[key]) for key in other if (key == "logits") == (what == "logits")
        )
        for what in ("logits", "gradients")
        for name, (one, other) in pairs.items()
    }


def training_step(model: PeftModel, inputs: Tensors, *, on_kernels: bool) -> Tensors:
    """Logits and gradients by name.

    Raises:
        RuntimeError: it was not done in the way that was asked for.
    """
    before, kernels.fused = kernels.fused, on_kernels
    try:
        outputs = model(**inputs)
        outputs.loss.backward()
    finally:
        kernels.fused = before
    if any(name == "_AddBackward" for name in names_of_graph(outputs.loss)) != on_kernels:
        raise RuntimeError(f"kernels.fused={on_kernels} did not decide whether kernels ran; the table would be wrong.")
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found | {"logits": outputs.logits.detach()}


def names_of_graph(loss: torch.Tensor) -> set[str]:
    """Names of the functions that backward would run."""
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return {node.name() for node in seen}


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """How far a tensor is from another, relative to the other's norm."""
    other = other.double()
    return ((one.double() - other).norm() / other.norm().clamp_min(1e-30)).item()


# -- compile ----------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "lengths, dynamic=True": {"dynamic": True},
    "lengths, default": {"dynamic": None},
    "lengths and rows, dynamic=True": {"dynamic": True, "vary_rows": True},
}


def report_compile(methods: Sequence[str], batches: int, backend: str) -> list[Row]:
    """Graphs, breaks and recompiles of every method."""
    heads = ("fullgraph", "graphs", "recompiles", "logits to eager", "gradients to eager", "why it was compiled again")
    print_head("method", "mode", "breaks", f"{batches} batches, {backend}", *heads)
    rows = []
    for method in methods:
        for training in (True, False):
            breaks, reasons = explain(method, training=training)
            for name, variant in VARIANTS.items():
                row = count_recompiles(method, training=training, batches=batches, backend=backend, **variant)
                found = {"method": method, "training": training, "variant": name, "breaks": breaks, "reasons": reasons}
                rows.append(found | row)
                far = (f"{row[what]:.0e}" if row[what] is not None else "–" for what in ("logits", "gradients"))
                cells = (said(row["fullgraph"]), row["graphs"], row["recompiles"], *far, row["why"] or "–")
                mode = "training" if training else "inference"
                print_row(NAMES[method], mode, breaks, name, *cells)
            for reason in reasons:
                print(f"\nGraph break in {method}: {reason}\n")
    return rows


def explain(method: str, *, training: bool) -> tuple[int, list[str]]:
    """Graph breaks of one call, and their reasons."""
    torch.compiler.reset()
    model = compiled_model(method, training=training)
    with torch.set_grad_enabled(training), quiet_compiler():
        said = torch._dynamo.explain(model)(**batch(method, rows=3, tokens=9, labels=training))
    return said.graph_break_count, [str(reason.reason) for reason in said.break_reasons]


def count_recompiles(
    method: str,
    *,
    training: bool,
    batches: int,
    dynamic: bool | None,
    vary_rows: bool = False,
    backend: str = "aot_eager",
) -> Row:
    """Calls of a compiled model over batches of many lengths, beside an eager copy.

    Args:
        method: a key of LABELS.
        training: with backward.
        batches: how many lengths, from 5 tokens on.
        dynamic: as for `torch.compile`.
        vary_rows: 2, 3 and 4 rows in turn; else 3.
        backend: as for `torch.compile`.

    Returns:
        `fullgraph`: whether it compiles whole; `graphs` and `recompiles`; `why`: reasons of recompiles; `logits` and
        `gradients`: largest relative distance from the eager model, None where there is none.
    """
    torch.compiler.reset()
    model = compiled_model(method, training=training)
    eager = copy.deepcopy(model)  # not the same: what an eager call leaves in a model is no reason to compile again
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    far: dict[str, list[float]] = {"logits": [], "gradients": []}
    with recompiles() as reasons, torch.set_grad_enabled(training), quiet_compiler():
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        whole = True
        for i in range(batches):
            inputs = batch(method, rows=2 + i % 3 if vary_rows else 3, tokens=5 + i, labels=training, seed=i)
            try:
                found, expected = compiled(**inputs), eager(**inputs)
            except torch._dynamo.exc.Unsupported:
                whole = False
                break
            far["logits"].append(distance(found.logits.detach(), expected.logits.detach()))
            if training:
                far["gradients"].append(gradient_distance((model, found.loss), (eager, expected.loss)))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    worst = {what: max(values, default=None) for what, values in far.items()}
    return {"fullgraph": whole, "graphs": graphs, "recompiles": len(reasons), "why": "; ".join(reasons)} | worst


def gradient_distance(one: tuple[PeftModel, torch.Tensor], other: tuple[PeftModel, torch.Tensor]) -> float:
    """Largest relative distance of gradients of two copies of a model and their losses."""
    found = []
    for model, loss in (one, other):
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    if not found[1] or found[0].keys() != found[1].keys():
        raise RuntimeError(f"Gradients are of different parameters: {sorted(found[0].keys() ^ found[1].keys())}.")
    return max(distance(found[0][name], gradient) for name, gradient in found[1].items())


def compiled_model(method: str, *, training: bool) -> PeftModel:
    """A model of one layer, which compiles in seconds."""
    return adapted(method, small_llama(layers=1), ["q_proj", "gate_proj"], "fp32").train(training)


@contextmanager
def recompiles() -> Iterator[list[str]]:
    """Reasons of what is compiled again meanwhile: the guards that failed."""
    reasons: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines = [line.strip(" -") for line in record.getMessage().splitlines()]
            reasons.append(next((line.split(": ", 1)[-1] for line in lines if line[:1].isdigit()), lines[0]))

    listener, logger = Listener(), logging.getLogger("torch._dynamo.guards.__recompiles")
    torch._logging.set_logs(recompiles=True)
    others, logger.handlers, passed_on, logger.propagate = logger.handlers, [listener], logger.propagate, False
    try:
        yield reasons
    finally:
        logger.handlers, logger.propagate = others, passed_on
        torch._logging.set_logs()


@contextmanager
def quiet_compiler() -> Iterator[None]:
    """Without what torch's compiler warns of by its own doing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        yield


# -- models and batches -----------------------------------------------------------------------------------------------


def small_llama(*, layers: int) -> LlamaForCausalLM:
    """A Llama with random weights, the same in each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
        )
        return LlamaForCausalLM(config)


def adapted(method: str, base: LlamaForCausalLM, targets: list[str], dtype: str) -> PeftModel:
    """A model with an adapter that changes its output; with one task for all calls where the method's name says so."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if method.startswith("at_moe"):
            config = grouped_config(method, len(base.model.layers), targets)
        else:
            choose = {"top_k": 8} if method == "molora_dense" else {}  # so that rounding changes no choice
            config = config_of(method, lambda: base, targets, task_type="CAUSAL_LM", **choose)
        model = adapt(base, config, dtype)
    if method == "moelora_one_task":
        model.set_task(0)
    return model


def grouped_config(method: str, layers: int, targets: list[str]) -> GroupedMoeConfig:
    """Experts that differ, or else routers would have gradients that are nothing but rounding."""
    experts = []
    for rank in (4, 8, 6, 8):
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights=False, target_modules=targets)
        with tempfile.TemporaryDirectory() as folder:
            get_peft_model(small_llama(layers=layers), lora).save_pretrained(folder)
            experts.append(read_expert(folder))
    a, b, c, general = experts
    return GroupedMoeConfig(
        task_type="CAUSAL_LM",
        groups={"f": {"a": a, "b": b}, "s": {"c": c}},
        general_expert=general,
        router_input="prompt" if method == "at_moe_prompt" else "token",
        learn_mix=True,
        init_lora_weights=False,
    )


def batch(method: str, *, rows: int, tokens: int, labels: bool, seed: int = 0) -> Tensors:
    """Token ids (rows, tokens), two tokens of the first row padding; labels of the last half; tasks where needed."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    found = {"input_ids": ids, "attention_mask": mask} | (
        {} if method == "moelora_one_task" else task_ids_of(method, rows)
    )
    if labels:
        found["labels"] = ids.masked_fill(torch.arange(tokens) < tokens // 2, -100)
    return found


if __name__ == "__main__":
    main()
