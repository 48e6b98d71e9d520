"""What a command prints: for a person, or as JSON for a script."""

import json
import sys
from contextlib import AbstractContextManager
from typing import Any

from jaxlm.terminal import log_to, output


def notes(as_json: bool) -> AbstractContextManager[None]:
    """Prints log records meanwhile; JSON is alone on standard output."""

    def write(line: str) -> None:
        print(line, file=output(sys.stderr if as_json else sys.stdout))

    return log_to(write)


def show(values: Any, text: str, as_json: bool) -> None:
    """Prints `values` as JSON, or `text`."""
    print(json.dumps(values, indent=2) if as_json else text)
