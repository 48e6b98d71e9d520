"""The positional arguments of commands, named in their `--help`."""

from typing import Annotated

from tyro.conf import Positional, arg

Run = Positional[Annotated[str, arg(metavar="RUN")]]
RunAtStep = Positional[Annotated[str, arg(metavar="RUN@STEP")]]
Folder = Positional[Annotated[str, arg(metavar="FOLDER")]]
Runs = Positional[Annotated[tuple[str, ...], arg(metavar="RUN ...")]]
RunsAtSteps = Positional[Annotated[tuple[str, ...], arg(metavar="RUN@STEP ...")]]
