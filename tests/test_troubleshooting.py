"""The texts that the page on troubleshooting quotes are those that the source raises, and peft's are peft's."""

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from helpers import routed
from tiny_models import make_model

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "guides" / "troubleshooting.md"
SOURCES = [*sorted((ROOT / "src" / "peft_moe").rglob("*.py")), ROOT / "scripts" / "train.py"]
VALUE = "…"  # what the page writes in the place of a value
ALIEN = "## Without the import"  # the section with errors of peft and transformers


def quotes(section: str) -> list[tuple[str, str]]:
    """Exception and text of each message that is quoted in a part of the page."""
    found = []
    for block in re.findall(r"^```text\n(.*?)\n```$", section, flags=re.MULTILINE | re.DOTALL):
        kind, _, text = " ".join(block.split()).partition(": ")
        found.append((kind, text))
    return found


def sections() -> tuple[str, str]:
    """The section with errors of others, and the rest of the page."""
    before, alien, after = PAGE.read_text(encoding="utf-8").partition(ALIEN)
    assert alien
    alien, following, rest = after.partition("\n## ")
    return alien, before + following + rest


def constants(tree: ast.Module) -> dict[str, str]:
    """Names that are given one text, once, in a module."""
    given = [
        (node.targets[0].id, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)
    ]
    times = Counter(name for name, _ in given)
    return {
        name: value.value
        for name, value in given
        if times[name] == 1 and isinstance(value, ast.Constant) and isinstance(value.value, str)
    }


def template(node: ast.expr, known: dict[str, str]) -> str:
    """The text of a string or f-string, with `VALUE` for what is filled in when it is raised."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part, known) for part in node.values)
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name) and node.value.id in known:
        return known[node.value.id]
    return VALUE


def squeezed(text: str) -> str:
    """With single spaces, and one `VALUE` for several that touch."""
    return re.sub(f"{VALUE}+", VALUE, " ".join(text.split()))


def strings(node: ast.AST) -> Iterator[ast.expr]:
    """Whole strings and f-strings below a node, without the parts of the latter."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.JoinedStr) or (isinstance(child, ast.Constant) and isinstance(child.value, str)):
            yield child
        else:
            yield from strings(child)


def kinds_in(place: ast.AST) -> set[str]:
    """Names of the exceptions that are made, and of the warnings that are given, somewhere in a module or function."""
    calls = [node for node in ast.walk(place) if isinstance(node, ast.Call)]
    made = {call.func.id for call in calls if isinstance(call.func, ast.Name) and call.func.id.endswith("Error")}
    for call in calls:
        if isinstance(call.func, ast.Attribute) and call.func.attr == "warn":
            given = [a.id for a in call.args if isinstance(a, ast.Name) and a.id.endswith("Warning")]
            made.update(given or ["UserWarning"])
    return made


@cache
def messages() -> dict[str, set[str]]:
    """By text, the exceptions and warnings that it can be the text of."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES]
    shared: dict[str, str] = {}  # what modules import from one another
    for tree in trees:
        shared |= {name: text for name, text in constants(tree).items() if name.isupper()}
    found: dict[str, set[str]] = {}
    for tree in trees:
        known = shared | constants(tree)
        kinds = kinds_in(tree)
        for place in [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))]:
            # a function that makes a text and raises nothing does so for others of its module
            here = kinds_in(place) or kinds
            for string in strings(place):
                found.setdefault(squeezed(template(string, known)), set()).update(here)
    return found


QUOTES = quotes(sections()[1])


def test_the_page_has_many_messages_each_once():
    assert len(QUOTES) >= 25
    assert not [quote for quote, times in Counter(QUOTES).items() if times > 1]


@pytest.mark.parametrize(("kind", "text"), QUOTES, ids=[text[:40] for _, text in QUOTES])
def test_a_quoted_message_is_one_of_the_source(kind, text):
    assert text in messages(), text
    assert kind in messages()[text], kind


def test_what_is_no_message_is_not_found():
    text = "r=… does not split over num_experts=…; use r=…."
    assert text in messages()
    assert text.replace("split", "divide") not in messages()
    assert text.replace(VALUE, "4", 1) not in messages()


# How users of peft and transformers load an adapter.
LOADERS = {
    "PeftModel.from_pretrained": "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)",
    "AutoPeftModelForCausalLM.from_pretrained": "AutoPeftModelForCausalLM.from_pretrained(adapter)",
    "PeftConfig.from_pretrained": "PeftConfig.from_pretrained(adapter)",
    "AutoModelForCausalLM.from_pretrained": "AutoModelForCausalLM.from_pretrained(adapter)",
    "load_adapter": "AutoModelForCausalLM.from_pretrained(base).load_adapter(adapter)",
}
RUN = """
import json, sys
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

base, adapter, codes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
def say():
    for code in codes:
        try:
            eval(code)
        except Exception as error:
            print(f"{type(error).__name__}: {error}")
        else:
            print("no error")

say()
import peft_moe
say()
"""


@pytest.mark.long
def test_the_errors_of_peft_without_the_import_and_with_it_are_these(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    make_model("llama").save_pretrained(base)
    model = routed(default_task="icd")
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(adapter)
    arguments = [str(base), str(adapter), json.dumps(list(LOADERS.values()))]
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, check=True)
    raised, page = done.stdout.splitlines(), sections()[0]
    without, shared = (f"{kind}: {text}" for kind, text in quotes(page))
    assert raised[: len(LOADERS)] == [without] * len(LOADERS)
    assert raised[len(LOADERS) :] == ["no error"] * 3 + [shared] * 2
    assert all(f"`{name}" in page for name in LOADERS)
