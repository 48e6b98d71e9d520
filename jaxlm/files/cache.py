"""The cache folder of prepared data and compiled programs."""

import os
from pathlib import Path

from jaxlm.errors import InputError
from jaxlm.files.durable import expand

ELSEWHERE = "name another place with --data.cache-dir or JAXLM_CACHE"


def cache_root(cache_dir: str | None) -> Path:
    """The folder that runs share: `cache_dir`, else $JAXLM_CACHE, else ~/.cache/jaxlm.

    Raises:
      ValueError: neither is set, and the user has no home; the path is too long, or a file.
    """
    root = cache_dir or os.environ.get("JAXLM_CACHE") or "~/.cache/jaxlm"
    expand(root, "cache_dir, or JAXLM_CACHE")
    try:
        path = Path(root).expanduser().absolute()
    except RuntimeError as error:
        raise InputError(
            f"cache: found no home folder for {root} ({error}); {ELSEWHERE}"
        ) from error
    if path.is_file():
        raise InputError(f"cache: found the file {path}, expected a folder; {ELSEWHERE}")
    return path
