"""MoLoRA: LoRA experts chosen per token by a router in each layer. Liao et al., MING-MOE, arXiv 2404.09027."""

from .config import MoLoraConfig
from .model import MoLoraModel

__all__ = ["MoLoraConfig", "MoLoraModel"]
