"""scripts/train.py as it is used: whole runs on a tiny model, scored again by evaluate.py; every recipe's arguments."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import client_environment
from huggingface_hub import ModelCard
from make_composites import MEDMULTI
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig
from safetensors.torch import load_file
from tiny_models import make_model
from tiny_text import make_tokenizer, write_data
from train import METHODS, AdapterArguments, DataArguments, ModelArguments, load_model, main
from transformers import AutoModelForCausalLM, TrainingArguments

from peft_moe import MedMoeLoraConfig, MoeLoraConfig, MoLoraConfig
from peft_moe.arguments import parse_arguments
from peft_moe.matched import match_lora

ROOT = Path(__file__).parents[1]
TRAIN = str(ROOT / "scripts" / "train.py")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    model = make_model("llama")
    model.lm_head.weight.data *= 20  # frozen, and too small at random for an adapter to prefer one word
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def recipe(base: Path, data: Path, tmp_path: Path) -> Path:
    """A YAML file for a run of four steps that writes to tmp_path/out."""
    path = tmp_path / "recipe.yaml"
    settings = {
        "model_name_or_path": str(base),
        "dataset": str(data),
        "eval_split": "dev",
        "test_split": "test",
        "r": 4,
        "num_experts": 2,
        "max_new_tokens": 2,
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 0.02,
        "lora_dropout": 0.0,
        "logging_steps": 20,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def run(command: list[str], **environment: str) -> str:
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_training_leaves_an_adapter_with_tokenizer_scores_and_card(recipe, tmp_path, capsys):
    main([str(recipe)])
    out = tmp_path / "out"
    config = PeftConfig.from_pretrained(out)
    assert isinstance(config, MoeLoraConfig)
    assert config.task_names == ["size", "leaf"]  # as in tasks.json; the rows begin with leaf
    results = json.loads((out / "all_results.json").read_text())
    assert results["test"].keys() == {"size", "leaf", "mean"}
    assert results["train_loss"] > 0
    card = ModelCard.load(out / "README.md")
    assert "| 0 | size | Name the size |" in card.text
    assert card.data.eval_results is not None
    assert (out / "chat_template.jinja").exists()
    printed = capsys.readouterr().out
    assert f"{results['test']['mean']['score']:.3f}" in printed


@pytest.mark.long
def test_evaluating_the_trained_adapter_gives_the_scores_that_training_saved(recipe, base, data, tmp_path):
    main([str(recipe), "--max_steps", "60"])
    out = tmp_path / "out"
    evaluate = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), "--model_name_or_path", str(base)]
    options = {"adapter": out, "data": data, "split": "test", "max_new_tokens": 2, "output": tmp_path / "scores.json"}
    run([*evaluate, *(str(part) for key, value in options.items() for part in (f"--{key}", value))])
    saved = json.loads((out / "test_results.json").read_text())["test"]
    assert json.loads((tmp_path / "scores.json").read_text())["results"] == saved
    assert saved["mean"]["score"] > 0


def test_the_adapter_is_saved_before_anything_can_go_wrong_while_it_is_scored(recipe, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError("too long")

    monkeypatch.setattr("train.score_with_trainer", fail)
    with pytest.raises(MemoryError):
        main([str(recipe), "--save_strategy", "no"])
    assert PeftConfig.from_pretrained(tmp_path / "out").task_names == ["size", "leaf"]
    assert load_file(tmp_path / "out" / WEIGHTS)
    assert (tmp_path / "out" / "README.md").exists()


def test_tasks_that_cannot_be_scored_are_named_before_training(recipe, data, tmp_path):
    other = shutil.copytree(data, tmp_path / "data")
    for path in other.iterdir():
        path.write_text(path.read_text().replace('"leaf"', '"mean"'))
    with pytest.raises(ValueError, match="A task is called 'mean'"):
        main([str(recipe), "--dataset", str(other)])
    assert not (tmp_path / "out").exists()


def test_scores_of_an_earlier_run_are_not_beside_those_of_the_next(recipe, tmp_path):
    results = tmp_path / "out" / "all_results.json"
    results.parent.mkdir()
    results.write_text('{"test": {"mean": {"score": 1.0}}}')
    main([str(recipe), "--eval_split", "null", "--test_split", "null", "--max_steps", "1"])
    assert json.loads(results.read_text()).keys() & {"test", "train_loss"} == {"train_loss"}


def test_an_option_that_is_a_flag_too_is_given_once(recipe):
    for options in ('{"target_modules": ["q_proj"]}', '{"tasks": ["a"]}', '{"r": 8}'):
        with pytest.raises(ValueError, match="--adapter_options has .*, which flags or the method give; leave it out"):
            main([str(recipe), "--adapter_options", options])


def test_data_with_one_split_is_enough(recipe, data, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for name in ("train.jsonl", "tasks.json"):
        shutil.copy(data / name, tmp_path / "data")
    flags = ["--dataset", str(tmp_path / "data"), "--eval_split", "null", "--test_split", "null", "--max_steps", "1"]
    main([str(recipe), *flags])
    assert "No eval_split or test_split to score." in capsys.readouterr().out
    assert (tmp_path / "out" / WEIGHTS).exists()


def test_an_adapter_knows_the_revision_of_its_base_model(base):
    config = MoeLoraConfig(task_type="CAUSAL_LM", tasks=["a"], num_experts=2, r=4)
    model, _ = load_model(ModelArguments(model_name_or_path=str(base), revision="v1.5"), config)
    assert model.active_peft_config.revision == "v1.5"


def test_the_best_checkpoint_is_kept_and_becomes_the_adapter(recipe, tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "mean", "save_total_limit": 1}
    flags = {"max_steps": 60, "eval_strategy": "steps", "eval_steps": 10, "save_steps": 10, **best}
    main([str(recipe), *(str(part) for key, value in flags.items() for part in (f"--{key}", value))])
    out = tmp_path / "out"
    state = json.loads((out / "trainer_state.json").read_text())
    means = {entry["step"]: entry["eval_mean"] for entry in state["log_history"] if "eval_mean" in entry}
    assert len(means) == 6
    best_step = max(means, key=means.__getitem__)
    assert (state["best_global_step"], state["best_metric"]) == (best_step, means[best_step])
    assert [path.name for path in out.glob("checkpoint-*")] == [f"checkpoint-{best_step}"]
    assert equal(out / f"checkpoint-{best_step}", out)


def equal(one: Path, other: Path) -> bool:
    first, second = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    return first.keys() == second.keys() and all(first[key].equal(second[key]) for key in first)


@pytest.mark.parametrize("resume", ["true", "folder"])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(recipe, tmp_path, resume):
    main([str(recipe), "--save_steps", "2", "--mixing", "uniform"])
    checkpoint = tmp_path / "out" / "checkpoint-2"
    again = tmp_path / "again"
    if resume == "true":
        shutil.copytree(checkpoint, again / checkpoint.name)
    start = "true" if resume == "true" else str(checkpoint)
    main([str(recipe), "--mixing", "uniform", "--output_dir", str(again), "--resume_from_checkpoint", start])
    assert equal(again, tmp_path / "out")
    assert not equal(again, checkpoint)


# settings of the recipe fixture that another method does not have, and what it has instead
OTHER_METHODS = {
    "lora": ({"num_experts"}, {}),
    "molora": (set(), {"num_experts": 4, "top_k": 2, "router_bias": False, "balance_loss": {"switch": 0.1, "z": 0.01}}),
    "medmoelora": (
        {"r"},
        {
            "num_experts": 4,
            "expert_ranks": [2, 4],
            "expert_schedule": {"type": "bands", "bands": [[0, 1, 2], [1, 2, 3]]},
        },
    ),
}


def change_method(recipe: Path, method: str) -> None:
    without, extra = OTHER_METHODS[method]
    settings = {k: v for k, v in yaml.safe_load(recipe.read_text()).items() if k not in without}
    recipe.write_text(yaml.safe_dump(settings | {"method": method} | extra))


@pytest.mark.parametrize(("method", "config_cls"), [("molora", MoLoraConfig), ("medmoelora", MedMoeLoraConfig)])
def test_token_routed_methods_are_trained_scored_resumed_and_their_routing_logged(
    recipe, base, data, tmp_path, method, config_cls
):
    change_method(recipe, method)
    main([str(recipe), "--save_steps", "2", "--logging_steps", "2", "--log_routing", "layers"])
    out = tmp_path / "out"
    config = PeftConfig.from_pretrained(out)
    assert type(config) is config_cls
    if method == "medmoelora":
        assert config.experts_per_layer == {"model.layers": [2, 3]}
    else:
        assert config.balance_loss == {"switch": 0.1, "z": 0.01}
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "routing/entropy_after" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    assert "routing/model.layers.1.mlp.down_proj/size/load_0" in logged[0]
    assert json.loads((out / "all_results.json").read_text())["test"].keys() == {"size", "leaf", "mean"}
    picture = tmp_path / "routing.png"
    run([sys.executable, str(ROOT / "scripts" / "plot_routing.py"), str(out), "--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    again = tmp_path / "again"
    main([str(recipe), "--output_dir", str(again), "--resume_from_checkpoint", str(out / "checkpoint-2")])
    assert equal(again, out)
    assert not equal(again, out / "checkpoint-2")


def test_rows_need_no_task_where_the_method_needs_none(recipe, data, tmp_path, capsys):
    rows = tmp_path / "rows"
    shutil.copytree(data, rows)
    for file in rows.glob("*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        texts = [{"prompt": line["input"], "completion": line["output"]} for line in lines]
        file.write_text("".join(json.dumps(line) + "\n" for line in texts))
    with pytest.raises(ValueError, match="has no column 'task'"):
        main([str(recipe), "--dataset", str(rows)])  # MOELoRA
    change_method(recipe, "molora")
    with pytest.raises(ValueError, match="has no column 'kind'"):
        main([str(recipe), "--dataset", str(rows), "--task_column", "kind"])
    main([str(recipe), "--dataset", str(rows), "--eval_strategy", "steps", "--eval_steps", "4"])
    out = tmp_path / "out"
    scores = json.loads((out / "all_results.json").read_text())["test"]
    assert scores.keys() == {"all", "mean"}
    evaluate = runpy.run_path(str(ROOT / "scripts" / "evaluate.py"))["main"]
    again = ["--adapter", str(out), "--data", str(rows), "--max_new_tokens", "2"]
    evaluate([*again, "--output", str(tmp_path / "scores.json")])
    assert json.loads((tmp_path / "scores.json").read_text())["results"] == scores
    with pytest.raises(ValueError, match="has no column 'kind'"):
        evaluate([*again, "--task_column", "kind"])


@pytest.mark.parametrize("method", ["molora", "medmoelora"])
@pytest.mark.parametrize("architecture", ["qwen2", "gemma3", "mixtral"])
def test_recipes_of_token_routed_methods_run_on_other_architectures(architecture, method, data, tmp_path):
    model = make_model(architecture)
    model.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    flags = {
        "model_name_or_path": tmp_path / "base", "dataset": data, "output_dir": tmp_path / "out", "max_steps": 1,
        "per_device_train_batch_size": 2, "max_new_tokens": 1, "report_to": "none", "use_cpu": True, "dtype": "float32",
    }  # fmt: skip
    arguments = [str(ROOT / "recipes" / f"{method}.yaml"), *(str(p) for k, v in flags.items() for p in (f"--{k}", v))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if architecture == "mixtral" and method == "molora":
            with pytest.raises(
                ValueError, match="all linear layers of this model are attention's; give num_experts_pat"
            ):
                main(arguments)
            arguments += ["--num_experts_pattern", "{}"]
        main(arguments)
    assert any("experts of its own" in str(w.message) for w in caught) == (architecture == "mixtral")
    assert (tmp_path / "out" / WEIGHTS).exists()


def test_a_token_routed_method_with_one_expert_everywhere_trains_as_a_plain_lora(recipe, tmp_path):
    change_method(recipe, "molora")
    settings = yaml.safe_load(recipe.read_text()) | {"num_experts": 1, "balance_loss": "none"}
    recipe.write_text(yaml.safe_dump(settings))
    main([str(recipe)])
    assert not any("router" in name for name in load_file(tmp_path / "out" / WEIGHTS))


def test_other_fields_of_a_config_are_given_as_a_mapping(recipe, tmp_path):
    change_method(recipe, "molora")
    groups = {"expert_groups": {"x": ["size"], "y": ["leaf"]}, "localized_delta": 0.2}
    settings = yaml.safe_load(recipe.read_text()) | {"balance_loss": "localized", "adapter_options": groups}
    recipe.write_text(yaml.safe_dump(settings))
    main([str(recipe), "--log_routing", "no"])
    config = PeftConfig.from_pretrained(tmp_path / "out")
    assert (config.expert_groups, config.localized_delta) == (groups["expert_groups"], 0.2)


def test_a_setting_of_another_method_is_refused(recipe):
    with pytest.raises(ValueError, match="--method lora has no num_experts; leave out what is of other methods"):
        main([str(recipe), "--method", "lora"])


@pytest.mark.parametrize("match", ["parameters", "active"])
def test_the_lora_that_matches_a_method_is_trained_instead(recipe, base, tmp_path, capsys, match):
    main([str(recipe), "--method", "molora", "--match_lora", match])
    said = capsys.readouterr().out
    config = MoLoraConfig(task_type="CAUSAL_LM", r=4, num_experts=2, target_modules="all-linear", lora_dropout=0.0)
    found = match_lora(config, AutoModelForCausalLM.from_pretrained(base), match)
    assert f"--match_lora {match}: {found}." in said
    assert f"lora of molora's {match}" in said
    adapter = tmp_path / "out"
    assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert sum(tensor.numel() for tensor in load_file(adapter / WEIGHTS).values()) == found.parameters


def test_a_stock_lora_matches_no_method(recipe, tmp_path):
    flags = ["--method", "lora", "--match_lora", "active", "--num_experts", "2"]
    with pytest.raises(ValueError, match="--match_lora active trains the LoRA that matches a method with experts"):
        main([str(recipe), *flags])
    assert not (tmp_path / "out").exists()


def test_a_stock_lora_is_trained_in_the_same_way(recipe, base, tmp_path):
    change_method(recipe, "lora")
    main([str(recipe)])
    config = PeftConfig.from_pretrained(tmp_path / "out")
    assert type(config) is LoraConfig
    assert config.r == 4
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model(torch.tensor([[4, 6, 5]])).logits.isfinite().all()


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning"
)  # renamed in transformers 5.23
def test_gradient_checkpointing_ends_with_the_same_weights(recipe, tmp_path):
    main([str(recipe), "--protocol", "bare"])
    options = ["--gradient_checkpointing", "true", "--output_dir", str(tmp_path / "again")]
    main([str(recipe), "--protocol", "bare", *options])
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in ("out", "again"))
    for key in first:
        torch.testing.assert_close(first[key], second[key])


def test_tensorboard_gets_the_score_of_each_task(recipe, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    main([str(recipe), "--report_to", "tensorboard", "--eval_strategy", "steps", "--eval_steps", "2"])
    (events,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    reader = event_accumulator.EventAccumulator(str(events)).Reload()
    assert [event.step for event in reader.Scalars("eval/leaf")] == [2, 4]


@pytest.mark.slow
def test_pushing_sends_our_card_and_the_adapter_loads_from_the_hub(recipe, hub, tmp_path):
    environment = client_environment(hub, home=tmp_path / "hf_home")
    push = ["--push_to_hub", "true", "--hub_model_id", "local/trees"]
    subprocess.run([sys.executable, TRAIN, str(recipe), *push], env=environment, check=True, capture_output=True)
    load = (
        "import peft_moe, huggingface_hub, peft\n"
        "print(peft.PeftConfig.from_pretrained('local/trees').task_names)\n"
        "print(huggingface_hub.ModelCard.load('local/trees').content)"
    )
    done = subprocess.run([sys.executable, "-c", load], env=environment, check=True, capture_output=True, text=True)
    assert "['size', 'leaf']" in done.stdout
    assert "peft-moe fold local/trees --task size --out size-lora" in done.stdout
    assert done.stdout.count("\n# trees") == 1


@pytest.mark.slow
def test_no_draft_of_a_card_is_pushed_before_the_scores_are_there(recipe, hub, tmp_path):
    environment = client_environment(hub, home=tmp_path / "hf_home")
    push = ["--push_to_hub", "true", "--hub_model_id", "local/unscored", "--max_new_tokens", "0"]
    done = subprocess.run([sys.executable, TRAIN, str(recipe), *push], env=environment, capture_output=True, text=True)
    assert "max_new_tokens=0" in done.stderr.splitlines()[-1]
    assert (tmp_path / "out" / WEIGHTS).exists()
    files = "import huggingface_hub\nprint(huggingface_hub.list_repo_files('local/unscored'))"
    done = subprocess.run([sys.executable, "-c", files], env=environment, check=True, capture_output=True, text=True)
    assert WEIGHTS in done.stdout  # of the Trainer's checkpoint
    assert "README.md" not in done.stdout


@pytest.mark.long
def test_two_processes_train_one_adapter_and_share_the_evaluation(recipe, tmp_path):
    # --cpu would start one process whatever their number; --multi_gpu without a GPU starts all, on gloo
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    flags = ["--per_device_train_batch_size", "2", "--eval_strategy", "epoch"]
    printed = run([*launch, "--main_process_port", "0", TRAIN, str(recipe), *flags])
    assert printed.count("all_results.json are in") == 1
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "| rows per step | 4 |" in card.text
    two = json.loads((tmp_path / "out" / "all_results.json").read_text())["test"]
    assert [two[task]["n"] for task in ("size", "leaf")] == [8, 8]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--r", "5"], "r=5"),
        (["--tasks", "size"], "leaf"),
        (
            ["--eval_split", "exam", "--eval_strategy", "epoch"],
            r"^--eval_split exam: .* has no split 'exam'; use split= one of \[.*--eval_split null leaves it out.$",
        ),
        (["--train_split", "exam"], r"^--train_split exam: .* has no split 'exam'; use split= one of \[[^-]*$"),
        (
            ["--eval_split", "null", "--eval_strategy", "epoch"],
            "--eval_strategy epoch scores a split, and none is named",
        ),
    ],
)
def test_a_wrong_argument_is_named_before_training(recipe, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        main([str(recipe), *flags])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_understood_and_use_data_that_is_here(path, tmp_path):
    arguments = (ModelArguments, DataArguments, AdapterArguments, TrainingArguments)
    _, data_args, adapter_args, args = parse_arguments(arguments, [str(path), "--use_cpu", "true"])
    if path.stem == "at_moe":  # its data are made by a script, which puts them here unless told otherwise
        assert ROOT / data_args.dataset == MEDMULTI / "composite"
    else:
        assert (ROOT / data_args.dataset / "train.jsonl").exists()
    config = adapter_args.config(["a", "b"])
    assert type(config) is {"quickstart": MoeLoraConfig, "lora_baseline": LoraConfig}.get(
        path.stem, METHODS.get(path.stem)
    )
    assert args.output_dir == f"outputs/{path.stem}"
    header = path.read_text().split("\n\n")[0]
    assert f"python scripts/train.py recipes/{path.name}" in header
