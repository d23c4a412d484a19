"""Mixture-of-LoRA-experts for Hugging Face peft. Importing the package registers its tuner types with peft."""

from ._register import PeftMoeType, register
from .calibrate import Calibration, calibrate
from .compose import compose, from_loras
from .config import MoeConfig
from .fold import fold
from .grouped import GroupedMoeConfig, GroupedMoeModel, read_expert
from .hotswap import hotswap_adapter
from .matched import matched_lora_config
from .medmoe import MedMoeLoraConfig, MedMoeLoraModel
from .moelora import MoeLoraConfig, MoeLoraModel
from .molora import MoLoraConfig, MoLoraModel
from .token_routed import TokenRoutedConfig

__version__ = "0.1.0"

register(PeftMoeType.MOELORA, MoeLoraConfig, MoeLoraModel)
register(PeftMoeType.MOLORA, MoLoraConfig, MoLoraModel)
register(PeftMoeType.MEDMOELORA, MedMoeLoraConfig, MedMoeLoraModel)
register(PeftMoeType.GROUPEDMOE, GroupedMoeConfig, GroupedMoeModel)

__all__ = [
    "Calibration",
    "GroupedMoeConfig",
    "GroupedMoeModel",
    "MedMoeLoraConfig",
    "MedMoeLoraModel",
    "MoLoraConfig",
    "MoLoraModel",
    "MoeConfig",
    "MoeLoraConfig",
    "MoeLoraModel",
    "PeftMoeType",
    "TokenRoutedConfig",
    "calibrate",
    "compose",
    "fold",
    "from_loras",
    "hotswap_adapter",
    "matched_lora_config",
    "read_expert",
]
