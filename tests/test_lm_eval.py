"""lm-eval scores our adapters as they score themselves: choices by log-likelihood, and answers it lets them write."""

import json
import subprocess
import sys

import pytest
import torch
from grouped_helpers import grouped_config
from helpers import TARGETS, TASKS
from peft import PeftModel, get_peft_model
from tiny_models import make_model
from tiny_text import ANSWERS, INPUTS, make_tokenizer
from transformers import AutoModelForCausalLM

from peft_moe import MedMoeLoraConfig, MoeLoraConfig, MoLoraConfig

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install 'peft-moe[test]')")
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:lm_eval", "ignore::UserWarning:lm_eval", "ignore::ResourceWarning"
)

KINDS = [
    "moelora",
    "molora",
    *(pytest.param(k, marks=pytest.mark.slow) for k in ("medmoe", "at_moe")),
    "at_moe by prompt",
]
CHOICES = list(ANSWERS["size"])
QUESTIONS = [f"Name the size {' the' * (i % 3)} {name}" for i, name in enumerate(INPUTS)]
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
doc_to_text: "{{question}}"
"""
CHOOSE = (
    COMMON
    + f"""
task: choose_size
output_type: multiple_choice
doc_to_choice: {json.dumps(CHOICES)}
doc_to_target: "{{{{target}}}}"
metric_list: [{{metric: acc}}]
"""
)
WRITE = (
    COMMON
    + f"""
