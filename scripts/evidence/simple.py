"""What the training rows score without a language model: what a system has to beat for its score to mean anything.

Each task by itself, so that these are told the task: the answer that training has most often; the answer to the
training input that is nearest (cosine of TF-IDF of words); and where answers are labels, logistic regression on the
same TF-IDF.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np
from rows import first_rows, read_rows
from setups import ROOT, Setup
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from tallies import tally_rows, value

from peft_moe.reading import read_task_info

OF_LABELS = ("accuracy", "macro_f1")  # metrics of tasks whose answers are labels


def simple(setup: Setup) -> dict[str, dict[str, float | None]]:
    """Scores on test by way of answering and task, None where answers are no labels; "mean" where all are there."""
    folder: Path = ROOT / setup.data
    metrics = {task: info.metric for task, info in read_task_info(str(folder)).items()}
    train = first_rows(read_rows(folder, "train"), setup.groups, setup.inputs)
    test = read_rows(folder, "test")
    found: dict[str, dict[str, float | None]] = {"most_common": {}, "nearest": {}, "regression": {}}
    for task in setup.tasks:
        learnt, asked = ([row for row in rows if row["task"] == task] for rows in (train, test))
        texts, answers = [row["input"] for row in learnt], [row["output"] for row in learnt]
        words = TfidfVectorizer()
        known, new = words.fit_transform(texts), words.transform([row["input"] for row in asked])
        given: dict[str, Sequence[str]] = {
            "most_common": [Counter(answers).most_common(1)[0][0]] * len(asked),
            "nearest": [answers[index] for index in np.asarray((new @ known.T).argmax(1)).ravel()],
        }
        if metrics[task] in OF_LABELS:
            given["regression"] = LogisticRegression(max_iter=1000).fit(known, answers).predict(new).tolist()
        for name, scores in found.items():
            rows = tally_rows(metrics[task], given[name], [row["output"] for row in asked]) if name in given else None
            scores[task] = None if rows is None else float(value(metrics[task], rows.sum(0)))
    for scores in found.values():
        known = [score for score in scores.values() if score is not None]
        scores["mean"] = mean(known) if len(known) == len(scores) else None
    return found
