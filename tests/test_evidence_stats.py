"""Statistics of the evidence page against closed forms, scipy, the metrics themselves, and simulated experiments."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from stats import Comparison, Estimate, Study
from tallies import System, read_test, sheet_of, sheet_of_rows, system_of_runs, tally, tally_rows, value
from variance import influences, seeds_of, variance_of_inputs
from verdicts import detectable, holm, judge

from peft_moe.evaluation import score
from peft_moe.metrics import METRICS, load_metric
from peft_moe.reading import read_examples, read_task_info

MINI = "data/medmulti/mini"
WORDS = st.sampled_from(
    ["left", "right", " Left", "side: left", "side:left ; visit: none", "a a b", "", "b\na", "yes", ":"]
)
ROWS = st.lists(st.tuples(WORDS, WORDS, st.integers(0, 3)), min_size=1, max_size=8).filter(
    lambda rows: any(times for *_, times in rows)
)


@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=20, deadline=None)
@given(rows=ROWS)
def test_the_summands_of_any_resample_give_the_metric_of_its_rows(metric, rows):
    predictions, references, times = zip(*rows, strict=True)
    repeated = [(p, r) for p, r, n in rows for _ in range(n)]
    expected = load_metric(metric).compute(predictions=[p for p, _ in repeated], references=[r for _, r in repeated])
    found = value(metric, np.array(times, dtype=float) @ tally_rows(metric, predictions, references))
    assert found == pytest.approx(expected[metric], rel=1e-12)


def answers_of(examples, seed, right):
    """The true answers, but for a share of rows that have the answer of another row of their task, or half of it."""
    rng = np.random.default_rng(seed)
    truth, tasks = [messages[-1]["content"] for messages in examples["messages"]], list(examples["task"])
    of_task = {task: [row for row, name in enumerate(tasks) if name == task] for task in set(tasks)}
    wrong = [truth[rng.choice(of_task[task])] for task in tasks]
    halves = [" ".join(text.split()[: 1 + len(text.split()) // 2]) for text in truth]
    draw = rng.random(len(truth))
    return [
        t if u < right else (w if u < (1 + right) / 2 else h)
        for t, w, h, u in zip(truth, wrong, halves, draw, strict=True)
    ]


@pytest.fixture(scope="module")
def runs():
    """Runs of two systems on MedMulti mini, with the scores that peft_moe.evaluation gives them."""
    examples, info = read_examples(MINI, split="test"), read_task_info(MINI)

    def run(system, seed, right):
        answers = answers_of(examples, 10 * seed + int(100 * right), right)
        uniform = answers_of(examples, seed, 0.3)
        return {
            "id": f"{system}/seed-{seed}",
            "seed": seed,
            "parameters": {"trainable": 1},
            "answers": answers,
            "scores": score(answers, examples, info),
            "uniform": {"answers": uniform, "scores": score(uniform, examples, info)},
        }

    return {name: [run(name, seed, right) for seed in (2, 1, 3)] for name, right in (("a", 0.7), ("b", 0.5))}


@pytest.fixture(scope="module")
def sheet():
    return sheet_of_rows(*read_test(MINI))


def test_an_input_of_medmulti_is_one_unit_for_all_tasks_of_its_group(sheet):
    sharing = {
        frozenset(name for name, task in sheet.tasks.items() if unit in task.inputs)
        for unit in range(len(sheet.inputs))
    }
    assert {len(tasks) for tasks in sharing} == {4, 2}
    assert len(sharing) == 3
    assert np.bincount(sheet.strata).tolist() == [80, 80, 80]
    assert all(sorted(task.inputs) == sorted(set(task.inputs)) for task in sheet.tasks.values())


@pytest.mark.parametrize("part", [None, "uniform"])
def test_real_answers_score_as_in_the_library(runs, sheet, part):
    study = Study({"a": system_of_runs(sheet, runs["a"], part)}, draws=10)
    expected = [
        (run if part is None else run[part])["scores"] for run in sorted(runs["a"], key=lambda run: run["seed"])
    ]
    estimates = study.estimate("a")
    assert estimates.keys() == {*expected[0], *(f"without {task}" for task in sheet.tasks)}
    for target, found in estimates.items():
        tasks = [task for task in sheet.tasks if target != f"without {task}"] if "without" in target else [target]
        scores_by_hand = [np.mean([scores[task]["score"] for task in tasks]) for scores in expected]
        assert found.per_seed == pytest.approx(scores_by_hand, rel=1e-12)
        assert found.value == pytest.approx(np.mean(found.per_seed))
        assert 0 <= found.low < found.value < found.high <= 1


def test_runs_that_do_not_fit_the_rows_are_refused(runs, sheet):
    first = runs["a"][0]
    with pytest.raises(ValueError, match=r"a/seed-2: its answers to .* score .* but .* in the file"):
        system_of_runs(sheet, [first | {"answers": first["answers"][::-1]}])
    with pytest.raises(ValueError, match=r"Runs of seeds \[2, 2\]; give one run"):
        system_of_runs(sheet, [first, first])
    with pytest.raises(ValueError, match=r"\[639\] answers of 1 seeds for 640 rows"):
        tally(sheet, [1], [first["answers"][1:]])
    with pytest.raises(ValueError, match="Only one input has rows of the tasks"):
        sheet_of(["t", "t", "u"], ["x", "y", "z"], ["", "", ""], {"t": "accuracy", "u": "accuracy"})
    study = Study({"a": system_of_runs(sheet, runs["a"]), "b": system_of_runs(sheet, runs["b"][1:])}, draws=10)
    with pytest.raises(ValueError, match=r"a has seeds \(1, 2, 3\) and b \(1, 3\); compare runs of the same seeds"):
        study.compare("a", "b")
    with pytest.raises(ValueError, match="have 2 sheets"):
        Study({"a": system_of_runs(sheet, runs["a"]), "b": system_of_runs(sheet_of_rows(*read_test(MINI)), runs["b"])})


def test_the_same_seed_gives_the_same_numbers_and_the_order_of_systems_the_sign(runs, sheet):
    systems = {name: system_of_runs(sheet, of_system) for name, of_system in runs.items()}
    one, two = Study(systems, draws=500), Study(dict(reversed(systems.items())), draws=500)
    assert one.compare("a", "b") == two.compare("a", "b")
    there, back = one.compare("a", "b")["mean"], two.compare("b", "a")["mean"]
    assert there.difference.value == pytest.approx(-back.difference.value)
    assert there.p == pytest.approx(back.p)
    assert there.difference.value > 0.05
    assert there.p < 1e-3
    same = one.compare("a", "a")["mean"]
    assert (same.difference.value, same.p) == (0, 1)


def one_task(metric, predictions, references):
    """A study of systems of one seed on a task whose rows all have inputs of their own."""
    rows = sheet_of(["t"] * len(references), [str(row) for row in range(len(references))], references, {"t": metric})
    return Study({name: tally(rows, [0], [texts]) for name, texts in predictions.items()}, draws=20_000)


def test_accuracy_has_the_standard_error_and_interval_of_a_mean():
    n, right = 200, 140
    found = one_task("accuracy", {"a": ["1"] * right + ["0"] * (n - right)}, ["1"] * n).estimate("a")["t"]
    error = (0.7 * 0.3 / (n - 1)) ** 0.5
    assert found.value == pytest.approx(0.7)
    assert (found.standard_error, found.degrees) == pytest.approx((error, n - 1))
    assert (found.low, found.high) == pytest.approx(scipy_stats.t.interval(0.95, n - 1, 0.7, error), abs=0.006)
    assert found.covers == "inputs"


@pytest.mark.parametrize(
    ("metric", "vocabulary"), [("macro_f1", ["yes", "no", "?"]), ("slot_f1", ["a: 1", "a: 2; b: 1", "b: 1"])]
)
def test_metrics_that_are_no_means_have_the_interval_of_scipys_bootstrap(metric, vocabulary):
    rng = np.random.default_rng(0)
    references = rng.choice(vocabulary[:2], 120).tolist()
    predictions = [r if rng.random() < 0.6 else rng.choice(vocabulary) for r in references]
    found = one_task(metric, {"a": predictions}, references).estimate("a")["t"]
    rows = tally_rows(metric, predictions, references)

    def of_rows(index, axis):
        return value(metric, rows[index].sum(axis if axis >= 0 else axis - 1))

    for method in ("percentile", "BCa"):
        theirs = scipy_stats.bootstrap(
            (np.arange(120),), of_rows, n_resamples=20_000, batch=1000, method=method, rng=np.random.default_rng(1)
        )
        assert (found.low, found.high) == pytest.approx(theirs.confidence_interval, abs=0.008)
        assert found.standard_error == pytest.approx(theirs.standard_error, rel=0.05)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]
    with pytest.raises(ValueError, match="not all within 0 and 1"):
        holm([0.5, float("nan")])


def comparison(difference, p, degrees=20.0, p_own=0.5):
    return Comparison(Estimate(difference, -1, 1, 0.01, degrees, [difference], "inputs and seeds"), p, p_own)


def test_verdicts_come_from_the_corrected_p_over_inputs_and_seeds():
    found = judge({"x": comparison(0.05, 0.001), "y": comparison(-0.05, 0.02), "z": comparison(0.05, 0.04)})
    assert [each.verdict for each in found.values()] == ["win", "loss", "win"]
    assert [each.p_corrected for each in found.values()] == pytest.approx([0.003, 0.04, 0.04])
    assert judge({"x": comparison(0.05, 0.03), "y": comparison(0.05, 0.03)})["x"].verdict == "tie"


def test_verdicts_by_own_seeds_stand_beside_where_all_of_the_family_have_them():
    found = judge({"x": comparison(0.05, 0.001), "y": comparison(-0.05, 0.5, p_own=0.02)})
    assert [(each.verdict, each.own) for each in found.values()] == [("win", "tie"), ("tie", "loss")]
    found = judge({"x": comparison(0.05, 0.001, p_own=0.001), "y": comparison(-0.05, 0.001, p_own=None)})
    assert [each.own for each in found.values()] == [None, None]


@pytest.mark.parametrize("degrees", [5.0, 24.0, 237.0])
def test_the_detectable_difference_is_found_with_a_probability_of_80_percent(degrees):
    difference = comparison(0, 1, degrees).difference
    rng = np.random.default_rng(0)
    z, spread = rng.standard_normal(100_000), (rng.chisquare(degrees, 100_000) / degrees) ** 0.5
    for level in (0.05, 0.005):
        t = (z + detectable(difference, level) / difference.standard_error) / spread
        assert np.mean(t > scipy_stats.t.ppf(1 - level / 2, degrees)) == pytest.approx(0.8, abs=0.006)
    assert judge({"x": comparison(0, 1), "y": comparison(0, 1)})["x"].detectable == pytest.approx(
        detectable(comparison(0, 1).difference, 0.025)
    )


class Experiment:
    """Right and wrong answers of systems of equal skill to 4 tasks in 3 groups of inputs; skill also varies by seed."""

    def __init__(self, seed, inputs=80):
        self.rng, tasks, units = np.random.default_rng(seed), [], []
        for group, size in enumerate((2, 1, 1)):
            for task in range(size):
                tasks += [f"{group}.{task}"] * inputs
                units += [f"{group}-{unit:03}" for unit in range(inputs)]
        self.sheet = sheet_of(tasks, units, [""] * len(tasks), dict.fromkeys(tasks, "accuracy"))

    def systems(self, of_seed, seeds=3, mu=1.0, difficulty=1.5, own=0.5):
        """A system for each standard deviation of `of_seed`, in logits, on one draw of inputs."""
        easy = {name: self.rng.normal(0, difficulty, len(task.inputs)) for name, task in self.sheet.tasks.items()}
        return {f"s{index}": self._system(easy, spread, seeds, mu, own) for index, spread in enumerate(of_seed)}

    def _system(self, easy, spread, seeds, mu, own):
        skill, tallies = self.rng.normal(0, spread, (seeds, 1)), {}
        for name, task in self.sheet.tasks.items():
            logit = mu + easy[name] + self.rng.normal(0, own, len(task.inputs)) + skill
            sums = np.zeros((seeds, len(self.sheet.inputs), 2))
            sums[:, task.inputs, 0] = self.rng.random(logit.shape) < 1 / (1 + np.exp(-logit))
            sums[:, task.inputs, 1] = 1
            tallies[name] = sums
        return System(self.sheet, tuple(range(seeds)), tallies, True)

    @staticmethod
    def truth(spread, mu=1.0, difficulty=1.5, own=0.5):
        nodes, weights = np.polynomial.hermite_e.hermegauss(60)
        logit = mu + (difficulty**2 + own**2 + spread**2) ** 0.5 * nodes
        return float((weights / (1 + np.exp(-logit))).sum() / weights.sum())


def test_variance_from_seeds_is_told_apart_from_the_noise_of_answers():
    experiment = Experiment(0)
    found = {}
    for spread in (0.0, 0.3):
        parts, means = [], []
        for _ in range(150):
            system = experiment.systems([spread])["s0"]
            scores = value("accuracy", np.array(list(system.tallies.values())).sum(2)).mean(0)
            influence = influences(system)["mean"]
            parts.append(seeds_of(scores, influence, experiment.sheet.strata))
            of_inputs = variance_of_inputs(influence.mean(0), experiment.sheet.strata)
            means.append((scores.mean(), of_inputs + (parts[-1].observed - parts[-1].noise) / 3))
        found[spread] = np.mean([each.observed - each.noise for each in parts])
        centre, variance = zip(*means, strict=True)
        assert np.mean(variance) == pytest.approx(np.var(centre), rel=0.25)
    slope = 0.3 * 0.157  # standard deviation in logits times the mean slope of the probability
    assert found[0.0] == pytest.approx(0, abs=0.1 * slope**2)
    assert found[0.3] == pytest.approx(slope**2, rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.0, 0.15, 0.4])
def test_simulated_experiments_are_covered_and_their_null_p_values_are_uniform(spread):
    experiment, covered, p = Experiment(int(100 * spread)), [], []
    for _ in range(200):
        study = Study(experiment.systems([spread] * 6), draws=300)
        single = study.estimate("s0")["mean"]
        compared = study.compare("s0", "s1")["mean"]
        difference = compared.difference
        covered.append((single.low < experiment.truth(spread) < single.high, difference.low < 0 < difference.high))
        p.append(compared.p)
    assert np.mean(covered, axis=0) == pytest.approx([0.95, 0.95], abs=0.035)
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.05, abs=0.035)
    assert scipy_stats.kstest(p, "uniform").statistic < 0.14


def test_own_seeds_are_those_of_the_two_systems_alone():
    systems = Experiment(8).systems([0.2, 0.2] + [0.1] * 6)
    pair = Study({name: systems[name] for name in ("s0", "s1")}, draws=300).compare("s0", "s1")["mean"]
    all_of_them = Study(systems, draws=300).compare("s0", "s1")["mean"]
    assert all_of_them.p_own == pytest.approx(pair.p_own)
    assert all_of_them.p < pair.p  # as the others are steadier
    once = replace(systems["s1"], seeds=(0,), tallies=first(systems["s1"]))
    study = Study(systems | {"s1": once}, draws=300)
    against = study.compare("s1", "s0")["mean"]  # one seed beside each of three
    assert against.p_own is None
    assert against.difference.per_seed == pytest.approx(
        [study.estimate("s1")["mean"].value - each for each in study.estimate("s0")["mean"].per_seed]
    )


def test_systems_that_share_adapters_are_compared_seed_by_seed():
    experiment = Experiment(10, inputs=400)
    systems = experiment.systems([0.6] * 6)
    # s0 again, but for the answers to a few inputs: its seeds are those of s0
    changed = {name: sums.copy() for name, sums in systems["s0"].tallies.items()}
    for sums in changed.values():
        sums[:, :40, 0] = np.minimum(sums[:, :40, 1], 1 - sums[:, :40, 0])
    study = Study(systems | {"twin": replace(systems["s0"], tallies=changed)}, draws=300, repeated=["twin"])
    apart, paired = (study.compare("twin", "s0", shared=shared)["mean"] for shared in (False, True))
    assert paired.difference.value == pytest.approx(apart.difference.value)
    assert paired.difference.standard_error < 0.5 * apart.difference.standard_error
    assert paired.p == paired.p_own < apart.p
    # with inputs and seeds as they are, the variance from seeds is that of the three differences
    per_seed = np.array(paired.difference.per_seed)
    influence = influences(study.systems["twin"])["mean"] - influences(study.systems["s0"])["mean"]
    of_inputs = variance_of_inputs(influence.mean(0), experiment.sheet.strata)
    noise = variance_of_inputs(influence - influence.mean(0), experiment.sheet.strata).sum() / 2
    expected = of_inputs + max(0, per_seed.var(ddof=1) - noise) / 3
    assert paired.difference.standard_error == pytest.approx(expected**0.5)
    # repeated seeds are not counted: what is known of seeds is as without the twin
    assert study.seeds.shared == Study(systems, draws=10).seeds.shared
    once = {
        name: replace(study.systems[name], seeds=(0,), tallies=first(study.systems[name])) for name in ("twin", "s0")
    }
    alone = Study(once, draws=300).compare("twin", "s0", shared=True)["mean"]
    assert (alone.difference.covers, alone.p_own) == ("inputs", None)
    with pytest.raises(ValueError, match="compare runs of the same seeds"):
        Study(systems | {"twin": once["twin"]}, draws=10).compare("twin", "s0", shared=True)


@pytest.mark.slow
def test_null_p_values_of_systems_that_share_seeds_are_not_too_small():
    """Two answers of the same trained adapters, whose seeds differ much and in the same way."""
    experiment, p = Experiment(11), []
    for _ in range(300):
        systems = experiment.systems([0.4] * 2)
        mixed = {"a": {}, "b": {}}
        for name in systems["s0"].tallies:
            # for each input, which of the two gets which answers is a matter of chance
            swap = experiment.rng.random((1, len(experiment.sheet.inputs), 1)) < 0.5
            one, two = (systems[each].tallies[name] for each in ("s0", "s1"))
            mixed["a"][name], mixed["b"][name] = np.where(swap, one, two), np.where(swap, two, one)
        study = Study({each: replace(systems["s0"], tallies=tallies) for each, tallies in mixed.items()}, draws=50)
        p.append(study.compare("a", "b", shared=True)["mean"].p)
    assert np.mean(np.array(p) < 0.05) < 0.08


def first(system):
    """The tallies of the first seed."""
    return {name: sums[:1] for name, sums in system.tallies.items()}


@pytest.mark.slow
def test_a_method_twice_as_unsteady_as_the_others_is_found_to_differ_too_often_but_not_by_its_own_seeds():
    """What the first threat to validity of the page says, in seeds alone: many inputs, and only seeds differ."""
    experiment, p, p_own = Experiment(9, inputs=400), [], []
    for _ in range(300):
        compared = Study(experiment.systems([0.3] * 12 + [0.6]), draws=50).compare("s12", "s0")["mean"]
        p.append(compared.p)
        p_own.append(compared.p_own)
    assert 0.1 < np.mean(np.array(p) < 0.05) < 0.2
    assert np.mean(np.array(p_own) < 0.05) < 0.07


def test_a_system_whose_seeds_differ_much_more_keeps_its_own_variance_and_is_named():
    systems = Experiment(5).systems([0.05] * 9 + [1.5])
    study = Study(systems, draws=300)
    assert study.seeds.unstable["mean"] == ["s9"]
    assert study.seeds.used["s9"]["mean"].degrees == 2
    assert study.seeds.used["s0"]["mean"].degrees == 18
    assert study.compare("s0", "s9")["mean"].difference.standard_error > 3 * (
        study.compare("s0", "s1")["mean"].difference.standard_error
    )


def test_what_is_not_trained_has_no_seeds_and_one_seed_borrows_the_variance_of_others():
    experiment = Experiment(6)
    systems = experiment.systems([0.4] * 4)
    one_run = first(systems["s0"])
    systems["base"] = System(experiment.sheet, (0,), one_run, trained=False)
    systems["once"] = System(experiment.sheet, (0,), one_run, trained=True)
    study = Study(systems, draws=300)
    base, once = study.estimate("base")["mean"], study.estimate("once")["mean"]
    assert (base.covers, once.covers) == ("inputs", "inputs and seeds")
    assert once.standard_error**2 - base.standard_error**2 == pytest.approx(study.seeds.used["s1"]["mean"].of_seed)
    against = study.compare("s1", "base")["mean"].difference
    assert (len(against.per_seed), against.covers) == (3, "inputs and seeds")
    alone = Study({"base": systems["base"], "once": replace(systems["once"])}, draws=300)
    assert alone.estimate("once")["mean"].covers == "inputs"


def test_degrees_of_freedom_are_satterthwaites():
    """By hand, of a difference: the variance from inputs, and that from seeds with the noise of answers."""
    study = Study(Experiment(12).systems([0.3] * 5 + [2.5]), draws=100)
    used, sheet = study.seeds.used, study.sheet
    assert study.seeds.unstable["mean"] == ["s5"]
    assert used["s0"]["1.0"] == used["s1"]["1.0"]
    for target, other, seeds, rest in (
        ("mean", "s1", [(used["s0"]["mean"], 2)], len(sheet.inputs) - 3),  # one estimate, which errs in both at once
        ("mean", "s5", [(used["s0"]["mean"], 1), (used["s5"]["mean"], 1)], len(sheet.inputs) - 3),
        ("1.0", "s1", [(used["s0"]["1.0"], 2)], len(sheet.tasks["1.0"].inputs) - 1),
    ):
        assert all(0 < each.of_seed < each.observed for each, _ in seeds)
        influence = influences(study.systems["s0"])[target] - influences(study.systems[other])[target]
        of_inputs = variance_of_inputs(influence.mean(0), sheet.strata)
        variance = of_inputs + sum(each.of_seed * times / 3 for each, times in seeds)
        uncertain = of_inputs**2 / rest + sum((each.observed * times / 3) ** 2 / each.degrees for each, times in seeds)
        found = study.compare("s0", other)[target].difference
        assert (found.standard_error, found.degrees) == pytest.approx((variance**0.5, variance**2 / uncertain))


def test_intervals_are_as_wide_as_inputs_and_seeds_make_them():
    study = Study(Experiment(13, inputs=400).systems([0.8] * 4), draws=4000)
    for found in (study.estimate("s0")["mean"], study.compare("s0", "s1")["mean"].difference):
        half = scipy_stats.t.ppf(0.975, found.degrees) * found.standard_error
        assert (found.value - found.low, found.high - found.value) == pytest.approx((half, half), rel=0.06)
    used = study.seeds.used["s0"]["mean"]
    assert used.of_seed / 3 > 0.8 * study.estimate("s0")["mean"].standard_error ** 2  # without seeds, half as wide
