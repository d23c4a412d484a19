"""What RoutingImages shows of an evaluation: a line, and images in TensorBoard's files."""

import gc
import io
import weakref

import numpy as np
import pytest
import torch
from grouped_helpers import grouped_config
from kinds import KINDS, config_of
from peft import LoraConfig, get_peft_model
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import make_model
from tiny_text import make_tokenizer, write_data
from train import main
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from peft_moe import routing_images
from peft_moe.callbacks import RoutingCallback
from peft_moe.data import encode, read_examples
from peft_moe.report.heatmaps import draw
from peft_moe.routing_images import RoutingImages, routes, routing_line
from peft_moe.training import TaskCollator

TASKS = ["size", "leaf"]
PICTURES = {
    "moelora": {"layers", "tasks", "depth"},
    "molora": {"layers", "tasks", "depth"},
    "medmoelora": {"layers", "tasks", "depth"},
    "at_moe": {"layers", "groups", "depth"},
}
pytestmark = pytest.mark.filterwarnings("ignore:Routing has collapsed:UserWarning")  # so few rows


def make_trainer(tmp_path, kind, *, config=None, **arguments) -> Trainer:
    """A Trainer of two steps that evaluates after each."""
    torch.manual_seed(0)
    labels = {} if kind == "at_moe" else {"tasks": TASKS}
    labels |= {"default_task": None} if kind == "moelora" else {}
    config = config or config_of(kind, "llama", tmp_path, **labels)
    tokenizer, told = make_tokenizer(), kind != "at_moe"
    rows = encode(read_examples(str(write_data(tmp_path / "data"))), tokenizer, tasks=TASKS if told else None)
    collator = DataCollatorForSeq2Seq(tokenizer)
    defaults = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "per_device_train_batch_size": 4}
    defaults |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    return Trainer(
        get_peft_model(make_model("llama"), config),
        TrainingArguments(str(tmp_path / "out"), **defaults | arguments),
        data_collator=TaskCollator(collator, TASKS) if told else collator,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("routing at step")]


