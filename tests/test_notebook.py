"""The notebook of the docs runs from a checkout, prints what it says, and has its outputs stored."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

from run_notebook import NOTEBOOK, run  # noqa: E402

ROOT = Path(__file__).parents[1]


def printed(node):
    return [
        "".join(output.get("text", "") for output in cell.outputs) for cell in node.cells if cell.cell_type == "code"
    ]


def shape_of(text):
    """What it says, without the numbers, which differ a little between machines."""
    return re.sub(r"[-+]?\d[\d.,e-]*", "0", text)


@pytest.fixture
def checkout(smollm2, tmp_path):
    """A folder that looks like the repository to the notebook, whose outputs are then not in the repository's."""
    (tmp_path / "docs" / "notebooks").mkdir(parents=True)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Parsing dates involving a day of month:DeprecationWarning")
def test_the_notebook_runs_from_a_checkout(checkout):
    node = run(NOTEBOOK, checkout / "docs" / "notebooks")
    stored = nbformat.read(NOTEBOOK, as_version=4)
    *start, gate, answers, saved, folded = printed(node)
    assert list(map(shape_of, start)) == list(map(shape_of, printed(stored)[:-4]))
    weights = [[float(weight) for weight in line.split()[1:]] for line in gate.splitlines()]
    assert [sum(of_task) for of_task in weights] == pytest.approx([1, 1], abs=0.01)
    assert max(abs(one - other) for one, other in zip(*weights, strict=True)) > 0.05  # tasks have parted
    assert "'Italy': 'Europe'" in answers
    assert "'Italy': 'Rome'" in answers
    assert "the same: True" in saved
    assert "LoraConfig of rank 16" in folded
    assert float(folded.split()[-1]) < 1e-2
    assert (checkout / "outputs" / "notebook-capital" / "adapter_model.safetensors").exists()


def test_the_stored_outputs_are_whole_and_of_no_machine():
    node = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(node)
    code = [cell for cell in node.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"stream"}
    assert all(output.name == "stdout" for output in outputs)
    assert not re.search(r"(?:^|\s|')/\w", NOTEBOOK.read_text())
    assert NOTEBOOK.stat().st_size < 50_000
