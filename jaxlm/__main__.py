"""The `jaxlm` command: flags in, one call each."""

import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Union

import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional

from jaxlm.launch import leave, parse_config, run_main


def prepare(flags: Positional[tuple[str, ...]] = ()) -> int:
    """Make the tokens of a config, without training: `jaxlm prepare --config FILE [--data.…]`.

    Args:
      flags: those of launch.py.
    """
    config = parse_config(flags, prog="jaxlm prepare")
    from jaxlm.data import prepare as preparation

    num_tokens = config.num_steps * config.tokens_per_step
    dataset = preparation.prepare(
        config.data,
        vocab_size=config.model.vocab_size,
        max_tokens=preparation.default_max_tokens(config.data, num_tokens),
    )
    print(f"{dataset.train.num_tokens:,} training tokens, {dataset.eval.num_tokens:,} held out")
    print(f"in {dataset.directory}")
    return 0


def prove_resume(flags: Positional[tuple[str, ...]] = ()) -> int:
    """Kill and resume a short run of a config, and compare the bits: prove-resume --config FILE.

    Args:
      flags: --prove_steps, --prove_kills, --prove_seed and --out; and those of launch.py.
    """
    from jaxlm.durable import write_file
    from jaxlm.prove import Settings, describe, prove

    settings, own = tyro.cli(
        Settings, prog="jaxlm prove-resume --config FILE", args=flags, return_unknown_args=True
    )
    config = parse_config(own, prog="jaxlm prove-resume")
    certificate = prove(config, own, settings)
    if settings.out:
        write_file(settings.out, json.dumps(certificate, indent=2).encode() + b"\n")
    print("\n".join(describe(certificate)))
    return 0 if certificate["proven"] else 1


def plan(flags: Positional[tuple[str, ...]] = ()) -> int:
    """Say what a run needs on devices that are not here: plan --config FILE --topology v5e-16.

    Args:
      flags: --topology, --save_cost_s, --mtbf_hours, --max_compiles and --json; and those of
        launch.py.
    """
    from jaxlm.plan import Settings, describe
    from jaxlm.plan import plan as make_plan

    settings, own = tyro.cli(
        Settings, prog="jaxlm plan --config FILE", args=flags, return_unknown_args=True
    )
    report = make_plan(parse_config(own, prog="jaxlm plan"), settings)
    _show(report, "\n".join(describe(report)), settings.json)
    return 0


def doctor() -> int:
    """Say what this machine has for a run: versions, devices, caches, disk."""
    from jaxlm.doctor import examine

    print("\n".join(examine()))
    return 0


def list_cache(cache_dir: str | None = None, *, json: bool = False) -> int:
    """List the prepared tokens and compiled programs that runs share.

    Args:
      cache_dir: the cache; by default $JAXLM_CACHE, else ~/.cache/jaxlm.
      json: print JSON.
    """
    from jaxlm.compiled import PROGRAMS, compiled_bytes
    from jaxlm.console import format_bytes, format_count
    from jaxlm.data.cache import cache_root, list_caches

    entries, compiled = list_caches(cache_dir), compiled_bytes(cache_dir)
    lines = [
        f"{entry['name']}: {format_count(entry['num_tokens'])} tokens of {entry['source']}, "
        f"{format_bytes(entry['num_bytes'])}{'' if entry['complete'] else ' (unfinished)'}, "
        f"last used {time.strftime('%Y-%m-%d', time.localtime(entry['last_used_s']))}"
        for entry in entries
    ]
    lines += [f"{PROGRAMS}: {format_bytes(compiled)}"] if compiled else []
    found = {"data": entries, "compiled_bytes": compiled}
    _show(found, "\n".join(lines or [f"nothing in {cache_root(cache_dir)}"]), json)
    return 0


def clear_cache(names: Positional[tuple[str, ...]] = (), *, cache_dir: str | None = None) -> int:
    """Delete prepared tokens and compiled programs; a run that needs them makes them again.

    Args:
      names: which, as `jaxlm cache list` names them; all there is if none is given.
      cache_dir: the cache; by default $JAXLM_CACHE, else ~/.cache/jaxlm.
    """
    from jaxlm.compiled import clear_compiled
    from jaxlm.data.cache import clear_caches

    for name in [*clear_caches(cache_dir, names or None), *clear_compiled(cache_dir, names)]:
        print(f"deleted {name}")
    return 0


def list_checkpoints(run: Positional[str], *, json: bool = False) -> int:
    """List the checkpoints of a run: step, tokens, losses, size, and which is what.

    Args:
      run: a run folder, or a checkpoint folder.
      json: print JSON.
    """
    return compare_runs((run,), json=json)


def compare_runs(runs: Positional[tuple[str, ...]], *, json: bool = False) -> int:
    """List the checkpoints of several runs in one table.

    Args:
      runs: run folders, or checkpoint folders.
      json: print JSON.
    """
    from jaxlm.compare import describe_run, format_table

    found = [describe_run(run) for run in runs]
    _show(found if len(found) != 1 else found[0], format_table(found), json)
    return 0


def diff(a: Positional[str], b: Positional[str]) -> int:
    """Compare two checkpoints bit by bit; exit code 0 only if every array is equal, else 1.

    Args:
      a: RUN@STEP; STEP is best, latest, final or a number, and latest if left out.
      b: the other.
    """
    from jaxlm.compare import diff_checkpoints

    differences = diff_checkpoints(a, b)
    for difference in differences:
        print(f"{difference.name}: {difference.what}")
    print(f"{len(differences)} arrays differ" if differences else "every array is equal to the bit")
    return 1 if differences else 0


