"""Several processes that train as one: how they start, and how none of them outlives another."""

import ctypes
import itertools
import json
import operator
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import jax
from jax.errors import JaxRuntimeError

from jaxlm.errors import InputError
from jaxlm.insides import coordination_client
from jaxlm.terminal import STOPPED, write_error

_HEARTBEAT_TIMEOUT_S = 10
_LINGER_S = 0.5
_PATIENCE_MS = 3_600_000
_SLICE_MS = 1_000  # in which Python's signal handlers have their turn
_LATE_S = 60.0  # a network disk may show one machine for so long what was
_VERDICT = "jaxlm/verdict"
_rounds = itertools.count()
# How the loss of a process reads, in a collective or at a barrier.
_SIGNS = ("Gloo", "NCCL", "UNAVAILABLE")
_ADVICE = "start all processes again, and they go on from the latest"


class Cluster:
    """The processes of a run, while they train.

    The first that ends in an error tells all, and each of them prints that error and exits with
    its code, wherever it is. One that can tell nothing any more is missed: at once in a collective,
    else within seconds. They leave by `os._exit`, since the usual way out waits for the lost one.

    Args:
      explain: error -> exit code and message; no message for a bug, which keeps its traceback.
    """

    def __init__(self, explain: Callable[[BaseException], tuple[int, str | None]]):
        self._explain = explain
        self._over = False
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        # Its own SIGTERM service would make our handlers deaf.
        jax.config.update("jax_enable_preemption_service", False)
        # Where a cluster does not say which process this is, these two do.
        count, index = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
        jax.distributed.initialize(
            num_processes=int(count) if count else None,
            process_id=int(index) if index else None,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_S,
        )
        # When the heartbeat of a peer is lost, JAX calls abort() in a C++ thread, where no Python
        # handler runs.
        ctypes.pythonapi.PyOS_setsig(signal.SIGABRT, _aborted)
        self._watcher.start()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self._over = True
            jax.distributed.shutdown()  # waits for all, and ends the watch
            self._watcher.join()
            signal.signal(signal.SIGABRT, signal.SIG_DFL)
            return
        code, text = _if_lost(error) or self._explain(error)
        if text is None:
            traceback.print_exception(error)
            text = f"{type(error).__name__}: {error}"
        tell_all(code, text)
        self._watcher.join(_HEARTBEAT_TIMEOUT_S)
        os._exit(code)

    def _watch(self) -> None:
        verdict = None
        while verdict is None:
            try:
                verdict = coordination_client().blocking_key_value_get(_VERDICT, _PATIENCE_MS)
            except JaxRuntimeError as error:
                if self._over:
                    return
                if "DEADLINE_EXCEEDED" not in str(error):
                    _leave(STOPPED, f"process 0 was lost ({_first_line(error)}); {_ADVICE}")
        code, text = json.loads(verdict)
        if jax.process_index() == 0:
            time.sleep(_LINGER_S)  # the others are told by this one
        _leave(code, text)


def tell_all(code: int, text: str) -> None:
    """Ends every process of the run with this exit code and message, unless one was told before."""
    index, count = jax.process_index(), jax.process_count()
    verdict = json.dumps([code, f"process {index} of {count}: {text}"])
    with suppress(JaxRuntimeError):  # another was first, or there is nobody left to tell
        coordination_client().key_value_set(_VERDICT, verdict)


def barrier(*, key: str, timeout_ms: int) -> None:
    """Orbax's barrier, where a save that has failed here waits for nobody.

    After an error Orbax comes here all the same, waits for those who wait elsewhere, and tells in
    the end of that alone.

    Raises:
      Exception: the error on the way here; one of a saving thread is told to all.
    """
    if error := sys.exc_info()[1]:
        if threading.current_thread() is not threading.main_thread():
            told = f"error: a save failed: {error}; look at the disk, then {_ADVICE}"
            tell_all(*(_if_lost(error) or (1, told)))
        raise error
    coordination_client().wait_at_barrier(key, timeout_ms)


def agree(value: Any, combine: Callable[[list[Any]], Any] = operator.itemgetter(0)) -> Any:
    """What holds for all processes, each of which must come here as often as every other.

    None of them goes on before all are here.

    Args:
      value: what this process found, as JSON values.
      combine: makes one of the values of all, in the order of the processes; by default it takes
        that of process 0.
    """
    if jax.process_count() == 1:
        return combine([value])
    number = next(_rounds)
    key = f"jaxlm/agree/{number}"
    coordination_client().key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    if jax.process_index() == 0:
        found = [_get(f"{key}/{index}") for index in range(jax.process_count())]
        coordination_client().key_value_delete(f"jaxlm/agree/{number - 1}/")  # which all have read
        coordination_client().key_value_set(f"{key}/all", json.dumps(combine(found)))
    return _get(f"{key}/all")


def all_fail(key: str, error: Exception) -> bool:
    """Whether every process comes here with an error, and none with that of a lost one.

    Args:
      key: names this place, once a run.
      error: what this process found.
    """
    if jax.process_count() == 1:
        return True
    if _if_lost(error):
        return False
    with suppress(JaxRuntimeError):  # the others are in a collective, which waits for this one
        coordination_client().wait_at_barrier(key, 1000 * _HEARTBEAT_TIMEOUT_S // 2)
        return True
    return False


def see(look: Callable[[], bool]) -> bool:
    """Whether something is seen on a shared disk, which may show it late."""
    deadline = time.monotonic() + _LATE_S
    while not (seen := look()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return seen


def check_alike(name: str, value: dict[str, Any]) -> None:
    """Refuses a process whose settings or data are not those of process 0.

    Args:
      name: what is compared, for the message.
      value: names and JSON values.

    Raises:
      ValueError: they differ.
    """
    value = json.loads(json.dumps(value))
    first, index = agree(value), jax.process_index()
    differing = [
        f"{field}: {first.get(field)!r} on process 0, {value.get(field)!r} on process {index}"
        for field in sorted(first.keys() | value.keys())
        if first.get(field) != value.get(field)
    ]
    if differing:
        raise InputError(
            f"{name}: the processes of a run must be started alike, by the same command with the "
            "same files, but found\n  " + "\n  ".join(differing)
        )


def _get(key: str) -> Any:
    while True:  # one that is lost ends the others by itself
        try:
            return json.loads(coordination_client().blocking_key_value_get(key, _SLICE_MS))
        except JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _if_lost(error: BaseException) -> tuple[int, str] | None:
    cause: BaseException | None = error
    while cause and not _is_loss(cause):
        cause = cause.__cause__ or cause.__context__
    return cause and (STOPPED, f"another process was lost ({_first_line(cause)}); {_ADVICE}")


def _is_loss(error: BaseException) -> bool:
    # What fails as a program is dispatched comes as a ValueError, what fails later as the other.
    of_jax = isinstance(error, JaxRuntimeError | ValueError)
    return of_jax and any(sign in str(error) for sign in _SIGNS)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _leave(code: int, text: str) -> None:
    write_error(text)
    os._exit(code)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(number: int) -> None:
    _leave(STOPPED, f"aborted: most likely another process was lost, see above; {_ADVICE}")
