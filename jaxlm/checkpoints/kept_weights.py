"""Keeps the weights of deleted checkpoints, in `weights/`."""

import shutil
from dataclasses import replace
from pathlib import Path

from jaxlm.checkpoints import manifest
from jaxlm.checkpoints.folder import TOKENIZER, WEIGHTS, read_metadata
from jaxlm.checkpoints.restore import ITEMS
from jaxlm.files.durable import fsync, link, read_file, write_file

_MAX_TOKENIZER_BYTES = 1 << 28


def keep_weights(doomed: Path, folder: Path) -> None:
    """Makes `weights/STEP` from a step before its deletion; replaces one of an abandoned branch.

    The step itself is not changed. After a kill, a complete step goes through this again; an
    incomplete one has its weights already, since its deletion had begun.

    Args:
      doomed: the step folder to be deleted; its name is the step.
      folder: the checkpoint folder.

    Raises:
      OSError: the disk refused a write.
    """
    if manifest.find_damage(doomed, contents=False):
        return
    metadata = read_metadata(doomed.parent, int(doomed.name))
    item, weights = metadata.weights_item, folder / WEIGHTS
    partial, target = weights / f".{doomed.name}.partial", weights / doomed.name
    shutil.rmtree(partial, ignore_errors=True)
    left_out = shutil.ignore_patterns(manifest.NAME, *(name for name in ITEMS if name != item))
    shutil.copytree(
        doomed,
        partial,
        ignore=lambda top, names: left_out(top, names) if top == str(doomed) else set(),
        copy_function=link,
    )
    kept = {k: v for k, v in metadata.fingerprints.items() if k.startswith(f"{item}/")}
    replace(metadata, fingerprints=kept).write(partial)
    manifest.write_manifest(partial)
    if (folder / TOKENIZER).is_file() and not (weights / TOKENIZER).exists():
        tokenizer = read_file(folder / TOKENIZER, _MAX_TOKENIZER_BYTES)
        write_file(weights / TOKENIZER, tokenizer)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    fsync(weights)
