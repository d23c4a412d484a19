"""Mixture-of-LoRA-experts for Hugging Face peft. Importing the package registers its tuner types with peft."""

from ._register import PeftMoeType, register
from .config import MoeConfig
from .fold import fold
from .medmoe import MedMoeLoraConfig, MedMoeLoraModel
from .moelora import MoeLoraConfig, MoeLoraModel
from .molora import MoLoraConfig, MoLoraModel
from .token_routed import TokenRoutedConfig

__version__ = "0.1.0"

register(PeftMoeType.MOELORA, MoeLoraConfig, MoeLoraModel)
register(PeftMoeType.MOLORA, MoLoraConfig, MoLoraModel)
register(PeftMoeType.MEDMOELORA, MedMoeLoraConfig, MedMoeLoraModel)

__all__ = [
    "MedMoeLoraConfig",
    "MedMoeLoraModel",
    "MoLoraConfig",
    "MoLoraModel",
    "MoeConfig",
    "MoeLoraConfig",
    "MoeLoraModel",
    "PeftMoeType",
    "TokenRoutedConfig",
    "fold",
]
