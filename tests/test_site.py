"""The site: its hook, what its reference has, and what its navigation names. `make docs` builds it."""

import inspect
import re
from pathlib import Path

import pytest
from docs_hooks import LOADED, LOADERS, rewrite_links, unshown

import peft_moe

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def rewritten(text, *, source="docs/page.md", shown_at="docs/page.md", repo_url=None):
    return rewrite_links(text, ROOT / source, ROOT / shown_at, DOCS, repo_url)


@pytest.mark.parametrize(
    ("text", "without_url", "with_url"),
    [
        ("[`fold.py`](../src/peft_moe/fold.py)", "`fold.py`", "[`fold.py`](https://x/blob/main/src/peft_moe/fold.py)"),
        ("[the list](../README.md#more)", "the list (`README.md`)", "[the list](https://x/blob/main/README.md#more)"),
        ("[performance/](performance)", "performance/", "[performance/](https://x/blob/main/docs/performance)"),
        ("[changes](../CHANGELOG.md)", *["[changes](changelog.md)"] * 2),
        ("[a](b.md#c) [d](http://e) [f](#g)", *["[a](b.md#c) [d](http://e) [f](#g)"] * 2),
        ("![a](../x.png) `[a](../x)`", *["![a](../x.png) `[a](../x)`"] * 2),
        ("```md\n[a](../x)\n```\n", *["```md\n[a](../x)\n```\n"] * 2),
    ],
)
def test_links_that_leave_the_docs_are_made_fit_for_the_site(text, without_url, with_url):
    assert rewritten(text) == without_url
    assert rewritten(text, repo_url="https://x/") == with_url


def test_links_of_pages_in_folders_and_of_files_beside_src_start_where_they_are_shown():
    assert rewritten("[a](../saving.md#b)", source="docs/guides/x.md", shown_at="docs/guides/x.md") == (
        "[a](../saving.md#b)"
    )
    assert rewritten("[a](docs/saving.md)", source="CHANGELOG.md", shown_at="docs/changelog.md") == "[a](saving.md)"
    assert rewritten("[a](README.md)", source="CONTRIBUTING.md", shown_at="docs/contributing.md") == "a (`README.md`)"


@pytest.mark.parametrize(
    ("html", "loads"),
    [
        ('<script src="https://x/y.js"></script>', True),
        ('<link rel="stylesheet" href="//x/y.css">', True),
        ('<link rel="preconnect" href="https://x">', True),
        ("<img alt=x src=https://x/y.png>", True),
        ('<script src="assets/y.js"></script><img src="y.png"><a href="https://x">x</a>', False),
        ('<link rel="canonical" href="https://x/y.html">', False),
    ],
)
def test_what_a_page_would_load_from_another_host_is_found(html, loads):
    assert bool(LOADED.search(html)) == loads


def test_loaders_of_mathjax_and_mermaid_are_taken_out_and_other_scripts_are_left():
    mathjax = '<!-- Load mathjax --><script src=""> </script><!-- End of mathjax configuration -->'
    mermaid = '<script type="module">import m from "https://x/mermaid.mjs"; m.run()</script>'
    other = '<script type="module">copy()</script>'
    assert LOADERS.sub("", f"a{mathjax}b{other}{mermaid}c") == f"ab{other}c"


def test_the_reference_has_everything_that_is_exported():
    shown = set()
    for page in (DOCS / "reference").glob("*.md"):
        shown |= set(re.findall(r"^::: ([\w.]+)$", page.read_text(), flags=re.MULTILINE))
    for name in peft_moe.__all__:
        thing = getattr(peft_moe, name)
        home = f"{thing.__module__}.{thing.__qualname__}"
        # a function of the name of its module is shown by the latter, as peft_moe.fold is both
        both = inspect.isfunction(thing) and home.split(".")[-2] == name
        assert home in shown or (not both and f"peft_moe.{name}" in shown), name


@pytest.mark.parametrize(
    ("ids", "lacking"),
    [
        (["p.report.collect.collect", "p.report.Routing"], []),
        (["p.report.collect", "p.report.Routing"], ["p.report.collect"]),  # the module
        (["p.report.collect.collect", "p.report.Page.Routing"], ["p.report.Routing"]),  # another's
    ],
)
def test_a_public_name_that_the_built_reference_lacks_is_found(ids, lacking, tmp_path):
    ids = [f"peft_moe{name.removeprefix('p')}" for name in ids]
    for path, text in {
        "src/peft_moe/report/__init__.py": "__all__ = ['Routing', 'collect']",
        "src/peft_moe/report/collect.py": "__all__ = ['collect', 'inner']",
        "docs/report.md": "Imported from `peft_moe.report`.",
        "site/report.html": "".join(f'<h2 id="{name}">' for name in ids),
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    found = unshown(tmp_path / "src", tmp_path / "docs", tmp_path / "site")
    assert found == [f"peft_moe{name.removeprefix('p')}" for name in lacking]


def test_the_reference_says_where_names_are_imported_from(tmp_path):
    lacking = unshown(ROOT / "src", DOCS / "reference", tmp_path)  # nothing is built there
    assert {f"peft_moe.{name}" for name in peft_moe.__all__} < set(lacking)
    assert {"peft_moe.report.findings", "peft_moe.data.encode"} < set(lacking)


def test_the_navigation_names_every_page_once():
    named = re.findall(r"^ +- [^:]+: (\S+\.(?:md|ipynb))", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert len(named) == len(set(named))
    pages = {path.relative_to(DOCS).as_posix() for kind in ("*.md", "*.ipynb") for path in DOCS.rglob(kind)}
    assert set(named) == pages | {"changelog.md", "contributing.md"}