def verify_checkpoints(run: Positional[str], *, eval: bool = False, json: bool = False) -> int:
    """Check every file and every array of every step; exit code 0 only if all are sound, else 1.

    Touches nothing on disk; a trainer may be at work in the folder.

    Args:
      run: a run folder, or a checkpoint folder.
      eval: also evaluate the best one again: its loss must be the recorded one.
      json: print JSON.
    """
    from rich.progress import track

    from jaxlm.folder import find_checkpoints, list_set_aside, list_steps, read_steps
    from jaxlm.score import score, verify_step

    folder, found = find_checkpoints(run), {}
    steps = list_steps(folder)
    if not steps:
        raise ValueError(f"{folder}: found no checkpoint to verify")
    at_a_look = read_steps(folder).damaged  # among them sound ones of another run
    for step in track(steps, "Verifying", transient=True, disable=json or not sys.stdout.isatty()):
        if (damage := verify_step(folder, step)) is not None:  # not deleted by a trainer
            found[step] = damage = damage or at_a_look.get(step, [])
            if not json:
                print(f"{step}: {'; '.join(damage) or 'sound'}", flush=True)
    sound, aside = not any(found.values()), list_set_aside(folder)
    values = {"folder": str(folder), "steps": found, "set_aside": aside}
    if aside and not json:
        print(f"damaged, set aside earlier: {', '.join(aside)}")
    if eval:
        (best,) = score([f"{run}@best"], say=_note(json))
        values["eval"] = best.to_json() | {"as_recorded": best.as_recorded}
        sound = sound and best.as_recorded
        if not json:
            for what in best.differences:
                print(f"bits may differ from the recorded ones: {what}")
            equal = "equal to the bit" if best.loss == best.recorded_loss else "equal in rounding"
            print(
                f"eval loss of step {best.step}: recorded {best.recorded_loss!r}, found "
                f"{best.loss!r}: {equal if best.as_recorded else 'not the same'}"
            )
    num_damaged = sum(map(bool, found.values()))
    _show(values, f"{num_damaged} of {len(found)} steps are damaged", json)
    return 0 if sound else 1


def evaluate(
    runs: Positional[tuple[str, ...]],
    *,
    paired: bool = False,
    source: str | None = None,
    json: bool = False,
) -> int:
    """Evaluate checkpoints on the held-out sets of their runs, or tell which of two is better.

    Args:
      runs: RUN@STEP each; STEP is best, latest, final or a number, and best if left out.
      paired: of two, the difference over the same batches, with a 95% confidence interval.
      source: take the held-out documents of another source, such as text:GLOB.
      json: print JSON.
    """
    from jaxlm.score import paired_difference, score

    if not runs or (paired and len(runs) != 2):
        expected = "two of them with --paired" if paired else "at least one"
        raise ValueError(f"RUN@STEP: found {len(runs)}, expected {expected}")
    scores = score(runs, source=source, paired=paired, say=_note(json))
    values: list[Any] = [s.to_json() for s in scores]
    lines = [
        f"{s.run} (step {s.step}): loss {s.loss:.4f}, perplexity {s.perplexity:.2f}, "
        f"{s.num_tokens:,} tokens held out of {s.source}"
        for s in scores
    ]
    if paired:
        found = paired_difference(scores[0].sums, scores[1].sums)
        verdict = "cannot tell" if found.better is None else f"{scores[found.better].run} is better"
        values.append({**found._asdict(), "verdict": verdict})
        lines.append(
            f"difference: {found.mean:+.5f}, 95% confidence {found.low:+.5f} to {found.high:+.5f}, "
            f"over {found.num_batches} batches: {verdict}"
        )
    _show(values if len(values) != 1 else values[0], "\n".join(lines), json)
    return 0


def _note(as_json: bool) -> Callable[[str], None]:
    # JSON is alone on standard output.
    return functools.partial(print, file=sys.stderr) if as_json else print


def _show(values: Any, text: str, as_json: bool) -> None:
    print(json.dumps(values, indent=2) if as_json else text)


def _choice(commands: dict[str, Callable[..., int]]) -> Any:
    return Union[  # noqa: UP007 - made of a list that only the run time knows
        tuple(Annotated[Any, tyro.conf.subcommand(n, constructor=f)] for n, f in commands.items())
    ]


def _group(doc: str, **commands: Callable[..., int]) -> Callable[[int], int]:
    def group(command: int) -> int:
        return command  # the exit code: tyro has called it

    group.__annotations__["command"] = OmitArgPrefixes[OmitSubcommandPrefixes[_choice(commands)]]
    group.__doc__ = doc
    return group


COMMANDS: dict[str, Callable[..., int]] = {
    "prepare": prepare,
    "prove-resume": prove_resume,
    "plan": plan,
    "cache": _group("Look at and clear prepared tokens.", list=list_cache, clear=clear_cache),
    "checkpoints": _group(
        "Look at checkpoints.",
        list=list_checkpoints,
        compare=compare_runs,
        diff=diff,
        verify=verify_checkpoints,
    ),
    "eval": evaluate,
    "doctor": doctor,
}


def command(args: Sequence[str]) -> int:
    """Runs one command; returns its exit code."""
    if args and args[0] in ("prepare", "prove-resume", "plan"):
        return COMMANDS[args[0]](tuple(args[1:]))  # its flags are those of a config
    return tyro.cli(OmitSubcommandPrefixes[_choice(COMMANDS)], prog="jaxlm", args=list(args))


def main() -> None:
    """The entry point: exits with the command's code, or 1 and a message."""
    leave(run_main(lambda: command(sys.argv[1:])))


if __name__ == "__main__":
    main()
