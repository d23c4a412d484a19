"""What the site needs beyond mkdocs' settings; mkdocs.yml names this file as its hook.

Pages are written to be read in the repository too, where a link may leave docs/ for a script or the README. On the
site it becomes a link into the URL of the repository, or the text alone while mkdocs.yml has no `repo_url`. The
changelog and the page for contributors are files beside src/, and become pages here. A page that would load anything
from another host ends the build, and so does a reference that lacks a public name.
"""

import ast
import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}  # page: file beside src/

LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>[^)\s]+)\)")
CODE = re.compile(r"^ *```.*?^ *```|(?P<ticks>`+)[^`].*?(?P=ticks)", flags=re.MULTILINE | re.DOTALL)
OUTSIDE = re.compile(r"^[a-z]+:|^//|^#")  # of the repository, or a section of the same page
# what a browser would fetch by itself
LOADED = re.compile(
    r"<(?:script|img|iframe|source|link\b(?![^>]*rel=\W?(?:canonical|prev|next))) [^>]*(?:https?:)?//[^>]*>"
)
# nbconvert's loaders of MathJax and Mermaid, from their hosts; notebooks here have neither
LOADERS = re.compile(
    r"<!-- Load mathjax -->.*?<!-- End of mathjax configuration -->|"
    r"<script type=\"module\">(?:(?!</script>).)*?mermaid.*?</script>",
    flags=re.DOTALL,
)
# where the reference says that names are imported from
HOMES = re.compile(r"[Ii]mported from `(peft_moe[\w.]*)`|^## .*`(peft_moe\.\w+)`$", flags=re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made of files beside src/."""
    from mkdocs.structure.files import File

    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **unused: Any) -> str:
    """Turn links that leave docs/ into what the site can show."""
    source, docs = Path(page.file.abs_src_path), Path(config["docs_dir"])
    shown_at = docs / page.file.src_uri  # where the page's own links start
    return rewrite_links(markdown, source, shown_at, docs, config["repo_url"])


def rewrite_links(markdown: str, source: Path, shown_at: Path, docs: Path, repo_url: str | None) -> str:
    """The text of a page with links that work on the site.

    Args:
        markdown: the text.
        source: the file that it is from, which its links start from.
        shown_at: where the page is among the pages in `docs`.
        docs: the folder of all pages.
        repo_url: where the repository can be read; None if nowhere.
    """
    code = [match.span() for match in CODE.finditer(markdown)]

    def rewritten(match: re.Match[str]) -> str:
        text, target = match["text"], match["target"]
        if OUTSIDE.match(target) or any(start <= match.start() < end for start, end in code):
            return match[0]
        path, mark, section = target.partition("#")
        file = Path(os.path.normpath(source.parent / path))
        pages = {ROOT / name: docs / page for page, name in PAGES.items()}
        file = pages.get(file, file)
        if file.is_relative_to(docs) and not file.is_dir():
            return f"[{text}]({Path(os.path.relpath(file, shown_at.parent)).as_posix()}{mark}{section})"
        name = file.relative_to(ROOT).as_posix()
        if repo_url:
            return f"[{text}]({repo_url.rstrip('/')}/blob/main/{name}{mark}{section})"
        return text if text.strip("`/") in (name, file.name) else f"{text} (`{name}`)"

    return LINK.sub(rewritten, markdown)


def on_page_content(html: str, **unused: Any) -> str:
    """Take out what nbconvert would load from other hosts."""
    return LOADERS.sub("", html)


def on_post_page(output: str, page: Any, **unused: Any) -> str:
    """End the build if a page would fetch anything from another host."""
    from mkdocs.exceptions import PluginError

    if found := LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} would load {found[0][:200]}; put the file into docs/.")
    return output


def on_post_build(config: Any, **unused: Any) -> None:
    """End the build if the reference lacks a name of a module that it tells readers to import from."""
    from mkdocs.exceptions import PluginError

    if lacking := unshown(ROOT / "src", Path(config["docs_dir"]) / "reference", Path(config["site_dir"]) / "reference"):
        raise PluginError(f"The reference does not show {lacking}; put each into a page of docs/reference.")


def unshown(source: Path, pages: Path, site: Path) -> list[str]:
    """Names in the `__all__` of modules that the pages name, which the built pages do not show.

    A module of the same name does not count: `peft_moe.report.collect` is one, and its function has a name of its own.

    Args:
        source: the folder with the package.
        pages: the folder of the reference's pages.
        site: the same when built.
    """
    text = "\n".join(page.read_text(encoding="utf-8") for page in sorted(pages.glob("*.md")))
    built = "\n".join(page.read_text(encoding="utf-8") for page in sorted(site.glob("*.html")))
    shown = {
        name
        for home, name in re.findall(r'id="([a-z_.]+)\.(\w+)"', built)  # methods have a class before them
        if _file_of(source, f"{home}.{name}") is None
    }
    modules = sorted({one or other for one, other in HOMES.findall(text)})
    return [f"{module}.{name}" for module in modules for name in _exported(source, module) if name not in shown]


def _file_of(source: Path, module: str) -> Path | None:
    path = source.joinpath(*module.split("."))
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


def _exported(source: Path, module: str) -> list[str]:
    """The `__all__` of a module, without importing it; empty if it has none."""
    file = _file_of(source, module)
    if file is None:
        raise ValueError(f"The reference names {module}, which is no module in {source}.")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return list(ast.literal_eval(node.value))
    return []
