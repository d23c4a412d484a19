"""From what a call was told, or a layer sees, to the weight of each expert: `Router(gate, select)`."""

from .batch import Batch, keep_mask
from .call import View
from .context import RoutingContext
from .gates import TaskGate, TokenGate
from .ledger import Ledger, OutsideScale
from .router import BalanceTerm, Router, TaskRouter, TokenRouter
from .select import softmax, top_k, top_p
from .statistics import RoutingStatistics
from .tasks import encode_tasks, list_tasks, task_index

__all__ = [
    "BalanceTerm",
    "Batch",
    "Ledger",
    "OutsideScale",
    "Router",
    "RoutingContext",
    "RoutingStatistics",
    "TaskGate",
    "TaskRouter",
    "TokenGate",
    "TokenRouter",
    "View",
    "encode_tasks",
    "keep_mask",
    "list_tasks",
    "softmax",
    "task_index",
    "top_k",
    "top_p",
]
