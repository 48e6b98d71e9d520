"""Memory, step time, largest batch and save interval of a run, on absent devices."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from jaxlm.config import Config
from jaxlm.errors import InputError
from jaxlm.plan.ahead import examine
from jaxlm.tracking.console import format_bytes
from jaxlm.tracking.throughput import find_device, flops_per_token

_NUM_AXES = {"v5e": 2, "v6e": 2, "v5p": 3}
"""TPU generation -> dimensions of its torus."""
Compile = Callable[[Config], dict[str, Any] | None]
"""Config -> result of `assess`; None once `max_compiles` is used up."""


@dataclass(frozen=True)
class Settings:
    """The flags of `jaxlm plan`, in addition to those of launch.py."""

    topology: str = ""
    """Devices to plan for, required, such as v5e-16, v6e-16, v5p-8, v5e:4x8 or h100x8."""
    save_cost_s: float | None = None
    """Time that a save blocks the training loop, as measured (seconds)."""
    mtbf_hours: float | None = None
    """Mean time between failures of the whole machine (hours)."""
    max_compiles: int = 16
    """Train-step programs to compile at most, for the largest batch or for flags that fit."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        for name in ("save_cost_s", "mtbf_hours", "max_compiles"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"--{name}: found {value}, expected a number above 0")
        if (self.save_cost_s is None) != (self.mtbf_hours is None):
            raise InputError("--save_cost_s, --mtbf_hours: found one, expected both; add the other")


