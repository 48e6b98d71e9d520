"""What `deterministic` changes in the step of `configs/180m.py`, compiled for an H100 without one.

    uv run --extra cuda-plan python benchmarks/determinism.py [layers] [plain]

`plain` takes XLA's own gradient of the embedding's lookup, as on a CPU. The account is the
compiler's: bytes of operands and results over 3.35 TB/s, or FLOPs over 989 TFLOP/s, of each
kernel, times the iterations of loops. Without a GPU, nothing is chosen by time: where
`deterministic` is off, all products are Triton's.
"""

import math
import os
import re
import runpy
import sys
from collections import defaultdict
from dataclasses import replace

os.environ |= {"JAX_PLATFORMS": "", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}

from jax._src.cudnn import fused_attention_stablehlo

from jaxlm.config import Config
from jaxlm.device import model
from jaxlm.device.embedding import plain_lookup
from jaxlm.plan import hlo
from jaxlm.plan.ahead import find_devices, lower_ahead

BYTES_PER_S, FLOPS_PER_S, SHARED_BYTES = 3.35e12, 989e12, 49152
Kernels = dict[str, list[float]]
"""Kind -> launches, bytes moved and seconds at least, of a step."""


def kind_of(instr: hlo.Instruction, inside: list[hlo.Instruction]) -> str:
    """What a kernel computes, as a row of the table."""
    ops = {each.op for each in inside} | {instr.op}
    if "fmha" in instr.text:
        return "attention (cuDNN)"
    if "cublas" in instr.text or "dot" in ops:
        return "products"
    return next((op for op in ("scatter", "sort") if op in ops), "other")


def sort_passes(shape: str) -> tuple[int, float]:
    """Kernels of XLA's bitonic sort of a shape, and the bytes that they move at most.

    Distances below a tile, as much as fits into shared memory, take one kernel for a stage.
    """
    parts = re.findall(r"(?:s|u|f|bf)(\d+)\[(\d+)\]", shape)
    num, item_bytes = int(parts[0][1]), sum(int(bits) for bits, _ in parts) // 8
    stages = math.ceil(math.log2(num))
    tile = int(math.log2(min(4096, SHARED_BYTES // item_bytes)))
    beyond = max(stages - tile, 0)
    passes = beyond * (beyond + 1) // 2 + beyond + 1
    return passes, passes * 2.0 * num * item_bytes


def kernels_of(text: str) -> Kernels:
    """The kernels of a compiled program, by kind; each sort with all of its passes."""
    program, entry = hlo.parse(text)
    found: Kernels = defaultdict(lambda: [0, 0, 0])

    def visit(name: str, times: int) -> None:
        computation = program[name]
        for instr in computation.values():
            called = hlo.called_by(instr)
            if instr.op in hlo.CALLS:
                trips = hlo.trip_count(instr, computation, program) if instr.op == "while" else 1
                for other in called:
                    visit(other, times * (trips or 1))
            elif instr.op not in hlo.FREE:
                inside = [
                    (each, program[name]) for name in called for each in program[name].values()
                ]
                kind = kind_of(instr, [each for each, _ in inside])
                launches, moved = 1, hlo.traffic(instr, computation, program)
                if kind == "sort":
                    launches, moved = sort_passes(instr.shape)
                moved -= sum(map(float, re.findall(r", s8\[(\d+)\]", instr.shape)))  # workspace
                products = [(instr, computation), *inside]
                flops = sum(hlo.product_flops(*product) for product in products)
                least_s = max(moved / BYTES_PER_S, flops / FLOPS_PER_S)
                for index, value in enumerate((launches, moved, least_s)):
                    found[kind][index] += times * value

    visit(entry, 1)
    return found


def main() -> None:
    """Prints a row for each kind of kernel."""
    # Lowers to cuDNN's attention, as on a GPU, though cuDNN is not here.
    fused_attention_stablehlo.check_cudnn_version = lambda: 91002
    fused_attention_stablehlo.check_compute_capability = lambda *_: True
    if "plain" in sys.argv:
        model.lookup_for = lambda platform: plain_lookup
    config: Config = runpy.run_path("configs/180m.py")["config"]
    layers = next((int(arg) for arg in sys.argv[1:] if arg.isdigit()), config.model.num_layers)
    config = replace(config, num_microbatches=4, model=replace(config.model, num_layers=layers))
    devices = find_devices("cuda", "1x1x1")
    programs = []
    for deterministic in (True, False):
        lowered, _ = lower_ahead(replace(config, deterministic=deterministic), devices)
        programs.append(kernels_of(lowered.compile().as_text() or ""))
    print(f"{layers} layers; launches, GB moved, ms at least (sorts: at most): on | off")
    total = [[sum(rows[i] for rows in found.values()) for i in range(3)] for found in programs]
    kinds = sorted(programs[0].keys() | programs[1].keys())
    rows = [(kind, *(found.get(kind, [0, 0, 0]) for found in programs)) for kind in kinds]
    for kind, *pair in [*rows, ("all", *total)]:
        cells = [
            f"{launches:7,.0f} {moved / 1e9:8.1f} {1e3 * least_s:7.1f}"
            for launches, moved, least_s in pair
        ]
        print(f"{kind:20s} {' | '.join(cells)}")


if __name__ == "__main__":
    main()
