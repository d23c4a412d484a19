"""From what a forward was told to the weight of each expert: `Router(gate, select)` and the context they read."""

from .context import Batch, RoutingContext
from .gates import TaskGate
from .router import Router
from .select import softmax
from .tasks import encode_tasks, list_tasks, task_index

__all__ = ["Batch", "Router", "RoutingContext", "TaskGate", "encode_tasks", "list_tasks", "softmax", "task_index"]
