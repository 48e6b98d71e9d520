"""How long a run of benchmarks/5m.py takes from the command to its first step, and `--help` at all.

    uv run python benchmarks/start_time.py

The first start has nothing kept from before: no tokens, no compiled programs. The second begins
another run with both. Bytecode of the packages is there in both, as after any earlier import.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TURNS = 5
ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "benchmarks" / "5m.py"
LAUNCH = [sys.executable, str(ROOT / "launch.py")]


def to_first_step_s(run_dir: Path, cache_dir: Path) -> float:
    """Seconds until the first row is on disk; then the run is stopped."""
    command = [*LAUNCH, "--config", str(CONFIG), "--run_dir", str(run_dir)]
    started = time.perf_counter()
    run = subprocess.Popen(
        [*command, "--data.cache_dir", str(cache_dir), "--log_interval", "1"],
        stdout=subprocess.DEVNULL,
        cwd=run_dir.parent,
    )
    rows = run_dir / "metrics.jsonl"
    while not (rows.exists() and rows.stat().st_size):
        if run.poll() is not None:
            raise SystemExit(f"the run ended with code {run.returncode}")
        time.sleep(0.01)
    seconds = time.perf_counter() - started
    run.terminate()
    run.wait()
    return seconds


def help_s() -> float:
    """Seconds of `--help`."""
    started = time.perf_counter()
    subprocess.run([*LAUNCH, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """All three in turns; prints medians and ranges (s)."""
    times: dict[str, list[float]] = {"first start": [], "second start": [], "--help": []}
    for _ in range(TURNS):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            times["first start"].append(to_first_step_s(folder / "first", folder / "cache"))
            times["second start"].append(to_first_step_s(folder / "second", folder / "cache"))
            times["--help"].append(help_s())
    for what, values in times.items():
        print(f"{what:13} | {statistics.median(values):5.2f} | {min(values):.2f}-{max(values):.2f}")


if __name__ == "__main__":
    main()
