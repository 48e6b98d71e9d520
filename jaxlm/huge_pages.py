"""Huge pages for the memory that a step on a CPU takes and gives back."""

import os
import sys
from pathlib import Path

_TUNABLES, _SETTING = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> None:
    """Starts this program again with huge pages in glibc's malloc, where they are for the asking.

    XLA takes the temporaries of each step anew from the kernel, which clears them a page at a time:
    with pages of 4 KiB, a tenth of a step. glibc reads the setting only as a program starts. So
    this is the first call of a program; process id, arguments and open files stay the same.
    `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` keeps small pages.
    """
    tunables = os.environ.get(_TUNABLES, "")
    if _SETTING in tunables or not _for_the_asking():
        return
    os.environ[_TUNABLES] = ":".join(filter(None, [tunables, f"{_SETTING}=1"]))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _for_the_asking() -> bool:
    try:
        return "[madvise]" in _MODE.read_text()  # with [always], malloc need not ask
    except OSError:  # not Linux, or a kernel without huge pages
        return False
