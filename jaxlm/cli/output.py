"""Output of commands, as text or as JSON."""

import json
import sys
from contextlib import AbstractContextManager
from typing import Any

from jaxlm.terminal import log_to, output


def notes(as_json: bool) -> AbstractContextManager[None]:
    """Prints log records inside the block; with JSON on stderr, so that stdout holds only JSON."""

    def write(line: str) -> None:
        print(line, file=output(sys.stderr if as_json else sys.stdout))

    return log_to(write)


def show(values: Any, text: str, as_json: bool) -> None:
    """Prints `values` as JSON, or `text`."""
    print(json.dumps(values, indent=2) if as_json else text)
