"""Adapter directories that are written whole or not at all."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

FILES = (SAFETENSORS_WEIGHTS_NAME, "README.md", CONFIG_NAME)


def check_free(out_dir: Path, *, overwrite: bool) -> None:
    """Raise a FileExistsError if a directory holds an adapter's files, and `overwrite` is False."""
    there = [name for name in FILES if (out_dir / name).exists()]
    if there and not overwrite:
        raise FileExistsError(f"{out_dir} holds {there} already; choose another directory, or pass overwrite=True.")


@contextmanager
def adapter_directory(out_dir: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder beside `out_dir` to write an adapter into, whose files take their place at the end of the `with` block.

    The config, without which nothing loads, comes last. An error leaves `out_dir` as it was. A process that is killed
    leaves the old adapter or the new one; or, where their configs differ, none for the moment in which the old weights
    would have the new config or the other way round. What has not taken its place then stays in the hidden folder.

    Raises:
        FileExistsError: `out_dir` holds files of these names, and `overwrite` is False.
    """
    check_free(out_dir, overwrite=overwrite)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{out_dir.name}-") as work:
        yield Path(work)
        out_dir.mkdir(exist_ok=True)
        if _settings(out_dir / CONFIG_NAME) != _settings(Path(work) / CONFIG_NAME):
            (out_dir / CONFIG_NAME).unlink(missing_ok=True)
        for name in FILES:
            (Path(work) / name).replace(out_dir / name)


def _settings(path: Path) -> object:
    """What a config says; None if that cannot be read."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    # peft keeps these as sets, and writes a set in another order in each process
    return {k: sorted(v) if k.endswith("_modules") and isinstance(v, list) else v for k, v in settings.items()}
