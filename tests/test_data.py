"""Reading the row shapes, tokenizing them, and mixing tasks."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, interleave_datasets
from tiny_text import TEMPLATE, make_tokenizer, write_data
from tokenizers.processors import TemplateProcessing

from peft_moe.data import encode, mix, prompt_ids, read_examples, read_task_info, take_per_task, tokenize
from peft_moe.reading import _pick_split

MEDMULTI = Path(__file__).parents[1] / "data" / "medmulti" / "tiny"
LEAF = [{"role": "user", "content": "Name the leaf\noak"}, {"role": "assistant", "content": "broad"}]
SHAPES = {
    "messages": {"messages": LEAF},
    "prompt and completion": {"prompt": "Name the leaf\noak", "completion": "broad"},
    "instruction, input and output": {"instruction": "Name the leaf", "input": "oak", "output": "broad"},
    "no input": {"instruction": "Name the leaf\noak", "input": "", "output": "broad"},
    "instruction from tasks.json": {"input": "oak", "output": "broad"},
}


def write_rows(folder: Path, rows: list[dict], name: str = "train.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def write_tasks(folder: Path) -> None:
    (folder / "tasks.json").write_text(json.dumps({"tasks": {"leaf": {"instruction": "Name the leaf"}}}))


def make_examples(**rows_per_task: int) -> Dataset:
    tasks = [task for task, n in rows_per_task.items() for _ in range(n)]
    return Dataset.from_dict({"task": tasks, "row": list(range(len(tasks)))})


@pytest.mark.parametrize("row", SHAPES.values(), ids=SHAPES)
def test_every_row_shape_reads_as_the_same_messages(row, tmp_path):
    write_tasks(tmp_path)
    examples = read_examples(write_rows(tmp_path, [{"id": 7, "task": "leaf", **row}]))
    assert examples.to_list() == [{"task": "leaf", "messages": LEAF}]


def test_row_shapes_may_be_mixed_in_one_file(tmp_path):
    write_tasks(tmp_path)
    examples = read_examples(write_rows(tmp_path, [{"task": "leaf", **row} for row in SHAPES.values()]))
    assert examples["messages"][:] == [LEAF] * len(SHAPES)


def test_the_bare_protocol_leaves_the_instruction_out():
    bare = read_examples(str(MEDMULTI), split="test", protocol="bare")
    asked = read_examples(str(MEDMULTI), split="test")
    info = read_task_info(str(MEDMULTI))
    for row, full in zip(bare, asked, strict=True):
        assert full["messages"][0]["content"] == f"{info[row['task']].instruction}\n{row['messages'][0]['content']}"
        assert full["messages"][1] == row["messages"][1]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_folders_hold_splits_in_any_file_type_and_dev_means_validation(suffix, tmp_path):
    write_tasks(tmp_path)
    for split in ("train", "dev"):
        rows = Dataset.from_list([{"task": "leaf", "input": f"{split} tree", "output": "NA"}])
        getattr(rows, {"jsonl": "to_json"}.get(suffix, f"to_{suffix}"))(str(tmp_path / f"{split}.{suffix}"))
    for split, found in [(None, "train"), ("train", "train"), ("dev", "dev"), ("validation", "dev")]:
        (row,) = read_examples(str(tmp_path), split=split)
        assert row["messages"][0]["content"] == f"Name the leaf\n{found} tree"
        assert row["messages"][1]["content"] == "NA"  # pandas takes it for a missing value unless told otherwise


def test_a_file_is_the_split_it_is_named_after(tmp_path):
    path = write_rows(tmp_path, [{"task": "a", "prompt": "p", "completion": "c"}], "dev.jsonl")
    assert len(read_examples(path)) == len(read_examples(path, split="validation")) == 1
    with pytest.raises(ValueError, match=r"no split 'test'; use split= one of \['validation'\]"):
        read_examples(path, split="test")


@pytest.mark.parametrize("where", ["file", "folder", "data/train.csv"])
def test_values_of_a_csv_file_stay_as_they_are_written(where, tmp_path):
    answers = ["001.0", "0123", "1E5", "true", "NA", "null", "None", "2020-01-01", "1.50"]
    rows = "".join(f"leaf,{answer},{answer}\n" for answer in answers)
    path = tmp_path / ("data/train.csv" if where.startswith("data") else "train.csv")
    path.parent.mkdir(exist_ok=True)
    path.write_text("task,prompt,completion\n" + rows)
    (tmp_path / "tasks.json").write_text('{"tasks": {}}')
    examples = read_examples(str(path if where == "file" else tmp_path))
    assert [[message["content"] for message in messages] for messages in examples["messages"]] == [
        [answer, answer] for answer in answers
    ]


@pytest.mark.parametrize("form", ["lines", "list", "one row a date"])
def test_values_of_a_json_file_stay_as_they_are_written(form, tmp_path):
    answers = ["2020-01-01", "2021-12-31T10:00:00"][: 1 + (form != "one row a date")] + [1, 2.5] * (form == "list")
    rows = [{"task": "leaf", "prompt": "2020-02-02", "completion": answer, "score": 0.5} for answer in answers]
    if form == "list":
        path = tmp_path / "train.json"
        path.write_text(json.dumps(rows[2:]))
        answers = answers[2:]
    else:
        path = Path(write_rows(tmp_path, rows))
    read = [[message["content"] for message in messages] for messages in read_examples(str(path))["messages"]]
    assert read == [["2020-02-02", str(answer)] for answer in answers]


def test_other_line_breaks_stand_in_texts_of_json_lines(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"task": "a", "prompt": "x\u2028y\u0085z", "completion": "2020-01-01"}\n', encoding="utf-8")
    messages = read_examples(str(path))[0]["messages"]
    assert [message["content"] for message in messages] == ["x\u2028y\u0085z", "2020-01-01"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has a file without rows"),
        ("task,prompt,completion\n", "has a file without rows"),
        ('task,prompt,completion\na,"b,c\n', "has a file that cannot be read as what its name ends in"),
    ],
)
def test_a_csv_file_that_is_empty_or_broken_is_named(text, message, tmp_path):
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(ValueError, match=f"train.csv {message}"):
        read_examples(str(tmp_path / "train.csv"))


def test_class_labels_are_their_names(tmp_path):
    features = Features(
        {
            "task": ClassLabel(names=["leaf", "size"]),
            "prompt": Value("string"),
            "completion": ClassLabel(names=["a", "b"]),
        }
    )
    rows = {"task": [1, 0], "prompt": ["oak", "elm"], "completion": [0, 1]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    examples = read_examples(str(tmp_path / "train.parquet"))
    assert examples["task"][:] == ["size", "leaf"]
    assert [messages[-1]["content"] for messages in examples["messages"]] == ["a", "b"]


def test_a_csv_file_beside_the_rows_is_no_matter(tmp_path):
    write_rows(tmp_path, [{"task": "leaf", "prompt": "Q", "completion": "A"}])
    (tmp_path / "codes.csv").write_text("code,text\n1,x\n")
    assert len(read_examples(str(tmp_path))) == 1


@pytest.mark.parametrize("there", ["dev", "val", "valid", "validation"])
@pytest.mark.parametrize("wanted", ["dev", "val", "valid", "validation"])
def test_splits_are_found_by_any_of_their_words(there, wanted):
    splits = DatasetDict(train=Dataset.from_dict({"a": [1]}), **{there: Dataset.from_dict({"a": [2]})})
    assert _pick_split(splits, "data", wanted)["a"][:] == [2]


def test_a_hub_that_cannot_be_asked_is_no_dataset_without_tasks(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        FileNotFoundError, match="No data at 'me/data' .* tasks.json on the Hub, .* go online, or use a local copy"
    ):
        read_task_info("me/data")


@pytest.mark.parametrize(
    "row", [{"instruction": ["Q"], "output": "x"}, {"instruction": "Q", "input": ["p"], "output": "x"}]
)
def test_a_list_is_no_question(row, tmp_path):
    with pytest.raises(ValueError, match="is no text; write a text, or a conversation"):
        read_examples(write_rows(tmp_path, [{"task": "leaf", **row}]))


def test_a_row_may_have_several_tasks_or_a_number_for_one(tmp_path):
    rows = [{"kind": task, "prompt": "p", "completion": "c"} for task in ("a", ["a", "b"])]
    assert read_examples(write_rows(tmp_path, rows), task_column="kind")["task"][:] == [["a"], ["a", "b"]]
    rows = [{"task": task, "prompt": "p", "completion": 3} for task in (0, 1)]
    assert read_examples(write_rows(tmp_path, rows))["task"][:] == ["0", "1"]


ASK = {"task": "size", "prompt": "p", "completion": "c"}
BAD_ROWS = {
    "no task": ({**ASK, "task": None}, {}, "Row 2 .*its task is None; use a name"),
    "no answer": ({"task": "a", "prompt": "p"}, {}, r"Row 2 .*no question and answer; .*has \['prompt'\]"),
    "empty answer": ({**ASK, "completion": " "}, {}, "Row 2 .*it has no answer"),
    "no instruction": ({"task": "a", "input": "i", "output": "o"}, {}, r"Row 2 .*no instruction.*\['a'\].*'bare'"),
    "nothing to leave out": (ASK, {"protocol": "bare"}, "needs rows with input and output"),
    "question last": ({"task": "a", "messages": [*LEAF, LEAF[0]]}, {}, "the last .* has to be the assistant's"),
    "answer only": ({"task": "a", "messages": LEAF[1:]}, {}, "the last of two or more"),
    "unknown protocol": (ASK, {"protocol": "short"}, r"'short' is unknown; use one of \['instruction', 'bare'\]"),
    "unknown column": (ASK, {"task_column": "kind"}, r"no column 'kind', only \[.*task_column="),
    "unknown split": (ASK, {"split": "test"}, r"no split 'test'; use split= one of \['train'\]"),
}


@pytest.mark.parametrize(("row", "arguments", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_what_cannot_be_read_is_an_error_that_says_why(row, arguments, message, tmp_path):
    path = write_rows(tmp_path, [ASK, row])
    with pytest.raises(ValueError, match=message):
        read_examples(path, **arguments)


def test_sources_without_data_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No data at '.*absent.jsonl'.*use a .jsonl"):
        read_examples(str(tmp_path / "absent.jsonl"))
    with pytest.raises(FileNotFoundError, match="No data at"):
        read_examples(str(tmp_path))
    (tmp_path / "rows.txt").write_text("text")
    with pytest.raises(ValueError, match=r"ends in '.txt'; use a file that ends in one of \['.jsonl'"):
        read_examples(str(tmp_path / "rows.txt"))
    (tmp_path / "header.csv").write_text("task,prompt,completion\n")
    for path in (write_rows(tmp_path, []), str(tmp_path / "header.csv")):
        with pytest.raises(ValueError, match=f"{path} has a file without rows; fill it"):
            read_examples(path)


def test_csv_files_of_a_folder_have_the_same_columns(tmp_path):
    (tmp_path / "train.csv").write_text("task,instruction,output\na,Do it.,x\n")
    for other in ("task,instruction,input,output\na,Do it.,this,x\n", "task,output\na,x\n"):
        (tmp_path / "dev.csv").write_text(other)
        with pytest.raises(
            ValueError, match=r"train.csv has the columns \['task', 'instruction', 'output'\], and .*dev"
        ):
            read_examples(str(tmp_path), split="dev")
    (tmp_path / "dev.csv").write_text(
        "output,id,task,instruction\nx,7,a,Do it.\n"
    )  # in any order, and what no row needs
    assert read_examples(str(tmp_path), split="dev")[0]["messages"][0]["content"] == "Do it."


def test_dates_within_messages_and_lists_stay_as_they_are_written(tmp_path):
    dates = [{"role": "user", "content": "2020-01-01"}, {"role": "assistant", "content": "2020-01-02T00:00:00"}]
    rows = [{"task": ["2020-01-01", "2021-01-01"], "messages": dates}] * 2
    examples = read_examples(write_rows(tmp_path, rows))
    assert examples[0] == {"task": ["2020-01-01", "2021-01-01"], "messages": dates}


def test_columns_that_no_row_needs_may_be_of_any_kind(tmp_path):
    extras = [
        {"meta": {"date": "2020-01-01", "extra": {"x": 1}}, "score": [0.5], "when": [{"at": "2020-01-01", "id": 7}]},
        {"meta": {"date": "2020-01-02", "extra": {"y": 2}}, "score": [1], "when": [{"at": "2020-01-01", "id": "a"}]},
    ]
    rows = [{**ASK, **extra} for extra in extras]
    assert len(read_examples(write_rows(tmp_path, rows))) == 2
    packed = tmp_path / "rows.jsonl.gz"
    with gzip.open(packed, "wt") as file:
        file.write("".join(json.dumps({**row, "prompt": "2020-01-01"}) + "\n" for row in rows))
    folder = tmp_path / "packed"
    folder.mkdir()
    packed.rename(folder / "train.jsonl.gz")
    assert read_examples(str(folder))[0]["messages"][0]["content"] == "2020-01-01"


def test_task_info_is_found_beside_a_file_and_may_be_absent(tmp_path):
    info = read_task_info(str(MEDMULTI / "dev.jsonl"))
    assert info == read_task_info(str(MEDMULTI))
    assert next(iter(info)) == "icd_chapter"
    assert (info["icd_chronic"].metric, info["icd_chronic"].labels) == ("macro_f1", ("no", "yes"))
    assert read_task_info(str(tmp_path)) == {}
    (tmp_path / "tasks.json").write_text('{"tasks": ["leaf"]}')
    with pytest.raises(ValueError, match="does not describe tasks; write"):
        read_task_info(str(tmp_path))


@pytest.mark.long
def test_a_hub_dataset_reads_like_the_folder_it_was_pushed_from(run_with_hub, tmp_path):
    write_data(tmp_path / "data")
    run_with_hub("""