def parse_topology(name: str) -> tuple[str, str]:
    """Platform and layout of a named topology, as its compiler takes them.

    Raises:
      ValueError: the name is not known.
    """
    if gpus := re.fullmatch(r"h100x([1-8])", name):
        return "cuda", f"1x1x{gpus[1]}"
    if match := re.fullmatch(r"(v5e|v6e|v5p)(?:-(\d+)|:\d+(?:x\d+)+)", name):
        generation, size = match.groups()
        if size is None:
            return "tpu", name
        axes = _NUM_AXES[generation]
        num_chips = int(size) // 2 if generation == "v5p" else int(size)  # v5p-N counts cores
        power = num_chips.bit_length() - 1
        if num_chips == 2**power and (power >= 2 or (power == 0 and axes == 2)):
            sides = [2 ** ((power + axis) // axes) for axis in range(axes)]
            sides.sort(key=lambda side: (side == 1, side))  # 2x2x1, not 1x2x2
            return "tpu", f"{generation}:{'x'.join(map(str, sides))}"
    raise InputError(
        f"--topology: found {name!r}, expected v5e-N or v6e-N (N chips), v5p-N (N cores), a power "
        "of two of at least 4 chips or one alone; a shape such as v5e:4x8; or h100x1 to h100x8"
    )


def plan(config: Config, settings: Settings) -> dict[str, Any]:
    """Memory and time of a config's train step on a topology.

    Also the largest batch if the step fits, else flags that may make it fit.

    Returns:
      The report for `describe`, as JSON values; counts and bytes are of one device.

    Raises:
      ValueError: the topology is not known, or the config does not fit it.
      ImportError: the compiler for it is not installed.
    """
    platform, layout = parse_topology(settings.topology)
    num_left = settings.max_compiles

    def compile_step(config: Config) -> dict[str, Any] | None:
        nonlocal num_left
        num_left -= 1
        return None if num_left < 0 else assess(config, examine(config, platform, layout))

    step = compile_step(config)
    assert step is not None
    report: dict[str, Any] = {"topology": settings.topology, "layout": layout, **step}
    report |= {name: getattr(config, name) for name in ("batch_size", "seq_len")}
    report["num_microbatches"] = config.num_microbatches
    if not step["fits"]:
        num_devices = math.prod(map(int, re.findall(r"\d+", layout.split(":")[-1])))
        return report | {"changes": find_changes(config, num_devices, compile_step)}
    report["largest_batch"] = largest_batch(config, step, compile_step)
    if settings.save_cost_s and settings.mtbf_hours:
        mtbf_s = settings.mtbf_hours * 3600
        report["saves"] = save_interval(settings.save_cost_s, mtbf_s, step["roofline"]["step_s"])
    return report


def assess(config: Config, found: dict[str, Any]) -> dict[str, Any]:
    """The result of `examine`, with `fits` and a lower bound of the step time.

    The bound assumes that compute, memory and links overlap in full, each at its peak.
    """
    if "refused" in found:
        return {"fits": False, **found}
    device = find_device(found["device_kind"])
    assert device is not None, found["device_kind"]
    num_devices = math.prod(found["mesh"].values())
    model_flops = config.tokens_per_step * flops_per_token(config.model, config.seq_len)
    model_flops /= num_devices
    costs, needed = found["costs"], sum(found["memory"].values())
    sent_bytes = sum(kind["num_bytes"] for kind in costs["collectives"].values())
    times = {
        # Custom kernels hide their matmul FLOPs from the HLO text: count at least the model's.
        "compute": max(costs["flops"], model_flops) / device.flops,
        "memory": costs["memory_bytes"] / device.memory_bytes_per_s,
        "interconnect": sent_bytes / device.link_bytes_per_s,
    }
    bound_by = max(times, key=lambda name: times[name])
    roofline = {f"{name}_s": value for name, value in times.items()}
    roofline |= {"step_s": times[bound_by], "bound_by": bound_by}
    roofline["mfu"] = model_flops / device.flops / times[bound_by]
    return {
        **found,
        "num_devices": num_devices,
        "memory_needed": needed,
        "memory_there": int(device.memory_bytes),
        "fits": needed <= device.memory_bytes,
        "roofline": roofline,
    }


def largest_batch(config: Config, step: dict[str, Any], compile_step: Compile) -> dict[str, Any]:
    """The largest batch that fits, searched over powers of two of rows per device and microbatch.

    Args:
      config: a config whose step fits.
      step: the result of `assess` for it.
      compile_step: compiles and assesses another config.
    """
    unit = step["mesh"]["data"] * step["mesh"]["fsdp"] * config.num_microbatches
    rows = config.batch_size // unit
    fits, too_large = rows.bit_length() - 1, None
    # Temporaries grow with the rows: the first guess is mostly right, and one more compilation
    # proves it.
    temporary_bytes = step["memory"]["temporaries"]
    room = (step["memory_there"] - step["memory_needed"]) / max(temporary_bytes, 1) + 1
    guess = max(fits + 1, math.floor(math.log2(room * rows)))
    while too_large != fits + 1:
        found = compile_step(replace(config, batch_size=unit << guess))
        if found is None:
            break
        fits, too_large = (guess, too_large) if found["fits"] else (fits, guess)
        guess = fits + 1 if too_large is None else (fits + too_large) // 2
    rows = max(1 << fits, rows)
    certain = too_large == fits + 1
    return {"batch_size": unit * rows, "rows_per_device": rows, "certain": certain}


def find_changes(config: Config, num_devices: int, compile_step: Compile) -> list[dict[str, Any]]:
    """Flags that may make a step fit: smaller microbatches, chunked logits, remat, fsdp.

    Args:
      config: a config whose step does not fit.
      num_devices: devices of the topology.
      compile_step: compiles and assesses another config.

    Returns:
      The changes tried, as flags; those that fit come first, fastest first.
    """
    products, full = "--model.remat products", "--model.remat full"
    chunks, fsdp = "--loss_chunks 8", "--mesh.data 1 --mesh.fsdp -1"
    changes = {
        chunks: {"loss_chunks": 8},
        products: {"model": replace(config.model, remat="products")},
        full: {"model": replace(config.model, remat="full")},
        fsdp: {"mesh": replace(config.mesh, data=1, fsdp=-1)},
    }
    alone = [(), (chunks,), (products,), (full,)]
    more = [(fsdp,), (chunks, full, fsdp)] if num_devices > 1 else [(chunks, full)]
    tried: list[dict[str, Any]] = []
    for parts in [*alone, *more]:
        enough = any(change["fits"] for change in tried)
        if (chunks in parts and config.seq_len % 8) or (parts[1:] and enough):
            continue
        changed = config
        for part in parts:
            changed = replace(changed, **changes[part])
        num = config.num_microbatches * (2 if changed == config else 1)
        if parts and changed == config:
            continue
        while config.batch_size % num == 0:
            flags = [] if num == config.num_microbatches else [f"--num_microbatches {num}"]
            change = {"flags": " ".join([*flags, *parts])}
            try:
                found = compile_step(replace(changed, num_microbatches=num))
            except ValueError as error:  # the mesh does not divide the batch or the model
                found = {"fits": False, "wrong": str(error)}
            if found is None or "wrong" in found:
                break
            tried.append(change | found)
            if found["fits"]:
                break
            num *= 2
    return sorted(tried, key=lambda c: c["roofline"]["step_s"] if c["fits"] else math.inf)


def save_interval(save_cost_s: float, mtbf_s: float, step_s: float) -> dict[str, Any]:
    """The save interval with the lowest expected cost (Young 1974; Daly 2006, first order).

    Args:
      save_cost_s: time that a save blocks the training loop (s).
      mtbf_s: mean time between failures (s).
      step_s: time of a step (s).
    """
    num_steps = max(round(math.sqrt(2 * save_cost_s * mtbf_s) / step_s), 1)
    interval_s = num_steps * step_s
    return {
        "save_interval": num_steps,
        "interval_s": interval_s,
        "lost_s_per_failure": interval_s / 2,
        "share_in_saves": save_cost_s / interval_s,
        "share_lost": interval_s / 2 / mtbf_s,
    }


def describe(report: dict[str, Any]) -> list[str]:
    """The report, as lines of text."""
    lines = [
        f"{report['topology']} ({report['layout']}): batch {report['batch_size']} of "
        f"{report['seq_len']} tokens in {report['num_microbatches']} microbatch(es)"
    ]
    lines += (
        _describe_step(report) if "memory" in report else [f"does not fit: {report['refused']}"]
    )
    if batch := report.get("largest_batch"):
        bound = "" if batch["certain"] else "at least "
        rows = f"{batch['rows_per_device']} rows a device at once"
        lines.append(f"largest batch that fits: {bound}{batch['batch_size']} ({rows})")
    for change in report.get("changes", ()):
        text = f"does not fit with {change['flags']}"
        if change["fits"]:
            times = change["roofline"]
            text = (
                f"fits with {change['flags']}: {format_bytes(change['memory_needed'])}, at least "
                f"{_milliseconds(times['step_s'])} a step, MFU at most {times['mfu']:.0%}"
            )
        lines.append(text)
    if saves := report.get("saves"):
        lines.append(
            f"cheapest --save_interval: {saves['save_interval']} ({saves['interval_s']:.0f} s); "
            f"saves take {saves['share_in_saves']:.2%} of the time, and failures lose "
            f"{saves['share_lost']:.2%}, {saves['lost_s_per_failure']:.0f} s each"
        )
    return lines


def _describe_step(report: dict[str, Any]) -> list[str]:
    costs, times = report["costs"], report["roofline"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    kinds = [
        f"{kind} {format_bytes(found['num_bytes'])} in {found['num']} operations"
        for kind, found in costs["collectives"].items()
    ]
    memory = [f"{k.replace('_', ' ')} {format_bytes(n)}" for k, n in report["memory"].items()]
    parts = [
        f"{name} {_milliseconds(times[f'{name}_s'])}"
        for name in ("compute", "memory", "interconnect")
    ]
    unknown = costs["num_unknown_loops"]
    return [
        f"{report['num_devices']} x {report['device_kind']} (mesh: {mesh}); of each device:",
        f"memory {'fits' if report['fits'] else 'does not fit'}: "
        f"{format_bytes(report['memory_needed'])} of {format_bytes(report['memory_there'])}",
        f"  {', '.join(memory)}",
        f"work of a step: {format_bytes(costs['flops'])[:-1]}FLOP in matmuls, "  # as bytes scale
        f"{format_bytes(costs['memory_bytes'])} to and from memory",
        f"  sent: {', '.join(kinds) or 'nothing'}",
        *([f"  {unknown} loop(s) of unknown length are counted once"] if unknown else []),
        f"a step takes at least {_milliseconds(times['step_s'])}, bound by {times['bound_by']}; "
        f"MFU at most {times['mfu']:.0%}",
        f"  {', '.join(parts)}",
    ]


def _milliseconds(duration_s: float) -> str:
    return f"{duration_s * 1e3:{'.3g' if duration_s < 1 else ',.0f'}} ms"
