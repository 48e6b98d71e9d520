"""What a command prints: for a person, or as JSON for a script."""

import functools
import json
import sys
from collections.abc import Callable
from typing import Any


def note(as_json: bool) -> Callable[[str], None]:
    """Takes lines on the way; JSON is alone on standard output."""
    return functools.partial(print, file=sys.stderr) if as_json else print


def show(values: Any, text: str, as_json: bool) -> None:
    """Prints `values` as JSON, or `text`."""
    print(json.dumps(values, indent=2) if as_json else text)
