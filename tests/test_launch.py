"""From a command line to a run, and what a person sees when it does not fit."""

import dataclasses
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import text_run
from test_config import INVALID

from jaxlm import __main__ as cli
from jaxlm import huge_pages, launch
from jaxlm.checkpoints.folder import list_steps, select
from jaxlm.config import Config, leaves, to_dict
from jaxlm.extras import version
from jaxlm.training import start


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No run yet."""
    home = text_run.make_home(tmp_path / "home")
    monkeypatch.chdir(home)
    return home


def parse(*flags: str) -> Config:
    return launch.parse_config(["--config", "configs/tiny.py", *flags], prog="launch.py")


def refusal(capsys: pytest.CaptureFixture, *flags: str) -> str:
    """What is said of flags that do not fit, on one line, without the frame around it."""
    with pytest.raises(SystemExit) as stop:
        parse(*flags)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", printed.err).split())


def test_the_config_file_gives_the_defaults(home: Path):
    config = parse()
    assert config.num_steps == 8 and config.model.d_model == 32
    assert config.run_dir == "runs/tiny"  # after the file
    assert config.checkpoint_dir == "runs/tiny/checkpoints"
    assert parse("--run_dir", "elsewhere").run_dir == "elsewhere"
    assert launch.parse_config(["--num_steps=9", "--config=configs/tiny.py"], "p").num_steps == 9


def test_a_run_folder_that_the_config_names_is_kept(home: Path):
    text = text_run.CONFIG.replace("    num_steps", '    run_dir="named",\n    num_steps')
    Path("configs/other.py").write_text(text)
    assert launch.load_config("configs/other.py").run_dir == "named"


def test_config_files_that_are_none(home: Path):
    with pytest.raises(ValueError, match=r"no file configs/x.py, expected one of: configs/tiny.py"):
        launch.load_config("configs/x.py")
    Path("configs/empty.py").write_text("config = {}")
    with pytest.raises(ValueError, match=r"configs/empty.py defines no `config = jaxlm.Config"):
        launch.load_config("configs/empty.py")
    with pytest.raises(ValueError, match=r"--config: found nothing, .*configs/tiny.py"):
        launch.parse_config(["--num_steps", "3"], prog="launch.py")
    with pytest.raises(ValueError, match="--config: found nothing"):
        launch.parse_config(["--config"], prog="launch.py")
    with pytest.raises(ValueError, match="--config: found nothing"):  # an empty variable
        launch.parse_config(["--config", ""], prog="launch.py")


MISTAKES = {
    "from jaxlm import Config\nconfig = Config(num_step=3)": (
        "line 2: num_step: not a field of Config; did you mean num_steps?"
    ),
    "from jaxlm.config import *\n\nconfig = Config(\n  optim=OptimConfig(learning_rate='3e-4'))": (
        "line 4: optim.learning_rate: found '3e-4', expected float"
    ),
    "config = Confg()": "line 1: NameError: name 'Confg' is not defined",
    "\nconfig = Config(": "line 2: SyntaxError: '(' was never closed",
    "import no_such": "line 1: ModuleNotFoundError: No module named 'no_such'",
    "raise KeyError('x')": "line 1: KeyError: 'x'",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_in_a_config_file_is_one_line(
    home: Path, capsys: pytest.CaptureFixture, text: str
):
    Path("configs/wrong.py").write_text(text)
    args = ["--config", "configs/wrong.py"]
    assert launch.run_main(lambda: launch.main(args)) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: --config: configs/wrong.py, {MISTAKES[text]}"), said
    assert said.count("\n") == 1


def test_the_config_of_a_run_goes_on_with_it(shared_home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(shared_home)
    config = launch.load_config(text_run.RUN)
    assert config == launch.load_config(f"{text_run.RUN}/config.json")
    assert (config.run_dir, config.num_steps, config.optim.learning_rate) == (text_run.RUN, 12, 3)
    said = launch.parse_config(["--config", text_run.RUN, "--num_steps", "20"], prog="launch.py")
    assert said == dataclasses.replace(config, num_steps=20)
    monkeypatch.chdir(shared_home / "runs")
    assert launch.load_config("tiny").run_dir == "tiny"  # from where it is looked at now


@pytest.mark.slow
def test_a_run_whose_text_has_moved_resumes(
    own_home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    monkeypatch.chdir(own_home)
    resume = ["--config", text_run.RUN, "--num_steps"]
    assert launch.main([*resume, "13"]) == 0
    Path("texts").rename("moved")
    assert launch.main([*resume, "14"]) == 0
    assert "The run needs no source: its tokens are in " in capfd.readouterr().out
    assert launch.main([*resume, "15", "--data.source", "text:moved/*.txt"]) == 0
    assert "changed from step 14 on: data.source" in capfd.readouterr().out
    recorded = select(f"{text_run.RUN}@15").metadata.data["main"]
    assert recorded["source"] == "text:texts/*.txt"  # what the tokens were made of
    assert cli.command(["eval", text_run.RUN]) == 0
    Path("moved").rename("gone")
    with pytest.raises(FileNotFoundError, match="no file matches"):
        launch.main([*resume, "16", "--data.source", "text:nowhere/*.txt"])


def test_a_config_json_that_is_none_of_a_run(home: Path):
    Path("config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="--config: config.json: model_type: not a field of .*run"):
        launch.load_config("config.json")
    with pytest.raises(ValueError, match="--config: found no file configs/config.json, expected"):
        launch.load_config("configs")
    Path("config.json").write_text(json.dumps(to_dict(Config(resume="never"))))
    config = launch.load_config("config.json")
    assert (config.resume, config.run_dir) == ("auto", ".")


def test_both_commands_name_the_version(capsys: pytest.CaptureFixture):
    assert launch.main(["--version"]) == cli.command(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxlm {version()}\n" * 2


def test_a_checkpoint_names_the_version_that_wrote_it(shared_home: Path):
    metadata = select(f"{shared_home / text_run.RUN}@4").metadata
    assert metadata.environment["versions"]["jaxlm"] == version()


@pytest.mark.parametrize("module", ["jaxlm.launch", "jaxlm"])
def test_a_module_that_is_run_runs(module: str, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(sys, "argv", [module, "--version"])
    monkeypatch.delitem(sys.modules, module if module != "jaxlm" else "jaxlm.__main__")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(module, run_name="__main__")
    assert stop.value.code == 0 and version() in capsys.readouterr().out


@pytest.mark.parametrize("first", ["configs/tiny.py", "--config=configs/tiny.py"])
def test_jaxlm_train_is_launch(home: Path, monkeypatch: pytest.MonkeyPatch, first: str):
    trained = []
    monkeypatch.setattr("jaxlm.cli.runs.run", lambda config: trained.append(config) or 75)
    assert cli.command(["train", first, "--num_steps", "9"]) == 75
    assert trained == [parse("--num_steps", "9")]


def test_every_field_is_a_flag_with_help(home: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out)
    helps = {}  # flag -> its text
    for chunk in re.split(r"\n\s+(?=--?[a-z])", text):
        flag, _, rest = chunk.strip().partition("\n")
        for name in re.findall(r"--([a-z][\w.-]*)", flag):
            helps[name] = rest.strip()
    names = [name.replace("_", "-") for name in leaves(Config())]
    assert len(names) > 50
    without = [name for name in names if len(helps.get(name, "")) < 10]
    assert without == []
    assert "no-such-flag" not in helps
    assert "tokens" in helps["model.vocab-size"] and "512" in helps["model.vocab-size"]


def test_the_seeds_own_spellings(home: Path):
    for dash in "_-":
        flags = ["--save_interval", "6", "--eval_interval", "7", "--checkpoint_dir", "elsewhere"]
        config = parse(*(flag.replace("_", dash) for flag in flags))
        assert config.checkpoint.save_interval == 6 and config.eval_interval == 7
        assert config.checkpoint_dir == "elsewhere" == config.checkpoint.directory


@pytest.mark.parametrize("name", ["checkpoint.keep_latest", "optim.warmup_steps", "num_steps"])
def test_both_spellings_of_every_flag(home: Path, name: str):
    for spelled in (name, name.replace("_", "-")):
        assert leaves(parse(f"--{spelled}", "5"))[name][0] == 5


def test_a_wrong_flag_gets_the_nearest_name(home: Path, capsys: pytest.CaptureFixture):
    said = refusal(capsys, "--num_stesp", "3")
    assert "Unrecognized options: --num_stesp" in said
    assert "Perhaps you meant: --num-steps INT" in said
    said = refusal(capsys, "--optim.learning_rte", "3")
    assert "--optim.learning-rate FLOAT" in said
    assert "cosine" in refusal(capsys, "--optim.schedule", "cosin")
    assert "--batch-size INT" in refusal(capsys, "--batch_size", "many")


# The default config's other values, so that a combination fails for the value at hand alone.
FLAGS = [(name, value) for _, name, value in INVALID if value != ""]


@pytest.mark.parametrize(("name", "value"), FLAGS, ids=str)
def test_an_invalid_value_ends_before_anything_exists(
    home: Path, capsys: pytest.CaptureFixture, name: str, value: object
):
    before = sorted(home.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        launch.main(["--config", "configs/tiny.py", f"--{name}", str(value)])
    assert stop.value.code == 2
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
    assert said.count("Error parsing") == 1
    assert f"{name}: found {value!r}, expected " in said
    assert sorted(home.rglob("*")) == before


def test_valid_values_get_past_that(home: Path):
    assert parse("--seed", "3", "--optim.clip_norm", "None").optim.clip_norm is None


# What only the devices or the data can tell.
LATER = {
    "--batch_size 12": r"batch_size: found 12 .*expected a multiple of .* = 8",
    "--mesh.data 3": r"mesh: data 3 x fsdp 1 x tensor 1 makes 3 devices, but there are 8",
    "--mesh.data 1 --mesh.tensor 8": r"mesh: layers/0/.* which tensor = 8 does not divide",
    "--data.source text:none/*.txt": r"none/\*\.txt",
    "--model.vocab_size 100": r"model.vocab_size: found 100, expected at least 257",
    "--branch_from runs/none@best": r"runs/none: found no checkpoints",
}


@pytest.mark.parametrize("flags", LATER)
def test_what_does_not_fit_is_one_message(home: Path, capfd: pytest.CaptureFixture, flags: str):
    args = ["--config", "configs/tiny.py", *flags.split()]
    assert launch.run_main(lambda: launch.main(args)) == 1
    said = capfd.readouterr().err
    assert re.search(LATER[flags], said.splitlines()[0]), said
    assert said.startswith("error: ") and "Traceback" not in said
    assert list_steps(home / "runs/tiny/checkpoints") == []


@pytest.mark.parametrize("begin", ["--init_from", "--branch_from"])
def test_another_model_is_refused_before_any_data_is_prepared(
    own_home: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, begin: str
):
    monkeypatch.chdir(own_home)
    flags = [begin, f"{text_run.RUN}@4", "--run_dir", "runs/b", "--data.source", "text:none/*.txt"]
    args = ["--config", "configs/tiny.py", *flags]
    assert launch.run_main(lambda: launch.main([*args, "--model.d_ff", "96"])) == 1
    assert "mlp/w_down_FD holds float32 [64, 32], but this model has" in capfd.readouterr().err
    assert launch.run_main(lambda: launch.main(args)) == 1  # the control: the model fits
    assert "none/*.txt" in capfd.readouterr().err


def test_exit_codes_of_run_main(capsys: pytest.CaptureFixture):
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert launch.run_main(lambda: 0) == launch.run_main(lambda: None) == 0
    assert launch.run_main(lambda: launch.STOPPED) == launch.STOPPED == 75
    assert capsys.readouterr().err == ""
    assert launch.run_main(interrupted) == 130
    assert "the same command resumes" in capsys.readouterr().err


def test_an_error_on_purpose_is_a_message_and_a_bug_a_traceback(
    home: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    def on_purpose() -> int:
        launch.load_config("none.py")
        return 0

    def bug_of_ours() -> int:
        return int(launch.Path("none").stat().st_size)  # raises inside pathlib: nobody meant to

    def bug_of_a_library() -> int:
        return int("x")  # a ValueError too, but not raised by jaxlm

    assert launch.run_main(on_purpose) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: --config: found no file none.py") and said.count("\n") == 1
    for bug in (bug_of_ours, bug_of_a_library):
        assert launch.run_main(bug) == 1
        assert capsys.readouterr().err.startswith("Traceback ")
    monkeypatch.setenv("JAXLM_TRACEBACK", "1")
    assert launch.run_main(on_purpose) == 1
    assert capsys.readouterr().err.startswith("Traceback ")


def test_what_the_machine_refuses_is_a_message(
    own_home: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(own_home)
    profile = Path("runs/new/profile")
    profile.parent.mkdir(parents=True)
    profile.touch()
    config = Path(text_run.RUN, "config.json")
    config.unlink()
    config.mkdir()
    train = ["--config", "configs/tiny.py", "--run_dir"]
    for args, said in (
        ([*train, "runs/new", "--profile", "2"], r"error: runs/new/profile: File exists"),
        ([*train, text_run.RUN, "--num_steps", "20"], r"error: .*config\.json: Is a directory"),
    ):
        assert launch.run_main(lambda args=args: launch.main(args)) == 1
        last = capfd.readouterr().err.splitlines()
        assert re.match(said, last[-1]) and not any("Traceback" in line for line in last), last


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_is_full_is_a_message(own_home: Path):
    command = [sys.executable, "-m", "jaxlm", "checkpoints", "list", text_run.RUN]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=own_home, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


def launch_apart(home: Path, *flags: str) -> subprocess.CompletedProcess:
    """A process of its own, with one device."""
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(text_run.REPO)}
    command = [sys.executable, "launch.py", "--config", "configs/tiny.py", *flags]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_real_process(own_home: Path):
    done = launch_apart(own_home, "--num_steps", "14", "--optim.learning_rate", "3")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "Resuming from step 12" in done.stdout and "done: 14 steps" in done.stdout
    assert "mesh.data: was 8, is 1" in done.stdout  # bits may differ


def test_the_run_folder(shared_home: Path):
    run = shared_home / text_run.RUN
    assert {"config.json", "metrics.jsonl", "checkpoints"} <= {path.name for path in run.iterdir()}
    config = json.loads((run / "config.json").read_bytes())
    assert config["num_steps"] == 12 and config["optim"]["learning_rate"] == 3.0
    assert set(config) == {field.name for field in dataclasses.fields(Config)}
    trained = [row["step"] for row in text_run.rows(run) if "train/loss" in row]
    assert trained == [1, 2, 4, 6, 8, 10, 12]
    assert list(text_run.eval_losses(run)) == [4, 8, 12]


def test_a_complete_run_says_how_to_go_on(own_home: Path):
    flags = "--num_steps 12 --optim.learning_rate 3"
    code, said = text_run.launched(own_home, flags)
    assert code == 0
    assert "is complete at step 12" in said and "a larger --num_steps" in said
    assert "this command differs" not in said
    _, said = text_run.launched(own_home, f"{flags} --log_interval 5")
    assert "this command differs in log_interval: was 2, is 5" in said


def test_a_complete_run_does_not_pass_for_one_with_other_settings(own_home: Path):
    flags = "--num_steps 12 --optim.lr 4"
    with pytest.raises(
        ValueError, match=r"nothing was trained .*\n.*rate: was 3.0, is 4.0\n.*--run"
    ):
        text_run.launched(own_home, flags)


def test_a_run_goes_on_from_its_folder_alone(own_home: Path):
    with text_run.working_in(own_home):
        assert launch.main(["--config", text_run.RUN]) == 0  # it is complete
        assert launch.main(["--config", text_run.RUN, "--num_steps", "13"]) == 0
    assert (
        select(f"{own_home / text_run.RUN}@latest").metadata.config["optim"]["learning_rate"] == 3
    )


def test_a_prompt_that_is_too_long_is_found_before_the_first_step(own_home: Path):
    with pytest.raises(ValueError, match="^sample_prompt: found .* tokens, expected at most 16"):
        text_run.launched(own_home, f"--run_dir runs/b --sample_prompt '{'aeinorst ' * 40}'")
    assert list_steps(own_home / "runs/b/checkpoints") == []


@pytest.mark.slow
def test_a_gpu_without_deterministic_kernels_is_told_at_a_resume(own_home: Path, monkeypatch):
    monkeypatch.setattr(start, "deterministic_options", lambda mesh: {"of_a_gpu": True})
    told = "bits may differ from an uninterrupted run: deterministic is off"
    flags = "--optim.learning_rate 3 --num_steps"
    assert told in text_run.launched(own_home, f"{flags} 13 --no-deterministic")[1]
    said = text_run.launched(own_home, f"{flags} 14")[1]
    assert told not in said and "deterministic: was False, is True" in said


def test_a_fixed_field_takes_a_new_run_and_checkpoint_dir_is_its_folder(own_home: Path):
    with pytest.raises(ValueError, match=r"seed: was 0, is 1\n.*add --run_dir for a new run"):
        text_run.launched(own_home, "--seed 1 --num_steps 20 --optim.learning_rate 3")
    flags = "--seed 1 --num_steps 3 --run_dir runs/b --checkpoint_dir kept --save_interval 2"
    code, said = text_run.launched(own_home, flags)
    assert code == 0 and "done: 3 steps" in said
    assert list_steps(own_home / "kept") == [2, 3]
    assert not (own_home / "runs/b/checkpoints").exists()


def test_out_of_memory_ends_with_advice(home: Path, monkeypatch: pytest.MonkeyPatch):
    import jax

    import jaxlm.training.train  # noqa: F401  (now in sys.modules)

    def fail(text: str) -> None:
        def train_(config: Config) -> None:
            raise jax.errors.JaxRuntimeError(text)

        monkeypatch.setattr(sys.modules["jaxlm.training.train"], "train", train_)
        launch.main(["--config", "configs/tiny.py", "--batch_size", "16"])

    with pytest.raises(
        SystemExit, match=r"RESOURCE_EXHAUSTED: 9 GB\n(.*\n)+.*--num_microbatches 2"
    ):
        fail("RESOURCE_EXHAUSTED: 9 GB\nframes")
    with pytest.raises(jax.errors.JaxRuntimeError):
        fail("INTERNAL: something else")


@pytest.mark.parametrize("given", ["", "glibc.malloc.check=0", "glibc.malloc.hugetlb=0"])
def test_the_launcher_asks_for_huge_pages_and_stays_the_same_program(tmp_path: Path, given: str):
    config = tmp_path / "says.py"
    config.write_text(
        "import os, sys\nprint(os.getpid(), sys.argv[1:], sys.flags.utf8_mode)\n"
        "sys.exit(os.environ.get('GLIBC_TUNABLES', ''))"
    )
    command = [sys.executable, "-X", "utf8", text_run.REPO / "launch.py", "--config", str(config)]
    process = subprocess.Popen(
        command,
        env=os.environ | {"GLIBC_TUNABLES": given},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said, tunables = process.communicate()
    assert said.split(maxsplit=1) == [str(process.pid), f"{['--config', str(config)]} 1\n"]
    mode = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    can_ask = mode.exists() and "[madvise]" in mode.read_text() and "hugetlb" not in given
    expected = [given, "glibc.malloc.hugetlb=1"] if can_ask else [given]
    assert tunables.strip() == ":".join(filter(None, expected))


def test_a_program_on_stdin_starts_once():
    program = (text_run.REPO / "launch.py").read_text()
    command = [sys.executable, "-", "--version"]
    said = subprocess.run(command, input=program, cwd=text_run.REPO, capture_output=True, text=True)
    assert said.stdout.startswith("jaxlm "), said.stderr


def test_a_program_that_loses_its_environment_starts_again_once(monkeypatch: pytest.MonkeyPatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda *command: started.append(command))
    monkeypatch.setattr(huge_pages, "_on_request", lambda: True)
    monkeypatch.setattr(sys, "argv", ["launch.py"])
    for _ in range(3):
        monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
        huge_pages.use_huge_pages()
    assert started == [(os.readlink("/proc/self/exe"), sys.orig_argv)]
