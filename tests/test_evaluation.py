"""Answers, scores and tables; scripts/evaluate.py on a base model, a stock LoRA and a MOELoRA adapter."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import make_model
from tiny_text import make_tokenizer, write_data
from transformers import LlamaForCausalLM

from peft_moe import MoeLoraConfig
from peft_moe.data import TaskInfo, encode, read_examples, read_task_info, tokenize
from peft_moe.evaluation import evaluate_tasks, generate_answers, score, table

TASKS = ["size", "leaf"]
EVALUATE = Path(__file__).parents[1] / "scripts" / "evaluate.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def examples(data: Path) -> Dataset:
    """Rows of both tasks in turn; the bare words, so that only the ids tell the tasks apart."""
    return read_examples(str(data), split="test", protocol="bare")


def make_base() -> LlamaForCausalLM:
    model = make_model("llama")
    model.resize_token_embeddings(len(make_tokenizer()))  # every token it can answer is a word
    model.lm_head.weight.data *= 20  # or a random model answers everything alike
    return model


def make_moelora(**changes) -> PeftModel:
    """A routed model whose tasks answer differently, left in training mode."""
    torch.manual_seed(0)
    fields = {"r": 4, "num_experts": 2, "tasks": TASKS, "lora_dropout": 0.5, "init_lora_weights": False}
    config = MoeLoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **{**fields, **changes})
    return get_peft_model(make_base(), config).train()


def make_lora() -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(make_base(), config).train()


MODELS = {"base": make_base, "LoRA": make_lora, "MOELoRA": make_moelora}


def answers_one_by_one(model: torch.nn.Module, examples: Dataset) -> list[str]:
    tokenizer = make_tokenizer()
    model.eval()
    answers = []
    for example in examples:
        prompt, _ = tokenize(example["messages"], tokenizer)
        routed = isinstance(model, PeftModel) and hasattr(model, "set_task")
        task = {"task_ids": [example["task"]]} if routed else {}
        ids = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False, **task)
        answers.append(tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True))
    return answers


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_batches_of_mixed_lengths_and_tasks_are_answered_as_row_by_row(make, examples):
    longer = examples.map(
        lambda row, i: {"messages": [row["messages"][0]] * (i % 3) + row["messages"]}, with_indices=True
    )
    model = make()
    before = model.training
    answers = generate_answers(model, make_tokenizer(), longer, batch_size=4, max_new_tokens=6, progress=False)
    assert model.training == before
    assert answers == answers_one_by_one(model, longer)
    assert len(set(answers)) > 3


def test_generation_needs_no_padding_token_and_leaves_the_tokenizer_as_it_was(examples):
    tokenizer = make_tokenizer()
    padded = generate_answers(make_base(), tokenizer, examples, max_new_tokens=6, progress=False)
    tokenizer.pad_token = None
    assert generate_answers(make_base(), tokenizer, examples, max_new_tokens=6, progress=False) == padded
    assert (tokenizer.pad_token, tokenizer.padding_side) == (None, "right")


def test_generation_stops_at_the_token_that_ends_answers_in_training(examples):
    """Some templates end answers with a token that neither the tokenizer nor the model calls EOS."""
    model = make_base()
    expected = generate_answers(model, make_tokenizer(), examples, max_new_tokens=40, progress=False)
    assert min(len(text.split()) for text in expected) < 30
    tokenizer = make_tokenizer()
    tokenizer.eos_token, model.generation_config.eos_token_id = None, None
    assert generate_answers(model, tokenizer, examples, max_new_tokens=40, progress=False) == expected


def test_what_was_learnt_from_encoded_rows_is_answered_word_for_word(examples, data):
    tokenizer, model = make_tokenizer(), make_moelora(r=8, lora_dropout=0.0, init_lora_weights=True)
    rows = encode(examples, tokenizer, tasks=TASKS).with_format("torch")
    batch = {key: torch.stack(list(rows[key])) for key in rows.column_names}  # all rows have the same length
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    for _ in range(100):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    results = evaluate_tasks(model, tokenizer, examples, read_task_info(str(data)), progress=False)
    assert [results[name]["score"] for name in ("size", "leaf", "mean")] == [1.0, 1.0, 1.0]


def test_rows_of_a_task_the_adapter_lacks_are_an_error_that_lists_its_tasks(examples):
    model = make_moelora(tasks=["size", "age"])
    with pytest.raises(ValueError, match=r"tasks \['leaf'\] that are not among the adapter's tasks \['size', 'age'\]"):
        generate_answers(model, make_tokenizer(), examples, progress=False)
    assert model.training


def make_answered(*rows: tuple[str | list[str], str]) -> Dataset:
    question = {"role": "user", "content": "?"}
    messages = [[question, {"role": "assistant", "content": answer}] for _, answer in rows]
    return Dataset.from_dict({"task": [task for task, _ in rows], "messages": messages})


INFO = {name: TaskInfo(name, metric=metric) for name, metric in {"a": "token_f1", "b": "accuracy"}.items()}


def test_scores_are_per_task_with_the_mean_over_tasks():
    examples = make_answered(("b", "yes"), ("a", "left knee"), ("c", "x"), ("b", "no"), ("a", "arm"))
    results = score(["yes", "knee", "x", "yes", "arm"], examples, INFO)
    assert results == {
        "a": {"metric": "token_f1", "score": pytest.approx((2 / 3 + 1) / 2), "exact_match": 0.5, "n": 2},
        "b": {"metric": "accuracy", "score": 0.5, "exact_match": 0.5, "n": 2},
        "c": {"metric": "exact_match", "score": 1.0, "exact_match": 1.0, "n": 1},
        "mean": {
            "metric": "mean",
            "score": pytest.approx((5 / 6 + 1 / 2 + 1) / 3),
            "exact_match": pytest.approx(2 / 3),
            "n": 5,
        },
    }
    assert list(results) == ["a", "b", "c", "mean"]  # in the order of tasks.json, then of the rows


def test_rows_of_several_tasks_are_scored_as_a_task_of_their_own():
    results = score(["x", "y"], make_answered((["a"], "x"), (["a", "b"], "x")), INFO)
    assert [(task, result["metric"], result["score"]) for task, result in results.items()] == [
        ("a", "token_f1", 1.0),
        ("a+b", "exact_match", 0.0),
        ("mean", "mean", 0.5),
    ]


def test_wrong_lengths_and_unknown_metrics_are_errors_before_anything_is_generated():
    examples = make_answered(("a", "x"), ("a", "y"))
    with pytest.raises(ValueError, match="1 predictions for 2 examples"):
        score(["x"], examples, INFO)
    with pytest.raises(ValueError, match="Unknown metric 'bleu'"):
        evaluate_tasks(None, None, examples, {"a": TaskInfo("a", metric="bleu")})
    with pytest.raises(ValueError, match="A task is called 'mean'.*rename the task"):
        evaluate_tasks(None, None, make_answered(("mean", "x")), INFO)


def test_the_table_lays_systems_side_by_side():
    before = score(["yes", "x"], make_answered(("b", "yes"), ("a", "y")), INFO)
    after = score(["yes", "x"], make_answered(("b", "yes"), ("c", "x")), INFO)
    assert table({"base": before, "MOELoRA": after}).splitlines() == [
        "task  metric       n   base  MOELoRA",
        "----  -----------  -  -----  -------",
        "a     token_f1     1  0.000        -",
        "b     accuracy     1  1.000    1.000",
        "c     exact_match  1      -    1.000",
        "mean               2  0.500    1.000",
    ]


@pytest.mark.parametrize("name", MODELS)
def test_the_script_scores_a_base_model_and_any_adapter_as_the_library_does(name, data, examples, tmp_path, capsys):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    make_base().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    model = MODELS[name]()
    flags = ["--model_name_or_path", str(base)]
    if name != "base":
        model.peft_config["default"].base_model_name_or_path = str(base)
        model.save_pretrained(adapter)
        flags = ["--adapter", str(adapter)]  # its base model and tokenizer are found from there
    options = ["--data", str(data), "--protocol", "bare", "--max_new_tokens", "6", "--output", str(tmp_path / "o.json")]
    runpy.run_path(str(EVALUATE))["main"]([*flags, *options])
    written = json.loads((tmp_path / "o.json").read_text())
    expected = evaluate_tasks(
        model, make_tokenizer(), examples, read_task_info(str(data)), max_new_tokens=6, progress=False
    )
    assert written["results"] == expected
    assert written["arguments"]["split"] == "test"
    assert written["arguments"]["model_name_or_path"] == str(base)
    assert table({Path(flags[1]).name: expected}) in capsys.readouterr().out


def test_the_script_reads_yaml_and_scores_some_rows_of_one_file(data, tmp_path, capsys):
    make_base().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "e.yaml").write_text(f"model_name_or_path: {tmp_path / 'base'}\nlimit: 4\nmax_new_tokens: 2\n")
    runpy.run_path(str(EVALUATE))["main"]([str(tmp_path / "e.yaml"), "--data", str(data / "dev.jsonl"), "--limit=3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:3] == ["size", "accuracy", "3"]
    assert lines[4].split()[:2] == ["mean", "6"]


def test_the_script_needs_something_to_score(data, capsys):
    with pytest.raises(SystemExit):
        runpy.run_path(str(EVALUATE))["main"](["--data", str(data)])
    assert "Nothing to score; give --model_name_or_path, --adapter, or both." in capsys.readouterr().err
