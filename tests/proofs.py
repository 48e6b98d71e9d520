"""What a checkpoint holds of the rows on disk, without JAX."""

import json
from pathlib import Path

from jaxlm.tracking.rows import NAME, Rows


def restored(run_dir: Path, step: int) -> tuple[int, Rows]:
    """As of a checkpoint of this step: the whole rows up to it."""
    path = run_dir / NAME
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows = [line for line in lines if line.startswith(b'{"step": ') and line.endswith(b"}\n")]
    return step, Rows().then(b"".join(row for row in rows if json.loads(row)["step"] <= step))
