"""`jaxlm plan`: what is read from a compiled program, and what follows from it."""

import dataclasses
import importlib.util
import json
import math
import re

import jax
import jax.numpy as jnp
import pytest
import tiny_model
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm import __main__ as cli
from jaxlm.config import Config, MeshConfig, ModelConfig
from jaxlm.launch import run_main
from jaxlm.plan import plan as planning
from jaxlm.plan.ahead import examine, examine_step
from jaxlm.plan.hlo import group_size, read_costs
from jaxlm.plan.plan import (
    Settings,
    assess,
    describe,
    find_changes,
    largest_batch,
    parse_topology,
    save_interval,
)
from jaxlm.plan.plan import plan as make_plan
from jaxlm.training.setup import set_up

CONFIG = Config(
    model=tiny_model.MODEL,
    optim=tiny_model.OPTIM,
    num_steps=10,
    batch_size=16,
    seq_len=8,
    eval_interval=5,
)

# --- HLO, compiled here for eight devices


def training_loop(num_steps: int) -> str:
    """Steps of a layer of 16 x 16 on 32 rows, 4 a device: two products and a sum over devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def step(w: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
        return w - jnp.einsum("bi,bo->io", x, jnp.tanh(x @ w)), None

    whole = NamedSharding(mesh, P())
    w = jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=whole)
    rows = NamedSharding(mesh, P(None, "data"))
    x = jax.ShapeDtypeStruct((num_steps, 32, 16), jnp.float32, sharding=rows)
    loop = jax.jit(lambda w, x: jax.lax.scan(step, w, x)[0], out_shardings=whole)
    return loop.lower(w, x).compile().as_text() or ""


@pytest.mark.parametrize("num_steps", [3, 5])
def test_a_loop_counts_as_often_as_it_runs(num_steps: int):
    costs = read_costs(training_loop(num_steps))
    assert costs.flops == num_steps * 2 * (2 * 4 * 16 * 16)
    (kind, found) = next(iter(costs.collectives.items()))
    assert len(costs.collectives) == 1 and kind == "all-reduce" and found.num == num_steps
    assert found.num_bytes == num_steps * (2 * 7 / 8) * (16 * 16 * 4)
    assert costs.num_unknown_loops == 0


def test_a_loop_of_unknown_length_is_counted_once_and_said():
    text = training_loop(5)
    assert "known_trip_count" in text
    text = re.sub(r'"known_trip_count":\{"n":"\d+"\}', "", text)
    costs = read_costs(text.replace("direction=LT", "direction=NE"))  # nor by its condition
    assert costs.num_unknown_loops == 1
    assert costs.flops == 2 * (2 * 4 * 16 * 16) and costs.collectives["all-reduce"].num == 1


def test_memory_traffic_is_near_that_of_the_compiler():
    compiled = jax.jit(lambda a, b: jnp.sin(a @ b)).lower(*[jnp.ones((256, 256))] * 2).compile()
    costs = read_costs(compiled.as_text() or "")
    analysis = compiled.cost_analysis()
    assert costs.memory_bytes == pytest.approx(analysis["bytes accessed"], rel=0.01)
    assert costs.flops == 2 * 256**3 == pytest.approx(analysis["flops"], rel=0.01)


# In the words of the TPU compiler: no trip count; a collective that is written once for each
# product that overlaps it; a product as a convolution; buffers on the chip, S(1).
TPU = """HloModule jit_train_step, is_scheduled=true

%add (l: f32[], r: f32[]) -> f32[] {
  %l = f32[] parameter(0)
  %r = f32[] parameter(1)
  ROOT %sum = f32[] add(%l, %r)
}

