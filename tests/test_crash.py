"""What a process leaves that is killed while it saves, trains or folds; crashes.py has the work and the checks."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from crashes import make_trainer
from helpers import config_for

from peft_moe.resume import last_complete_checkpoint, why_incomplete

WORK = ("save_over_an_older_save", "fold_over_an_older_fold", "train_with_checkpoints")


def run(*arguments: object) -> str:
    command = [sys.executable, str(Path(__file__).with_name("crashes.py")), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_a_kill_at_many_moments_leaves_the_old_adapter_or_the_new_and_a_checkpoint_to_go_on_from(tmp_path):
    assert run(tmp_path, 4, *WORK).count("killed") == 4 + 2 + 1


@pytest.mark.slow
@pytest.mark.parametrize("work", WORK)
def test_a_kill_at_every_moment_leaves_the_old_adapter_or_the_new_and_a_checkpoint_to_go_on_from(work, tmp_path):
    assert "killed" in run(tmp_path, 1, work)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """checkpoint-1 and checkpoint-2, whole."""
    out = tmp_path_factory.mktemp("out")
    make_trainer(config_for("llama"), out, max_steps=2).train()
    return out


@pytest.fixture
def out(checkpoints, tmp_path):
    shutil.copytree(checkpoints, tmp_path / "out")
    return tmp_path / "out"


FILES = {
    "trainer_state.json": "no whole trainer_state.json, which is written last",
    "adapter_model.safetensors": "no whole adapter_model.safetensors",
    "adapter_config.json": "adapter_config.json",
    "optimizer.pt": "optimizer",
    "scheduler.pt": "scheduler.pt",
    "rng_state.pth": "random numbers|rng_state.pth is cut off",
}


@pytest.mark.parametrize("part", [None, 0, 0.5, 0.97], ids=["lost", "empty", "half", "almost"])
@pytest.mark.parametrize(("name", "reason"), FILES.items(), ids=FILES)
def test_a_checkpoint_that_lacks_a_file_or_its_end_is_left_out(name, reason, part, out, caplog):
    assert last_complete_checkpoint(out) == str(out / "checkpoint-2")
    assert caplog.text == ""
    content = (out / "checkpoint-2" / name).read_bytes()
    (out / "checkpoint-2" / name).unlink()
    if part is not None:
        (out / "checkpoint-2" / name).write_bytes(content[: int(len(content) * part)])
    before = sorted(out.rglob("*"))
    assert last_complete_checkpoint(out) == str(out / "checkpoint-1")
    assert "checkpoint-2 is left out: " in caplog.text
    assert re.search(reason, caplog.text)
    assert sorted(out.rglob("*")) == before


def test_there_may_be_no_complete_checkpoint(out, tmp_path):
    assert last_complete_checkpoint(tmp_path / "nothing") is None
    (out / "checkpoint-7").mkdir()
    (out / "checkpoint-note").mkdir()
    (out / "checkpoint-9").write_text("a file")
    assert last_complete_checkpoint(str(out)) == str(out / "checkpoint-2")
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.rmtree(out / name)
    assert last_complete_checkpoint(out) is None


def test_numbers_are_compared_as_numbers(out):
    (out / "checkpoint-2").rename(out / "checkpoint-10")
    (out / "checkpoint-1").rename(out / "checkpoint-9")
    assert last_complete_checkpoint(out) == str(out / "checkpoint-10")


def test_states_of_random_numbers_of_several_processes_are_all_there_or_the_checkpoint_is_left_out(out):
    folder = out / "checkpoint-2"
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    assert "random numbers" in why_incomplete(folder)  # several processes, of which one has written
    shutil.copy(folder / "rng_state_0.pth", folder / "rng_state_1.pth")
    assert why_incomplete(folder) is None


def test_adapters_in_folders_of_their_names_are_looked_at(out):
    folder = out / "checkpoint-2"
    (folder / "second").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).rename(folder / "second" / name)
    assert why_incomplete(folder) is None
    (folder / "second" / "adapter_model.safetensors").write_bytes(b"")
    assert why_incomplete(folder) == "it has no whole adapter_model.safetensors"


def test_a_config_is_replaced_at_once(tmp_path):
    config_for("llama").save_pretrained(tmp_path)
    first = (tmp_path / "adapter_config.json").stat()
    config_for("llama", r=4).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").stat().st_ino != first.st_ino
    assert (tmp_path / "adapter_config.json").stat().st_mode == first.st_mode
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(AssertionError, match="should be a directory, not a file"):
        config_for("llama").save_pretrained(str(tmp_path / "file"))
