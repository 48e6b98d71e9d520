"""What `import jaxlm` gives, whatever was imported before."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

import jaxlm
from jaxlm import extras
from jaxlm.extras import version


def run_apart(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_train_is_the_function():
    told = run_apart("""
import importlib, sys
for before in ("jaxlm", "jaxlm.training.train"):
    for name in [name for name in sys.modules if name.split(".")[0] == "jaxlm"]:
        del sys.modules[name]
    importlib.import_module(before)
    from jaxlm import Config, load_model, train
    import jaxlm
    names = train.__name__, load_model.__name__, Config.__name__
    print(before, jaxlm.train is train, *names, end="; ")
""")
    right = "True train load_model Config"
    assert told == f"jaxlm {right}; jaxlm.training.train {right};"


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
    assert told == version()


def test_the_commit_is_that_of_the_packages_own_checkout(tmp_path: Path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    assert extras._checked_out(tmp_path) is None
    subprocess.run([*git, "init", "-q"], check=True)
    assert extras._checked_out(tmp_path) is None  # nothing is committed
    (tmp_path / "a").write_text("1")
    subprocess.run([*git, "add", "a"], check=True)
    subprocess.run([*git, "commit", "-qm", "a"], check=True)
    commit = extras._checked_out(tmp_path)
    assert commit and re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "a").write_text("2")
    assert extras._checked_out(tmp_path) == f"{commit}-dirty"
    (tmp_path / "site-packages").mkdir()
    assert extras._checked_out(tmp_path / "site-packages") is None


def test_the_commit_of_a_package_installed_from_a_repository(monkeypatch: pytest.MonkeyPatch):
    texts = {'{"url": "x", "vcs_info": {"vcs": "git", "commit_id": "abc"}}': "abc", None: None}
    for text, commit in texts.items():
        found = SimpleNamespace(read_text=lambda name, text=text: text)
        monkeypatch.setattr(extras.importlib.metadata, "distribution", lambda name, f=found: f)
        assert extras._installed_from() == commit


def test_its_version_is_that_of_the_project():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    assert jaxlm.__version__ == project["project"]["version"]
