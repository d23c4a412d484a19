"""Training that was killed and resumed has the losses and ends with the weights of training that was not."""

import json
import sys

import pytest
from crashes import RESUMED
from test_crash import run

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")


def results(folder, stride):
    (line,) = [line for line in run(folder, stride, "resume_every_config").splitlines() if line.startswith("RESULTS")]
    return json.loads(line.removeprefix("RESULTS"))


@pytest.fixture(scope="module")
def of_some(tmp_path_factory):
    return results(tmp_path_factory.mktemp("some"), 2)


@pytest.fixture(scope="module")
def of_all(tmp_path_factory):
    return results(tmp_path_factory.mktemp("all"), 1)


def check(result):
    assert result["from"] == "checkpoint-2"
    assert len(result["straight"]) == 6
    assert len(set(result["straight"])) == 6  # the rows are not the same in each step
    assert result["resumed"] == result["straight"]
    assert result["difference"] == 0
    assert result["trained"] == 1  # the share of tensors that training changed


@pytest.mark.long
@pytest.mark.parametrize("name", list(RESUMED)[::2])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(name, of_some):
    check(of_some[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RESUMED)[1::2])
def test_other_runs_that_were_killed_go_on_as_if_they_had_not_been(name, of_all):
    check(of_all[name])
