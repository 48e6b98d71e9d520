"""`jaxlm cache`: what runs share."""

import time

from tyro.conf import Positional

from jaxlm.cli.output import show


def list_all(*, cache_dir: str | None = None, json: bool = False) -> int:
    """List the prepared tokens and compiled programs that runs share.

    Args:
      cache_dir: the cache; by default $JAXLM_CACHE, else ~/.cache/jaxlm.
      json: print JSON.

    Examples:
      jaxlm cache list
    """
    from jaxlm.compiled import PROGRAMS, compiled_bytes
    from jaxlm.data.cache import cache_root, list_caches
    from jaxlm.tracking.console import format_bytes, format_count

    entries, compiled = list_caches(cache_dir), compiled_bytes(cache_dir)
    lines = [
        f"{entry['name']}: {format_count(entry['num_tokens'])} tokens of {entry['source']}, "
        f"{format_bytes(entry['num_bytes'])}{'' if entry['complete'] else ' (unfinished)'}, "
        f"last used {time.strftime('%Y-%m-%d', time.localtime(entry['last_used_s']))}"
        for entry in entries
    ]
    lines += [f"{PROGRAMS}: {format_bytes(compiled)}"] if compiled else []
    found = {"data": entries, "compiled_bytes": compiled}
    show(found, "\n".join(lines or [f"nothing in {cache_root(cache_dir)}"]), json)
    return 0


def clear(names: Positional[tuple[str, ...]] = (), *, cache_dir: str | None = None) -> int:
    """Delete prepared tokens and compiled programs; a run that needs them makes them again.

    Args:
      names: which, as `jaxlm cache list` names them; all there is if none is given.
      cache_dir: the cache; by default $JAXLM_CACHE, else ~/.cache/jaxlm.

    Examples:
      jaxlm cache clear  # all there is
      jaxlm cache clear embedded-eb4bcf8e9a60
    """
    from jaxlm.compiled import clear_compiled
    from jaxlm.data.cache import clear_caches

    for name in [*clear_caches(cache_dir, names or None), *clear_compiled(cache_dir, names)]:
        print(f"deleted {name}")
    return 0
