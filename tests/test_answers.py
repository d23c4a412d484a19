"""Training on the logits of answers alone is training on all logits: same losses, same gradients, fewer logits."""

import json
import pickle
from contextlib import contextmanager
from types import MethodType

import numpy as np
import pytest
import torch
import yaml
from helpers import TARGETS, TASKS, config_for, enable_checkpointing
from kinds import KINDS, config_of
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_models import VOCAB, make_model
from tiny_text import make_tokenizer, write_data
from torch import nn
from train import main
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from peft_moe import MoLoraConfig
from peft_moe.answers import (
    AnswerLogitsCollator,
    takes_positions_per_row,
    why_all_logits,
    with_answer_logits,
)
from peft_moe.training import TaskCollator

ARCHITECTURES = ["llama", "gpt2", "opt", "qwen2", "gemma2", "gemma3", "mixtral"]
FURTHER_TARGETS = ["q_proj", "v_proj"]
MODELS = [*ARCHITECTURES, "gpt_neox"]
PER_ROW = takes_positions_per_row(make_model("llama"))
every_way = pytest.mark.parametrize("per_row", [True, False] if PER_ROW else [False])


def make(name):
    if name != "gpt_neox":
        return make_model(name)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", num_attention_heads=4, **sizes))


def row(prompt: int, *rest: int, seed: int = 0, **more) -> dict:
    """Tokens of a prompt, an answer, another prompt, and so on, of these lengths; answers have labels."""
    tokens = torch.randint(3, VOCAB, (prompt + sum(rest),), generator=torch.Generator().manual_seed(seed)).tolist()
    labels = [-100] * prompt
    for i, length in enumerate(rest):
        labels += [-100] * length if i % 2 else tokens[len(labels) : len(labels) + length]
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels, **more}


BATCHES = {
    "of_one_length": [row(5, 3, seed=1), row(5, 3, seed=2)],
    "of_many_lengths": [row(9, 1, seed=1), row(2, 4, seed=2), row(6, 2, seed=3)],
    "with_a_row_without_labels": [row(7, seed=1), row(3, 2, seed=2)],
    "of_several_turns": [row(3, 2, 4, 3, seed=1), row(2, 1, 1, 1, 1, 1, seed=2), row(4, 5, seed=3)],
    "of_answers_alone": [row(0, 6, seed=1), row(0, 4, seed=2)],
}
ROWS = BATCHES["of_many_lengths"] + BATCHES["of_several_turns"] + [row(4, seed=7), row(5, 6, seed=8)]

LONGEST = max(len(r["input_ids"]) for r in ROWS)


def padding(side: str = "right", **options) -> DataCollatorForSeq2Seq:
    tokenizer = make_tokenizer()
    tokenizer.padding_side = side
    return DataCollatorForSeq2Seq(tokenizer, **options)


