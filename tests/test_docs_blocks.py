"""Every block of Python and every command in README.md, CONTRIBUTING.md and docs/ works, or says why it is not run."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from page_runs import check_commands, commands_of, in_a_fork, run_python
from pages import PAGES, ROOT, WRONG_SIDE, blocks_of, name_of, names_for_given, run_together
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

PYTHON, SHELL = {"python"}, {"bash", "sh"}
NEITHER = {"", "text", "yaml", "json"}  # printed, or data; what the methods' pages have of it is in test_docs.py
# Their Python has tests of its own, in test_docs.py: with the real model, and with what else the examples need.
ELSEWHERE = {"README.md", "docs/integrations.md"}

BLOCKS = {name_of(page): blocks_of(page) for page in PAGES}


def to_run(page, languages):
    return [block for block in BLOCKS[page] if block.language in languages and block.reason is None]


@pytest.fixture(scope="session")
def small_base(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of SmolLM2's architecture, with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=True, **sizes, **special)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("page", [page for page in BLOCKS if page not in ELSEWHERE and to_run(page, PYTHON)])
def test_the_python_of_a_page_runs_in_order(page, small_base, tmp_path):
    folder = tmp_path / "repository"
    (folder / "models").mkdir(parents=True)
    (folder / "models" / "SmolLM2-135M-Instruct").symlink_to(small_base)
    shutil.copytree(ROOT / "data" / "medmulti" / "tiny", folder / "data" / "medmulti" / "tiny")
    in_a_fork(run_python, run_together(to_run(page, PYTHON)), page, folder, log=tmp_path / "log")
    assert WRONG_SIDE not in (tmp_path / "log").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [page for page in BLOCKS if to_run(page, PYTHON)])
def test_a_page_says_what_the_names_are_that_its_python_takes_for_given(page):
    before = "\n".join((ROOT / page).read_text(encoding="utf-8").splitlines()[: to_run(page, PYTHON)[0].line - 1])
    given = names_for_given(run_together(to_run(page, PYTHON)))
    assert not {name for name in given if not re.search(rf"`{name}(?![\w(])", before)}


def test_names_for_given_are_those_that_nothing_makes():
    code = (
        "import a.b\nfrom c import d as e\nfor f in e(g):\n    h = [i for i in f if a]\nwith h as j:\n    k = {l: j}\n"
    )
    assert names_for_given(code) == {"g", "l"}
    assert names_for_given("class A(B):\n    def f(self, *, x):\n        return print(self, x, y, A)\n") == {"B", "y"}


@pytest.mark.parametrize("page", [page for page in BLOCKS if to_run(page, SHELL)])
def test_the_commands_of_a_page_are_understood_by_their_programs(page, tmp_path):
    blocks = [(f"{page}:{block.line}", block.text) for block in to_run(page, SHELL)]
    in_a_fork(check_commands, blocks, log=tmp_path / "log")


@pytest.mark.parametrize("page", BLOCKS)
def test_blocks_have_a_language_that_is_looked_after_and_marks_a_reason(page):
    for block in BLOCKS[page]:
        assert block.language in PYTHON | SHELL | NEITHER, block
        assert block.reason is None or (len(block.reason.split()) > 1 and block.language in PYTHON | SHELL), block


@pytest.mark.parametrize(
    ("line", "commands"),
    [
        ("make demo    # five minutes", [["make", "demo"]]),
        ("A=1 B=2 make demo && cd x", [["make", "demo"], ["cd", "x"]]),
        ("python scripts/train.py \\\n  a.yaml --x='y z'", [["python", "scripts/train.py", "a.yaml", "--x=y z"]]),
        ("pip install '.[train,plot]'", [["pip", "install", ".[train,plot]"]]),
    ],
)
def test_commands_are_found_in_lines(line, commands):
    assert list(commands_of(line)) == commands


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("vllm serve model", "nothing here can check it"),
        ("python scripts/no_such.py", "no file scripts/no_such.py"),
        ("python scripts/train.py recipes/moelora.yaml --lerning_rate 1", "lerning_rate"),
        ("python scripts/train.py recipes/no_such.yaml", "no_such.yaml cannot be read"),
        ("python scripts/get_model.py --fast", "'--fast'. is unknown"),
        ("python scripts/docs_hooks.py --fast", "takes no arguments"),
        ("python scripts/bench/layer.py --round 5 --no_such", "no_such"),
        ("accelerate launch --config_file accelerate/no.yaml scripts/train.py recipes/moelora.yaml", "no file acc"),
        ("accelerate launch scripts/train.py recipes/moelora.yaml --no_such 1", "no_such"),
        ("peft-moe fold adapter --tasks a --out b", "unrecognized|--tasks|is unknown"),
        ("peft-moe fold adapter", "--out"),
        ("make demos", "the Makefile has no demos"),
        ("pip install '.[trains]'", "setup.cfg has no extra"),
    ],
)
def test_a_command_that_is_wrong_is_found(command, message, tmp_path):
    with pytest.raises(AssertionError, match=message):
        in_a_fork(check_commands, [("a page", command)], log=tmp_path / "log")


def test_python_that_is_wrong_is_found_at_its_line(tmp_path):
    with pytest.raises(AssertionError, match=r"README.md\", line 3[\s\S]*ZeroDivisionError"):
        in_a_fork(run_python, "\n\n1 / 0\n", "README.md", tmp_path, log=tmp_path / "log")


def test_a_page_that_does_not_import_peft_moe_does_not_have_it(tmp_path):
    code = "import sys\nassert 'torch' in sys.modules\nassert not any(m.startswith('peft_moe') for m in sys.modules)\n"
    in_a_fork(run_python, code, "README.md", tmp_path, log=tmp_path / "log")


@pytest.mark.parametrize(
    "text", ["<!-- not run: a reason -->\n\nText.\n", "<!-- not run: a reason -->\n", "```python\nx = 1\n"]
)
def test_a_mark_without_a_block_and_a_block_without_an_end_are_errors(text, tmp_path):
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(ValueError, match="not before a block of code|does not end"):
        blocks_of(tmp_path / "page.md")
