"""What programs print."""

from __future__ import annotations

import sys
from io import TextIOWrapper


def print_any_text() -> None:
    """Let standard output take names in any script: what its encoding does not have comes out as an escape.

    Otherwise the first such name would end the program, with what it has computed.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
