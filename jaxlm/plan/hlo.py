"""FLOPs, memory traffic and collectives of a compiled program, read from its HLO text.

XLA's cost analysis cannot be used: it counts the body of a loop once, omits products fused with a
collective, and counts on-chip buffers as memory.
"""

import math
import re
from collections import defaultdict
from typing import NamedTuple

from jaxlm.errors import InputError

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:calls|body|to_apply|branch_computations)=(\{[^}]*\}|%[\w.\-]+)")
_NAME = re.compile(r"%([\w.\-]+)")
_TRIPS = r'known_trip_count":\{"n":"(\d+)"'
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
CALLS = ("while", "conditional", "call", "async-start")
# Bookkeeping, which moves no bytes; called computations are counted separately.
FREE = (*CALLS, "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "async-update")
FREE += ("async-done", "optimization-barrier", "after-all", "partition-id", "replica-id")
_FREE_CALLS = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast)"')


class Instruction(NamedTuple):
    """One instruction of HLO."""

    name: str
    op: str
    shape: str
    operands: tuple[str, ...]
    text: str
    """The text after the opening bracket: operands and attributes."""
    is_root: bool


Computation = dict[str, Instruction]
Program = dict[str, Computation]


class Collectives(NamedTuple):
    """All collectives of a kind, in one run of the program."""

    num: int
    num_bytes: float
    """Bytes that one device sends with the best ring or mesh algorithm."""


class Costs(NamedTuple):
    """The work of one device in one run of the program."""

    flops: float
    """FLOPs of the matrix products."""
    memory_bytes: float
    """Main memory traffic: each operand is read once, each result written once (bytes)."""
    collectives: dict[str, Collectives]
    num_unknown_loops: int
    """Loops without a known trip count; their bodies are counted once."""


def read_costs(text: str) -> Costs:
    """The costs of a whole program; the body of a loop counts once per iteration.

    Args:
      text: `jax.stages.Compiled.as_text()`, after partitioning.
    """
    program, entry = parse(text)
    flops, memory_bytes, num_unknown = 0.0, 0.0, 0
    found: dict[str, tuple[str, int, float]] = {}

    def visit(name: str, times: int, fused: bool) -> None:
        nonlocal flops, memory_bytes, num_unknown
        computation = program[name]
        for instr in computation.values():
            flops += times * product_flops(instr, computation)
            if not fused:
                memory_bytes += times * traffic(instr, computation, program)
            kind = instr.op.removesuffix("-start")
            if kind in _KINDS:
                # The TPU compiler repeats an asynchronous collective in each product that it
                # overlaps with: count each channel once.
                key = _find(r"channel_id=(\d+)", instr.text) or f"{name}/{instr.name}"
                if "all-reduce-scatter" in name:
                    kind = "reduce-scatter"
                operand_bytes = sum(_size(computation[n].shape) for n in instr.operands)
                sent = sent_bytes(kind, operand_bytes, instr.text)
                found[key] = max(found.get(key, (kind, 0, 0.0)), (kind, times, times * sent))
            repeats = trip_count(instr, computation, program) if instr.op == "while" else 1
            num_unknown += repeats is None
            for other in called_by(instr):
                visit(other, times * (repeats or 1), fused or instr.op not in CALLS)

    visit(entry, 1, False)
    collectives: dict[str, Collectives] = {}
    for kind, times, num_bytes in sorted(found.values()):
        before = collectives.get(kind, Collectives(0, 0.0))
        collectives[kind] = Collectives(before.num + times, before.num_bytes + num_bytes)
    return Costs(flops, memory_bytes, collectives, num_unknown)


def parse(text: str) -> tuple[Program, str]:
    """The computations of a module by name, and the name of its entry computation."""
    program: Program = {}
    entry, current = "", {}
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = program[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif match := _LINE.match(line):
            root, name, shape, op, rest = match.groups()
            operands = tuple(_NAME.findall(re.split(r"\)(?:, |$)", rest, maxsplit=1)[0]))
            current[name] = Instruction(name, op, shape, operands, rest, bool(root))
    if not entry:
        raise InputError("HLO: found no ENTRY, expected the text of a compiled module")
    return program, entry


def trip_count(loop: Instruction, computation: Computation, program: Program) -> int | None:
    """The iterations of a `while`, or None if they are not in the text.

    XLA writes the trip count on CPU and GPU. The TPU compiler does not: derive it from the
    counter, which starts at a constant, grows by a constant and is compared with a third.
    """
    if known := _find(_TRIPS, loop.text):
        return int(known)
    condition, body = (
        program[_find(rf"{part}=%?([\w.\-]+)", loop.text)] for part in ("condition", "body")
    )
    test = _root(condition)
    if test.op != "compare" or "direction=LT" not in test.text:
        return None
    counter, bound = (condition[name] for name in test.operands)
    if counter.op != "get-tuple-element" or bound.op != "constant":
        return None
    index = int(_find(r"index=(\d+)", counter.text))
    following = _origin(_root(body).operands[index], body)
    steps = [n for name in following.operands if (n := _constant(name, body)) is not None]
    start = _constant(computation[loop.operands[0]].operands[index], computation)
    if following.op != "add" or not steps or start is None:
        return None
    return max(math.ceil((int(bound.text.split(")")[0]) - start) / steps[0]), 0)


def product_flops(instr: Instruction, computation: Computation) -> float:
    """FLOPs of a matrix product, two for each multiply-add; 0 for another instruction."""
    if instr.op == "convolution":
        return 2 * _num_products(instr, computation)
    contracted = _find(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([^}\]]*)', instr.text)
    if instr.op not in ("dot", "custom-call") or not contracted:
        return 0
    lhs, out = _dims(computation[instr.operands[0]].shape), _dims(instr.shape)
    return 2 * math.prod(out) * math.prod(lhs[int(d)] for d in re.findall(r"\d+", contracted))


