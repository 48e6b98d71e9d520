"""What a compiled program does on one device, read from its HLO text.

The compiler's own cost analysis counts the body of a loop once, leaves out the products that a
collective is fused with, and takes buffers on the chip for memory; so this reads the text.
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
_CALLS = ("while", "conditional", "call", "async-start")
# Bookkeeping, which moves no bytes; what is called is counted where it is.
_FREE = (*_CALLS, "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "async-update")
_FREE += ("async-done", "optimization-barrier", "after-all", "partition-id", "replica-id")
_FREE_CALLS = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast)"')


class Instruction(NamedTuple):
    """A line of HLO."""

    name: str
    op: str
    shape: str
    operands: tuple[str, ...]
    text: str
    """What follows the opening bracket: operands and attributes."""
    is_root: bool


Computation = dict[str, Instruction]


class Collectives(NamedTuple):
    """All collectives of a kind, in one run of the program."""

    num: int
    num_bytes: float
    """Sent by one device, as the best ring or mesh algorithm does."""


class Costs(NamedTuple):
    """What one device does in one run of the program."""

    flops: float
    """Of the matrix products."""
    memory_bytes: float
    """Read from and written to the main memory, each operand and result of an operation once."""
    collectives: dict[str, Collectives]
    num_unknown_loops: int
    """Loops whose length is not in the text; their bodies are counted once."""


def read_costs(text: str) -> Costs:
    """Adds up a whole program, the body of each loop as often as it runs.

    Args:
      text: `jax.stages.Compiled.as_text()`, after partitioning.
    """
    program, entry = parse(text)
    flops, memory_bytes, num_unknown = 0.0, 0.0, 0
    found: dict[str, tuple[str, int, float]] = {}

    def visit(name: str, times: int, fused: bool) -> None:
        nonlocal flops, memory_bytes, num_unknown
        inside = program[name]
        for it in inside.values():
            flops += times * product_flops(it, inside)
            called = [n for group in _CALLED.findall(it.text) for n in _NAME.findall(group)]
            if not fused:
                memory_bytes += times * _traffic(it, inside, program)
            kind = it.op.removesuffix("-start")
            if kind in _KINDS:
                # The TPU compiler fuses a collective that is under way with each product that it
                # overlaps: one channel is one collective, however often it is written.
                key = _find(r"channel_id=(\d+)", it.text) or f"{name}/{it.name}"
                if "all-reduce-scatter" in name:
                    kind = "reduce-scatter"
                sent = sent_bytes(kind, sum(_size(inside[n].shape) for n in it.operands), it.text)
                found[key] = max(found.get(key, (kind, 0, 0.0)), (kind, times, times * sent))
            repeats = trip_count(it, inside, program) if it.op == "while" else 1
            num_unknown += repeats is None
            for other in called:
                visit(other, times * (repeats or 1), fused or it.op not in _CALLS)

    visit(entry, 1, False)
    collectives: dict[str, Collectives] = {}
    for kind, times, num_bytes in sorted(found.values()):
        before = collectives.get(kind, Collectives(0, 0.0))
        collectives[kind] = Collectives(before.num + times, before.num_bytes + num_bytes)
    return Costs(flops, memory_bytes, collectives, num_unknown)


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a module by name, and the name of the one that it starts with."""
    program: dict[str, Computation] = {}
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


