"""AT-MoE: trained LoRAs, frozen, under a router over groups and then within a group. arXiv 2410.10896."""

from .config import GroupedMoeConfig
from .model import GroupedMoeModel
from .sources import Expert, read_expert

__all__ = ["Expert", "GroupedMoeConfig", "GroupedMoeModel", "read_expert"]
