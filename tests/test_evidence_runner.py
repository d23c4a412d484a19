"""scripts/evidence/run.py and one.py: doing runs so that they can be stopped at any time, and what a run leaves."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import evidence_jobs
import grid
import measure
import numpy as np
import one
import pytest
import run as command
import store as files
from estimates import Estimates, clock
from grid import forecast, is_kept
from peft import LoraConfig, PeftConfig
from setups import COMMON, ROOT, Setup, full
from tiny_models import make_model
from tiny_text import make_tokenizer, write_data

RATES = (1e-3, 3e-3, 1e-2)
MIDDLE, HIGH = RATES[1:]


def test_a_record_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "b.json"
    files.write(path, {"id": "x", "text": "ö"})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write(path, {"id": "x", "score": float("nan")})
    assert path.read_bytes() == before
    kill = "import os, sys, store; os.replace = lambda *_: os._exit(9); "  # just before the file is put in its place
    code = kill + "store.write(store.Path(sys.argv[1]), {'id': 'new'})"
    killed = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT / "scripts" / "evidence")
    assert killed.returncode == 9
    assert path.read_bytes() == before
    files.write(path, {"id": "y"})
    assert json.loads(path.read_text()) == {"id": "y"}
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]


def test_a_file_that_is_no_record_is_named(tmp_path):
    path = tmp_path / "main" / "x.json"
    path.parent.mkdir()
    path.write_text('{"id": "x"')
    with pytest.raises(ValueError, match="x.json is no record of a run .* delete it"):
        files.Store(full(), tmp_path)


# doing them, by processes that train nothing


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A call of run.py on few runs, and what came of it."""
    folder, results = str(tmp_path / "runs"), tmp_path / "results"

    def call(*words, behaviour=None):
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("BEHAVIOUR", json.dumps(behaviour or {}))
        results.mkdir(exist_ok=True)
        return evidence_jobs.call(folder, str(results), *words)

    call.folder, call.results, call.adapter = folder, results, evidence_jobs.small_setup(folder).adapter
    call.started = lambda: (results / "started").read_text().splitlines()
    call.done = lambda: {json.loads(path.read_text())["id"] for path in results.glob("*/*.json")}
    return call


def of(system, seed=1, rate=MIDDLE):
    return f"instruction/{system}/lr-{rate:g}/seed-{seed}"


def test_runs_are_done_in_an_order_in_which_what_others_need_is_there(small, capsys):
    assert small("--search") == 0
    started = small.started()
    assert len(started) == len(set(started)) == 3 * 3 + 3 + 1  # searches, finals and the base model
    finals = [name for name in started if name.startswith("instruction/at_moe")]
    before = set(started[: started.index(finals[0])])
    assert before >= {of(system, 0, rate) for system in grid.EXPERTS for rate in RATES}
    assert small.done() == set(started)
    out = capsys.readouterr().out
    assert re.search(r"done in \d+ s: instruction/at_moe/lr-0.003/seed-1, test 0.500 \| 13 done, 0 left", out)

    assert small("--search") == 0  # nothing is done twice
    assert small.started() == started
    small("--search", "--list")
    assert capsys.readouterr().out.count("\ndone  0.") >= 12


def test_a_run_that_fails_is_named_at_the_end_and_does_not_stop_the_others(small, capfd):
    bad = of("lora-r16")
    assert small(behaviour={bad: "fail"}) == 1
    out, err = capfd.readouterr()
    log = Path(small.folder, "logs", "instruction_lora-r16_lr-0.003_seed-1.log")
    assert re.search(rf"FAILED after \d+ s: {bad}; its output is in {log}", out)
    assert "1 runs failed" in err
    assert f"{bad}: see {log}" in err
    assert log.read_text() == "no luck\n"
    assert small.done() == {of("lora-per-task"), "instruction/base"}  # and not what needs it

    assert small() == 0  # and is done by the next call
    assert small.done() >= {bad, of("at_moe")}


def test_runs_can_be_named_and_what_comes_before_them_is_done_too(small, capfd):
    assert small("--search", "--only", of("lora-r16", 0)) == 0
    assert small.done() == {of("lora-r16", 0)}
    assert small("--search", "--only", of("lora-r16", 0), "--again") == 0
    assert small.started() == [of("lora-r16", 0)] * 2
    assert small("--search", "--only", of("lora-r8")) == 0  # its rate is that of lora-r16
    assert small.done() == {*(of("lora-r16", 0, rate) for rate in RATES), of("lora-r8")}
    assert small("--only", "nothing/*") == 1
    assert "No run has an id like nothing/*" in capfd.readouterr().err