def step(model, batch, **kwargs):
    """The loss of a batch, and the gradients by name."""
    model.zero_grad()
    torch.manual_seed(0)  # dropout is the same in both
    loss = model(**batch, **kwargs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_step(model, rows, collator, *, per_row=PER_ROW, **kwargs):
    expected_loss, expected = step(model, collator(rows), **kwargs)
    loss, found = step(model, AnswerLogitsCollator(collator, per_row=per_row)(rows), **kwargs)
    assert found.keys() == expected.keys()
    assert any(grad.abs().max() > 1e-4 for grad in expected.values())
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@contextmanager
def head_inputs(model):
    """The shapes of what the vocabulary head gets."""
    shapes: list[tuple[int, ...]] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    try:
        yield shapes
    finally:
        handle.remove()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_all_logits(name, side):
    same_step(make(name).train(), BATCHES["of_many_lengths"], padding(side))


@every_way
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_answers_may_be_of_any_number_length_and_place(rows, side, per_row):
    same_step(make("llama"), rows, padding(side, pad_to_multiple_of=8), per_row=per_row)


@every_way
def test_the_loss_of_a_part_of_a_step_is_shared_out_as_before(per_row):
    same_step(make("llama"), BATCHES["of_many_lengths"], padding(), per_row=per_row, num_items_in_batch=23)


@every_way
def test_a_batch_without_any_label_has_no_gradient_and_no_nan(per_row):
    model, collator = make("llama"), AnswerLogitsCollator(padding(), per_row=per_row)
    loss, grads = step(model, collator([row(4, seed=1), row(6, seed=2)]), num_items_in_batch=5)
    assert loss == 0
    assert not any(grad.any() for grad in grads.values())


def test_texts_packed_into_a_row_keep_their_borders():
    """The first token of each text is nobody's answer: the collator that packs them says so in labels."""
    packed = DataCollatorWithFlattening()
    batch = AnswerLogitsCollator(packed)(BATCHES["of_answers_alone"])
    assert batch["shift_labels"].tolist() == [[*(BATCHES["of_answers_alone"][0]["labels"][1:]),
                                               *(BATCHES["of_answers_alone"][1]["labels"][1:])]]  # fmt: skip
    same_step(make("llama"), BATCHES["of_answers_alone"], packed)


@pytest.mark.skipif(not PER_ROW, reason="transformers before 5.21 has the same positions in all rows")
@pytest.mark.parametrize("name", MODELS)
def test_the_head_sees_as_many_positions_as_the_longest_answer_has(name):
    model, rows = make(name), BATCHES["of_many_lengths"]
    with head_inputs(model) as shapes:
        model(**padding()(rows))
        outputs = model(**AnswerLogitsCollator(padding())(rows))
    assert [shape[:2] for shape in shapes] == [(3, 10), (3, 4)]
    assert outputs.logits.shape == (3, 4, VOCAB)


def test_positions_are_those_before_labels_in_order():
    batch = AnswerLogitsCollator(padding())([row(3, 2, 4, 3, seed=1), row(4, 1, seed=2)])
    assert batch["logits_to_keep"][0].tolist() == [2, 3, 8, 9, 10]
    assert batch["logits_to_keep"][1, 0] == 3
    assert batch["shift_labels"][1].tolist() == [batch["labels"][1, 4].item(), -100, -100, -100, -100]
    kept = torch.arange(12).expand(2, 12).gather(1, batch["logits_to_keep"]) + 1
    there = batch["shift_labels"] != -100
    assert torch.equal(batch["labels"].gather(1, kept)[there], batch["shift_labels"][there])
    shared = AnswerLogitsCollator(padding(), per_row=False)([row(3, 2, seed=1), row(4, 2, seed=2)])
    assert shared["logits_to_keep"].tolist() == [2, 3, 4]
    assert (shared["shift_labels"] != -100).tolist() == [[True, True, False], [False, True, True]]


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_learns_the_same(kind, side, checkpointed, tmp_path):
    more = {"at_moe": {"router_input": "prompt"}, "molora": {"balance_loss": "switch"}}
    fields = more.get(kind, {"balance_loss": "cv2"} if kind == "medmoelora" else {})
    torch.manual_seed(0)
    model = get_peft_model(make_model("llama"), config_of(kind, "llama", tmp_path, **fields)).train()
    if checkpointed:
        enable_checkpointing(model)
    routes = kind == "moelora"
    rows = [r | {"task_ids": TASKS[i]} if routes else r for i, r in enumerate(BATCHES["of_several_turns"])]
    assert why_all_logits(model) is None
    same_step(model, rows, TaskCollator(padding(side), TASKS) if routes else padding(side))
    same_step(model, rows, TaskCollator(padding(side), TASKS) if routes else padding(side), num_items_in_batch=40)


def test_the_collators_of_tasks_and_of_answers_go_around_each_other_either_way():
    rows = [r | {"task_ids": TASKS[i]} for i, r in enumerate(BATCHES["of_many_lengths"])]
    outer = AnswerLogitsCollator(TaskCollator(padding(), TASKS))(rows)
    inner = TaskCollator(AnswerLogitsCollator(padding()), TASKS)(rows)
    assert outer.keys() == inner.keys() == {*rows[0], "logits_to_keep", "shift_labels"}
    assert all(torch.equal(outer[name], inner[name]) for name in outer)


def trained(folder, collator, *, kind="molora", **arguments):
    """Two steps of a Trainer; returns it with the losses logged."""
    torch.manual_seed(0)
    model = get_peft_model(make_model("llama"), config_of(kind, "llama", folder))
    defaults = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01, "logging_steps": 1}
    defaults |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    metrics = arguments.pop("compute_metrics", None)
    args = TrainingArguments(str(folder / "out"), **defaults | arguments)
    with head_inputs(model) as shapes:
        trainer = Trainer(
            model, args, data_collator=collator, train_dataset=ROWS, eval_dataset=ROWS, compute_metrics=metrics
        )
        trainer.train()
        evaluation = trainer.evaluate()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, dict(model.named_parameters()), evaluation, shapes


