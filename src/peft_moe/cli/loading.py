"""An adapter on its base model, and its tokenizer, as subcommands need them."""

from __future__ import annotations

from argparse import Namespace
from typing import Any


def add_options(parser: Any) -> None:
    """The options of subcommands that run an adapter over rows: what is loaded, and how rows are asked."""
    parser.add_argument("--base-model", help="base model, in place of the one that the adapter names")
    parser.add_argument(
        "--dtype",
        choices=("auto", "fastest", "float32", "bfloat16"),
        default="auto",
        help="type of the base weights; auto: the checkpoint's; fastest: bfloat16 where the device computes with it, "
        "else float32 (default: %(default)s)",
    )
    parser.add_argument(
        "--protocol",
        choices=("instruction", "bare"),
        default="instruction",
        help="how rows were asked in training; bare: by their input alone (default: %(default)s)",
    )


def hub_of(arguments: Namespace) -> dict[str, Any]:
    """What is to be said to the Hub of an adapter there."""
    return {"revision": arguments.revision} if arguments.revision else {}


class Source:
    """Where an adapter and its base model are.

    Args:
        adapter: directory or Hub id.
        config: the adapter's config.
        base_model: in place of the one that the config names.
        dtype: type of the base weights, as `resolve_dtype` takes it.
        hub: for a Hub adapter, `revision`.

    Raises:
        ValueError: nothing names a base model.
    """

    def __init__(self, adapter: str, config: Any, *, base_model: str | None, dtype: str, hub: dict[str, Any]) -> None:
        self.adapter, self.dtype, self.hub = adapter, dtype, hub
        self.base = base_model or config.base_model_name_or_path
        if not self.base:
            raise ValueError(f"The adapter {adapter!r} names no base model; pass --base-model.")
        self.base_hub = {} if base_model or not config.revision else {"revision": config.revision}

    def tokenizer(self) -> Any:
        """The tokenizer that was saved with the adapter, or else the base model's; it pads."""
        from transformers import AutoTokenizer
        from transformers.utils.hub import cached_file

        try:
            cached_file(self.adapter, "tokenizer_config.json", **self.hub)
        except OSError:
            tokenizer = AutoTokenizer.from_pretrained(self.base, **self.base_hub)
        else:
            tokenizer = AutoTokenizer.from_pretrained(self.adapter, **self.hub)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def model(self) -> Any:
        """The adapter on its base model, on the device that accelerate chooses."""
        from accelerate import PartialState
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        from ..dtypes import resolve_dtype

        device = PartialState().device
        dtype = resolve_dtype(self.dtype, device)
        base = AutoModelForCausalLM.from_pretrained(self.base, dtype=dtype, **self.base_hub)
        return PeftModel.from_pretrained(base.to(device), self.adapter, **self.hub)
