"""scripts/train_experts.py: a stock LoRA for each expert of a recipe, on a tiny model; wrong recipes before that."""

import json
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, PeftConfig
from tiny_models import make_model
from tiny_text import make_tokenizer, write_data
from train import DataArguments, read_split
from train_experts import main

from peft_moe.data import take_per_task

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A YAML file of two experts, of which one is not named after its task, and a general one."""
    make_model("llama").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    folders = {name: str(tmp_path / "experts" / name) for name in ("size", "foliage", "general")}
    settings = {
        "model_name_or_path": str(tmp_path / "base"),
        "dataset": str(tmp_path / "of stage 2"),
        "test_split": "test",
        "method": "at_moe",
        "groups": {"wood": {"size": folders["size"]}, "crown": {"foliage": folders["foliage"]}},
        "general_expert": folders["general"],
        "router_input": "token",
        "stage1": {
            "dataset": str(write_data(tmp_path / "data")),
            "tasks": {"foliage": ["leaf"]},
            "r": 4,
            "target_modules": ["q_proj", "v_proj"],
            "max_steps": 3,
        },
        "output_dir": str(tmp_path / "out"),
        "max_steps": 40,
        "max_new_tokens": 1,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def change(recipe: Path, **settings: object) -> None:
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | settings, sort_keys=False))


@pytest.mark.long
def test_each_expert_is_a_stock_lora_of_its_tasks_and_a_second_call_leaves_it(recipe, tmp_path, capfd):
    main([str(recipe), "--learning_rate", "0.02"])
    experts = tmp_path / "experts"
    for name, tasks, rows in (("size", {"size"}, 8), ("foliage", {"leaf"}, 8), ("general", {"size", "leaf"}, 16)):
        config = PeftConfig.from_pretrained(experts / name)
        assert type(config) is LoraConfig
        assert (config.r, config.target_modules) == (4, {"q_proj", "v_proj"})
        assert json.loads((experts / name / "all_results.json").read_text())["test"].keys() == tasks | {"mean"}
        card = (experts / name / "README.md").read_text()
        assert all(f"| {line} |" in card for line in (f"rows | {rows}", "steps | 3", "learning rate | 0.02"))
    assert not (tmp_path / "out").exists()
    printed = capfd.readouterr().out
    assert f"Expert 2 of 3, foliage: training on leaf into {experts / 'foliage'}." in printed
    assert f"All 3 experts are there; next: python scripts/train.py {recipe}" in printed

    (experts / "foliage" / CONFIG).unlink()  # as if the call had been interrupted while it was saved
    written = {name: (experts / name / WEIGHTS).stat().st_mtime_ns for name in ("size", "general")}
    main([str(recipe)])
    assert (experts / "foliage" / CONFIG).exists()
    assert written == {name: (experts / name / WEIGHTS).stat().st_mtime_ns for name in written}
    assert f"Expert 1 of 3, size: is in {experts / 'size'} already; --again" in capfd.readouterr().out


@pytest.mark.slow
def test_an_expert_that_is_there_is_trained_anew_if_asked(recipe, tmp_path):
    folder = tmp_path / "experts" / "size"
    folder.mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(b"old")
    (folder / CONFIG).write_bytes(b"{}")
    change(
        recipe, groups={"wood": {"size": str(folder)}}, general_expert=None, stage1=None, dataset=str(tmp_path / "data")
    )
    main([str(recipe)])
    assert (folder / WEIGHTS).read_bytes() == b"old"
    main([str(recipe), "--again", "--max_steps", "1"])
    assert (folder / WEIGHTS).read_bytes() != b"old"


@pytest.mark.slow
def test_the_first_expert_that_fails_ends_the_call_with_its_name_and_exit_code(recipe, tmp_path, capfd):
    with pytest.raises(SystemExit) as ended:
        main([str(recipe), "--learning_rat", "0.02"])
    assert ended.value.code == 2  # argparse's, from train.py
    said = capfd.readouterr()
    assert "did you mean learning_rate" in said.err
    assert "Expert 1 of 3, size: train.py failed with exit code 2" in said.err
    assert "Expert 2" not in said.out
    assert not (tmp_path / "experts").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": None}, r"groups=None; write {group: {expert: path, ...}, ...}"),
        ({"groups": ["a", "b"]}, r"groups=\['a', 'b'\]; write"),
        ({"groups": {"x": "a/b/c"}}, "groups={'x': 'a/b/c'}; write"),
        ({"groups": {"x": {}}}, "groups={'x': {}}; write"),
        ({"groups": {"x": {1: "a/b/c"}}}, r"the experts \[1\]; use texts as names"),
        ({"groups": {"x": {"size": "a/b/c"}, "y": {"size": "a/b/d"}}}, r"\['size'\] in two groups; give each"),
        ({"groups": {"x": {"size": "a/b/c", "foliage": "a/./b/c"}}}, "'a/./b/c' is the path of size and of foliage"),
        ({"groups": {"x": {"foliage": "a/b/c"}}, "general_expert": "a/b/c"}, "of foliage and of the general one; give"),
        ({"groups": {"x": {"foliage": "someone/trees"}}}, "path 'someone/trees', which looks like a Hub id"),
        ({"general_expert": "hf://someone/trees"}, "the general one has path 'hf://someone/trees', which looks like"),
        ({"general_expert": __file__}, "which is a file; name a folder"),
        ({"groups": {"x": {"foliage": None}}}, "foliage has path None; name the folder"),
        ({"stage1": ["r", 4]}, r"stage1=\['r', 4\]; write a mapping of settings of train.py"),
        ({"stage1": {"method": "lora", "output_dir": "a"}}, "stage1 sets method, output_dir, which follow from groups"),
        ({"stage1": {"tasks": {"foliage": "leaf"}}}, "stage1 has tasks={'foliage': 'leaf'}; write {expert: "),
        ({"stage1": {"tasks": {"bark": ["leaf"]}}}, r"tasks for \['bark'\], which groups does not have; use some of"),
    ],
)
def test_a_wrong_recipe_is_an_error_before_anything_is_trained(recipe, settings, message, tmp_path):
    change(recipe, **settings)
    with pytest.raises(ValueError, match=message):
        main([str(recipe)])
    assert not (tmp_path / "experts").exists()


def test_a_file_that_is_no_mapping_is_an_error(recipe):
    recipe.write_text("- groups\n")
    with pytest.raises(ValueError, match="recipe.yaml holds a list; write one `name: value` per line"):
        main([str(recipe)])


@pytest.mark.parametrize("flag", ["--method=molora", "--output-dir", "--train_tasks"])
def test_flags_that_would_make_all_experts_the_same_are_refused(recipe, flag, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(recipe), flag, "leaf"])
    assert f"{flag.split('=')[0].replace('-', '_').replace('__', '--')} is not for flags" in capsys.readouterr().err
    assert not (tmp_path / "experts").exists()


def test_every_split_has_the_rows_of_the_tasks_to_train_on_alone(tmp_path):
    data = str(write_data(tmp_path / "data"))
    for split in ("train", "test"):
        rows = read_split(DataArguments(data, train_tasks=["leaf"], max_rows_per_task=8), split, seed=0)
        assert rows["task"] == ["leaf"] * 8
    with pytest.raises(
        ValueError, match=r"--train_tasks has \['bark'\], which no row of split 'test' has; use some of"
    ):
        read_split(DataArguments(data, train_tasks=["leaf", "bark"]), "test", seed=0)


def test_a_row_of_two_tasks_needs_both_among_those_to_train_on(tmp_path):
    lines = [
        {"task": task, "instruction": "Name", "input": "oak", "output": "a"} for task in (["a"], ["a", "b"], ["b", "c"])
    ]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = read_split(DataArguments(str(data), train_tasks=["b", "a"]), "train", seed=0)
    assert sorted(take_per_task(rows, 1)["task"]) == [["a"], ["a", "b"]]
    with pytest.raises(ValueError, match="--train_tasks c leaves split 'train' without rows: all rows that have these"):
        read_split(DataArguments(str(data), train_tasks=["c"]), "train", seed=0)
