"""The training step of jaxlm and that of MaxText, compiled for the same TPUs: memory, traffic.

    python benchmarks/against_maxtext.py 180m v5e-16
    python benchmarks/against_maxtext.py 180m-products v5e-16
    python benchmarks/against_maxtext.py 8b v5p-16

Needs an environment of its own, with MaxText 0.2.5, libtpu and jaxlm's dependencies in it; both
sides are compiled by the same JAX and libtpu, with AdamW, and collectives as they are (no windowed
einsum). Prints a JSON object a side, of one device.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

COMPILER: dict[str, Any] = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
# Config, rows a device, flags of ours, those of MaxText.
CASES: dict[str, tuple[str, int, list[str], list[str]]] = {
    "180m": (
        "configs/180m.py",
        8,
        ["--model.remat", "full", "--loss_chunks", "8"],
        ["ici_data_parallelism=-1", "ici_fsdp_parallelism=1", "remat_policy=full"],
    ),
    "180m-products": (
        "configs/180m.py",
        8,
        ["--model.remat", "products", "--loss_chunks", "8"],
        ["ici_data_parallelism=-1", "ici_fsdp_parallelism=1", "remat_policy=minimal"],
    ),
    "8b": (
        "configs/8b.py",
        2,
        ["--model.remat", "full", "--loss_chunks", "8"],
        ["ici_fsdp_parallelism=-1", "remat_policy=full"],
    ),
}


def found(compiled: Any) -> dict[str, Any]:
    """What is compared."""
    from jaxlm.plan.hlo import read_costs

    sizes = compiled.memory_analysis()
    costs = read_costs(compiled.as_text())
    sent = {kind: each.num_bytes for kind, each in costs.collectives.items()}
    total = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
    total += sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return {
        "hbm_bytes": total,
        "temporary_bytes": sizes.temp_size_in_bytes,
        "argument_bytes": sizes.argument_size_in_bytes,
        "program_bytes": sizes.generated_code_size_in_bytes,
        "flops": costs.flops,
        "traffic_bytes": costs.memory_bytes,
        "sent_bytes": sum(sent.values()),
        "sent": sent,
    }


def ours(case: str, topology: str) -> Any:
    """Our step, compiled."""
    from jaxlm.launch import parse_config
    from jaxlm.plan.ahead import find_devices, lower_ahead
    from jaxlm.plan.plan import parse_topology

    path, rows, flags, _ = CASES[case]
    devices = find_devices(*parse_topology(topology))
    batch_size = rows * len(devices)
    config = parse_config(
        ["--config", path, "--optim.name", "adamw", f"--batch_size={batch_size}", *flags],
        prog="against_maxtext.py",
    )
    return lower_ahead(config, devices)[0].compile(compiler_options=COMPILER)


def maxtext(case: str, topology: str, *more: str) -> Any:
    """MaxText's step, compiled by its own `train_compile`."""
    import maxtext  # pyright: ignore[reportMissingImports]
    from absl import app  # pyright: ignore[reportMissingImports]
    from maxtext.trainers.pre_train import train_compile  # pyright: ignore[reportMissingImports]

    from jaxlm.launch import load_config

    path, rows, _, flags = CASES[case]
    config = load_config(path)
    shape = config.model
    base = str(Path(maxtext.__path__[0], "configs", "base.yml"))
    kept = []

    compile_it = train_compile.jit_and_compile

    def keep(*args: Any, **kwargs: Any) -> Any:
        kept.append(compile_it(*args, **kwargs))
        return kept[-1]

    train_compile.jit_and_compile = keep
    xla_flags = " ".join(f"--{name}={value}" for name, value in COMPILER.items())
    argv = [
        "train_compile",
        base,
        f"compile_topology={topology}",
        "compile_topology_num_slices=1",
        "dataset_type=synthetic",
        "enable_checkpointing=false",
        "run_name=x",
        f"compile_xla_flags={xla_flags}",
        f"per_device_batch_size={rows}",
        f"max_target_length={config.seq_len}",
        f"base_emb_dim={shape.d_model}",
        f"base_mlp_dim={shape.d_ff}",
        f"base_num_decoder_layers={shape.num_layers}",
        f"base_num_query_heads={shape.num_heads}",
        f"base_num_kv_heads={shape.num_kv_heads}",
        f"head_dim={shape.head_dim}",
        f"vocab_size={shape.vocab_size}",
        f"use_qk_norm={str(shape.qk_norm).lower()}",
        f"logits_via_embedding={str(shape.tie_embeddings).lower()}",
        "dtype=bfloat16",
        "weight_dtype=float32",
        "attention=flash",
        "opt_type=adamw",
        *flags,
        *more,
    ]
    try:
        app.run(train_compile.main, argv=argv)
    except SystemExit:
        pass
    return kept[0]


def main() -> None:
    """Each side in a process of its own."""
    case, topology, *rest = sys.argv[1:]
    if rest:
        from jaxlm.plan.ahead import _ENV_TPU

        os.environ.update(_ENV_TPU)
        side, *more = rest
        compiled = ours(case, topology) if side == "jaxlm" else maxtext(case, topology, *more)
        print(json.dumps({"side": " ".join(rest), **found(compiled)}), flush=True)
        return
    for side in (["jaxlm"], ["maxtext"], ["maxtext", "scan_layers=false"]):
        subprocess.run([sys.executable, __file__, case, topology, *side], check=False)


if __name__ == "__main__":
    main()