@pytest.mark.parametrize("kind", KINDS)
def test_tensorboard_gets_images_and_the_console_a_line_at_each_evaluation(tmp_path, kind, capsys, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make_trainer(tmp_path, kind, report_to="tensorboard")
    trainer.add_callback(RoutingImages(trainer))
    trainer.train()
    assert [line.split(":")[0] for line in lines_of(capsys.readouterr().out)] == [
        "routing at step 1",
        "routing at step 2",
    ]
    events = EventAccumulator(str(tmp_path / "events"), size_guidance={"images": 0}).Reload()
    assert set(events.Tags()["images"]) == {f"routing/{name}" for name in PICTURES[kind]}
    for tag in events.Tags()["images"]:
        images = events.Images(tag)
        assert [image.step for image in images] == [1, 2]
        pixels = np.asarray(Image.open(io.BytesIO(images[-1].encoded_image_string)).convert("RGB"))
        assert pixels.shape == (images[-1].height, images[-1].width, 3)
        assert pixels.std() > 10  # no blank page


@pytest.mark.parametrize("kind", KINDS)
def test_without_tensorboard_nothing_is_drawn_and_nothing_fails(tmp_path, kind, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(routing_images, "draw", drawn.append)
    trainer = make_trainer(tmp_path, kind)
    trainer.add_callback(RoutingImages(trainer, images=True))
    trainer.train()
    assert len(lines_of(capsys.readouterr().out)) == 2
    assert not drawn
    trainer.evaluate()  # outside of training
    assert not lines_of(capsys.readouterr().out)


@pytest.mark.parametrize("first", ["RoutingCallback", "RoutingImages", None])
@pytest.mark.parametrize("kind", ["molora", "medmoelora"])
def test_beside_the_callback_that_logs_both_have_all_of_an_evaluation(tmp_path, kind, first, monkeypatch):
    seen = []
    monkeypatch.setattr(routing_images, "routing_line", lambda routing, *rest: seen.append(routing) or "")
    trainer = make_trainer(tmp_path, kind)
    shown = RoutingImages(trainer)
    others = [] if first is None else [RoutingCallback(trainer, per_layer=True)]
    for callback in [*others, shown] if first == "RoutingCallback" else [shown, *others]:
        trainer.add_callback(callback)
    trainer.train()
    tokens = sum(len(row["input_ids"]) for row in trainer.eval_dataset)
    assert [layer["tokens"] for routing in seen for layer in routing["layers"]] == [tokens] * sum(
        len(routing["layers"]) for routing in seen
    )
    assert len(seen) == 2
    if others:
        logged = [entry for entry in trainer.state.log_history if "eval_routing/largest_load" in entry]
        for entry, routing in zip(logged, seen, strict=True):
            for layer in routing["layers"]:
                for i, load in enumerate(layer["load"]):
                    assert entry[f"eval_routing/{layer['name']}/load_{i}"] == pytest.approx(load)
    assert not trainer.model.recording


def routing_of(trainer) -> dict:
    """What the callback has to show after a training of two steps: of the last evaluation."""
    shown, found = RoutingImages(trainer, images=False, line=False), []
    trainer.add_callback(shown)
    routing = shown.source.routing
    shown.source.routing = lambda asking: found.append(routing(asking))
    trainer.train()
    return found[-1]


def test_moelora_has_the_weights_of_its_gates(tmp_path):
    trainer = make_trainer(tmp_path, "moelora")
    routing = routing_of(trainer)
    assert routing["method"] == "MOELoRA"
    assert routing["tasks"] == sorted(TASKS)
    (router,) = trainer.model.base_model.moelora_router["default"].values()
    for layer in routing["layers"]:
        weights = [(router.gate.proj.weight @ router.gate.embedding.weight[i]).softmax(0) for i in range(len(TASKS))]
        for task, expected in zip(TASKS, weights, strict=True):
            assert layer["tasks"][task]["load"] == pytest.approx(expected.tolist(), abs=1e-6)
        assert layer["load"] == pytest.approx(torch.stack(weights).mean(0).tolist(), abs=1e-6)


@pytest.mark.parametrize("router_input", ["token", "prompt"])
def test_at_moe_has_the_means_that_explain_gives(tmp_path, router_input):
    config = grouped_config("llama", tmp_path, router_input=router_input)
    trainer = make_trainer(tmp_path, "at_moe", config=config, learning_rate=0.1)
    routing = routing_of(trainer)
    assert routing["groups"] == ["f", "s"]
    assert [(layer["name"], layer["block"], layer["module"]) for layer in routing["layers"]] == [
        ("model.layers.0", 0, ""),
        ("model.layers.1", 1, ""),
    ]
    # the same rows, one by one: a naive mean
    means: dict = {}
    total = 0
    trainer.model.eval()
    for row in trainer.eval_dataset:
        batch = trainer.data_collator([row])
        explained = trainer.model.explain(batch)
        n = len(row["input_ids"]) if router_input == "token" else 1
        total += n
        for block, groups in explained.means().items():
            mix = explained.mix[block]
            values = [mix * value for experts in groups.values() for value in experts.values()] + [1 - mix]
            means[block] = means.get(block, 0) + n * np.array(values)
    for layer in routing["layers"]:
        assert layer["tokens"] == total
        assert layer["experts"] == ["f/a", "f/b", "s/c", "general"]
        assert layer["group_of"] == [0, 0, 1, -1]
        assert layer["load"] == pytest.approx((means[layer["name"]] / total).tolist(), abs=1e-5)
        assert sum(layer["group_load"]) == pytest.approx(1, abs=1e-5)
    assert all(router.seen is None for router in trainer.model.modules() if hasattr(router, "seen"))


def test_figures_are_released(tmp_path, monkeypatch):
    from matplotlib import pyplot

    before = pyplot.get_fignums()  # of other tests

    alive = []

    def watched(routing):
        figures = draw(routing)
        alive.extend(weakref.ref(figure) for figure in figures.values())
        return figures

    monkeypatch.setattr(routing_images, "draw", watched)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make_trainer(tmp_path, "molora", report_to="tensorboard")
    trainer.add_callback(RoutingImages(trainer, line=False))
    trainer.train()
    gc.collect()
    assert len(alive) == 2 * len(PICTURES["molora"])
    assert not [figure for figure in alive if figure() is not None]
    assert pyplot.get_fignums() == before


def test_the_line_says_how_routing_is():
    load = [0.5, 0.25, 0.25, 0.0]
    tasks = {"a": {"load": [1.0, 0.0, 0.0, 0.0]}, "b": {"load": [0.0, 0.5, 0.5, 0.0]}}
    layer = {"name": "m.0.up\x1b[2J", "experts": ["0", "1", "2", "3"], "load": load, "entropy": 1.0, "tasks": tasks}
    line = routing_line({"layers": [layer | {"effective_experts": 2.83}]}, 40)
    assert line == (
        "routing at step 40: 4 experts, 2.8 in effect, least used 3 of m.0.up\\x1b[2J (0% of an even share), "
        "entropy 1.00 of 1.39, tasks 1.00 apart"
    )
    few = layer | {"effective_experts": 2.83, "chosen_per_token": 2.0}
    assert "entropy 1.00 of 0.69" in routing_line({"layers": [few]}, 40)  # two even weights
    assert routing_line({"layers": [few]}, 40, "a\x1bb").startswith("routing of a\\x1bb at step 40: ")


def test_each_of_several_evaluation_datasets_has_its_own_line_and_images(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make_trainer(tmp_path, "molora", report_to="tensorboard", max_steps=1)
    rows = trainer.eval_dataset
    trainer.eval_dataset = {"a": rows.select(range(4)), "a_b": rows.select(range(2))}
    trainer.add_callback(RoutingImages(trainer))
    trainer.train()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("routing of")]
    assert [line.split(":")[0] for line in said] == ["routing of a at step 1", "routing of a_b at step 1"]
    events = EventAccumulator(str(tmp_path / "events"), size_guidance={"images": 0}).Reload()
    tags = {f"routing/{name}/{picture}" for name in ("a", "a_b") for picture in PICTURES["molora"]}
    assert set(events.Tags()["images"]) == tags


def test_models_without_routers_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, "molora")
    stock = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"]))
    assert not routes(stock)
    assert routes(trainer.model)
    trainer.model = stock
    with pytest.raises(ValueError, match=r"is for adapters of peft_moe, and the trainer's model is a PeftModel.*LoraM"):
        RoutingImages(trainer)


@pytest.mark.parametrize(
    ("flags", "lines", "images"),
    [
        ([], 2, True),
        (["--routing_images", "false"], 2, False),
        (["--log_routing", "no"], 0, False),
        (["--log_routing", "no", "--routing_images", "true"], 0, True),
    ],
)
def test_train_py_shows_routing_as_its_flags_say(tmp_path, flags, lines, images, capsys, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    make_model("llama").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    arguments = f"--model_name_or_path {tmp_path}/base --dataset {write_data(tmp_path / 'data')} --eval_split dev --r 4"
    arguments += " --num_experts 2 --max_new_tokens 1 --max_steps 2 --eval_strategy steps --eval_steps 1"
    arguments += f" --output_dir {tmp_path}/out"
    main([*arguments.split(), "--report_to", "tensorboard", "--use_cpu", "true", "--disable_tqdm", "true", *flags])
    assert len(lines_of(capsys.readouterr().out)) == lines
    events = EventAccumulator(str(tmp_path / "events"), size_guidance={"images": 0}).Reload()
    assert bool(events.Tags()["images"]) == images
