"""`jaxlm cache`: prepared tokens and compiled programs that runs share."""

import time
from typing import Literal

from tyro.conf import Positional

from jaxlm.cli.output import show
from jaxlm.errors import InputError


def list_all(*, cache_dir: str | None = None, json: bool = False) -> int:
    """List the prepared tokens and compiled programs that runs share.

    Args:
      cache_dir: the cache; by default $JAXLM_CACHE, else ~/.cache/jaxlm.
      json: print JSON.

    Examples:
      jaxlm cache list
    """
    from jaxlm.compilation_cache import PROGRAMS, compiled_bytes
    from jaxlm.corpus.cache import list_caches
    from jaxlm.files.cache import cache_root
    from jaxlm.tracking.console import format_bytes, format_count

    entries, compiled = list_caches(cache_dir), compiled_bytes(cache_dir)
    lines = [
        f"{entry['name']}: {format_count(entry['num_tokens'])} tokens of {entry['source']}, "
        f"{format_bytes(entry['num_bytes'])}{'' if entry['complete'] else ' (unfinished)'}, "
        f"last used {time.strftime('%Y-%m-%d', time.localtime(entry['last_used_s']))}"
        for entry in entries
    ]
    lines += [f"{PROGRAMS}: {format_bytes(compiled)} of compiled programs"] if compiled else []
    found = {"data": entries, "compiled_bytes": compiled}
    show(found, "\n".join(lines or [f"nothing in {cache_root(cache_dir)}"]), json)
    return 0


def verify(names: Positional[tuple[str, ...]] = (), *, cache_dir: str | None = None) -> int:
    """Read every byte of prepared tokens, and compare with their checksums.

    A run reads a file in full only if the file is new or has another size or time. The exit code
    is 1 if a file is damaged or a preparation unfinished.

    Args:
      names: names of `jaxlm cache list`; all prepared tokens if left out.
      cache_dir: the cache; by default $JAXLM_CACHE, else ~/.cache/jaxlm.

    Examples:
      jaxlm cache verify
    """
    from jaxlm.corpus.cache import DATA, find_caches, verify_cache

    chosen = find_caches(names or (DATA,), cache_dir)
    found = {name: verify_cache(name, cache_dir) for name in chosen}
    for name, damage in found.items():
        print(f"{name}: {damage or 'sound'}")
    return int(any(found.values()))


def export(
    dataset: Positional[str],
    *,
    out: str,
    format: Literal["nanogpt", "llm.c", "megatron", "npy"] = "nanogpt",
    cache_dir: str | None = None,
) -> int:
    """Write prepared tokens as files that other trainers read: train, val and the tokenizer.

    Args:
      dataset: a name of `jaxlm cache list`.
      out: the folder to make.
      format: raw .bin of nanoGPT, .bin with the header of llm.c, .bin and .idx of Megatron-LM, or
        .npy; data.source tokens:GLOB reads each.
      cache_dir: the cache; by default $JAXLM_CACHE, else ~/.cache/jaxlm.

    Examples:
      jaxlm cache export embedded-eb4bcf8e9a60d2c1 --out tokens
      jaxlm cache export embedded-eb4bcf8e9a60d2c1 --out tokens --format megatron
    """
    from jaxlm.corpus.token_files import export_dataset

    found = export_dataset(dataset, out, format, cache_dir)
    for path, num_tokens in found.items():
        print(f"{path}: {num_tokens:,} tokens")
    return 0


def clear(
    names: Positional[tuple[str, ...]] = (), *, cache_dir: str | None = None, delete: bool = False
) -> int:
    """List cache entries that can be deleted, or delete them; a run that needs one makes it again.

    Args:
      names: names of `jaxlm cache list`; data for all prepared tokens, programs for all compiled
        programs.
      cache_dir: the cache; by default $JAXLM_CACHE, else ~/.cache/jaxlm.
      delete: delete the named entries.

    Examples:
      jaxlm cache clear  # deletes nothing
      jaxlm cache clear embedded-eb4bcf8e9a60d2c1 --delete
      jaxlm cache clear data programs --delete
    """
    from jaxlm.compilation_cache import PROGRAMS, clear_compiled, compiled_bytes
    from jaxlm.corpus.cache import DATA, clear_caches, find_caches, list_caches
    from jaxlm.files.cache import cache_root
    from jaxlm.tracking.console import format_bytes

    if delete and not names:
        raise InputError(
            f"--delete: found no name, expected {DATA}, {PROGRAMS} or some of `jaxlm cache list`"
        )
    sizes = {entry["name"]: entry["num_bytes"] for entry in list_caches(cache_dir)}
    names = names or (DATA, PROGRAMS)
    found = (clear_caches if delete else find_caches)([*{*names} - {PROGRAMS}], cache_dir)
    if PROGRAMS in names and (compiled := compiled_bytes(cache_dir)):
        sizes[PROGRAMS] = compiled
        found.append(PROGRAMS)
        if delete:
            clear_compiled(cache_dir)
    verb = "deleted" if delete else "would be deleted"
    for name in found:
        print(f"{name}: {verb}, {format_bytes(sizes[name])}")
    if not found:
        print(f"nothing in {cache_root(cache_dir)}")
    elif not delete:
        print("deleted nothing; to delete, name the entries and add --delete")
    return 0