def trip_count(
    loop: Instruction, inside: Computation, program: dict[str, Computation]
) -> int | None:
    """How often the body of a `while` runs, or None where the text has no number.

    XLA writes the number down on CPU and GPU. Its TPU compiler does not: there the counter starts
    at a constant, grows by one, and is compared with another.
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
    start = _constant(inside[loop.operands[0]].operands[index], inside)
    if following.op != "add" or not steps or start is None:
        return None
    return max(math.ceil((int(bound.text.split(")")[0]) - start) / steps[0]), 0)


def product_flops(it: Instruction, inside: Computation) -> float:
    """Two for each multiply-add of a matrix product, else 0."""
    if it.op == "convolution":
        return 2 * _num_products(it, inside)
    contracted = _find(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([^}\]]*)', it.text)
    if it.op not in ("dot", "custom-call") or not contracted:
        return 0
    lhs, out = _dims(inside[it.operands[0]].shape), _dims(it.shape)
    return 2 * math.prod(out) * math.prod(lhs[int(d)] for d in re.findall(r"\d+", contracted))


def _num_products(it: Instruction, inside: Computation) -> int:
    # The TPU compiler writes products as convolutions, and dims that are batched or contracted
    # besides as a window that touches each index once: it multiplies by their size.
    names = re.split("_|->", _find(r"dim_labels=([\w?]+->\w+)", it.text))
    shapes = [inside[name].shape for name in it.operands] + [it.shape]
    lhs, rhs, out = (
        dict(zip(n, _dims(s), strict=True)) for n, s in zip(names, shapes, strict=True)
    )
    window = [max(lhs[axis], rhs[axis], out[axis]) for axis in out if axis.isdigit()]
    return out["b"] * out["f"] * rhs["i"] * math.prod(window)


def sent_bytes(kind: str, operand_bytes: float, text: str) -> float:
    """What one device sends in a collective, from the size of its own operand."""
    n = group_size(text)
    share = {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1, "collective-permute": 1}
    return operand_bytes * share.get(kind, (n - 1) / n)


def group_size(text: str) -> int:
    """Devices that take part together, in any of the three ways in which HLO writes them."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return 1


def _traffic(it: Instruction, inside: Computation, program: dict[str, Computation]) -> float:
    if it.op in _FREE or _FREE_CALLS.search(it.text):
        return 0
    if it.op.endswith("-done"):
        return _size(it.shape, memory_only=True)
    if it.op == "fusion":
        return _fusion_traffic(program[_CALLED.findall(it.text)[0].strip("%")])
    read = [inside[name].shape for name in it.operands]
    if it.op in ("dynamic-slice", "gather"):
        read = [it.shape, *read[1:]]
    if it.op == "dynamic-update-slice":
        return 2 * _size(read[1], memory_only=True)
    written = "" if it.op.endswith("-start") else it.shape
    return sum(_size(shape, memory_only=True) for shape in [*read, written])


def _fusion_traffic(inside: Computation) -> float:
    """What is read of each parameter, and what is written; not what is only passed through."""
    root = _root(inside)
    outs = [inside[name] for name in root.operands] if root.op == "tuple" else [root]
    read: dict[str, list[Instruction]] = defaultdict(list)
    for it in inside.values():
        for name in it.operands if it.op != "tuple" else ():
            read[name].append(it)
    total = sum(_size(out.shape, memory_only=True) for out in outs if out.op != "parameter")
    for it in inside.values():
        if it.op == "parameter" and (users := read[it.name]):
            sliced = all(user.op in ("dynamic-slice", "gather") for user in users)
            shapes = [user.shape for user in users] if sliced else [it.shape]
            in_memory = _size(it.shape, memory_only=True) > 0
            total += sum(map(_size, shapes)) if in_memory else 0
    return total


def _find(pattern: str, text: str) -> str:
    """The group of the pattern where it is first met, or nothing."""
    match = re.search(pattern, text)
    return match[1] if match else ""


def _root(inside: Computation) -> Instruction:
    return next(it for it in inside.values() if it.is_root)


def _origin(name: str, inside: Computation) -> Instruction:
    it = inside[name]
    return _origin(it.operands[0], inside) if it.op in ("copy", "bitcast") else it


def _constant(name: str, inside: Computation) -> int | None:
    it = _origin(name, inside)
    return int(it.text.split(")")[0]) if it.op == "constant" else None


def _dims(shape: str) -> list[int]:
    match = _SHAPE.search(shape)
    return [int(size) for size in match[2].split(",") if size] if match else []


def _size(shape: str, memory_only: bool = False) -> float:
    """Bytes of a shape, or of all parts of a tuple; `memory_only` leaves out the chip's buffers."""
    total = 0.0
    for dtype, dims, layout in _SHAPE.findall(shape):
        if memory_only and "S(" in layout:
            continue
        bits = 8 if dtype == "pred" else int(_find(r"(\d+)", dtype))
        total += math.prod(int(size) for size in dims.split(",") if size) * bits / 8
    return total