%start (p0: bf16[4,64]) -> bf16[4,64] {
  %p0 = bf16[4,64]{1,0:T(8,128)} parameter(0)
  %all-gather.1 = bf16[16,64]{1,0} all-gather(%p0), channel_id=7, replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_0'}, dimensions={0}
  ROOT %custom-call.1 = bf16[4,64]{1,0} custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%done (p1: bf16[4,64]) -> bf16[16,64] {
  %p1 = bf16[4,64]{1,0:T(8,128)} parameter(0)
  ROOT %all-gather.2 = bf16[16,64]{1,0:T(8,128)S(1)} all-gather(%p1), channel_id=7, replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_0'}, dimensions={0}
}

%all-reduce-scatter.1 (p2: f32[64,64]) -> f32[16,64] {
  %p2 = f32[64,64]{1,0:T(8,128)S(1)} parameter(0)
  %all-reduce.1 = f32[64,64]{1,0} all-reduce(%p2), channel_id=9, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %slice = f32[16,64]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={16,64}
}

%product (p3: bf16[8,32,6,16], p4: bf16[8,32,6,16]) -> f32[8,6,32,32] {
  %p3 = bf16[8,32,6,16]{3,2,1,0:T(8,128)} parameter(0)
  %p4 = bf16[8,32,6,16]{3,2,1,0:T(8,128)} parameter(1)
  ROOT %convolution.1 = f32[8,6,32,32]{3,2,1,0:T(8,128)S(1)} convolution(%p3, %p4), window={size=8x6 stride=7x5 lhs_dilate=8x6}, dim_labels=0b1f_0o1i->01bf
}

%body (state: (s32[], f32[64,64])) -> (s32[], f32[64,64]) {
  %state = (s32[]{:T(128)}, f32[64,64]{1,0:T(8,128)S(1)}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%state), index=0
  %copy.1 = s32[]{:T(128)} copy(%count)
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%copy.1, %two), metadata={op_name="while/body/add"}
  %x = f32[64,64]{1,0:T(8,128)S(1)} get-tuple-element(%state), index=1
  %scattered = f32[16,64]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %out = (s32[]{:T(128)}, f32[64,64]{1,0:T(8,128)S(1)}) tuple(%next, %x)
}

%condition (state.1: (s32[], f32[64,64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(9)
  %state.1 = (s32[]{:T(128)}, f32[64,64]{1,0:T(8,128)S(1)}) parameter(0)
  %count.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%count.1, %limit), direction=LT
}

ENTRY %main (a: bf16[4,64], q: bf16[8,32,6,16], w: f32[64,64]) -> f32[64,64] {
  %a = bf16[4,64]{1,0:T(8,128)} parameter(0)
  %q = bf16[8,32,6,16]{3,2,1,0:T(8,128)} parameter(1)
  %w = f32[64,64]{1,0:T(8,128)S(1)} parameter(2)
  %one = s32[]{:T(128)} constant(1)
  %begin = s32[]{:T(128)} copy(%one)
  %f.1 = bf16[4,64]{1,0} fusion(%a), kind=kCustom, calls=%start
  %f.2 = bf16[16,64]{1,0:T(8,128)S(1)} fusion(%f.1), kind=kCustom, calls=%done
  %scores = f32[8,6,32,32]{3,2,1,0:T(8,128)S(1)} fusion(%q, %q), kind=kOutput, calls=%product
  %tuple.1 = (s32[]{:T(128)}, f32[64,64]{1,0:T(8,128)S(1)}) tuple(%begin, %w)
  %while.1 = (s32[]{:T(128)}, f32[64,64]{1,0:T(8,128)S(1)}) while(%tuple.1), condition=%condition, body=%body
  ROOT %result = f32[64,64]{1,0:T(8,128)S(1)} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501 - as compilers write it


def test_what_the_tpu_compiler_writes():
    costs = read_costs(TPU)
    assert costs.num_unknown_loops == 0
    assert costs.flops == 2 * 8 * 6 * 32 * 32 * 16
    assert costs.collectives["all-gather"] == (1, 3 * (4 * 64 * 2))  # one channel, one gather
    times = 4  # 1, 3, 5, 7
    assert costs.collectives["reduce-scatter"] == (times, times * 3 / 4 * (64 * 64 * 4))
    assert set(costs.collectives) == {"all-gather", "reduce-scatter"}
    # The scores and the gathered array stay on the chip: q twice, a twice and what starts, slices.
    in_memory = 2 * (8 * 32 * 6 * 16 * 2) + 3 * (4 * 64 * 2) + times * (16 * 64 * 4)
    assert costs.memory_bytes == pytest.approx(in_memory, abs=100)  # and counters


def test_another_program_has_other_costs():
    base = read_costs(TPU)
    longer = read_costs(TPU.replace("constant(9)", "constant(10)"))
    assert longer.collectives["reduce-scatter"].num == 5
    two_channels = read_costs(TPU.replace("channel_id=7", "channel_id=8", 1))
    assert two_channels.collectives["all-gather"].num == 2
    off_chip = read_costs(TPU.replace("T(8,128)S(1)} convolution", "T(8,128)} convolution"))
    assert off_chip.memory_bytes - base.memory_bytes == 8 * 6 * 32 * 32 * 4
    assert read_costs(TPU.replace("direction=LT", "direction=NE")).num_unknown_loops == 1
    with pytest.raises(ValueError, match="found no ENTRY"):
        read_costs(TPU.replace("ENTRY ", ""))


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[4,2]<=[8]", 2),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=4], device_ids=([4,4]T(1,0)) {'axis_0'}", 4),
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_0','axis_1'}", 16),
        ("mesh['axis_0'=8] {'axis_0':(1)4}", 4),
    ],
)
def test_group_size(groups: str, size: int):
    assert group_size(f"%x), channel_id=1, replica_groups={groups}, dimensions={{0}}") == size


