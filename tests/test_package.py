"""What `import jaxlm` gives, whatever was imported before."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jaxlm


def run_apart(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("before", ["", "from jaxlm.training.train import Result"])
def test_train_is_the_function(before: str):
    told = run_apart(
        f"{before}\nfrom jaxlm import Config, load_model, train\nimport jaxlm\n"
        "print(jaxlm.train is train, train.__name__, load_model.__name__, Config.__name__)"
    )
    assert told == "True train load_model Config"


def test_nothing_is_loaded_before_it_is_used():
    assert run_apart("import sys, jaxlm; print('jax' in sys.modules)") == "False"
    assert "has no attribute 'no_such'" in run_apart("import jaxlm; jaxlm.no_such")


def test_it_works_from_its_folder_without_being_installed():
    told = run_apart("""
import importlib.metadata
find = importlib.metadata.distribution
def without_jaxlm(name):
    if name == "jaxlm":
        raise importlib.metadata.PackageNotFoundError(name)
    return find(name)
importlib.metadata.distribution = without_jaxlm
from jaxlm.extras import versions
print(versions()["jaxlm"])
""")
    assert told == jaxlm.__version__


def test_its_version_is_that_of_the_project():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    assert jaxlm.__version__ == project["project"]["version"]