task: write_size
output_type: generate_until
doc_to_target: "{{{{{json.dumps(CHOICES).replace('"', "'")}[target]}}}}"
generation_kwargs: {{until: ["</s>"], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny base model with its tokenizer, and the tasks."""
    folder = tmp_path_factory.mktemp("lm_eval")
    base = make_model("llama")
    base.resize_token_embeddings(len(make_tokenizer()))  # as lm-eval does before it loads an adapter
    base.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    (folder / "tasks").mkdir()
    data = folder / "tasks" / "test.jsonl"
    lines = [json.dumps({"question": q, "target": i % len(CHOICES)}) for i, q in enumerate(QUESTIONS)]
    data.write_text("\n".join(lines) + "\n")
    for name, task in ("choose", CHOOSE), ("write", WRITE):
        (folder / "tasks" / f"{name}.yaml").write_text(task.replace("DATA", str(data)))
    return folder


@pytest.fixture(scope="module")
def manager(folder):
    return TaskManager(include_path=str(folder / "tasks"), include_defaults=False)


def make_adapter(kind, folder, **fields):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    common = {"task_type": "CAUSAL_LM", "init_lora_weights": False}
    if kind.startswith("at_moe"):
        router = "prompt" if "prompt" in kind else "token"
        return get_peft_model(base, grouped_config("llama", folder / "loras", **common, router_input=router)).eval()
    cls = {"moelora": MoeLoraConfig, "molora": MoLoraConfig, "medmoe": MedMoeLoraConfig}[kind]
    common |= {"target_modules": TARGETS["llama"], "num_experts": 4} | ({"tasks": TASKS} if kind == "moelora" else {})
    return get_peft_model(base, cls(**common, **fields)).eval()


def evaluate(model, manager, **arguments):
    """Score of the choices, their log-likelihoods by row, and the answers that were written."""
    done = lm_eval.simple_evaluate(
        model=model, tasks=["choose_size", "write_size"], task_manager=manager, bootstrap_iters=0, **arguments
    )
    chosen, written = done["samples"]["choose_size"], done["samples"]["write_size"]
    likelihoods = [[value for value, _ in row["filtered_resps"]] for row in chosen]
    return done["results"]["choose_size"]["acc,none"], likelihoods, [row["filtered_resps"][0] for row in written]


@torch.no_grad()
def by_hand(model):
    """The same, one row at a time."""
    tokenizer = make_tokenizer()
    likelihoods, answers = [], []
    for question in QUESTIONS:
        ids = tokenizer(question, return_tensors="pt")["input_ids"]
        found = model(ids).logits[0, -1].log_softmax(-1)  # each choice is one token
        scores = [found[tokenizer.convert_tokens_to_ids(choice)].item() for choice in CHOICES]
        likelihoods.append(scores)
        out = model.generate(ids, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids))
        answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    right = [max(range(3), key=row.__getitem__) == i % 3 for i, row in enumerate(likelihoods)]
    return sum(right) / len(right), likelihoods, answers


def assert_same(found, expected):
    assert found[0] == expected[0]
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(expected[1]), rtol=1e-4, atol=1e-5)
    assert [answer.strip() for answer in found[2]] == [answer.strip() for answer in expected[2]]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_a_saved_adapter_are_its_own(kind, folder, manager, tmp_path):
    fields = {"default_task": "rad"} if kind == "moelora" else {}
    model = make_adapter(kind, folder, **fields)
    model.save_pretrained(str(tmp_path))
    arguments = {"pretrained": str(folder / "base"), "peft": str(tmp_path)}
    # lm-eval reads choices without attention mask, so that padding would belong to the prompt
    batch_size = 1 if kind == "at_moe by prompt" else 3
    found = evaluate("hf", manager, model_args=arguments, batch_size=batch_size, device="cpu")
    expected = by_hand(model)
    assert_same(found, expected)
    with model.disable_adapter():
        assert by_hand(model)[1] != expected[1]


def test_scores_of_a_model_in_memory_are_those_of_the_task_it_was_set_to(folder, manager):
    model = make_adapter("moelora", folder)
    scores = []
    for task in ("icd", "rad"):
        model.set_task(task)
        found = evaluate(HFLM(pretrained=model, tokenizer=make_tokenizer(), batch_size=3), manager)
        assert_same(found, by_hand(model))
        scores.append(found[1])
    assert scores[0] != scores[1]


def test_a_saved_adapter_without_a_default_task_is_an_error_that_says_what_to_do(folder, manager, tmp_path):
    make_adapter("moelora", folder).save_pretrained(str(tmp_path))
    arguments = {"pretrained": str(folder / "base"), "peft": str(tmp_path)}
    with pytest.raises(ValueError, match="No task was given, and adapter 'default' knows 'icd' .*set default_task"):
        evaluate("hf", manager, model_args=arguments, device="cpu")


def test_a_default_task_can_be_given_to_an_adapter_that_was_saved_without(folder, manager, tmp_path):
    model = make_adapter("moelora", folder)
    model.save_pretrained(str(tmp_path / "all"))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), str(tmp_path / "all"))
    loaded.peft_config["default"].default_task = "def"
    loaded.save_pretrained(str(tmp_path / "def"))
    arguments = {"pretrained": str(folder / "base"), "peft": str(tmp_path / "def")}
    with model.task("def"):
        expected = by_hand(model)
    assert_same(evaluate("hf", manager, model_args=arguments, batch_size=3, device="cpu"), expected)


@pytest.mark.slow  # lm-eval's command line reads all of its own tasks
def test_the_command_line_of_the_docs_scores_an_adapter(folder, manager, tmp_path):
    model = make_adapter("molora", folder)
    model.save_pretrained(str(tmp_path / "adapter"))
    code = "import peft_moe; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    words = ["--model", "hf", "--model_args", f"pretrained={folder / 'base'},peft={tmp_path / 'adapter'}"]
    words += ["--tasks", "choose_size", "--include_path", str(folder / "tasks"), "--device", "cpu"]
    words += ["--output_path", str(tmp_path / "out"), "--batch_size", "3"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(results.read_text())["results"]["choose_size"]["acc,none"] == by_hand(model)[0]
    without = subprocess.run([sys.executable, "-m", "lm_eval", *words], capture_output=True, text=True)
    assert "KeyError: 'MOLORA'" in without.stderr
