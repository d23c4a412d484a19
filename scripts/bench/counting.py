"""What a step costs, counted and not timed: the same in every run, but for what products in bfloat16 need inside.

`count` gives operations, multiplications and bytes of a step by watching what PyTorch dispatches, `peak_memory` the
largest sum of what its CPU allocator has given out, `saved_for_backward` the tensors that a forward keeps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Step = Callable[[], Any]
# products by name: where their two factors are among the arguments; `x_` and `x.out` are as `x`
PRODUCTS = {
    "mm": (0, 1),
    "bmm": (0, 1),
    "mv": (0, 1),
    "dot": (0, 1),
    "linear": (0, 1),
    "matmul": (0, 1),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
    "addbmm": (1, 2),
    "addmv": (1, 2),
    "_addmm_activation": (1, 2),
    "addr": (1, 2),
}
# products inside of attention are not counted: they are the same for all that are compared
LOOKS_LIKE_ONE = ("mm", "linear", "matmul", "einsum", "bilinear", "conv", "convolution")


@dataclass
class Costs:
    """Sums over the operations of a step.

    Args:
        flops: two for each multiplication of a matrix product.
        written: bytes of all results that are no views, those in place included.
        allocated: bytes of all new results.
        operations: calls of the dispatcher, views included.
    """

    flops: int = 0
    written: int = 0
    allocated: int = 0
    operations: int = 0

    def ratio_to(self, other: Costs) -> dict[str, float]:
        """Every sum as a ratio to that of another step."""
        return {name: value / getattr(other, name) for name, value in vars(self).items()}


class _Watch(TorchDispatchMode):
    """Adds up what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.costs = Costs()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {_address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **kwargs or {})
        results = result if isinstance(result, (tuple, list)) else [result]
        self.costs.operations += 1
        self.costs.flops += flops_of(func, args, results)
        for returned, declared in zip(results, func._schema.returns, strict=False):
            in_place = declared.alias_info is not None and declared.alias_info.is_write
            for tensor in tree_leaves(returned):
                if not isinstance(tensor, torch.Tensor):
                    continue
                new = _address(tensor) not in given
                self.costs.written += _bytes(tensor) if new or in_place else 0
                self.costs.allocated += _bytes(tensor) if new else 0
        return result


def flops_of(func: Any, args: tuple[Any, ...], results: Iterable[Any]) -> int:
    """Two for each multiplication of a matrix product; 0 for everything else.

    Raises:
        NotImplementedError: an operation whose insides are not seen: one that looks like a product and is not in
            `PRODUCTS`, or one from outside of PyTorch.
    """
    namespace, name = func._schema.name.split("::")
    name = name.removesuffix("_")
    if name in ("_grouped_mm", "grouped_mm"):  # every row of the left factor, or of the result, has its one group
        left, right = args[0], args[1]
        out = next(iter(results))
        return 2 * (out.numel() * left.shape[-1] if right.dim() == 3 else left.numel() * right.shape[-1])
    if name in PRODUCTS:
        left, right = (args[i] for i in PRODUCTS[name])
        if name == "addr":
            return 2 * left.numel() * right.numel()
        # every number of the left factor meets each column of the right one
        columns = 1 if right.dim() == 1 else right.shape[-2 if name == "linear" else -1]
        return 2 * left.numel() * columns
    known = namespace in ("aten", "prim", "prims", "profiler")
    if not known or any(part in LOOKS_LIKE_ONE for part in name.split("_")):
        raise NotImplementedError(f"{func} may hold products that nobody counts; teach scripts/bench/counting.py.")
    return 0


def count(step: Step) -> Costs:
    """The costs of a step, after one that is not counted and may fill caches."""
    step()
    with _Watch() as watch:
        step()
    return watch.costs


def peak_memory(step: Step) -> int:
    """The most bytes a step has at one time of what it has allocated itself, on the CPU.

    From the allocator's own record, which has what is inside of operations too.

    Args:
        step: gives back all that it allocates.

    Raises:
        RuntimeError: the record was not whole, which happens where the machine stands still for a while, five times.
    """
    step()
    for _ in range(5):
        peak, held = _recorded_peak(step)
        if abs(held) <= peak / 1000:
            return peak
    raise RuntimeError(f"Of {peak} bytes {held} seem to be held after the step.")


def _recorded_peak(step: Step) -> tuple[int, int]:
    """The most bytes, and those that are left at the end: 0 if the record is whole."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        step()
    record = profiler.profiler
    assert record is not None
    events = [event for event in record.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak, held


def saved_for_backward(forward: Step, beside: Iterable[torch.Tensor]) -> dict[str, int]:
    """Bytes that a forward keeps for its backward, by type and shape of the tensors.

    A storage counts once, whole. What a function keeps in its context by other ways than `save_for_backward` is not
    seen here, but in `peak_memory`.

    Args:
        forward: returns what keeps the graph alive.
        beside: tensors that are there anyway: the input, parameters.
    """
    seen = {_address(t) for t in beside}
    found: Counter[str] = Counter()
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if _address(tensor) not in seen:
            seen.add(_address(tensor))
            alive.append(tensor)  # so that no other gets its address
            shape = " × ".join(map(str, tensor.shape)) or "number"
            found[f"{shape} {str(tensor.dtype).removeprefix('torch.')}"] += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return dict(found.most_common())


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
