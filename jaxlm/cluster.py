"""The processes of a run: joined at the start, and all ended when one fails or is lost."""

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
_EXIT_DELAY_S = 0.5
_WATCH_TIMEOUT_MS = 3_600_000
_POLL_MS = 1_000  # A longer wait would block Python's signal handlers.
_VISIBLE_TIMEOUT_S = 60.0  # A shared disk may show another machine's writes this late.
_VERDICT = "jaxlm/verdict"
_rounds = itertools.count()
# In the message of a collective or barrier that failed because a process was lost.
_SIGNS = ("Gloo", "NCCL", "UNAVAILABLE")
_ADVICE = "restart all processes: the run resumes from its latest checkpoint"


class Cluster:
    """The processes of a run, while they train.

    The first process to fail publishes its error; every process prints it and exits with its code.
    A killed or frozen process publishes nothing: the others fail in a collective, or lose its
    heartbeat after about 10 s. Exit is by `os._exit`: normal shutdown would wait for the lost one.

    Args:
      explain: error -> exit code and message; no message for a bug, which keeps its traceback.
    """

    def __init__(self, explain: Callable[[BaseException], tuple[int, str | None]]):
        self._explain = explain
        self._over = False
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        # JAX's preemption service would take SIGTERM from our handlers.
        jax.config.update("jax_enable_preemption_service", False)
        # JAX cannot detect the process index outside a known cluster.
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
            jax.distributed.shutdown()  # Waits for every process; ends the wait of the watcher.
            self._watcher.join()
            signal.signal(signal.SIGABRT, signal.SIG_DFL)
            return
        code, text = _if_lost(error) or self._explain(error)
        if text is None:
            traceback.print_exception(error)
            text = f"{type(error).__name__}: {error}"
        publish_verdict(code, text)
        self._watcher.join(_HEARTBEAT_TIMEOUT_S)
        os._exit(code)

    def _watch(self) -> None:
        verdict = None
        while verdict is None:
            try:
                verdict = coordination_client().blocking_key_value_get(_VERDICT, _WATCH_TIMEOUT_MS)
            except JaxRuntimeError as error:
                if self._over:
                    return
                if "DEADLINE_EXCEEDED" not in str(error):
                    _leave(STOPPED, f"process 0 was lost ({_first_line(error)}); {_ADVICE}")
        code, text = json.loads(verdict)
        if jax.process_index() == 0:
            # Process 0 serves the verdict: its exit would cut off peers still reading.
            time.sleep(_EXIT_DELAY_S)
        _leave(code, text)


def publish_verdict(code: int, text: str) -> None:
    """Ends every process of the run with this exit code and message; the first verdict wins."""
    index, count = jax.process_index(), jax.process_count()
    verdict = json.dumps([code, f"process {index} of {count}: {text}"])
    with suppress(JaxRuntimeError):  # An earlier verdict stands, or process 0 is lost.
        coordination_client().key_value_set(_VERDICT, verdict)


def barrier(*, key: str, timeout_ms: int) -> None:
    """Orbax's `barrier_sync_fn`; re-raises an error being handled here instead of waiting.

    Orbax enters its barriers even after an error, then waits for its peers and reports only the
    failed wait.

    Raises:
      Exception: the error being handled; from a saving thread, it first goes to every process.
    """
    if error := sys.exc_info()[1]:
        if threading.current_thread() is not threading.main_thread():
            text = f"error: a save failed: {error}; look at the disk, then {_ADVICE}"
            publish_verdict(*(_if_lost(error) or (1, text)))
        raise error
    coordination_client().wait_at_barrier(key, timeout_ms)


def agree(value: Any, combine: Callable[[list[Any]], Any] = operator.itemgetter(0)) -> Any:
    """One value for all processes: `combine` of their values.

    A collective: a process that skips a call mixes the values of different calls.

    Args:
      value: JSON value of this process.
      combine: list of values, in process order -> result; by default process 0's value.
    """
    if jax.process_count() == 1:
        return combine([value])
    number = next(_rounds)
    key = f"jaxlm/agree/{number}"
    coordination_client().key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    if jax.process_index() == 0:
        found = [_get(f"{key}/{index}") for index in range(jax.process_count())]
        # Every process has read the previous result: it took part in this call.
        coordination_client().key_value_delete(f"jaxlm/agree/{number - 1}/")
        coordination_client().key_value_set(f"{key}/all", json.dumps(combine(found)))
    return _get(f"{key}/all")


def all_fail(key: str, error: Exception) -> bool:
    """Whether every process arrives with an error, and no error is the loss of a peer.

    Args:
      key: barrier name, unique within the run.
      error: the error of this process.
    """
    if jax.process_count() == 1:
        return True
    if _if_lost(error):
        return False
    with suppress(JaxRuntimeError):  # Timeout: a peer without an error is in a collective.
        coordination_client().wait_at_barrier(key, 1000 * _HEARTBEAT_TIMEOUT_S // 2)
        return True
    return False


def wait_until_visible(look: Callable[[], bool]) -> bool:
    """Polls `look` until it is true; False if another machine's write stays invisible."""
    deadline = time.monotonic() + _VISIBLE_TIMEOUT_S
    while not (seen := look()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return seen


def check_equal(name: str, value: dict[str, Any]) -> None:
    """Refuses a process whose settings or data differ from those of process 0.

    Args:
      name: "settings" or "data", for the message.
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
            f"{name}: every process of a run must be started by the same command with the same "
            "files, but found\n  " + "\n  ".join(differing)
        )


def _get(key: str) -> Any:
    while True:  # No deadline: the heartbeat timeout ends this process if a peer dies.
        try:
            return json.loads(coordination_client().blocking_key_value_get(key, _POLL_MS))
        except JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _if_lost(error: BaseException) -> tuple[int, str] | None:
    cause: BaseException | None = error
    while cause and not _is_loss(cause):
        cause = cause.__cause__ or cause.__context__
    return cause and (STOPPED, f"another process was lost ({_first_line(cause)}); {_ADVICE}")


def _is_loss(error: BaseException) -> bool:
    # Errors at dispatch are ValueErrors, later ones JaxRuntimeErrors.
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