@pytest.mark.parametrize("steps", [1, 3], ids=["", "accumulated"])
def test_a_trainer_trains_the_same_adapter_and_reports_the_same_losses(steps, tmp_path):
    options = {"gradient_accumulation_steps": steps}
    losses, weights, evaluation, shapes = trained(tmp_path, AnswerLogitsCollator(padding(), per_row=PER_ROW), **options)
    expected_losses, expected, expected_evaluation, all_shapes = trained(tmp_path, padding(), **options)
    assert len(losses) == 2
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert evaluation["eval_loss"] == pytest.approx(expected_evaluation["eval_loss"], rel=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5)
    positions, before = (sum(shape[0] * shape[1] for shape in s) for s in (shapes, all_shapes))
    assert len(shapes) == len(all_shapes)
    assert positions <= before * (0.5 if PER_ROW else 0.75)


def accuracy(prediction):
    """Of next tokens; the labels of stock batches are those of the tokens themselves."""
    logits, labels = prediction.predictions, prediction.label_ids
    if logits.shape[1] == LONGEST:  # all of them
        logits, labels = logits[:, :-1], labels[:, 1:]
    there = labels != -100
    right = (logits.argmax(-1) == labels)[there]
    return {"n": int(there.sum()), "right": float(right.mean()), "sum": float(np.abs(logits[there]).sum())}


def test_metrics_get_the_labels_that_go_with_the_logits(tmp_path):
    answers = AnswerLogitsCollator(padding(), per_row=PER_ROW)
    found = trained(tmp_path, answers, compute_metrics=accuracy, label_names=["shift_labels"])[2]
    expected = trained(tmp_path, padding(), compute_metrics=accuracy)[2]
    assert found["eval_n"] == expected["eval_n"] > 20
    for name in ("eval_loss", "eval_right", "eval_sum"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4)


