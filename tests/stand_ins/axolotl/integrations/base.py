"""Stands in for axolotl.integrations.base: what our plugin uses of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterCapabilities:
    name: str
    lora_like: bool = False
    relora: bool = False


class BasePlugin:
    def get_input_args(self):
        return None

    def get_adapter_capabilities(self):
        return []

    def load_adapter(self, model, cfg, inference=False, config_only=False):
        return None
