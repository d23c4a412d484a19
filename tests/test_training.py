"""TaskCollator on real collators and trainers, and the scores that TaskEvaluation hands to the Trainer."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import make_model
from tiny_text import make_tokenizer, write_data
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from peft_moe import MedMoeLoraConfig, MoeLoraConfig, MoLoraConfig
from peft_moe.callbacks import RoutingCallback, is_collapsed
from peft_moe.data import encode, read_examples, read_task_info
from peft_moe.evaluation import evaluate_tasks
from peft_moe.training import TaskCollator, TaskEvaluation, score_with_trainer

TASKS = ["size", "leaf"]
COLLATORS = {
    "seq2seq": DataCollatorForSeq2Seq(make_tokenizer(), pad_to_multiple_of=16),
    "padding": DataCollatorWithPadding(make_tokenizer()),
    "default": default_data_collator,
}


def make_rows(column: str, values: list) -> list[dict]:
    shared = {"attention_mask": [1, 1, 1], "labels": [-100, -100, 2]}
    return [{"input_ids": [4, 6 + i, 2], **shared, column: value} for i, value in enumerate(values)]


def make_trainer(folder: Path, model: PeftModel, rows: Dataset, tasks: list[str] | None, **arguments) -> Trainer:
    defaults = {"max_steps": 2, "per_device_train_batch_size": 4, "report_to": "none", "disable_tqdm": True}
    tokenizer = make_tokenizer()
    collator = DataCollatorForSeq2Seq(tokenizer)
    return Trainer(
        model,
        TrainingArguments(str(folder / "out"), use_cpu=True, **defaults | arguments),
        data_collator=TaskCollator(collator, tasks),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )


def make_moelora() -> PeftModel:
    torch.manual_seed(0)
    config = MoeLoraConfig(task_type="CAUSAL_LM", r=4, num_experts=2, tasks=TASKS, target_modules="all-linear")
    return get_peft_model(make_model("llama"), config)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


@pytest.mark.parametrize("name", COLLATORS)
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1, 1], [0, 1, 1]),
        (["leaf", "size", "leaf"], [1, 0, 1]),
        ([torch.tensor(1), np.int64(0), 1], [1, 0, 1]),
        ([[1], ["size"], 0], [1, 0, 0]),
        ([[0, 1], "leaf", [1, 0]], [[0, 1], [1, -1], [1, 0]]),
        ([torch.tensor([0, 1]), 0, [1]], [[0, 1], [0, -1], [1, -1]]),
    ],
)
def test_task_ids_join_the_batch_that_the_inner_collator_makes(name, values, expected):
    collator = COLLATORS[name]
    batch = TaskCollator(collator, TASKS)(make_rows("task_ids", values))
    alone = collator([{k: v for k, v in row.items() if k != "task_ids"} for row in make_rows("task_ids", values)])
    assert batch.pop("task_ids").tolist() == expected
    assert {key: value.tolist() for key, value in batch.items()} == {
        key: value.tolist() for key, value in alone.items()
    }


def test_the_column_may_have_another_name_and_rows_are_left_as_they_were():
    rows = make_rows("task", ["leaf"])
    assert TaskCollator(default_data_collator, TASKS, column="task")(rows)["task_ids"].tolist() == [1]
    assert rows == make_rows("task", ["leaf"])


def test_a_pickled_collator_gives_the_same_batch():
    collator = TaskCollator(COLLATORS["seq2seq"], TASKS)
    rows = make_rows("task_ids", ["leaf", 0])
    assert pickle.loads(pickle.dumps(collator))(rows)["task_ids"].equal(collator(rows)["task_ids"])


@pytest.mark.parametrize(
    ("tasks", "value", "message"),
    [
        (TASKS, "bark", r"Unknown task 'bark'.*\['size', 'leaf'\]"),
        (TASKS, 2, "Unknown task 2.*below 2"),
        (TASKS, -1, "Unknown task -1"),
        (TASKS, [], "at least one task"),
        (None, "leaf", r"'leaf'.*tasks=\[\.\.\.\]"),
    ],
)
def test_a_task_that_is_not_known_is_refused(tasks, value, message):
    with pytest.raises(ValueError, match=message):
        TaskCollator(default_data_collator, tasks)(make_rows("task_ids", [value]))


def test_a_row_without_task_says_which_keys_it_has_and_who_drops_columns():
    with pytest.raises(
        ValueError, match=r"only \['attention_mask', 'input_ids', 'labels', 'task'\].*remove_unused_columns=False"
    ):
        TaskCollator(default_data_collator, TASKS)(make_rows("task", ["leaf"]))


def test_a_trainer_that_drops_the_task_column_stops_with_an_error(tmp_path, data):
    rows = encode(read_examples(str(data)), make_tokenizer(), tasks=TASKS)
    lora = get_peft_model(make_model("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        make_trainer(tmp_path, lora, rows, TASKS).train()


def test_a_collator_that_merges_rows_is_refused():
    with pytest.raises(ValueError, match="made 1 batch rows of 2 rows"):
        TaskCollator(DataCollatorWithFlattening(), TASKS)(make_rows("task_ids", [0, 1]))


def test_trainer_trains_the_embedding_of_the_tasks_in_the_batches_only(tmp_path, data):
    examples = read_examples(str(data)).filter(lambda row: row["task"] == "leaf")
    model = make_moelora()
    before = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    rows = encode(examples, make_tokenizer(), tasks=TASKS)
    make_trainer(tmp_path, model, rows, TASKS, learning_rate=0.1, weight_decay=0.0).train()
    (embedding,) = [name for name, value in before.items() if value.shape[0] == len(TASKS) and "embedding" in name]
    change = (model.get_parameter(embedding) - before[embedding]).abs().amax(dim=1)
    assert change[TASKS.index("size")] == 0
    assert change[TASKS.index("leaf")] > 0


def test_scores_of_each_task_reach_the_metrics_the_log_and_the_choice_of_the_best(tmp_path, data):
    examples, info = read_examples(str(data), split="dev"), read_task_info(str(data))
    rows = encode(examples, make_tokenizer(), tasks=TASKS)
    trainer = make_trainer(
        tmp_path,
        make_moelora(),
        rows,
        TASKS,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        metric_for_best_model="mean",
        learning_rate=0.05,
    )
    trainer.add_callback(TaskEvaluation(trainer, examples, info, max_new_tokens=2))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_mean" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 3, 4]
    assert trainer.state.best_metric == max(entry["eval_mean"] for entry in logged)
    assert all(entry["eval_mean"] == (entry["eval_leaf"] + entry["eval_size"]) / 2 for entry in logged)
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_leaf", "eval_size", "eval_mean"} <= metrics.keys()


def test_scores_with_a_trainer_are_those_without_one(tmp_path, data):
    examples, info = read_examples(str(data), split="dev"), read_task_info(str(data))
    model = make_moelora()
    trainer = make_trainer(tmp_path, model, encode(examples, make_tokenizer(), tasks=TASKS), TASKS, learning_rate=0.05)
    trainer.train()
    with_trainer = score_with_trainer(trainer, examples, info, max_new_tokens=2)
    assert with_trainer == evaluate_tasks(model, make_tokenizer(), examples, info, max_new_tokens=2)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL 1.16 sets it
def test_rows_reach_the_model_with_their_tasks_through_trl(tmp_path, data):
    trl = pytest.importorskip("trl")
    rows = encode(read_examples(str(data)), make_tokenizer(), tasks=TASKS)
    arguments = trl.SFTConfig(
        str(tmp_path / "out"),
        max_steps=2,
        use_cpu=True,
        bf16=False,
        report_to="none",
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    model = make_moelora()
    trainer = trl.SFTTrainer(
        model,
        arguments,
        data_collator=TaskCollator(DataCollatorForLanguageModeling(pad_token_id=0), TASKS),
        train_dataset=rows,
        processing_class=make_tokenizer(),
    )
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["task_ids"]), with_kwargs=True)
    trainer.train()
    assert len(seen) == 2
    assert set(torch.cat(seen).tolist()) == {0, 1}


def make_token_routed(config_cls=MoLoraConfig, **changes) -> PeftModel:
    torch.manual_seed(0)
    fields = {"target_modules": "all-linear", "num_experts": 4, "tasks": TASKS, "balance_loss": "cv2"}
    if config_cls is MoLoraConfig:
        fields["router_bias"] = False  # inputs of so small a model are smaller than it
    return get_peft_model(make_model("llama"), config_cls(task_type="CAUSAL_LM", **fields | changes))


@pytest.mark.parametrize("config_cls", [MoLoraConfig, MedMoeLoraConfig])
def test_routing_is_logged_by_layer_and_in_short_for_training_and_evaluation(tmp_path, data, config_cls):
    rows = encode(read_examples(str(data)), make_tokenizer(), tasks=TASKS)
    model = make_token_routed(config_cls)
    arguments = {"max_steps": 4, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 4}
    trainer = make_trainer(tmp_path, model, rows, TASKS, gradient_accumulation_steps=2, **arguments)
    trainer.add_callback(RoutingCallback(trainer, per_layer=True))
    trainer.train()
    history = trainer.state.log_history
    training = [entry for entry in history if "routing/entropy_after" in entry]
    (evaluation,) = (entry for entry in history if "eval_routing/entropy_after" in entry)
    assert [entry["step"] for entry in training] == [2, 4]
    layer = "model.layers.1.mlp.down_proj"
    experts = {MoLoraConfig: 4, MedMoeLoraConfig: 5}[config_cls]
    for entry, prefix in [*((e, "routing") for e in training), (evaluation, "eval_routing")]:
        loads = [entry[f"{prefix}/{layer}/load_{i}"] for i in range(experts)]
        assert sum(loads) == pytest.approx(1, abs=1e-5)
        assert f"{prefix}/{layer}/load_{experts}" not in entry
        assert sum(entry[f"{prefix}/{layer}/top1_{i}"] for i in range(experts)) == pytest.approx(1, abs=1e-5)
        assert sum(entry[f"{prefix}/{layer}/leaf/load_{i}"] for i in range(experts)) == pytest.approx(1, abs=1e-5)
        assert entry[f"{prefix}/{layer}/entropy_after"] <= entry[f"{prefix}/{layer}/entropy_before"] + 1e-5
        assert entry[f"{prefix}/balance/cv2"] >= 0
        assert entry[f"{prefix}/largest_load"] >= max(loads)
    assert not model.recording  # off again, and so free of cost


def test_the_summary_alone_is_a_few_numbers(tmp_path, data):
    rows = encode(read_examples(str(data)), make_tokenizer(), tasks=TASKS)
    trainer = make_trainer(tmp_path, make_token_routed(), rows, TASKS, logging_steps=1)
    trainer.add_callback(RoutingCallback(trainer))
    trainer.train()
    names = {name for entry in trainer.state.log_history for name in entry if name.startswith("routing/")}
    assert names == {
        f"routing/{name}"
        for name in (
            "balance/cv2", "entropy_before", "entropy_after", "effective_experts", "effective_experts_min",
            "largest_load", "dead_experts",
        )
    }  # fmt: skip


def test_recording_does_not_change_what_is_trained(tmp_path, data):
    rows = encode(read_examples(str(data)), make_tokenizer(), tasks=TASKS)
    models = [make_token_routed(), make_token_routed()]
    for model, recorded in zip(models, (True, False), strict=True):
        trainer = make_trainer(tmp_path, model, rows, TASKS, learning_rate=0.01)
        if recorded:
            trainer.add_callback(RoutingCallback(trainer))
        torch.manual_seed(0)
        trainer.train()
    for (name, first), second in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(first, second), name


def test_a_collapsed_router_is_warned_of_once(tmp_path, data):
    rows = encode(read_examples(str(data)), make_tokenizer(), tasks=TASKS)
    model = make_token_routed(balance_loss="none", router_bias=True)
    for _, router in model.routers():
        router.gate.bias.data[:2] += 100  # two of four experts get every token
    trainer = make_trainer(tmp_path, model, rows, TASKS, logging_steps=1)
    trainer.add_callback(RoutingCallback(trainer))
    with pytest.warns(UserWarning, match=r"collapsed in 6 of 6 routed layers.*balance_loss") as caught:
        trainer.train()
    assert sum("collapsed" in str(w.message) for w in caught) == 1


@pytest.mark.parametrize(
    ("load", "chosen", "collapsed"),
    [
        ([0.5, 0.5, 0, 0], 2, True),  # all tokens choose the same two
        ([0.4, 0.3, 0.2, 0.1], 2, False),
        ([0.25] * 4, 4, False),  # dense
        ([0.99, 0.01, 0, 0], 4, True),  # dense, and one gets everything
        ([1.0, 0, 0, 0], 1, True),
        ([0.5, 0.5], 2, False),  # top 2 of 2 is dense
    ],
)
def test_collapse_is_as_few_experts_for_all_tokens_as_for_one(load, chosen, collapsed):
    assert is_collapsed({"load": load, "chosen": [chosen / len(load)] * len(load)}) == collapsed
    base = {"load": [0.9, *(0.1 * value for value in load)], "chosen": [1.0, *[chosen / len(load)] * len(load)]}
    assert is_collapsed(base, 1) == collapsed  # a base expert is not counted


def test_the_callback_refuses_a_model_whose_routers_do_not_look_at_tokens(tmp_path, data):
    rows = encode(read_examples(str(data)), make_tokenizer(), tasks=TASKS)
    with pytest.raises(ValueError, match=r"the trainer's model is a MoeLoraModel; use it with MoLoraConfig"):
        RoutingCallback(make_trainer(tmp_path, make_moelora(), rows, TASKS))


@pytest.mark.filterwarnings("ignore:Routing has collapsed:UserWarning")  # so few rows
def test_the_loss_is_logged_beside_the_routing(tmp_path, data):
    rows = encode(read_examples(str(data)), make_tokenizer(), tasks=TASKS)
    losses = []
    for watched in (False, True):
        torch.manual_seed(0)
        config = MoLoraConfig(task_type="CAUSAL_LM", r=2, num_experts=4, tasks=TASKS, target_modules="all-linear")
        trainer = make_trainer(tmp_path, get_peft_model(make_model("llama"), config), rows, TASKS, logging_steps=1)
        if watched:
            trainer.add_callback(RoutingCallback(trainer))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