def _num_products(instr: Instruction, computation: Computation) -> int:
    # The TPU compiler writes products as convolutions. Further batch or contracting dims become a
    # window that touches each index once: multiply by their sizes.
    names = re.split("_|->", _find(r"dim_labels=([\w?]+->\w+)", instr.text))
    shapes = [computation[name].shape for name in instr.operands] + [instr.shape]
    lhs, rhs, out = (
        dict(zip(n, _dims(s), strict=True)) for n, s in zip(names, shapes, strict=True)
    )
    window = [max(lhs[axis], rhs[axis], out[axis]) for axis in out if axis.isdigit()]
    return out["b"] * out["f"] * rhs["i"] * math.prod(window)


def sent_bytes(kind: str, operand_bytes: float, text: str) -> float:
    """Bytes that one device sends in a collective with this operand."""
    n = group_size(text)
    share = {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1, "collective-permute": 1}
    return operand_bytes * share.get(kind, (n - 1) / n)


def group_size(text: str) -> int:
    """The number of devices in a replica group, from any of HLO's three notations."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return 1


def called_by(instr: Instruction) -> list[str]:
    """Names of the computations that an instruction calls."""
    return [name for group in _CALLED.findall(instr.text) for name in _NAME.findall(group)]


def traffic(instr: Instruction, computation: Computation, program: Program) -> float:
    """Bytes of main memory that an instruction reads and writes; those of a call are its body's."""
    if instr.op in FREE or _FREE_CALLS.search(instr.text):
        return 0
    if instr.op.endswith("-done"):
        return _size(instr.shape, memory_only=True)
    if instr.op == "fusion":
        return _fusion_traffic(program[called_by(instr)[0]])
    read = [computation[name].shape for name in instr.operands]
    if instr.op in ("dynamic-slice", "gather"):
        read = [instr.shape, *read[1:]]
    if instr.op == "dynamic-update-slice":
        return 2 * _size(read[1], memory_only=True)
    written = "" if instr.op.endswith("-start") else instr.shape
    return sum(_size(shape, memory_only=True) for shape in [*read, written])


def _fusion_traffic(computation: Computation) -> float:
    """Bytes read of each parameter plus bytes written; parameters passed through count as 0."""
    root = _root(computation)
    outs = [computation[name] for name in root.operands] if root.op == "tuple" else [root]
    read: dict[str, list[Instruction]] = defaultdict(list)
    for instr in computation.values():
        for name in instr.operands if instr.op != "tuple" else ():
            read[name].append(instr)
    total = sum(_size(out.shape, memory_only=True) for out in outs if out.op != "parameter")
    for instr in computation.values():
        if instr.op == "parameter" and (users := read[instr.name]):
            sliced = all(user.op in ("dynamic-slice", "gather") for user in users)
            shapes = [user.shape for user in users] if sliced else [instr.shape]
            in_memory = _size(instr.shape, memory_only=True) > 0
            total += sum(map(_size, shapes)) if in_memory else 0
    return total


def _find(pattern: str, text: str) -> str:
    """The group of the first match of the pattern, or an empty string."""
    match = re.search(pattern, text)
    return match[1] if match else ""


def _root(computation: Computation) -> Instruction:
    return next(instr for instr in computation.values() if instr.is_root)


def _origin(name: str, computation: Computation) -> Instruction:
    instr = computation[name]
    return _origin(instr.operands[0], computation) if instr.op in ("copy", "bitcast") else instr


def _constant(name: str, computation: Computation) -> int | None:
    instr = _origin(name, computation)
    return int(instr.text.split(")")[0]) if instr.op == "constant" else None


def _dims(shape: str) -> list[int]:
    match = _SHAPE.search(shape)
    return [int(size) for size in match[2].split(",") if size] if match else []


def _size(shape: str, memory_only: bool = False) -> float:
    """Bytes of a shape or of all parts of a tuple; `memory_only` leaves out on-chip buffers."""
    total = 0.0
    for dtype, dims, layout in _SHAPE.findall(shape):
        if memory_only and "S(" in layout:
            continue
        bits = 8 if dtype == "pred" else int(_find(r"(\d+)", dtype))
        total += math.prod(int(size) for size in dims.split(",") if size) * bits / 8
    return total