# --- the step


@pytest.mark.parametrize(
    ("mesh", "num_microbatches"),
    [((2, 2, 2), 2), pytest.param((8, 1, 1), 1, marks=pytest.mark.slow)],
)
def test_it_is_the_step_of_the_trainer(mesh: tuple[int, ...], num_microbatches: int):
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(tiny_model.MODEL, num_layers=1),
        optim=dataclasses.replace(tiny_model.OPTIM, name="adamw"),
        mesh=MeshConfig(*mesh),
        num_microbatches=num_microbatches,
        batch_size=32,
    )
    batch = tiny_model.host_batch(0, 32, 8)
    parts = set_up(config, batches=lambda index, rows: {k: v[rows] for k, v in batch.items()})
    trained = read_costs(parts.compiled.as_text())
    found = examine_step(config, jax.devices())
    assert found["costs"]["flops"] == trained.flops > 0
    assert found["costs"]["memory_bytes"] == trained.memory_bytes > 0
    kinds = {kind: tuple(c.values()) for kind, c in found["costs"]["collectives"].items()}
    assert kinds == trained.collectives != {}
    sizes = parts.compiled.memory_analysis()
    assert found["memory"]["temporaries"] == sizes.temp_size_in_bytes
    state = sum(found["memory"][kind] for kind in ("params", "optimizer", "batch_and_padding"))
    assert state == sizes.argument_size_in_bytes
    assert found["memory"]["batch_and_padding"] < 4096
    other = examine_step(dataclasses.replace(config, num_microbatches=4), jax.devices())
    assert other["costs"]["memory_bytes"] != trained.memory_bytes
    json.dumps(found)


def test_a_mesh_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch_size: found 12"):
        examine_step(dataclasses.replace(CONFIG, batch_size=12), jax.devices())
    with pytest.raises(ValueError, match="mesh: data 3 x fsdp 1 x tensor 1 makes 3 devices"):
        examine_step(dataclasses.replace(CONFIG, mesh=MeshConfig(data=3)), jax.devices())


# --- names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v5e-1", ("tpu", "v5e:1x1")),
        ("v5e-8", ("tpu", "v5e:2x4")),
        ("v5e-16", ("tpu", "v5e:4x4")),
        ("v6e-256", ("tpu", "v6e:16x16")),
        ("v5p-8", ("tpu", "v5p:2x2x1")),
        ("v5p-16", ("tpu", "v5p:2x2x2")),
        ("v5p-128", ("tpu", "v5p:4x4x4")),
        ("v5p-256", ("tpu", "v5p:4x4x8")),
        ("v5e:4x8", ("tpu", "v5e:4x8")),
        ("h100x8", ("cuda", "1x1x8")),
    ],
)
def test_topologies(name: str, expected: tuple[str, str]):
    assert parse_topology(name) == expected


