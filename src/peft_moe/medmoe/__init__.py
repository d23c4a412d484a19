"""Med-MoE-LoRA: more experts in deeper layers, mixed ranks, a base expert. Yang et al., arXiv 2601.07935."""

from .config import MedMoeLoraConfig
from .model import MedMoeLoraModel

__all__ = ["MedMoeLoraConfig", "MedMoeLoraModel"]
