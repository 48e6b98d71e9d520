"""The parser of RUN@STEP, the name of a checkpoint."""

import re
from pathlib import Path

from jaxlm.errors import InputError
from jaxlm.files.durable import expand

_STEP = re.compile("best|latest|final|[0-9]+")


def split_step(run: str) -> tuple[str, str]:
    """RUN and STEP of `RUN@STEP`; STEP is empty if none is given.

    A path may contain @ too: an existing folder is a RUN, and only `best`, `latest`, `final` or a
    number after the last @ is a STEP.

    Raises:
      ValueError: RUN exists, and STEP is none of these.
    """
    run = expand(run, "RUN")
    name, _, step = run.rpartition("@")
    if not name or Path(run).is_dir():
        return run, ""
    if _STEP.fullmatch(step):
        return name, step
    if Path(name).is_dir():
        raise InputError(f"{run}: expected @best, @latest, @final or @ and a step number")
    return run, ""
