"""SIGTERM and Ctrl-C, turned into "finish this step, save, and stop"."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.device.sharding import replicated


class StopRequest:
    """Whether this run was asked to stop.

    Attributes:
      received: the name of the signal that this process got, or empty.
    """

    def __init__(self, mesh: Mesh):
        self.received = ""
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(lambda flags: flags.max(axis=0), out_shardings=replicated(mesh))
        self._earlier: jax.Array | None = None
        self._saves = False

    def wanted(self, *, save: bool) -> tuple[bool, bool]:
        """Call once a step: whether to stop and whether to save, alike on every process.

        With several processes, what any of them wanted a step ago.

        Args:
          save: whether this process would save now.
        """
        if jax.process_count() == 1:
            return bool(self.received), save
        # Reduced on the devices and read one step late, so that none of them ever waits.
        mine = np.array([[bool(self.received), save]], np.int32)
        shape = (self._sharding.mesh.size, 2)
        flags = jax.make_array_from_callback(shape, self._sharding, lambda _: mine)
        earlier, self._earlier = self._earlier, self._any(flags)
        if earlier is None:
            return False, False
        stop, wanted = np.asarray(earlier)
        # What is wanted while a save is agreed upon is that save, and not one more.
        self._saves = bool(wanted) and not self._saves
        return bool(stop), self._saves


@contextmanager
def stop_requests(mesh: Mesh) -> Iterator[StopRequest]:
    """Catches the first SIGTERM or SIGINT; a second one acts as it always does.

    Off the main thread (a notebook's worker, a server) there are no handlers, and no stop.
    """
    request = StopRequest(mesh)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous: dict[int, Any] = {}

    def restore() -> None:
        for number in list(previous):
            signal.signal(number, previous.pop(number))

    def receive(number: int, frame: FrameType | None) -> None:
        del frame
        request.received = name = signal.Signals(number).name
        restore()
        text = f"{name}: finishing this step, then saving and stopping; once more to stop at once\n"
        with suppress(OSError):  # a terminal that is gone must not cost the save
            os.write(2, text.encode())  # not print: the signal may have come in the middle of one

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, receive)
    try:
        yield request
    finally:
        restore()
