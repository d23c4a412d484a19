"""Mixture-of-LoRA-experts for Hugging Face peft. Importing the package registers its tuner types with peft."""

from ._register import PeftMoeType, register
from .config import MoeConfig
from .fold import fold
from .moelora import MoeLoraConfig, MoeLoraModel

__version__ = "0.1.0"

register(PeftMoeType.MOELORA, MoeLoraConfig, MoeLoraModel)

__all__ = ["MoeConfig", "MoeLoraConfig", "MoeLoraModel", "PeftMoeType", "fold"]
