"""Our adapters in axolotl and ms-swift, by the interface of each.

Where a host is not installed, its interface is that of tests/stand_ins: names and signatures as in axolotl 0.19.0 and
ms-swift 4.6.0. Tests that need the host itself are skipped then.
"""

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from grouped_helpers import make_experts
from helpers import TARGETS, TASKS, logits
from peft import PeftModel, get_peft_model
from tiny_models import make_inputs, make_model

import peft_moe
from peft_moe import MoLoraConfig
from peft_moe.integrations import config_from

INTEGRATIONS = Path(peft_moe.__file__).parent / "integrations"
PLUGIN = "peft_moe.integrations.axolotl.PeftMoePlugin"
HOSTS = {"axolotl": "axolotl.integrations.base", "ms_swift": "swift.tuner_plugin"}
KINDS = ["MOELORA", "molora", "MedMoELoRA", "groupedmoe"]

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(axolotl|swift|modelscope).*"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),  # an import of ms-swift
]


class Settings(dict):
    """As axolotl's DictDefault: what is not there is None."""

    __getattr__ = dict.get


def is_installed(host):
    return importlib.util.find_spec(HOSTS[host].split(".")[0]) is not None


@pytest.fixture
def plugin(request, monkeypatch):
    """The module of our plugin for a host, or for what stands in for it."""
    host = request.param
    if not is_installed(host):
        before = set(sys.modules)
        monkeypatch.syspath_prepend(Path(__file__).parent / "stand_ins")
        yield importlib.import_module(f"peft_moe.integrations.{host}")
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("axolotl", "swift") or name.startswith("peft_moe.integrations."):
                del sys.modules[name]
    else:
        yield importlib.import_module(f"peft_moe.integrations.{host}")


def for_host(host):
    return pytest.mark.parametrize("plugin", [host], indirect=True)


def fields_of(kind, tmp_path, **changes):
    fields = {"peft_type": kind, "init_lora_weights": False}
    if kind == "groupedmoe":
        experts = make_experts("llama", tmp_path)
        fields |= {"groups": {"f": {name: experts[name] for name in "ab"}}, "general_expert": experts["p"]}
    else:
        fields |= {"num_experts": 4, "target_modules": TARGETS["llama"]}
    if kind == "MOELORA":
        fields |= {"tasks": TASKS, "default_task": "rad"}
    return fields | changes


def train_a_step(model):
    """A training call without tasks, as of a collator that drops them; warnings are errors."""
    model.train()(**make_inputs("llama")).loss.backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


@for_host("axolotl")
@pytest.mark.parametrize("kind", KINDS)
def test_axolotl_puts_in_the_adapter_of_its_yaml_and_loads_it_again(kind, plugin, tmp_path):
    ours = plugin.PeftMoePlugin()
    assert [capability.name for capability in ours.get_adapter_capabilities()] == ["peft_moe"]
    module, _, name = ours.get_input_args().rpartition(".")
    block = getattr(importlib.import_module(module), name)(peft_moe=fields_of(kind, tmp_path)).model_dump()
    cfg = Settings(adapter="peft_moe", **block)
    assert ours.load_adapter(make_model("llama"), Settings(adapter="lora")) is None
    nothing, config = ours.load_adapter(make_model("llama"), cfg, config_only=True)
    assert nothing is None
    assert config.peft_type.value == kind.upper()
    model, _ = ours.load_adapter(make_model("llama"), cfg)
    assert any("moelora_router" in name for name in train_a_step(model))
    expected = logits(model.eval(), make_inputs("llama", labels=False))
    model.save_pretrained(str(tmp_path / "saved"))
    saved = Settings(adapter="peft_moe", lora_model_dir=str(tmp_path / "saved"))
    for inference in (True, False):
        loaded, _ = ours.load_adapter(make_model("llama"), saved, inference=inference)
        torch.testing.assert_close(logits(loaded.eval(), make_inputs("llama", labels=False)), expected)
        assert any(p.requires_grad for p in loaded.parameters()) != inference
    assert train_a_step(loaded)


@for_host("ms_swift")
@pytest.mark.parametrize("kind", KINDS)
def test_ms_swift_makes_saves_and_loads_the_adapter_of_a_file(kind, plugin, tmp_path, monkeypatch):
    tuner = sys.modules["swift.tuner_plugin"].tuners_map["peft_moe"]
    assert tuner is plugin.PeftMoeTuner
    (tmp_path / "moe.yaml").write_text(yaml.safe_dump(fields_of(kind, tmp_path)))
    monkeypatch.setenv("PEFT_MOE_CONFIG", str(tmp_path / "moe.yaml"))
    model = tuner.prepare_model(SimpleNamespace(task_type="causal_lm"), make_model("llama"))
    assert model.active_peft_config.task_type == "CAUSAL_LM"
    assert any("moelora_router" in name for name in train_a_step(model))
    expected = logits(model.eval(), make_inputs("llama", labels=False))
    tuner.save_pretrained(model, str(tmp_path / "saved"), state_dict=None, safe_serialization=True)
    loaded = tuner.from_pretrained(make_model("llama"), str(tmp_path / "saved"), is_trainable=True)
    torch.testing.assert_close(logits(loaded.eval(), make_inputs("llama", labels=False)), expected)
    assert train_a_step(loaded)


