"""One HTML page that shows the routing, and needs nothing but a browser: no network, no server, no other file."""

from __future__ import annotations

import json
import math
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch

SCRIPTS = ("colours.js", "elements.js", "maps.js", "numbers.js", "tokens.js", "summary.js", "parts.js", "page.js")
FIELDS = ("task", "tokens", "prompt_tokens", "weights")  # of a sample
WHOLE = 2**16 - 1  # a weight of 1
DIGITS = 5  # significant; the page shows three or four


def write_page(routing: Mapping[str, Any], samples: Sequence[Any], path: Path) -> None:
    """Write the page of a routing report.

    Text of the adapter and the data is untrusted. It goes into the page as JSON and is shown as text only; the page's
    Content-Security-Policy lets nothing run but the script that is shipped with this package, and nothing be loaded.

    The size is about 80 kB, plus 8/3 bytes for every weight of a sample (tokens × experts × layers, or experts × layers
    where all tokens of a row share their weights), plus about 9 bytes for each number in `routing`. 8 samples of 200
    tokens in 210 layers of 8 experts are 7.2 MB; one sample is 0.9 MB.

    Where the base model is a folder, only the folder's name is written: its path says who has made the page.

    Args:
        routing: what `Routing.to_dict()` gives, format 1.
        samples: rows to show token by token, as mappings or objects with `task`, `tokens` (n texts), `prompt_tokens`
            (how many of them are the prompt), `cut` (how many tokens before these are left out; 0 if it is missing)
            and `weights`: for each layer of `routing` a tensor (n or 1, E) of numbers from 0 to 1, kept in steps of
            1/65535, by which no expert overtakes the strongest. May be empty.
        path: the file to write; an existing one is replaced.

    Raises:
        ValueError: another format, or a sample whose weights do not fit its tokens or the layers.

    Example:
        >>> write_page(routing.to_dict(), samples, Path("report/index.html"))
    """
    if routing.get("format") != 1:
        raise ValueError(
            f"this is routing of format {routing.get('format')!r}; the page shows format 1, make it again."
        )
    data = {
        "routing": _rounded({**routing, "base_model": _without_folders(routing["base_model"])}),
        "samples": [_sample(sample, routing["layers"], number) for number, sample in enumerate(samples)],
    }
    Path(path).write_text(_filled(data), encoding="utf-8", newline="\n")


def _filled(data: Mapping[str, Any]) -> str:
    style, script = _asset("page.css"), "\n".join(map(_asset, SCRIPTS))
    parts = {
        "policy": (
            f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
            "base-uri 'none'; form-action 'none'"
        ),
        "style": style,
        "script": script,
        **{name: as_script_json(value) for name, value in data.items()},
    }
    # One pass, so that a part that reads like the name of another is left alone.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset("page.html"))


def as_script_json(value: Any) -> str:
    """JSON that can stand in a `<script>` element: ASCII, and without the characters that could end it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _asset(name: str) -> str:
    return files(__package__).joinpath("assets").joinpath(name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _hash(text: str) -> str:
    """What a Content-Security-Policy calls this inline text."""
    return "sha256-" + b64encode(sha256(text.encode()).digest()).decode()


def _rounded(value: Any) -> Any:
    """Plain lists and dicts with short numbers; None for a number that is none, such as the cosine of no direction."""
    if isinstance(value, Mapping):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def _without_folders(name: str) -> str:
    """The last part of what is a path on this machine and no name on a hub, which is "name" or "owner/name"."""
    parts = re.split(r"[/\\]", name)
    local = "\\" in name or len(parts) > 2 or parts[0] in ("", ".", "..", "~") or parts[0].endswith(":")
    return next((part for part in reversed(parts) if part), name) if local else name


def _sample(sample: Any, layers: Sequence[Mapping[str, Any]], number: int) -> dict[str, Any]:
    found = sample if isinstance(sample, Mapping) else {name: getattr(sample, name) for name in FIELDS}
    cut = found.get("cut", 0) if isinstance(sample, Mapping) else getattr(sample, "cut", 0)
    tokens, weights = list(found["tokens"]), list(found["weights"])
    if len(weights) != len(layers):
        raise ValueError(
            f"sample {number} has weights of {len(weights)} layers and the routing has {len(layers)}; "
            "take both from the same run."
        )
    return {
        "task": found["task"],
        "tokens": tokens,
        "prompt_tokens": found["prompt_tokens"],
        "cut": cut,
        "weights": [
            _packed(of_layer, len(tokens), layer, f"sample {number}, layer {index}")
            for index, (of_layer, layer) in enumerate(zip(weights, layers, strict=True))
        ],
    }


def _packed(weights: torch.Tensor, tokens: int, layer: Mapping[str, Any], where: str) -> str:
    """Weights (n or 1, E) as base64 of two bytes each, the lower first, row by row: 65535 is a weight of 1."""
    experts = len(layer["experts"])
    if weights.ndim != 2 or weights.shape[1] != experts or weights.shape[0] not in (1, tokens):
        raise ValueError(
            f"{where}: weights of shape {tuple(weights.shape)}; give ({tokens}, {experts}), "
            f"or (1, {experts}) where all tokens share them."
        )
    if not torch.isfinite(weights).all():
        raise ValueError(f"{where}: a weight is not finite; collect the routing again from an adapter without NaN.")
    values = weights.detach().float().cpu().clamp(0, 1).numpy()
    whole = np.rint(values * WHOLE)
    # The page takes the first of equal ones: those that are below the strongest, and equal to it only when rounded,
    # go a step down. The strongest is one of a group where there are groups, as in the page.
    grouped = [e for e, group in enumerate(layer.get("group_of") or ()) if group >= 0] or slice(None)
    strongest = values[:, grouped].max(-1, keepdims=True)
    whole -= (whole == np.rint(strongest * WHOLE)) & (values < strongest)
    return b64encode(whole.clip(0).astype("<u2").tobytes()).decode()
