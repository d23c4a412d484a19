"""MOELoRA: LoRA experts weighed by the task id. Liu et al., SIGIR 2024, arXiv 2310.18339."""

from .config import MoeLoraConfig
from .model import MoeLoraModel

__all__ = ["MoeLoraConfig", "MoeLoraModel"]
