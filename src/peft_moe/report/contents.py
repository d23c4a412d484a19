"""An adapter's files, of which no more is read than has to be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import safe_open

from ..folding import StateDict
from ..grouped.sources import PICKLES
from ..integrity import ANEW, UNREADABLE


@dataclass(frozen=True)
class Contents:
    """What a file of weights has, of which only routers' weights are loaded.

    Args:
        shapes, dtypes: by name of the tensor.
        routers: the tensors of routers.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    routers: StateDict

    @property
    def counts(self) -> dict[str, int]:
        """Numbers in each tensor."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    @classmethod
    def of(cls, path: Path) -> Contents:
        """Those of a safetensors file; a ValueError if it is none, or if numbers of routers are not finite."""
        shapes, dtypes, routers = {}, {}, {}
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # it is no mapping
                    part = file.get_slice(name)
                    shapes[name], dtypes[name] = tuple(part.get_shape()), str(part.get_dtype())
                    if "moelora_router." in name:
                        routers[name] = file.get_tensor(name)
        except UNREADABLE as error:
            what = " ".join(str(error).split())[:160]
            raise ValueError(f"{path} cannot be read ({what}); it is cut off or no file of weights: {ANEW}.") from None
        for name, tensor in routers.items():
            if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"{path} has {name!r} with numbers that are NaN, infinite or whole, as from training that "
                    "diverged; load an earlier checkpoint."
                )
        return cls(shapes, dtypes, routers)


def find_file(adapter: str | Path, name: str, hub_kwargs: dict[str, Any]) -> Path:
    """The path of one of an adapter's files, in a folder or in the cache of the Hub's.

    Raises:
        FileNotFoundError: there is none.
    """
    subfolder = hub_kwargs.get("subfolder")
    if Path(adapter).exists():
        folder = Path(adapter) / (subfolder or "")
        if (folder / name).is_file():
            return folder / name
        if pickled := [pickle for pickle in PICKLES if (folder / pickle).exists()]:
            raise FileNotFoundError(
                f"The weights of {str(adapter)!r} are a pickle file ({pickled[0]}), and opening one can run any code; "
                "load it with peft where you trust it, and save it again, which makes safetensors."
            )
        raise FileNotFoundError(f"There is no {name} in {str(folder)!r}; give the folder of an adapter.")
    try:
        return Path(hf_hub_download(str(adapter), name, **hub_kwargs))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise FileNotFoundError(
            f"There is no {name} in a folder or Hub repository called {str(adapter)!r} ({why}); give the folder or "
            "Hub id of an adapter."
        ) from None
