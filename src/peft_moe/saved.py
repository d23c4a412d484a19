"""What configs do on their way to a file and back."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig
from peft.utils import CONFIG_NAME

# Raised by a release that saves what earlier ones would compute other numbers from, or could not load.
FORMAT = 1


@dataclass
class SavedConfig(PeftConfig):
    """A config whose file is written whole or not at all, and says by which rules it is to be read.

    Args:
        moe_format: format of the saved adapter; leave it out. One that is newer than this peft_moe is refused.
        moe_version: version of peft_moe that saved the adapter, which saving sets; None if it does not say.
    """

    moe_format: int = FORMAT
    moe_version: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._read_from: str | None = None  # no field: it is not saved
        if isinstance(self.moe_format, bool) or not isinstance(self.moe_format, int) or self.moe_format < 1:
            raise ValueError(f"moe_format={self.moe_format!r} is the format of a saved adapter; leave it out.")
        if self.moe_format > FORMAT:
            raise ValueError(
                f"moe_format={self.moe_format}: the adapter was written by a newer peft_moe, and this one knows "
                f"formats up to {FORMAT}; install the newer one."
            )

    @property
    def read_from(self) -> str | None:
        """The folder or Hub id that the config was read from, until the weights have been loaded; then None."""
        return getattr(self, "_read_from", None)

    @read_from.setter
    def read_from(self, folder: str | None) -> None:
        self._read_from = folder

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """As in peft."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if isinstance(config, SavedConfig):  # and not one of another type, which is what the file says
            config.read_from = str(Path(pretrained_model_name_or_path, subfolder or ""))
        return cast(PeftConfig, config)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As in peft, but a process that is killed meanwhile leaves the file that was there, not the half of one."""
        from . import __version__

        self.moe_version = __version__
        if os.path.isfile(save_directory):
            super().save_pretrained(save_directory, **kwargs)  # which says so
        os.makedirs(save_directory, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=save_directory, prefix=".config-") as work:
            super().save_pretrained(work, **kwargs)
            os.replace(Path(work, CONFIG_NAME), Path(save_directory, CONFIG_NAME))