@pytest.mark.parametrize("plugin", list(HOSTS), indirect=True)
def test_moelora_without_a_default_task_is_refused_before_anything_is_changed(plugin, tmp_path, monkeypatch):
    fields = fields_of("MOELORA", tmp_path, default_task=None)
    config = config_from(fields | {"default_task": "icd"})
    config.default_task = None
    saved = tmp_path / "saved"
    get_peft_model(make_model("llama"), config).save_pretrained(str(saved))
    (tmp_path / "moe.json").write_text(json.dumps(fields))
    monkeypatch.setenv("PEFT_MOE_CONFIG", str(tmp_path / "moe.json"))
    model = make_model("llama")
    if hasattr(plugin, "PeftMoePlugin"):
        load = plugin.PeftMoePlugin().load_adapter
        calls = [
            lambda: load(model, Settings(adapter="peft_moe", peft_moe=fields)),
            lambda: load(model, Settings(adapter="peft_moe", lora_model_dir=str(saved))),
        ]
    else:
        calls = [
            lambda: plugin.PeftMoeTuner.prepare_model(SimpleNamespace(), model),
            lambda: plugin.PeftMoeTuner.from_pretrained(model, str(saved)),
        ]
    for call in calls:
        with pytest.raises(ValueError, match=r"collators drop the rows' tasks. Set default_task to one of \['icd'"):
            call()
    assert not any("moelora" in name for name, _ in model.named_parameters())


def test_settings_that_make_no_config_are_errors_with_the_remedy():
    for fields, message in (
        ({}, r"peft_type=None is none of peft_moe's; give one of \['MOELORA'"),
        ({"peft_type": "lora"}, "peft_type='lora' is none of peft_moe's"),
        ({"peft_type": "molora", "experts": 4}, "settings of MOLORA do not fit: .*'experts'"),
        ({"peft_type": "molora", "num_experts": 0}, "num_experts=0"),
    ):
        with pytest.raises(ValueError, match=message):
            config_from(fields)
    assert isinstance(config_from({"peft_type": "molora"}), MoLoraConfig)
    assert config_from({"peft_type": "molora"}).task_type == "CAUSAL_LM"


@for_host("axolotl")
def test_axolotl_without_the_block_is_told_to_give_one(plugin):
    with pytest.raises(ValueError, match="needs a block peft_moe: with a peft_type"):
        plugin.PeftMoePlugin().load_adapter(make_model("llama"), Settings(adapter="peft_moe"))


@for_host("ms_swift")
@pytest.mark.parametrize("there", [None, "missing.yaml", "list.yaml"])
def test_ms_swift_without_a_file_of_fields_is_told_to_give_one(there, plugin, tmp_path, monkeypatch):
    monkeypatch.delenv("PEFT_MOE_CONFIG", raising=False)
    (tmp_path / "list.yaml").write_text("[1, 2]")
    if there:
        monkeypatch.setenv("PEFT_MOE_CONFIG", str(tmp_path / there))
    with pytest.raises(ValueError, match=r"PEFT_MOE_CONFIG=.*(is no file; set it|holds no fields; write one)"):
        plugin.PeftMoeTuner.prepare_model(SimpleNamespace(), make_model("llama"))


def test_no_plugin_file_has_the_name_of_its_host():
    # ms-swift puts the folder of a plugin first on the path: a swift.py in it would be found instead of ms-swift
    assert not (INTEGRATIONS / "swift.py").exists()


@pytest.mark.skipif(not is_installed("axolotl"), reason="axolotl is not installed")
def test_axolotl_s_own_manager_and_loader_take_the_plugin(tmp_path):
    pytest.importorskip("axolotl.loaders.adapter", reason="axolotl does not import here")
    from axolotl.integrations.base import PluginManager
    from axolotl.loaders.adapter import load_adapter
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.schemas.peft import LoraConfig as Schema

    manager = PluginManager.get_instance()
    manager.register(PLUGIN)
    assert manager.supports_adapter("peft_moe")
    assert manager.get_input_args() == ["peft_moe.integrations.axolotl.PeftMoeArgs"]
    assert Schema.model_validate({"adapter": "peft_moe"}).adapter == "peft_moe"
    cfg = DictDefault({"adapter": "peft_moe", "peft_moe": fields_of("molora", tmp_path)})
    model, config = load_adapter(make_model("llama"), cfg, cfg.adapter)
    assert isinstance(model, PeftModel)
    assert isinstance(config, MoLoraConfig)
    assert any("moelora_router" in name for name in train_a_step(model))


@pytest.mark.skipif(not is_installed("ms_swift"), reason="ms-swift is not installed")
def test_ms_swift_imports_the_file_and_trains_through_its_own_mixin(tmp_path, monkeypatch):
    from swift.tuner_plugin import tuners_map
    from swift.utils.utils import import_external_file

    tuners_map.pop("peft_moe", None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    import_external_file(str(INTEGRATIONS / "ms_swift.py"))
    assert tuners_map["peft_moe"].__name__ == "PeftMoeTuner"
    import swift

    assert Path(swift.__file__).parent.name == "swift"
    mixin = pytest.importorskip("swift.pipelines.train.tuner", reason="ms-swift's pipelines do not import here")
    (tmp_path / "moe.yaml").write_text(yaml.safe_dump(fields_of("molora", tmp_path)))
    monkeypatch.setenv("PEFT_MOE_CONFIG", str(tmp_path / "moe.yaml"))
    args = SimpleNamespace(
        tuner_type="peft_moe", is_adapter=True, adapters=[], resume_from_checkpoint=None, tuner_backend="peft",
        use_liger_kernel=False, use_galore=False, task_type="causal_lm",
    )  # fmt: skip
    model = mixin.TunerMixin.prepare_model(args, make_model("llama"))
    assert isinstance(model, PeftModel)
    assert any("moelora_router" in name for name in train_a_step(model))
