"""The model cards of folded adapters."""

from __future__ import annotations

from dataclasses import dataclass

from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig

from .calibrate import Calibration
from .card_methods import hub_id, table
from .config import MoeConfig


@dataclass(frozen=True)
class How:
    """What the card says of a fold.

    Args:
        title: of the card.
        what: the adapter, as the subject of "folded into a stock LoRA".
        result: what the LoRA is beside the adapter, a sentence.
        errors: a section on errors; empty if it is exact.
    """

    title: str
    what: str
    result: str
    errors: str = ""


def errors_section(calibration: Calibration) -> str:
    """The section of the card on how close a calibrated LoRA comes."""
    how = "least squares" if calibration.method == "least_squares" else "mean weights"
    damping = calibration.damping or "features / tokens"
    rows = [("error, mean over layers", calibration.error, calibration.mean_gate_error)]
    if calibration.kl is not None and calibration.mean_gate_kl is not None:
        rows.append(("KL of predictions, nats", calibration.kl, calibration.mean_gate_kl))
    rows += [(f"`{key}`", layer.error, layer.mean_gate_error) for key, layer in calibration.layers.items()]
    cells = [(what, f"{error:.4f}", f"{by_mean:.4f}") for what, error, by_mean in rows]
    return f"""
## How close it is

Made by `peft_moe.calibrate` by {how} from {calibration.tokens} tokens (damping {damping}); measured on
{calibration.held_out_tokens} others. An error is the norm of what the LoRA adds to a layer's output less what the
adapter adds, over the norm of the latter: 0 is the same, 1 as wrong as adding nothing.

{table(("", "this LoRA", "each expert's mean weight, uncompressed"), cells)}
"""


def folded_card(config: MoeConfig, lora_config: LoraConfig, how: How) -> str:
    """The README of a folded adapter."""
    base = config.base_model_name_or_path
    data = ModelCardData(base_model=hub_id(base), library_name="peft", tags=["lora", "peft-moe"])
    text = f"""---
{data.to_yaml()}
---

# {how.title}

{how.what}, folded by peft_moe into a stock LoRA of rank {lora_config.r}. {how.result}, and needs
only peft:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/directory")  # base_model: {base or "the adapter's"}
```
{how.errors}"""
    return str(ModelCard(text))
