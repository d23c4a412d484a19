"""The package as a citizen: what it registers, what it leaves alone, and which way its imports point."""

import ast
import copy
import importlib
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from helpers import config_for
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_moe
from peft_moe import MoeLoraConfig, MoeLoraModel, PeftMoeType
from peft_moe._register import register

SOURCE = Path(peft_moe.__file__).parent


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_the_type_is_registered_under_its_name():
    assert PEFT_TYPE_TO_CONFIG_MAPPING["MOELORA"] is MoeLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["MOELORA"] is MoeLoraModel


@pytest.mark.long
def test_importing_changes_no_class_and_no_function_of_peft():
    done = python(
        "import inspect, peft, peft.tuners.tuners_utils as t, peft.utils.peft_types as p, transformers as f\n"
        "import transformers.trainer\n"
        "watched = [peft, peft.peft_model, t, p, f.Trainer, p.PeftType, t.BaseTuner, t.BaseTunerLayer]\n"
        "watched += [c for c in vars(peft).values() if inspect.isclass(c)]\n"
        "before = [dict(vars(w)) for w in watched]\n"
        "import peft_moe\n"
        "assert list(p.PeftType) == list(before[5]['_member_map_'].values())\n"
        "for w, b in zip(watched, before):\n"
        "    now = dict(vars(w))\n"
        "    assert {k for k in now if now[k] is not b.get(k)} <= {'__warningregistry__'}, w\n"
    )
    assert done.returncode == 0, done.stderr


def test_importing_again_and_reloading_change_nothing():
    importlib.reload(importlib.import_module("peft_moe"))
    register(PeftMoeType.MOELORA, MoeLoraConfig, MoeLoraModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING["MOELORA"] is MoeLoraConfig


def test_a_name_that_somebody_else_has_taken_is_refused(monkeypatch):
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, "MOELORA", peft.LoraConfig)
    with pytest.raises(KeyError, match=r"'MOELORA' is taken by peft\.tuners\.lora"):
        register(PeftMoeType.MOELORA, MoeLoraConfig, MoeLoraModel)


@pytest.mark.parametrize("version", ["0.20.0", "0.22.0.dev0", "0.22.0", "1.0"])
def test_another_peft_gives_a_sentence(version):
    done = python(
        "import importlib.metadata as m\n"
        "real = m.version\n"
        f"m.version = lambda name: {version!r} if name == 'peft' else real(name)\n"
        "import peft_moe\n"
    )
    last = done.stderr.strip().splitlines()[-1]
    assert f"ImportError: peft {version} is installed, and peft_moe works with peft >= 0.21.0, < 0.22" in last
    assert "pip install" in last


def test_types_and_models_can_be_copied_and_pickled():
    assert pickle.loads(pickle.dumps(PeftMoeType.MOELORA)) is PeftMoeType.MOELORA
    assert copy.deepcopy(PeftMoeType.MOELORA) is PeftMoeType.MOELORA
    assert hash(PeftMoeType.MOELORA) == hash("MOELORA")


def answer_from_a_child(config, queue):
    queue.put((config.peft_type.value, sorted(config.target_modules)))


@pytest.mark.long
def test_a_spawned_process_knows_the_type():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=answer_from_a_child, args=(config_for("llama"), queue))
    process.start()
    assert queue.get(timeout=120)[0] == "MOELORA"
    process.join()
    assert process.exitcode == 0


@pytest.mark.long
def test_importing_loads_no_package_that_peft_has_not_loaded_already():
    done = python(
        "import sys, peft\n"
        "already = set(sys.modules)\n"
        "import peft_moe, peft_moe.cli\n"
        "for command in [], ['fold'], ['compose'], ['inspect'], ['report'], ['check'], ['check', 'uniform']:\n"
        "    try:\n"
        "        peft_moe.cli.main([*command, '--help'])\n"
        "    except SystemExit:\n"
        "        pass\n"
        "print(sorted(set(sys.modules) - already))\n"
    )
    assert done.returncode == 0, done.stderr
    added = ast.literal_eval(done.stdout.splitlines()[-1])
    packages = {name.partition(".")[0] for name in added} - sys.stdlib_module_names
    assert packages == {"peft_moe"}  # not datasets, evaluate, pandas, matplotlib, trl, sklearn, ...
    # nor parts of packages that peft loads a part of
    assert not {"transformers.trainer", "torch._dynamo", "torch._inductor"} & set(added)


# torch only -> layer -> tuner -> a room per paper -> registration; the tools sit on top.
ORDER = [
    {"bank", "checks", "dispatch", "kernels", "losses", "routing", "schedule", "stand_in"},
    {"saved"},
    {"config"},
    {"blocks", "checkpointing", "entry", "folding", "fused", "integrity", "layer", "shortcut"}
    | {"matching", "mixing", "offloading", "packing", "prompts", "quantised"},
    {"targets"},
    {"tuner"},
    {"token_routed"},
    {"moelora", "molora", "medmoe"},
    {"grouped"},
    {"_register"},
    {"watch"},
    {"calibrate", "card_methods", "directory", "outline", "resume"},
    {"compose", "fold", "fold_card", "hotswap", "matched"},
    {"metrics", "reading", "arguments", "data", "output"},
    {"report"},
    {"answers", "callbacks", "evaluation", "rollouts", "training", "card"},
    {"routing_evaluated"},
    {"routing_images"},
    {"cli", "integrations"},
]


def test_imports_point_one_way():
    rank = {room: i for i, rooms in enumerate(ORDER) for room in rooms}
    for path in SOURCE.rglob("*.py"):
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for node in module_level_imports(path):
            depth = len(path.relative_to(SOURCE).parts)
            if node.level == depth:  # an import of a sibling room
                for target in [node.module.split(".")[0]] if node.module else [a.name for a in node.names]:
                    assert rank[target] <= rank[room], f"{path.name} imports {target}"
        if room in ORDER[0]:
            outside = {n.module for n in module_level_imports(path) if n.level == 0}
            assert not {m for m in outside if m.startswith(("peft", "transformers"))}, path


def module_level_imports(path):
    return [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]


def test_only_the_register_writes_into_peft():
    for path in SOURCE.rglob("*.py"):
        if path.name != "_register.py":
            assert "PEFT_TYPE_TO" not in path.read_text(), path


def test_what_is_exported_is_documented():
    for name in peft_moe.__all__:
        assert getattr(peft_moe, name).__doc__, name