@pytest.mark.parametrize("name", ["v5e", "v5e-12", "v5e-2", "v5p-4", "v9-8", "h100x9", "", "v5e:4"])
def test_unknown_topologies(name: str):
    with pytest.raises(ValueError, match="^--topology: found .*expected v5e-N .* or h100x1"):
        parse_topology(name)


@pytest.mark.parametrize(
    "wrong", [{"save_cost_s": 1.0}, {"save_cost_s": -1.0, "mtbf_hours": 1.0}, {"max_compiles": 0}]
)
def test_wrong_settings(wrong: dict):
    with pytest.raises(ValueError, match="^--.*: found .*expected"):
        Settings("v5e-1", **wrong)


# --- what follows: a device whose memory is the rows at once, and the state over fsdp


GIB = 2**30


def made_up(config: Config, row_bytes: float = GIB, state_bytes: float = 4 * GIB) -> dict:
    """What the compiler would say of four v5e (15.75 GiB): less with remat, state split by fsdp."""
    if config.micro_batch_size % 4:
        raise ValueError("batch_size: the mesh does not divide it")
    fsdp = 4 if config.mesh.fsdp == -1 else 1
    rows = (
        config.batch_size
        / config.num_microbatches
        / 4
        * (1 if config.model.remat == "none" else 0.25)
        * (1 if config.loss_chunks == 1 else 0.9)
    )
    flops, seconds = 1e9, 1 + config.num_microbatches / 10
    seconds += (config.model.remat != "none") + (config.loss_chunks > 1) / 20
    return {
        "device_kind": "TPU v5 lite",
        "mesh": {"data": 4 // fsdp, "fsdp": fsdp, "tensor": 1},
        "memory": {"params": int(state_bytes / fsdp), "temporaries": int(rows * row_bytes)},
        "costs": {
            "flops": flops,
            "memory_bytes": seconds * 819e9,
            "collectives": {"all-reduce": {"num": 2, "num_bytes": 100e9}},
            "num_unknown_loops": 0,
        },
    }


class Compiler:
    """Counts what it compiles."""

    def __init__(self, limit: int = 16, **sizes: float):
        self.limit, self.sizes, self.asked = limit, sizes, []

    def __call__(self, config: Config) -> dict | None:
        self.asked.append(config)
        if len(self.asked) > self.limit:
            return None
        return assess(config, made_up(config, **self.sizes))


def test_the_roofline_by_hand():
    found = made_up(CONFIG)
    times = assess(CONFIG, found)["roofline"]
    assert times["memory_s"] == pytest.approx(1.1) and times["interconnect_s"] == 0.5
    assert times["bound_by"] == "memory" and times["step_s"] == times["memory_s"]
    found["costs"]["flops"] = 2 * 197e12
    times = assess(CONFIG, found)["roofline"]
    assert times["bound_by"] == "compute" and times["compute_s"] == 2
    found["costs"]["collectives"]["all-reduce"]["num_bytes"] = 600e9
    assert assess(CONFIG, found)["roofline"]["bound_by"] == "interconnect"


def test_products_that_the_text_does_not_show_take_their_time():
    found = made_up(CONFIG)
    found["costs"] |= {"flops": 0.0, "memory_bytes": 0.0, "collectives": {}}
    times = assess(CONFIG, found)["roofline"]
    assert times["bound_by"] == "compute" and times["mfu"] == pytest.approx(1)


@pytest.mark.parametrize(("row_gib", "rows"), [(1, 8), (0.1, 64), (2.9, 4), (0.73, 16)])
def test_the_largest_batch(row_gib: float, rows: int):
    compiler = Compiler(row_bytes=row_gib * GIB)
    step = compiler(CONFIG)
    assert step is not None and step["fits"]
    found = largest_batch(CONFIG, step, compiler)
    assert found == {"batch_size": 4 * rows, "rows_per_device": rows, "certain": True}
    assert 4 * rows * 2 in [config.batch_size for config in compiler.asked]  # it was tried
    assert len(compiler.asked) <= 4


def test_the_largest_batch_is_never_less_than_the_one_that_fits():
    config = dataclasses.replace(CONFIG, batch_size=12)  # 3 rows each
    compiler = Compiler(row_bytes=3 * GIB)
    step = compiler(config)
    assert step is not None and step["fits"]
    found = largest_batch(config, step, compiler)
    assert found == {"batch_size": 12, "rows_per_device": 3, "certain": True}


def test_the_largest_batch_in_few_tries_is_a_least():
    compiler = Compiler(limit=1, row_bytes=0.1 * GIB)
    step = compiler(CONFIG)
    assert step is not None
    found = largest_batch(CONFIG, step, compiler)
    assert found == {"batch_size": 16, "rows_per_device": 4, "certain": False}


def test_what_makes_it_fit_the_fastest_first():
    config = dataclasses.replace(CONFIG, batch_size=64)  # 16 rows each
    changes = find_changes(config, 4, Compiler())
    fitting = [change["flags"] for change in changes if change["fits"]]
    assert fitting == [
        "--num_microbatches 2",
        "--num_microbatches 2 --mesh.data 1 --mesh.fsdp -1",
        "--num_microbatches 2 --loss_chunks 8",
        "--model.remat products",
        "--model.remat full",
    ]
    too_large = ["--loss_chunks 8", "--mesh.data 1 --mesh.fsdp -1"]
    assert [change["flags"] for change in changes if not change["fits"]] == too_large


def test_all_changes_together_where_none_is_enough():
    changes = find_changes(CONFIG, 4, Compiler(limit=40, state_bytes=50 * GIB, row_bytes=8 * GIB))
    assert changes[0]["fits"] and not changes[1]["fits"]
    assert (
        changes[0]["flags"]
        == "--num_microbatches 4 --loss_chunks 8 --model.remat full --mesh.data 1 --mesh.fsdp -1"
    )
    nothing = find_changes(CONFIG, 4, Compiler(state_bytes=500 * GIB))
    assert nothing and not any(change["fits"] for change in nothing)
    assert not any("fsdp" in c["flags"] for c in find_changes(CONFIG, 1, Compiler(row_bytes=9e9)))
    assert len(find_changes(CONFIG, 4, Compiler(limit=2, state_bytes=500 * GIB))) == 2


def test_the_save_interval_costs_least():
    cost_s, mtbf_s, step_s = 2.0, 36_000.0, 0.5
    found = save_interval(cost_s, mtbf_s, step_s)
    assert found["interval_s"] == pytest.approx(math.sqrt(2 * cost_s * mtbf_s), abs=step_s)

    def share(num_steps: float) -> float:
        return cost_s / (num_steps * step_s) + num_steps * step_s / 2 / mtbf_s

    best = found["save_interval"]
    assert found["share_in_saves"] + found["share_lost"] == pytest.approx(share(best))
    assert share(best) < share(best * 0.9) and share(best) < share(best * 1.1)
    assert save_interval(1e-9, 1, 10)["save_interval"] == 1


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "examine", lambda config, *_: made_up(config))
    monkeypatch.chdir(tiny_model.__file__.rsplit("/", 2)[0])


