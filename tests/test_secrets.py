"""Keys in the environment, in a remote's URL or on the command line reach no file and no screen."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import text_run

from jaxlm.config import CheckpointConfig, Config, DataConfig, TrackingConfig

CANARY = "c4n4ry"
SECRETS = {
    "WANDB_API_KEY": f"{CANARY}{'0' * 34}",  # of the length that wandb wants
    "HF_TOKEN": f"hf_{CANARY}1",
    "HUGGING_FACE_HUB_TOKEN": f"hf_{CANARY}2",
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}3",
    "GITHUB_TOKEN": f"ghp_{CANARY}4",
    "MY_DATABASE_PASSWORD": f"{CANARY}5",
    "HTTPS_PROXY": f"http://me:{CANARY}6@127.0.0.1:1",
    "WANDB_BASE_URL": f"https://me:{CANARY}7@127.0.0.1:1",
}
TRACKED = bool(importlib.util.find_spec("wandb") and importlib.util.find_spec("tensorboardX"))
LEAK = """
import os
from jaxlm.training import loop as module
described = module.describe_environment
module.describe_environment = lambda mesh: described(mesh) | {"environ": dict(os.environ)}
"""


def train(home: Path, leak: str = "") -> str:
    """A run with every tracker that is installed; returns all that it printed."""
    text_run.make_home(home)
    remote = f"https://me:{CANARY}8@127.0.0.1/x.git"
    for command in (["init", "-q"], ["remote", "add", "origin", remote]):
        subprocess.run(["git", *command], cwd=home, check=True)
    flags = ["--config", "configs/tiny.py", "--num_steps", "4"]
    if TRACKED:
        flags += ["--tracking.wandb", "offline", "--tracking.tensorboard"]
    code = f"{leak}\nimport sys\nfrom jaxlm.launch import main\nsys.exit(main({flags}))"
    folders = {name: str(home / "own") for name in ("HOME", "TMPDIR", "JAXLM_CACHE")}
    (home / "own").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=home,
        env=os.environ | SECRETS | folders,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def files_with_a_secret(home: Path) -> list[str]:
    files = [path for path in home.rglob("*") if path.is_file() and ".git" not in path.parts]
    names = {path.name for path in files}
    assert {"config.json", "metrics.jsonl", "manifest.json", "metadata"} <= names
    assert not TRACKED or any(name.endswith(".wandb") for name in names)
    assert not TRACKED or any("tfevents" in name for name in names)
    return [str(path) for path in files if CANARY.encode() in path.read_bytes()]


@pytest.mark.slow
def test_no_file_and_no_line_of_a_run_holds_a_secret(tmp_path: Path):
    said = train(tmp_path / "home")
    assert "done: 4 steps" in said and CANARY not in said
    assert files_with_a_secret(tmp_path / "home") == []


@pytest.mark.slow
def test_a_secret_that_leaks_is_found(tmp_path: Path):
    train(tmp_path / "home", leak=LEAK)
    found = files_with_a_secret(tmp_path / "home")
    assert any(path.endswith("meta/metadata") for path in found)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Config(run_dir=f"https://me:{CANARY}@host/x"),
        lambda: Config(data=DataConfig(source=f"hf:https://host/x?token={CANARY}")),
        lambda: Config(data=DataConfig(source=f"https://{CANARY}@host/x")),
        lambda: Config(data=DataConfig(tokenizer=f"https://{CANARY}@host/x")),
        lambda: Config(checkpoint=CheckpointConfig(directory=f"s3://key:{CANARY}@bucket/x")),
        lambda: Config(tracking=TrackingConfig(wandb_project=f"https://host/?key={CANARY}")),
        lambda: Config(init_from=f"s3://b/x?X-Amz-Date=1&X-Amz-Signature={CANARY}&a=b"),
        lambda: Config(data=DataConfig(source=f"text:az://c/x?sv=1&sig={CANARY}%3D")),
        lambda: Config(sample_prompt=f"see https://host/?access_token={CANARY} there"),
    ],
)
def test_a_url_with_a_key_is_refused_without_showing_it(make):
    with pytest.raises(ValueError, match="://…") as caught:
        make()
    assert CANARY not in str(caught.value)


def test_a_url_without_a_key_and_a_glob_are_taken():
    assert Config(data=DataConfig(source="tfds_dir:gs://bucket/set")).data.source
    for source in ("text:texts/??.txt", "text:s3://b/shard-?.jsonl", "text:s3://b/?/key=1/x.txt"):
        assert Config(data=DataConfig(source=source)).data.source
    for prompt in ("Have you read https://example.org/abs/2306?", "https://host/?q=a&page=2"):
        assert Config(sample_prompt=prompt).sample_prompt


def test_a_flag_with_a_key_is_not_shown_again(tmp_path: Path):
    home = text_run.make_home(tmp_path / "home")
    flag = ["--checkpoint_dir", f"s3://key:{CANARY}@bucket/x"]
    command = [sys.executable, "launch.py", "--config", "configs/tiny.py", *flag]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True)
    assert done.returncode != 0 and "checkpoint.directory" in done.stdout + done.stderr
    assert CANARY not in done.stdout + done.stderr