@pytest.mark.slow
def test_a_compiled_model_is_one_graph_for_answers_of_all_lengths():
    torch.compiler.reset()
    torch.manual_seed(0)
    config = MoLoraConfig(task_type="CAUSAL_LM", r=2, num_experts=4, target_modules=["gate_proj"])
    model = get_peft_model(make_model("llama"), config)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    assert why_all_logits(compiled) is None
    collator = with_answer_logits(padding(), compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for answer in (4, 2, 7):
            rows = [row(6, answer, seed=1), row(3, answer - 1, seed=2)]
            with torch.no_grad():
                found, expected = compiled(**collator(rows)), model(**padding()(rows))
            torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
            assert found.logits.shape[1] == collator(rows)["logits_to_keep"].numel() < expected.logits.shape[1]


class OwnForward(LlamaForCausalLM):
    """As code from the Hub may be: logits of the last tokens only, by their number."""

    def forward(self, input_ids=None, labels=None, logits_to_keep=0, **kwargs):
        hidden = self.model(input_ids=input_ids).last_hidden_state
        logits = self.lm_head(hidden[:, -logits_to_keep:])
        return self.loss_function(logits=logits, labels=labels, vocab_size=VOCAB, **kwargs)


def with_own_loss():
    model = make_model("llama")
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    return model


def with_own_forward():
    model = make_model("llama")

    def forward(self, input_ids, **kwargs):
        return type(self).forward(self, input_ids)

    model.forward = MethodType(forward, model)
    return model


def adapted(name, config):
    return get_peft_model(make_model(name), config)


UNSUITABLE = {
    "classifier": (lambda: make_model("bert"), "BertForSequenceClassification has a loss of its own"),
    "encoder_decoder": (lambda: make_model("t5"), "T5ForConditionalGeneration is no decoder of transformers"),
    "module": (lambda: nn.Linear(2, 2), "Linear is no decoder of transformers"),
    "own_loss": (with_own_loss, "LlamaForCausalLM has a loss of its own"),
    "own_forward": (with_own_forward, "does not hand shift_labels to transformers' loss"),
    "numbers_only": (lambda: OwnForward(make_model("llama").config), "OwnForward has no logits_to_keep"),
    "prompt_tuning": (
        lambda: adapted("llama", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
        "puts tokens before the row",
    ),
    "experts_in_the_head": (
        lambda: adapted("llama", MoLoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"])),
        "experts in the vocabulary head",
    ),
}


@pytest.mark.parametrize(("build", "reason"), UNSUITABLE.values(), ids=UNSUITABLE)
def test_other_models_keep_all_logits_and_say_why(build, reason):
    model, collator = build(), padding()
    assert reason in why_all_logits(model)
    assert with_answer_logits(collator, model) is collator
    with pytest.raises(ValueError, match=rf"answer_logits='on', but .*{reason}.*use 'auto' or 'off'"):
        with_answer_logits(collator, model, wanted="on")


@pytest.mark.parametrize("name", MODELS)
def test_causal_models_take_answers_with_and_without_adapters(name):
    model = make(name)
    assert why_all_logits(model) is None
    targets = TARGETS.get(name, ["query_key_value"] if name == "gpt_neox" else FURTHER_TARGETS)
    fan_in_fan_out = name == "gpt2"
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=targets, fan_in_fan_out=fan_in_fan_out)
    assert why_all_logits(get_peft_model(make(name), lora)) is None
    assert why_all_logits(get_peft_model(make(name), config_for("llama", target_modules=targets))) is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True"),
    ],
    ids=["label_smoothing", "dispatch_batches"],
)
def test_arguments_that_need_all_logits_get_them(options, reason, tmp_path):
    model, collator = make_model("llama"), padding()
    args = TrainingArguments(str(tmp_path), use_cpu=True, **options)
    assert reason in why_all_logits(model, args)
    assert with_answer_logits(collator, model, args) is collator
    with pytest.raises(ValueError, match=reason):
        with_answer_logits(collator, model, args, wanted="on")


def test_off_is_off_and_auto_is_on_where_it_can_be(tmp_path):
    model, collator = make_model("llama"), padding()
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    assert with_answer_logits(collator, model, args, wanted="off") is collator
    for wanted in ("auto", "on"):
        wrapped = with_answer_logits(collator, model, args, wanted=wanted)
        assert isinstance(wrapped, AnswerLogitsCollator)
        assert wrapped.per_row == takes_positions_per_row(model)
        assert pickle.loads(pickle.dumps(wrapped))(ROWS)["shift_labels"].shape[0] == len(ROWS)


def test_batches_without_labels_pass_and_other_labels_are_refused():
    rows = [{name: value for name, value in r.items() if name != "labels"} for r in ROWS]
    batch = AnswerLogitsCollator(padding())(rows)
    assert "logits_to_keep" not in batch
    assert batch["input_ids"].shape == (len(rows), LONGEST)

    def classes(rows):
        return {"input_ids": torch.ones(len(rows), 3, dtype=torch.long), "labels": torch.zeros(len(rows))}

    with pytest.raises(ValueError, match=r"function made labels of \(8,\).*tensor \(rows, tokens\)"):
        AnswerLogitsCollator(classes)(ROWS)
    with pytest.raises(TypeError, match="collator=3 cannot be called"):
        AnswerLogitsCollator(3)


def test_the_script_trains_the_same_with_answers_on_and_off(tmp_path):
    base = tmp_path / "base"
    make_model("llama").save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    settings = {"model_name_or_path": str(base), "dataset": str(write_data(tmp_path / "data")), "r": 4, "seed": 1}
    settings |= {"num_experts": 2, "max_steps": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    losses = {}
    for wanted in (True, False):  # as YAML reads on and off
        out = tmp_path / str(wanted)
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({**settings, "answer_logits": wanted, "output_dir": str(out)}))
        main([str(recipe)])
        losses[wanted] = json.loads((out / "all_results.json").read_text())["train_loss"]
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    with pytest.raises(ValueError, match="answer_logits='on', but label_smoothing_factor=0.1"):
        main([str(recipe), "--answer_logits", "on", "--label_smoothing_factor", "0.1"])