ARGS = ["plan", "--config", "configs/tiny.py", "--topology", "v5e-4"]


def test_the_command(no_compiler, capsys: pytest.CaptureFixture):
    more = ["--save_cost_s", "0.5", "--mtbf_hours", "10", "--batch_size", "16"]
    assert cli.command([*ARGS, *more]) == 0
    said = capsys.readouterr().out
    assert (
        "memory fits: 8.6 GB of 16.9 GB" in said and "largest batch that fits: 32 (8 rows" in said
    )
    assert "bound by memory" in said and "all-reduce 100.0 GB in 2" in said
    assert "cheapest --save_interval: 172 " in said
    assert cli.command([*ARGS, *more, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] and report["largest_batch"]["batch_size"] == 32
    assert report["saves"]["save_interval"] == 172 and report["batch_size"] == 16
    assert cli.command([*ARGS, "--batch_size", "64"]) == 0
    said = capsys.readouterr().out
    assert "memory does not fit" in said and "\nfits with --num_microbatches 2: " in said


def test_a_refusal_of_the_compiler_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "examine", lambda *_: {"refused": "RESOURCE_EXHAUSTED: 15.75G"})
    lines = describe(make_plan(CONFIG, Settings("v5e-1", max_compiles=3)))
    assert lines[1] == "does not fit: RESOURCE_EXHAUSTED: 15.75G" and len(lines) == 4
    assert all(line.startswith("does not fit with --num_microbatches") for line in lines[2:])


