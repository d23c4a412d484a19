"""Scores of generated answers as `evaluate` metrics that are computed here, without a download.

All of them compare normalised texts: stripped, case-folded, runs of white space squeezed to one space; `line_f1` keeps
the line breaks. All return one number from 0 to 1 under the metric's name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import evaluate
from datasets import Features, Value

# Scripts without spaces between words: kana, Chinese characters and their compatibility forms.
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORDS = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
LETTERS = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")


def normalise(text: str) -> str:
    """Strip, case-fold and squeeze white space: what the metrics compare."""
    return " ".join(text.casefold().split())


class _AnswerMetric(evaluate.Metric):
    """One text per row against one reference text; subclasses define `_score` on normalised texts."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description="predictions and references: a list of str each, of equal length.",
            features=Features({"predictions": Value("string"), "references": Value("string")}),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        if not references:
            raise ValueError(f"{self.name} has nothing to score; give at least one prediction and its reference.")
        score = self._score(list(map(self._normalise, predictions)), list(map(self._normalise, references)))
        return {self.name: float(score)}

    def _normalise(self, text: str) -> str:
        return normalise(text)

    def _score(self, predictions: list[str], references: list[str]) -> float:
        raise NotImplementedError


class ExactMatch(_AnswerMetric):
    """Share of predictions that equal their reference."""

    def _score(self, predictions: list[str], references: list[str]) -> float:
        return _mean(predictions, references, lambda prediction, reference: prediction == reference)


class Accuracy(ExactMatch):
    """`ExactMatch` under the name that classification tasks use."""


class MacroF1(_AnswerMetric):
    """Unweighted mean of the F1 of each label that occurs in the references; any other prediction is wrong."""

    def _score(self, predictions: list[str], references: list[str]) -> float:
        f1_score = _optional("sklearn.metrics").f1_score
        return f1_score(references, predictions, labels=sorted(set(references)), average="macro", zero_division=0)


class TokenF1(_AnswerMetric):
    """Mean over rows of the F1 of shared words, each counted as often as it occurs; two empty texts agree.

    Words stand between white space; of scripts that write none (Chinese, Japanese), each character is one.
    """

    def _score(self, predictions: list[str], references: list[str]) -> float:
        return _mean(predictions, references, _word_f1)


class LineF1(_AnswerMetric):
    """Mean over the reference's lines of the F1 of words shared with the prediction's line in the same place.

    A missing line counts 0, and extra lines of the prediction lower the score, as the sum is divided by the larger
    number of lines. Blank lines do not count. For answers to several questions, a line each.
    """

    def _normalise(self, text: str) -> str:
        return "\n".join(filter(None, map(normalise, text.splitlines())))

    def _score(self, predictions: list[str], references: list[str]) -> float:
        return _mean(predictions, references, _line_f1)


class SlotF1(_AnswerMetric):
    """Micro F1 of the `name: value` pairs in answers such as `side: left; visit: none`; a pair counts once per row.

    White space around names and values does not count, and what has no colon is a pair of its own with an empty value.
    """

    def _score(self, predictions: list[str], references: list[str]) -> float:
        return _f1(_slots(predictions), _slots(references))


class RougeL(_AnswerMetric):
    """Mean ROUGE-L F-measure, by the `rouge_score` package without stemming.

    Its own tokens are runs of a-z and 0-9, which other scripts have none of. Here they are runs of letters and digits
    of any script, which is the same for English, and each character of scripts that put no space between words.
    """

    def _score(self, predictions: list[str], references: list[str]) -> float:
        scorer = _optional("rouge_score.rouge_scorer").RougeScorer(["rougeL"], tokenizer=_Words())
        return _mean(
            predictions,
            references,
            lambda prediction, reference: scorer.score(target=reference, prediction=prediction)["rougeL"].fmeasure,
        )


METRICS: dict[str, type[_AnswerMetric]] = {
    "accuracy": Accuracy,
    "exact_match": ExactMatch,
    "line_f1": LineF1,
    "macro_f1": MacroF1,
    "rouge_l": RougeL,
    "slot_f1": SlotF1,
    "token_f1": TokenF1,
}


def load_metric(name: str) -> evaluate.Metric:
    """Load one of our metrics by its name, as `evaluate.load` does for those on the Hub.

    Args:
        name: `accuracy`, `exact_match`, `line_f1`, `macro_f1`, `rouge_l`, `slot_f1` or `token_f1`.

    The metric keeps its inputs in memory. Raises `ValueError` for another name; `compute` raises `ImportError` if
    `macro_f1` or `rouge_l` miss their package.

    Example:
        `load_metric("token_f1").compute(predictions=["left knee"], references=["knee"])`
    """
    if not isinstance(name, str) or name not in METRICS:
        raise ValueError(f"Unknown metric {name!r}; use one of {list(METRICS)}.")
    return METRICS[name](keep_in_memory=True)


def _optional(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        name = {"sklearn": "scikit-learn"}.get(package, package)
        raise ImportError(f"This metric needs {name}; install it with `pip install {name}`.") from error


def _mean(predictions: list[str], references: list[str], score: Callable[[str, str], float]) -> float:
    return sum(map(score, predictions, references)) / len(references)


def _f1(prediction: Counter[Any], reference: Counter[Any]) -> float:
    total = prediction.total() + reference.total()
    return 2 * (prediction & reference).total() / total if total else 1.0


def _word_f1(prediction: str, reference: str) -> float:
    return _f1(Counter(WORDS.findall(prediction)), Counter(WORDS.findall(reference)))


def _line_f1(prediction: str, reference: str) -> float:
    lines, wanted = prediction.splitlines(), reference.splitlines()
    longer = max(len(lines), len(wanted))
    return sum(map(_word_f1, lines, wanted)) / longer if longer else 1.0


class _Words:
    """What `rouge_score` asks for tokens."""

    def tokenize(self, text: str) -> list[str]:
        return LETTERS.findall(text)


def _slots(texts: list[str]) -> Counter[tuple[int, str, str]]:
    pairs = set()
    for row, text in enumerate(texts):
        for slot in filter(None, map(str.strip, text.split(";"))):
            name, _, value = slot.partition(":")
            pairs.add((row, name.strip(), value.strip()))
    return Counter(pairs)
