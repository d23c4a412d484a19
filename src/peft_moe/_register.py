"""Makes peft know our tuner types: the only file that writes into peft, and only into peft's lookup tables."""

from importlib.metadata import version
from typing import cast

from packaging.version import Version

OLDEST_PEFT, FIRST_UNTRIED_PEFT = "0.21.0", "0.22.dev0"

# Checked before anything of peft is imported: a stranger version meets a sentence, not an ImportError from inside.
_installed = version("peft")
if not Version(OLDEST_PEFT) <= Version(_installed) < Version(FIRST_UNTRIED_PEFT):
    raise ImportError(
        f"peft {_installed} is installed, and peft_moe works with peft >= {OLDEST_PEFT}, < {FIRST_UNTRIED_PEFT}; "
        f"run: pip install 'peft>={OLDEST_PEFT},<{FIRST_UNTRIED_PEFT}'"
    )

from peft import PeftConfig  # noqa: E402  (after the check above)
from peft.mapping import (  # noqa: E402
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner  # noqa: E402
from peft.utils.peft_types import PeftType  # noqa: E402

from .config import PeftMoeType  # noqa: E402

__all__ = ["PeftMoeType", "register"]


def register(peft_type: PeftMoeType, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Enter a tuner type into peft's tables; doing it again (a reload) replaces our own entry.

    peft's `register_peft_method` only takes members of its own `PeftType` enum, and adding one would change a class of
    peft.

    Raises:
        KeyError: somebody else has registered a type of this name.
    """
    key = cast(PeftType, peft_type)  # peft looks its tables up by string, and ours hashes like one
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(key)
    if known is not None and known.__module__ != config_cls.__module__:
        raise KeyError(
            f"peft type {peft_type.value!r} is taken by {known.__module__}.{known.__qualname__}; "
            "uninstall that package or do not import it beside peft_moe."
        )
    PEFT_TYPE_TO_PREFIX_MAPPING[key] = model_cls.prefix
    PEFT_TYPE_TO_CONFIG_MAPPING[key] = config_cls
    PEFT_TYPE_TO_TUNER_MAPPING[key] = model_cls