def test_an_adapter_that_is_missing_is_made_anew_without_a_new_record(small):
    assert small() == 0
    record = next(small.results.glob("main/instruction_at_moe*seed-1.json"))
    record.unlink()
    needed = Path(small.adapter(of("lora-r16")))
    needed.rmdir()
    before = len(small.started())
    assert small() == 0
    assert small.started()[before:] == [f"{of('lora-r16')} alone", of("at_moe")]
    assert record.exists()
    assert needed.is_dir()


def test_adapters_that_missing_adapters_are_made_of_are_made_anew_first(small):
    composite = of("at_moe-of-single-tasks")  # is asked of the adapter of AT-MoE, which is made of its experts'
    assert small("--only", composite) == 0
    next(small.results.glob("composite/*.json")).unlink()
    shutil.rmtree(Path(small.folder, "adapters"))
    before = len(small.started())
    assert small("--only", composite) == 0
    *experts, method, last = small.started()[before:]
    assert sorted(experts) == [f"{of('lora-per-task')} alone", f"{of('lora-r16')} alone"]
    assert [method, last] == [f"{of('at_moe')} alone", composite]
    assert composite in small.done()


def test_no_run_is_started_that_would_not_end_in_time(small, capsys):
    assert small("--hours", "0.2") == 0  # a run that nobody has measured is taken for 15 minutes
    assert not small.done()
    assert "0 done, 4 left" in capsys.readouterr().out
    assert small("--hours", "0.3", "--only", "instruction/base") == 0
    assert small.done() == {"instruction/base"}


def test_records_made_with_other_settings_are_not_mixed_in(small, capfd):
    assert small("--only", "instruction/base") == 0
    path = next(small.results.glob("*/*.json"))
    record = json.loads(path.read_text())
    record["settings"]["max_new_tokens"] = 5
    files.write(path, record)
    assert small() == 1
    assert "Done with other settings than now: instruction/base." in capfd.readouterr().err


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "by", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=SLOW), pytest.param(signal.SIGKILL, marks=SLOW)]
)
def test_a_call_that_is_stopped_leaves_nothing_half_done_and_the_next_goes_on(small, by):
    hanging = of("lora-r16")
    small.results.mkdir()
    words = [sys.executable, evidence_jobs.__file__, "call", small.folder, str(small.results)]
    call = subprocess.Popen(words, env=os.environ | {"BEHAVIOUR": json.dumps({hanging: "hang"})}, cwd=ROOT)
    try:
        wait_for(lambda: Path(f"{small.adapter(hanging)}.partial").exists())
        wait_for(lambda: len(small.done()) == 2)
        with pytest.raises(SystemExit, match="Another call is at work"):
            small()
    finally:
        call.send_signal(by)
        code = call.wait(timeout=30)
    assert code == (-signal.SIGKILL if by == signal.SIGKILL else 130)
    assert small.done() == {of("lora-per-task"), "instruction/base"}

    assert small() == 0
    started = [of("lora-r16"), of("lora-r16"), of("lora-per-task"), "instruction/base", of("at_moe")]
    assert sorted(small.started()) == sorted(started)
    assert small.done() == set(started)
    assert not list(Path(small.folder).rglob("*.partial"))


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_estimates_are_those_of_the_runs_that_are_most_alike():
    runs = {r.id: r for r in forecast(full(), {})}
    seconds = {  # training, answers, the rest
        of("molora"): (70, 20, 12),
        of("molora", 0): (80, 10, 1),
        of("lora-r16"): (36, 14, 4),
        of("moelora-r8"): (50, 16, 2),
    }
    records = {name: files.brief(evidence_jobs.record_of(runs[name], 0.5, *took)) for name, took in seconds.items()}
    estimates = Estimates(records)
    assert estimates.seconds(runs[of("molora", 2)]) == 75 + 20 + 12
    assert estimates.seconds(runs[of("molora", 0, HIGH)]) == 75 + 10 + 1  # a search
    assert estimates.seconds(runs[of("molora-k3")]) == 75 + 20 + 2  # routing alone is measured beside its answers
    assert estimates.seconds(runs[of("lora-r8")]) == 36 + 14 + 1  # nothing is
    assert estimates.seconds(runs[of("lora-r16-longer")]) == 3 * 36 + 14 + 1
    assert estimates.seconds(runs["instruction/base"]) == (20 + 14 + 16) / 3 + 4  # is not trained
    each = (12 / 4 + 1 + 4 / 2 + 2 / 2) / 4
    assert estimates.seconds(runs[f"bare/molora/lr-{MIDDLE:g}/seed-1"]) == 75 + 20 + 2
    assert estimates.seconds(runs[f"bare/moelora/lr-{MIDDLE:g}/seed-1"]) == 50 + 16 + 3 * each  # gates, and equal ones
    assert Estimates({}).seconds(runs[of("molora")]) == 900
    assert [clock(s) for s in (40, 200, 7500)] == ["40 s", "3 min", "2 h 05 min"]


