"""Adapter directories: written whole or not at all, and what their configs say."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

FILES = (SAFETENSORS_WEIGHTS_NAME, "README.md", CONFIG_NAME)


def check_free(out_dir: Path, *, overwrite: bool, names: Sequence[str] = FILES) -> None:
    """Raise an error if a directory cannot be written, or holds files of these names and `overwrite` is False."""
    file = next((path for path in (out_dir, *out_dir.parents) if path.is_file()), None)
    if file is not None:
        raise NotADirectoryError(f"{out_dir} cannot be a directory, since {file} is a file; choose another directory.")
    there = [name for name in names if (out_dir / name).exists()]
    if there and not overwrite:
        raise FileExistsError(
            f"{out_dir} holds {there} already; choose another directory, or pass overwrite=True (--overwrite)."
        )


def check_not_over(out_dir: Path, sources: Iterable[Path]) -> None:
    """Raise a ValueError if what is made of adapters would be written over one of them, whether or not that may be."""
    for source in sources:
        if source.is_dir() and out_dir.is_dir() and source.samefile(out_dir):
            raise ValueError(f"{out_dir} holds the adapter that this is made of; choose another directory.")


@contextmanager
def adapter_directory(out_dir: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to write an adapter into, whose files take their place in `out_dir` at the end of the `with` block.

    The config, without which nothing loads, comes last. An error leaves `out_dir` as it was. A process that is killed
    leaves the old adapter or the new one; or, where their configs differ, none for the moment in which the old weights
    would have the new config or the other way round. What has not taken its place then stays in the hidden folder.

    Raises:
        FileExistsError: `out_dir` holds files of these names, and `overwrite` is False.
        NotADirectoryError: it, or a folder above it, is a file.
    """
    check_free(out_dir, overwrite=overwrite)
    with folder_near(out_dir) as work:
        yield work
        out_dir.mkdir(exist_ok=True)
        if _settings(out_dir / CONFIG_NAME) != _settings(work / CONFIG_NAME):
            (out_dir / CONFIG_NAME).unlink(missing_ok=True)
        for name in FILES:
            (work / name).replace(out_dir / name)


@contextmanager
def folder_near(out: Path) -> Iterator[Path]:
    """A hidden folder for the span of a `with` block, on the file system of a folder that may not be there yet.

    It is in `out` if that is there: a link or a mount may be on another file system than what it stands in, and files
    could not be moved from there.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out if out.is_dir() else out.parent, prefix=f".{out.name}-") as work:
        yield Path(work)


def read_config(source: str | Path, **hub_kwargs: Any) -> PeftConfig:
    """The config of a saved adapter.

    Args:
        source: a directory or Hub id.
        hub_kwargs: for a Hub id: `revision`, `token`, `subfolder`, `cache_dir`.

    Raises:
        ValueError: there is none, or it is none that peft knows, or has a wrong value; the message says where it is.
    """
    try:
        return PeftConfig.from_pretrained(str(source), **hub_kwargs)
    except KeyError as error:  # what peft makes of an adapter type it does not know
        raise ValueError(f"{source} is an adapter of type {error}, which peft does not know.") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"The {CONFIG_NAME} of {source} is no JSON ({error}); save or fetch the adapter anew."
        ) from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"The {CONFIG_NAME} of {source} cannot be read: {error}") from None


def _settings(path: Path) -> object:
    """What a config says; None if that cannot be read."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    # peft keeps these as sets, and writes a set in another order in each process
    return {k: sorted(v) if k.endswith("_modules") and isinstance(v, list) else v for k, v in settings.items()}
