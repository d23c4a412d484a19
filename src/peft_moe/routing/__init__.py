"""From what a call was told, or a layer sees, to the weight of each expert: `Router(gate, select)`."""

from .batch import Batch, check_prompt_mask, keep_mask, prompt_before_labels
from .call import Call, View
from .context import RoutingContext
from .control import Control, GroupWeights, control_of, plain
from .gates import GroupedGate, TaskGate, TokenGate
from .grouped import Decision, GroupedRouter, Router
from .ledger import Ledger, OutsideScale
from .mixture import BASE, Part, adapters_of
from .prompt import Prompt
from .router import BalanceTerm, TaskRouter, TokenRouter
from .select import softmax, top_k, top_p
from .statistics import RoutingStatistics
from .tasks import encode_tasks, list_tasks, task_index

__all__ = [
    "BASE",
    "BalanceTerm",
    "Batch",
    "Call",
    "Control",
    "Decision",
    "GroupWeights",
    "GroupedGate",
    "GroupedRouter",
    "Ledger",
    "OutsideScale",
    "Part",
    "Prompt",
    "Router",
    "RoutingContext",
    "RoutingStatistics",
    "TaskGate",
    "TaskRouter",
    "TokenGate",
    "TokenRouter",
    "View",
    "adapters_of",
    "check_prompt_mask",
    "control_of",
    "encode_tasks",
    "keep_mask",
    "list_tasks",
    "plain",
    "prompt_before_labels",
    "softmax",
    "task_index",
    "top_k",
    "top_p",
]