# one run, trained


TASKS = {"wood": ("size",), "crown": ("leaf",)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A setup of a tiny model and 16 rows, in which one rate is all there is."""
    folder = tmp_path_factory.mktemp("evidence")
    make_model("llama").save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    write_data(folder / "data")
    little = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "max_new_tokens": 2,
        "max_length": 64,
        "logging_steps": 1,
    }
    return Setup(
        str(folder / "base"),
        str(folder / "data"),
        str(folder / "runs"),
        TASKS,
        rates=(1e-2,),
        seeds={"": (1,)},
        protocols=("instruction",),
        common=COMMON | little | {"dtype": "float32"},
        limit=3,
        unequal=(4, 2),
    )


def do_one(setup, pattern, *, train_only=False, keep=None):
    """One run in this process; its record."""
    (r,) = [
        r for r in forecast(setup, {}) if r.id.startswith(f"instruction/{pattern}/") or r.id == f"instruction/{pattern}"
    ]
    record = Path(setup.folder, "results", f"{r.system}.json")
    job = {"run": json.loads(json.dumps(r.to_dict())), "adapter": setup.adapter(r.id), "record": str(record)}
    job |= {"other": setup.adapter(r.adapter) if r.adapter else None, "beside": 1, "train_only": train_only}
    one.perform(job | {"keep": is_kept(r) if keep is None else keep}, general_of_tests)
    return None if train_only else files.read(record)


def general_of_tests(model, tokenizer):
    """A real call, without a task, as general text is."""
    batch = tokenizer("ash elm fir", return_tensors="pt")
    return {"perplexity": {"loss": model(**batch, labels=batch["input_ids"]).loss.item()}}


def check(record, *, trained=True):
    assert record.keys() >= {"id", "experiment", "system", "protocol", "purpose", "settings", "command", "commit"}
    assert record["command"] == f"python scripts/evidence/run.py --only {record['id']}"
    assert record["split"] == "test"
    rows = sum(result["n"] for task, result in record["scores"].items() if task != "mean")
    assert len(record["answers"]) == rows == record["scores"]["mean"]["n"]
    assert 0 <= record["scores"]["mean"]["score"] <= 1
    assert record["seconds"]["total_cpu"] > 0
    if trained:
        assert [step for step, _ in record["losses"]] == [1, 2]
        assert record["parameters"]["trainable"] > 0


@pytest.mark.parametrize(
    ("system", "active", "total"),
    [("moelora", 16, 16), ("molora", (4 * 16 + 3 * 32) / 7, (4 * 16 + 3 * 128) / 7), ("lora-r16", 16, 16)],
)
def test_a_run_leaves_a_record_of_all_that_is_measured_and_no_adapter_unless_others_need_it(
    tiny, system, active, total
):
    record = do_one(tiny, system)
    check(record)
    assert record["parameters"]["active_rank"] == pytest.approx(active, abs=0.01)
    assert record["parameters"]["total_rank"] == pytest.approx(total, abs=0.01)
    assert record["general"]["perplexity"]["loss"] > 0
    adapter = Path(tiny.adapter(record["id"]))
    assert adapter.exists() == (system != "molora")
    if system == "lora-r16":
        assert not record.keys() & {"uniform", "routing"}
        return
    assert len(record["uniform"]["answers"]) == len(record["answers"])
    assert record["uniform"]["scores"].keys() == record["scores"].keys()
    routing = record["routing"]
    assert (routing["tasks"], routing["experts"]) == (["leaf", "size"], 8)
    assert len(routing["layers"]) == len(routing["names"]) == (1 if system == "moelora" else 6)
    for layer in routing["layers"]:
        assert [sum(shares) for shares in layer] == pytest.approx([1, 1], abs=1e-3)


def test_layers_with_fewer_experts_than_others_have_shares_of_0_for_the_rest(tiny):
    routing = do_one(tiny, "medmoelora")["routing"]
    assert sorted(set(routing["counts"])) == [4, 9]  # eq. 2 for two layers: 3 (of 3.5) and 8; and a base expert
    for count, layer in zip(routing["counts"], routing["layers"], strict=True):
        for shares in layer:
            assert len(shares) == routing["experts"] == 9
            assert sum(shares[:count]) == pytest.approx(1, abs=1e-3)
            assert not any(shares[count:])


def test_an_adapter_for_each_task_answers_its_own_rows_and_at_moe_is_made_of_them(tiny):
    record = do_one(tiny, "lora-per-task")
    check(record)
    folder = Path(tiny.adapter(record["id"]))
    assert {path.name for path in folder.iterdir()} == {"size", "leaf"}
    weights = [(folder / task / "adapter_model.safetensors").read_bytes() for task in ("size", "leaf")]
    assert weights[0] != weights[1]
    do_one(tiny, "lora-r16", train_only=True)
    assert record["parameters"]["total_rank"] == 32

    record = do_one(tiny, "at_moe")
    check(record)
    assert PeftConfig.from_pretrained(tiny.adapter(record["id"])).general_expert["sha256"]
    assert record["parameters"]["total_rank"] == 48
    routing = record["routing"]
    assert routing["experts"] == 2  # and not the general one
    assert len(routing["layers"]) == 2


def test_bare_the_inputs_of_a_group_are_routed_the_same_for_all_its_tasks_and_with_instructions_they_can_differ(tiny):
    do_one(tiny, "molora", keep=True)
    run = next(r for r in forecast(tiny, {}) if r.system == "molora")
    model, tokenizer = measure.load(run, tiny.adapter(run.id))
    for protocol in ("bare", "instruction"):
        layers = np.array(measure.routing(model, tokenizer, replace(run, protocol=protocol, limit=None))["layers"])
        assert (abs(layers[:, 0] - layers[:, 1]).max() < 1e-4) == (protocol == "bare")


def test_a_matched_lora_is_a_stock_lora_of_the_rank_at_work(tiny):
    record = do_one(tiny, "lora-like-molora-active", keep=True)
    check(record)
    config = PeftConfig.from_pretrained(tiny.adapter(record["id"]))
    assert type(config) is LoraConfig
    expected = pytest.approx((4 * 16 + 3 * 32) / 7, abs=0.01)
    assert (record["parameters"]["active_rank"], record["parameters"]["total_rank"]) == (expected, expected)
    assert not record.keys() & {"uniform", "routing"}


@pytest.mark.slow
def test_an_adapter_that_is_made_anew_is_the_same(tiny):
    do_one(tiny, "lora-r16", train_only=True)
    path = Path(tiny.adapter("instruction/lora-r16/lr-0.01/seed-1"), "adapter_model.safetensors")
    before = path.read_bytes()
    do_one(tiny, "lora-r16", train_only=True)
    assert path.read_bytes() == before


def test_a_task_that_was_held_out_is_answered_by_all_other_tasks_gates(tiny):
    record = do_one(tiny, "moelora-without-leaf")
    assert record["scores"].keys() == {"leaf", "mean"}
    check(record)
    assert len(record["uniform"]["answers"]) == 3


def test_the_base_model_is_asked_as_it_is(tiny):
    record = do_one(tiny, "base")
    check(record, trained=False)
    assert record["parameters"] == {"trainable": 0, "active_rank": 0, "total_rank": 0}
    assert (record["seed"], record["losses"]) == (None, [])


def test_what_was_trained_on_single_tasks_can_be_asked_something_else(tiny):
    do_one(tiny, "moelora", train_only=True)
    tasks = json.loads(Path(tiny.data, "tasks.json").read_text())
    rows = [{"task": ["size", "leaf"], "instruction": "Name both", "input": "oak", "output": "tall\nbroad"}] * 2
    folder = Path(tiny.composite_data)
    folder.mkdir(parents=True)
    for split in ("train", "dev", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks["tasks"]["size+leaf"] = {"metric": "line_f1"}
    (folder / "tasks.json").write_text(json.dumps(tasks))
    record = do_one(tiny, "moelora-of-single-tasks")
    assert record["scores"]["size+leaf"]["n"] == 2
    assert record["losses"] == []
    assert Path(tiny.adapter("instruction/moelora/lr-0.01/seed-1")).exists()


@pytest.mark.slow
def test_run_py_does_all_this_in_processes_of_its_own(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    write_groups(Path(tiny.data))
    setup = replace(tiny, folder=str(tmp_path / "runs"), general=False)
    only = ["--only", "instruction/at_moe/*", "*/moelora-sampled-uniform/*", "--workers", "2"]
    setup = replace(setup, composites=("--train", "2", "--dev", "1", "--test", "1", "--single", "2"))
    assert command.do(setup, files.Store(setup, tmp_path / "results"), command.parse(only)) == 0
    found = {json.loads(path.read_text())["system"] for path in (tmp_path / "results").glob("*/*.json")}
    assert found == {"lora-r16", "lora-per-task", "at_moe", "moelora-sampled-uniform"}


def write_groups(data):
    description = json.loads((data / "tasks.json").read_text())
    for task in description["tasks"].values():
        task["group"] = "tree"
    (data / "tasks.json").write_text(json.dumps(description))