# --- the compilers

NEEDS = {
    "tpu": ("libtpu", "v5e-4"),
    "cuda-plan": ("jax_cuda13_plugin", "h100x4"),
}


def needs(extra: str) -> pytest.MarkDecorator:
    there = importlib.util.find_spec(NEEDS[extra][0]) is not None
    return pytest.mark.skipif(not there, reason=f"needs the extra {extra}: {NEEDS[extra][0]}")


@pytest.mark.parametrize("extra", ["tpu", pytest.param("cuda-plan", marks=pytest.mark.slow)])
def test_no_compiler_is_one_error(extra: str, no_jax_plugin, capsys: pytest.CaptureFixture):
    args = [*ARGS[:-1], NEEDS[extra][1]]
    assert run_main(lambda: cli.command(args)) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: a plan for ") and f"'.[{extra}]'" in said
    assert len(said.splitlines()) == 1


@pytest.fixture
def no_jax_plugin(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """The compilers fail to import, in child processes too."""
    for name, _ in NEEDS.values():
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')")
    monkeypatch.syspath_prepend(str(tmp_path))
    repo = tiny_model.__file__.rsplit("/", 2)[0]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{repo}")
    monkeypatch.chdir(repo)


@pytest.mark.slow
@needs("tpu")
def test_a_plan_for_tpus():
    config = dataclasses.replace(CONFIG, num_microbatches=2)
    found = examine(config, "tpu", "v5e:2x2")
    assert found["device_kind"] == "TPU v5 lite" and found["mesh"]["data"] == 4
    assert found["costs"]["num_unknown_loops"] == 0 and found["costs"]["collectives"]
    # The loop of microbatches has no count in this text: the products tell that it is in full.
    assert found["costs"]["flops"] == examine(CONFIG, "tpu", "v5e:2x2")["costs"]["flops"]
    with pytest.raises(ValueError, match="--topology: the compiler for v5e:32x32 .*Check failed"):
        examine(dataclasses.replace(CONFIG, batch_size=1024), "tpu", "v5e:32x32")
    with pytest.raises(ValueError, match="--topology: the compiler for v5e:3x3"):
        examine(CONFIG, "tpu", "v5e:3x3")
    with pytest.raises(ValueError, match="batch_size: found 6"):
        examine(dataclasses.replace(CONFIG, batch_size=6), "tpu", "v5e:2x2")
    huge = dataclasses.replace(CONFIG, batch_size=2**16, seq_len=512)
    assert "15.75G" in examine(huge, "tpu", "v5e:2x2")["refused"]


@pytest.mark.slow
@needs("tpu")
def test_fsdp_never_gathers_the_params_of_all_blocks():
    model = ModelConfig(
        vocab_size=512,
        num_layers=16,
        d_model=512,
        d_ff=2048,
        num_heads=4,
        num_kv_heads=4,
        head_dim=128,
        remat="full",
    )
    mesh, optim = MeshConfig(data=1, fsdp=8), dataclasses.replace(tiny_model.OPTIM, name="adamw")
    config = dataclasses.replace(
        CONFIG, model=model, mesh=mesh, optim=optim, batch_size=8, seq_len=128
    )
    memory = examine(config, "tpu", "v5e:2x4")["memory"]
    whole = 8 * memory["params"] / 2  # all of them on one device, in bfloat16
    assert memory["temporaries"] < whole / 2


@pytest.mark.slow
@needs("cuda-plan")
def test_a_plan_for_gpus():
    # Its compiler finds no tiling for products as narrow as those of the other tests.
    model = dataclasses.replace(
        tiny_model.MODEL, d_model=256, d_ff=512, head_dim=64, vocab_size=512
    )
    config = dataclasses.replace(CONFIG, model=model, seq_len=64)
    found = examine(config, "cuda", "1x1x8")
    assert "H100" in found["device_kind"] and found["mesh"]["data"] == 8
    assert found["costs"]["flops"] > 0 and found["costs"]["collectives"]
