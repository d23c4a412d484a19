"""Adapters of peft_moe in ms-swift: `--external_plugins THIS_FILE --tuner_type peft_moe`.

`PEFT_MOE_CONFIG` in the environment names a YAML or JSON file with the `peft_type` and the fields of its config. Not
called swift.py: ms-swift puts the folder of a plugin first on the path, where that would be found instead of itself.

Written for ms-swift 4.6, which asks for peft below 0.21: see docs/integrations.md for what was run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from peft import PeftConfig, PeftModel
from swift.tuner_plugin import PeftTuner, tuners_map
from torch import nn

# absolute: ms-swift runs the file by its path, outside of the package
from peft_moe.integrations import adapt, check_one_task, choose_default, config_from

VARIABLE = "PEFT_MOE_CONFIG"


class PeftMoeTuner(PeftTuner):
    """What ms-swift calls to make, load and save the adapter; saving is as for peft's."""

    @staticmethod
    def prepare_model(args: Any, model: nn.Module) -> PeftModel:
        """The model with a new adapter.

        Raises:
            ValueError: see `config_from`; also no file, or one that holds no fields.
        """
        path = os.environ.get(VARIABLE)
        if not path or not Path(path).is_file():
            raise ValueError(f"{VARIABLE}={path!r} is no file; set it to a YAML or JSON file of the adapter's config.")
        fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError(f"{VARIABLE}={path!r} holds no fields; write one `name: value` per line.")
        task_type = str(getattr(args, "task_type", None) or "causal_lm").upper()
        return adapt(model, config_from(fields, task_type if task_type in ("CAUSAL_LM", "SEQ_CLS") else None))

    @staticmethod
    def from_pretrained(model: nn.Module, model_id: str, **kwargs: Any) -> PeftModel:
        """The model with a saved adapter; a ValueError if its rows would need tasks."""
        check_one_task(PeftConfig.from_pretrained(model_id))
        return choose_default(PeftTuner.from_pretrained(model, model_id, **kwargs))


tuners_map["peft_moe"] = PeftMoeTuner
