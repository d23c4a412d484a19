"""Adapters of peft_moe in axolotl: `adapter: peft_moe` with the plugin `peft_moe.integrations.axolotl.PeftMoePlugin`.

Written for axolotl 0.19, which asks for peft 0.20: see docs/integrations.md for what was run.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftConfig, PeftModel
from pydantic import BaseModel

from peft_moe.integrations import adapt, check_one_task, choose_default, config_from

ADAPTER = "peft_moe"


class PeftMoeArgs(BaseModel):
    """What the plugin adds to axolotl's YAML: `peft_moe`, the `peft_type` and the fields of its config."""

    peft_moe: dict[str, Any] | None = None


class PeftMoePlugin(BasePlugin):
    """Puts in, or loads from `lora_model_dir`, the adapter that the block `peft_moe` of axolotl's YAML describes.

    Example:
        ```yaml
        plugins: [peft_moe.integrations.axolotl.PeftMoePlugin]
        adapter: peft_moe
        peft_moe: {peft_type: molora, num_experts: 8, balance_loss: switch}
        ```
    """

    def get_input_args(self) -> str:
        """Where axolotl finds the block's schema."""
        return f"{PeftMoeArgs.__module__}.{PeftMoeArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """The name of the adapter; it is none that axolotl's code for LoRA can make."""
        return [AdapterCapabilities(name=ADAPTER)]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig] | None:
        """The model with the adapter and its config; None for other adapters than ours.

        Raises:
            ValueError: see `config_from`; also a YAML without the block.
        """
        if cfg.adapter != ADAPTER:
            return None
        folder = cfg.lora_model_dir
        if folder:
            config: Any = PeftConfig.from_pretrained(folder)
            check_one_task(config)
        elif cfg.peft_moe:
            config = config_from(dict(cfg.peft_moe))
        else:
            raise ValueError(f"adapter: {ADAPTER} needs a block peft_moe: with a peft_type and its fields.")
        if config_only:
            return None, config
        autocast = cfg.peft_autocast_adapter_dtype
        options = {} if autocast is None else {"autocast_adapter_dtype": autocast}
        if folder:
            loaded = PeftModel.from_pretrained(model, folder, is_trainable=not inference, **options)
            return choose_default(loaded), config
        return adapt(model, config, **options), config
