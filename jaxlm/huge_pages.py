"""Huge pages for the memory that a step on a CPU takes and gives back."""

import contextlib
import os
import sys
from pathlib import Path

_TUNABLES, _SETTING = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_STARTED_AGAIN = "JAXLM_STARTED_AGAIN"
_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> None:
    """Starts this program again with huge pages in malloc, if the kernel gives them on request.

    XLA takes the temporaries of each step anew from the kernel, which clears them a page at a time:
    with pages of 4 KiB, a tenth of a step. glibc reads the setting only as a program starts. So
    this is the first call of a program; process id, arguments and open files stay the same.
    `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` keeps small pages.
    """
    tunables = os.environ.get(_TUNABLES, "")
    if _SETTING in tunables or not _on_request() or not _can_start_again():
        return
    os.environ[_TUNABLES] = ":".join(filter(None, [tunables, f"{_SETTING}=1"]))
    os.environ[_STARTED_AGAIN] = str(os.getpid())
    with contextlib.suppress(OSError, ValueError):  # small pages will do
        os.execv(os.readlink("/proc/self/exe"), sys.orig_argv)


def _on_request() -> bool:
    try:
        return "[madvise]" in _MODE.read_text()  # with [always], malloc need not ask
    except OSError:  # not Linux, or a kernel without huge pages
        return False


def _can_start_again() -> bool:
    # A privileged process loses GLIBC_TUNABLES, so a second variable ends the starts.
    # Python has read a program on stdin to its end; a debugger would lose its breakpoints.
    started_again = os.environ.get(_STARTED_AGAIN) == str(os.getpid())
    from_stdin = not sys.argv[0] or sys.argv[0] == "-"
    return not (started_again or from_stdin or sys.gettrace())
