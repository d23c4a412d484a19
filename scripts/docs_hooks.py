"""What the site needs beyond mkdocs' settings; mkdocs.yml names this file as its hook.

Pages are written to be read in the repository too, where a link may leave docs/ for a script or the README. On the
site it becomes a link into the URL of the repository, or the text alone while mkdocs.yml has no `repo_url`. The
changelog and the page for contributors are files beside src/, and become pages here. A page that would load anything
from another host ends the build.
"""

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
