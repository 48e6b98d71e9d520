"""`jaxlm doctor`: versions, devices, memory, caches and disk of this machine."""

import importlib.util
import os
import platform
import shutil
from pathlib import Path

import jax

from jaxlm.compilation_cache import compiled_bytes
from jaxlm.corpus.cache import list_caches
from jaxlm.extras import MODULES, versions
from jaxlm.files.cache import cache_root
from jaxlm.tracking.console import format_bytes
from jaxlm.tracking.throughput import peak_flops


def examine() -> list[str]:
    """The report, as lines of text."""
    lines = [f"python {platform.python_version()} on {platform.platform()}"]
    lines += [f"{name} {version}" for name, version in versions().items()]
    installed = [extra for extra, module in MODULES.items() if importlib.util.find_spec(module)]
    lines.append(f"extras: {', '.join(installed) or 'none'}")
    devices = jax.devices()
    peak = peak_flops(devices[0].device_kind)
    known = f", {peak / 1e12:.0f} TFLOP/s each" if peak else ""
    lines.append(f"devices: {len(devices)} x {devices[0].device_kind}{known}")
    stats = devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        lines.append(f"device memory: {format_bytes(stats['bytes_limit'])}")
    lines.append(f"cores: {os.cpu_count()}")
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        lines.append(f"memory: {format_bytes(memory)}")
    held = format_bytes(compiled_bytes(None) + sum(e["num_bytes"] for e in list_caches()))
    lines.append(f"cache: {cache_root(None)} holds {held}; `jaxlm cache list` lists it")
    here = Path.cwd()
    lines.append(f"disk: {format_bytes(shutil.disk_usage(here).free)} free in {here}")
    return lines