from huggingface_hub import HfApi
from peft_moe.data import read_examples, read_task_info

HfApi().create_repo("data", repo_type="dataset")
HfApi().upload_folder(folder_path="data", repo_id="local/data", repo_type="dataset")
assert read_task_info("local/data") == read_task_info("data") != {}
for split in ("train", "dev", "test"):
    assert read_examples("local/data", split=split).to_list() == read_examples("data", split=split).to_list()
try:
    read_examples("local/absent")
except FileNotFoundError as error:
    assert "No data at 'local/absent'" in str(error), error
else:
    raise AssertionError("a dataset that does not exist was read")
assert read_task_info("local/absent") == read_task_info("local/data", revision="nowhere") == {}
""")


def test_encoding_labels_the_answer_and_its_end_only(tmp_path):
    tokenizer = make_tokenizer()
    examples = read_examples(str(write_data(tmp_path)))
    rows = encode(examples, tokenizer, tasks=["size", "leaf"])
    assert rows.column_names == ["input_ids", "attention_mask", "labels", "task_ids"]
    for row, example in zip(rows, examples, strict=True):
        question, answer = (message["content"] for message in example["messages"])
        assert tokenizer.decode(row["input_ids"]) == f"<user> {' '.join(question.split())} </s> <bot> {answer} </s>"
        assert tokenizer.decode([i for i in row["labels"] if i != -100]) == f"{answer} </s>"
        assert row["labels"][-2:] == row["input_ids"][-2:]
        assert row["attention_mask"] == [1] * len(row["input_ids"])
        assert row["task_ids"] == ["size", "leaf"].index(example["task"])
    assert "task_ids" not in encode(examples, tokenizer, tasks=None).column_names


@pytest.mark.parametrize(
    ("special_tokens", "prompt"), [("$A", "oak fir"), ("<s> $A", "<s> oak fir"), ("<s> $A </s>", "<s> oak fir")]
)
def test_without_a_template_a_row_is_prompt_answer_and_eos(special_tokens, prompt):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=special_tokens, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    messages = [{"role": "system", "content": "oak"}, {"role": "user", "content": "fir"}, LEAF[1]]
    assert [tokenizer.decode(ids) for ids in tokenize(messages, tokenizer)] == [prompt, "broad </s>"]


def test_an_answer_that_the_template_leaves_open_is_closed_with_eos():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
    assert tokenizer.decode(tokenize(LEAF, tokenizer)[1]) == "broad </s>"
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="Nothing ends an answer: .*set tokenizer.eos_token"):
        tokenize(LEAF, tokenizer)


@pytest.mark.parametrize("answer", ["broad", "think", "</s>x"])
def test_what_a_template_writes_before_every_answer_belongs_to_the_prompt(answer):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = TEMPLATE.replace("'<bot> ' }}{{", "'<bot> <think> </think> ' }}{{")
    prompt, rest = tokenize([LEAF[0], {"role": "assistant", "content": answer}], tokenizer)
    assert tokenizer.decode(prompt).split()[-3:] == ["<bot>", "<think>", "</think>"]
    assert rest == tokenizer(f"{answer} </s>")["input_ids"]


@pytest.mark.parametrize(
    "template", [TEMPLATE, TEMPLATE.replace("'<bot> ' }}{{", "'<bot> <think> </think> ' }}{{"), None]
)
def test_a_question_reads_as_in_training(template):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template
    assert prompt_ids(LEAF[:-1], tokenizer) == tokenize(LEAF, tokenizer)[0]


def test_a_template_that_rewrites_its_prompt_is_an_error():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages | length }} {% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="'1 Name the leaf.*' does not start '2 Name"):
        tokenize(LEAF, tokenizer)


def test_long_rows_lose_the_start_of_their_prompt_with_one_warning():
    tokenizer = make_tokenizer()
    prompt, answer = tokenize(LEAF, tokenizer)
    whole = prompt + answer
    examples = Dataset.from_dict({"task": ["a", "a"], "messages": [LEAF, LEAF]})
    with pytest.warns(UserWarning, match=f"2 of 2 rows .*max_length={len(whole)} would keep all") as caught:
        rows = encode(examples, tokenizer, tasks=None, max_length=len(whole) - 2)
    assert len(caught) == 1
    assert rows["input_ids"][0] == whole[2:]
    assert rows["labels"][0] == [-100] * (len(whole) - 4) + whole[-2:]
    with pytest.raises(ValueError, match="longest answer of 2 tokens.*use max_length=3 or more"):
        encode(examples, tokenizer, tasks=None, max_length=2)


def test_rows_of_several_tasks_get_a_list_of_ids_and_unknown_tasks_are_an_error():
    examples = Dataset.from_dict({"task": [["b"], ["b", "a"]], "messages": [LEAF, LEAF]})
    assert encode(examples, make_tokenizer(), tasks=["a", "b"])["task_ids"][:] == [[1], [1, 0]]
    with pytest.raises(ValueError, match=r"tasks \['b'\] that are not among the adapter's tasks \['a', 'c'\]"):
        encode(examples, make_tokenizer(), tasks=["a", "c"])


SHARES = {
    ("proportional", 2.0): {"a": 0.8, "b": 0.2},
    ("uniform", 2.0): {"a": 0.5, "b": 0.5},
    ("temperature", 2.0): {"a": 2 / 3, "b": 1 / 3},  # 1600^(1/2) : 400^(1/2) = 40 : 20
    ("temperature", 1.0): {"a": 0.8, "b": 0.2},
}


@pytest.mark.parametrize(("strategy", "shares"), SHARES.items())
def test_mixing_keeps_the_length_and_draws_tasks_by_their_shares(strategy, shares):
    mixed = mix(make_examples(a=1600, b=400), strategy=strategy[0], temperature=strategy[1], seed=1)
    assert len(mixed) == 2000
    counts = Counter(mixed["task"])
    # four standard deviations of 2000 draws are at most 0.045
    assert {task: n / 2000 for task, n in counts.items()} == pytest.approx(shares, abs=0.045)
    rows = Counter(mixed["row"])
    assert max(rows.values()) <= min(n for row, n in rows.items() if row >= 1600) + 1  # b goes round evenly


def test_proportional_mixing_is_a_shuffle_and_the_seed_decides():
    examples = make_examples(a=30, b=10)
    for strategy in ("proportional", "uniform", "temperature"):
        first = mix(examples, strategy=strategy, seed=1)
        assert first["row"][:] == mix(examples, strategy=strategy, seed=1)["row"][:]
        assert first["row"][:] != mix(examples, strategy=strategy, seed=2)["row"][:]
    assert sorted(mix(examples, seed=3)["row"]) == list(range(40))


@pytest.mark.parametrize("rows", [{"a": 50, "b": 7, "c": 1}, {"a": 3}])
@pytest.mark.parametrize(("strategy", "power"), [("uniform", 0.0), ("temperature", 0.5)])
def test_mixing_draws_as_datasets_interleaves(rows, strategy, power):
    examples = make_examples(**rows)
    parts = [examples.filter(lambda row, task=task: row["task"] == task).shuffle(seed=5) for task in rows]
    weights = [n**power for n in rows.values()]
    shares = [weight / sum(weights) for weight in weights]
    expected = interleave_datasets(parts, probabilities=shares, seed=5, stopping_strategy="all_exhausted")
    mixed = mix(examples, strategy=strategy, temperature=2.0, seed=5)
    assert mixed["row"][:] == expected["row"][: len(examples)]


def test_a_task_that_is_hardly_ever_drawn_takes_no_time():
    mixed = mix(make_examples(a=1000, b=2), strategy="temperature", temperature=0.1)
    assert Counter(mixed["task"]) == {"a": 1002}


def test_mixing_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"'even' is unknown; use one of \['proportional'"):
        mix(make_examples(a=2), strategy="even")
    with pytest.raises(ValueError, match="temperature=0 must be a number from 0.1 up"):
        mix(make_examples(a=2), strategy="temperature", temperature=0)


def test_the_first_rows_of_each_task_are_taken_in_order():
    examples = Dataset.from_dict({"task": ["a", "b", "a", "a", "b"], "row": [0, 1, 2, 3, 4]})
    assert take_per_task(examples, 2)["row"][:] == [0, 1, 2, 4]
    with pytest.raises(
        ValueError, match="limit=0 is how many rows of each task to take; give a whole number from 1 up"
    ):
        take_per_task(examples, 0)
