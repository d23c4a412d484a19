"""Runs the notebook of the docs and keeps what it prints, which is what the site shows.

    pip install '.[test]'
    python scripts/run_notebook.py
    python scripts/run_notebook.py --output runs/quickstart.ipynb

What libraries write to standard error is left out: it is about the machine, and changes from one to the next.
"""

import argparse
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "notebooks" / "quickstart.ipynb"


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=NOTEBOOK, help="where to write; default: the notebook itself")
    output = parser.parse_args().output
    nbformat.write(run(NOTEBOOK, NOTEBOOK.parent), output)
    print(f"Wrote {output}.")


def run(notebook: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs anew.

    Args:
        notebook: the file, which is left alone.
        folder: the working directory.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell that fails.
    """
    node = nbformat.read(notebook, as_version=4)
    NotebookClient(node, kernel_name="python3", timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in node.cells:
        cell.metadata.pop("execution", None)  # times of the day
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    node.metadata.pop("widgets", None)
    node.metadata["language_info"] = {"name": "python"}
    return node


if __name__ == "__main__":
    main()
