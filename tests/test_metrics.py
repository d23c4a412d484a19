"""Metrics against values worked out by hand. conftest sets HF_EVALUATE_OFFLINE, so a download would fail here."""

import sys

import evaluate
import pytest

from peft_moe.metrics import METRICS, load_metric

SLOTS = "side: left; visit: none"
VALUES = {
    # one of three texts differs by more than case and white space
    "accuracy": (["  Yes", "no\n", "maybe so"], ["yes", "NO", "maybe  not"], 2 / 3),
    "exact_match": (["  Yes", "no\n", "maybe so"], ["yes", "NO", "maybe  not"], 2 / 3),
    # yes: precision 1, recall 1/2; no: precision 1/2, recall 1; "perhaps" is no label and only counts as a miss of yes
    "macro_f1": (["Yes", "no", "no", "perhaps"], ["yes", "no", "yes", "yes"], (1 / 2 + 2 / 3) / 2),
    # 2 shared of 2 and 3 words; one of two "a" shared; nothing shared; both empty
    "token_f1": (["knee left", "a a", "arm", ""], ["the left knee", "a b", "leg", " "], (0.8 + 0.5 + 0 + 1) / 4),
    # both lines right but for case and white space; the second of two missing; each line in the other's place; 2 words
    # shared of 2 and 3 on the first of one line too many; both empty
    "line_f1": (
        [" Eye \n\n left  KNEE", "eye", "yes\neye", "left knee\nyes\neye", "\n"],
        ["eye\nleft knee", "eye\nyes", "eye\nyes", "the left knee\nyes", ""],
        (1 + 1 / 2 + 0 + (0.8 + 1) / 3 + 1) / 5,
    ),
    # 1 + 2 + 0 pairs agree of 2 + 2 + 1 predicted and 2 + 2 + 2 true ones
    "slot_f1": (["Side :left;visit: first", SLOTS, "left"], [SLOTS, "visit: none;side: left", SLOTS], 2 * 3 / (5 + 6)),
    # longest common subsequences: 3 of 3 and 4 words; 1 of 2 and 2
    "rouge_l": (["the left knee", "knee left"], ["The left, swollen knee", "left knee"], (6 / 7 + 1 / 2) / 2),
}


@pytest.mark.parametrize(("name", "case"), VALUES.items(), ids=VALUES)
def test_metrics_give_the_value_worked_out_by_hand(name, case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    predictions, references, value = case
    metric = load_metric(name)
    assert metric.compute(predictions=predictions, references=references) == {name: pytest.approx(value)}
    assert metric.compute(predictions=references, references=references) == {name: 1.0}
    assert list(tmp_path.iterdir()) == []


def test_every_metric_has_a_case():
    assert METRICS.keys() == VALUES.keys()


def test_metrics_combine_and_collect_rows_as_those_of_evaluate_do():
    combined = evaluate.combine([load_metric(name) for name in METRICS])
    combined.add_batch(predictions=["a", "b"], references=["a", "a"])
    combined.add(prediction="b", reference="b")
    assert combined.compute() == {name: pytest.approx(2 / 3) for name in METRICS}


@pytest.mark.parametrize(("name", "package"), [("macro_f1", "scikit-learn"), ("rouge_l", "rouge_score")])
def test_a_metric_without_its_package_says_what_to_install(name, package, monkeypatch):
    imported = {"scikit-learn": "sklearn"}.get(package, package)
    for module in [module for module in sys.modules if module.split(".")[0] == imported]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, imported, None)  # Python's own way to make an import fail
    with pytest.raises(ImportError, match=f"needs {package}; install it with `pip install {package}`"):
        load_metric(name).compute(predictions=["a"], references=["a"])


def test_unknown_names_and_empty_inputs_are_errors():
    with pytest.raises(ValueError, match="Unknown metric 'bleu'; use one of .*'token_f1'"):
        load_metric("bleu")
    with pytest.raises(ValueError, match="token_f1 has nothing to score"):
        load_metric("token_f1").compute(predictions=[], references=[])


@pytest.mark.parametrize(
    ("name", "prediction", "reference", "expected"),
    [
        ("rouge_l", "患者有糖尿病", "患者有糖尿病", 1.0),
        ("rouge_l", "患者有糖尿病", "患者没有糖尿病", 12 / 13),
        ("rouge_l", "пациент здоров", "пациент болен", 0.5),
        ("rouge_l", "Übelkeit", "belkeit", 0.0),
        ("rouge_l", "no_fever, 38.5", "no fever 38 5", 1.0),
        ("token_f1", "患者有糖尿病史", "患者有糖尿病", 12 / 13),
        ("token_f1", "пациент здоров", "пациент болен", 0.5),
    ],
)
def test_words_of_other_scripts_count(name, prediction, reference, expected):
    assert load_metric(name).compute(predictions=[prediction], references=[reference])[name] == pytest.approx(expected)
