"""What every test finds: an offline environment, one thread per process, a local hub and a real small model."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

_HF_HOME = tempfile.TemporaryDirectory(prefix="peft-moe-tests-")

# Before torch, transformers or huggingface_hub is imported: they read these once.
os.environ |= {
    "HF_HOME": _HF_HOME.name,  # neither the caches nor the login of whoever runs the tests
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # the models are tiny, and pytest-xdist runs one process per core
}

import pytest  # noqa: E402
from get_model import smollm2_dir  # noqa: E402
from hub_server import client_environment, serve  # noqa: E402

TESTS = Path(__file__).parent


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct; fetched and converted by the first test that asks for it."""
    return smollm2_dir()


@pytest.fixture
def hub() -> Iterator[str]:
    """The URL of an empty in-memory hub."""
    with serve() as url:
        yield url


@pytest.fixture
def run_with_hub(hub: str, tmp_path: Path) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Run Python code in a new process that is logged in at `hub`; fails with its stderr if the code does."""

    def run(code: str) -> subprocess.CompletedProcess[str]:
        environment = client_environment(hub, home=tmp_path / "hf_home") | {"PYTHONPATH": str(TESTS)}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done

    return run
