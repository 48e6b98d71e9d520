"""The Colab notebook does what it says, here on a CPU and on a small run."""

import os
import re
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import text_run
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from jaxlm import launch
from jaxlm.plan.plan import parse_topology

PATH = text_run.REPO / "notebooks" / "colab_tpu.ipynb"
FLAGS = "--num_steps 200 --eval_interval 10 --save_interval 10 --checkpoint.lock if_possible"


def cell_of(notebook: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    (cell,) = (cell for cell in notebook.cells if cell.id == name)
    return cell


def executed(
    notebook: nbformat.NotebookNode, home: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """Cell -> what it printed; small settings come in behind the cell of parameters."""
    small = {
        "WORK": str(home),
        "CODE": str(text_run.REPO),
        "INSTALL": "python -c 'import jaxlm'",  # this environment stays as it is
        "RUN": str(home / "runs" / "small"),
        "CONFIG": str(home / "configs" / "tiny.py"),
        "TOPOLOGY": "",  # tests/test_plan.py has those
        "FLAGS": FLAGS,
    }
    override = "\n".join(f"{name} = {value!r}" for name, value in small.items())
    at = next(n for n, cell in enumerate(notebook.cells) if "parameters" in tags(cell)) + 1
    notebook.cells.insert(at, nbformat.v4.new_code_cell(override))
    for name in ("XLA_FLAGS", "NPROC"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("IPYTHONDIR", str(home / "ipython"))
    NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
    return {
        cell.id: "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    }


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(PATH, as_version=4)


def test_the_notebook_is_as_it_should_be_committed(notebook):
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) > 8
    assert [cell for cell in cells if cell.outputs or cell.execution_count] == []
    assert [cell.id for cell in cells if "parameters" in tags(cell)] == ["parameters"]
    # Neither shell lines that may fail unseen, nor magics.
    assert [cell.id for cell in cells if re.search(r"^\s*[!%]", cell.source, re.M)] == []
    for cell in cells:
        compile(cell.source, cell.id, "exec")


def test_its_settings_fit_the_real_config(notebook):
    names: dict[str, str] = {}
    exec(cell_of(notebook, "parameters").source, names)
    path = text_run.REPO / Path(names["CONFIG"]).relative_to(names["CODE"])
    flags = ["--config", str(path), *names["FLAGS"].split()]
    config = launch.parse_config(flags, prog="launch.py")
    assert config.num_microbatches == 8 and config.intervals_nest
    assert parse_topology(names["TOPOLOGY"]) == ("tpu", "v5e:1x1")
    project = tomllib.loads((text_run.REPO / "pyproject.toml").read_text())["project"]
    extras = re.search(r"\[(.*)\]", names["INSTALL"])
    assert extras and set(extras[1].split(",")) <= set(project["optional-dependencies"])


def test_a_command_that_fails_fails_the_notebook(notebook, tmp_path, monkeypatch):
    caught = "try:\n    run('exit 75')\nexcept RuntimeError as error:\n    print(error)"
    cells = {"right": "said = run('true | cat')", "caught": caught, "wrong": "run('false | cat')"}
    notebook.cells = [cell_of(notebook, name) for name in ("parameters", "run")]
    notebook.cells += [nbformat.v4.new_code_cell(text, id=name) for name, text in cells.items()]
    with pytest.raises(CellExecutionError, match=r"exit code 1: false \| cat"):
        executed(notebook, tmp_path, monkeypatch)
    (said,) = cell_of(notebook, "caught").outputs
    assert said.text == "exit code 75: exit 75\n" and cell_of(notebook, "right").outputs == []


@pytest.mark.slow
def test_the_notebook_runs_from_its_beginning_to_its_end(notebook, tmp_path, monkeypatch):
    home = text_run.make_home(tmp_path / "home")
    said = executed(notebook, home, monkeypatch)
    assert "devices: 1 x cpu" in said["doctor"]
    assert "Resuming from step" in said["resume"] and "done: 200 steps" in said["resume"]
    assert re.search(r"^ *200 ", said["list"], re.M) and "best" in said["list"]
    assert "report: report.html" in said["report"]
    (shown,) = (o for o in cell_of(notebook, "report").outputs if o.output_type == "execute_result")
    assert "&lt;!doctype html&gt;" in shown.data["text/html"]
    assert "The water in a river comes from" in said["sample"]
    assert "(1, 3, 512)" in said["load"]
    assert list(home.glob("exported-*/model.safetensors"))
