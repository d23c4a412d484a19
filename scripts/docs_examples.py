"""How docstrings become the reference: mkdocs.yml names this file as an extension of griffe, which reads them."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^Example:$", flags=re.MULTILINE)


class DocstringExamples(griffe.Extension):
    """Reads the section "Example:" as "Examples:", the name by which griffe knows that `>>>` is Python."""

    def on_object(self, *, obj: griffe.Object, **unused: Any) -> None:
        """Called for every object with what is in it."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub("Examples:", obj.docstring.value)
