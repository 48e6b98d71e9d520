"""SIGTERM, SIGHUP and Ctrl-C, turned into "finish this step, save, and stop"."""

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.device.sharding import replicated
from jaxlm.terminal import catch, write_error


class StopRequest:
    """Requests to stop or save, agreed upon by all processes.

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
        """Whether to stop and whether to save; call once a step, on every process.

        With several processes, the answer is the same on each: any request made by the last call
        of `wanted` or `stops` on any process.

        Args:
          save: whether this process would save now.
        """
        stop, wanted = self._agreed(save)
        if jax.process_count() > 1:
            # Debounce: agreement takes one step, so a request made meanwhile means the same save.
            wanted = self._saves = wanted and not self._saves
        return stop, wanted

    def stops(self) -> bool:
        """Whether to stop, the same on every process; call once an eval batch."""
        return self._agreed(False)[0]

    def _agreed(self, save: bool) -> tuple[bool, bool]:
        if jax.process_count() == 1:
            return bool(self.received), save
        # Reduced on the devices and read at the next call: reading at once would block the host.
        mine = np.array([[bool(self.received), save]], np.int32)
        shape = (self._sharding.mesh.size, 2)
        flags = jax.make_array_from_callback(shape, self._sharding, lambda _: mine)
        earlier, self._earlier = self._earlier, self._any(flags)
        if earlier is None:
            return False, False
        stop, wanted = np.asarray(earlier)
        return bool(stop), bool(wanted)


@contextmanager
def stop_requests(mesh: Mesh) -> Iterator[StopRequest]:
    """Catches SIGTERM, SIGINT and SIGHUP; a second SIGTERM or SIGINT acts as it always does.

    Off the main thread (a notebook's worker, a server) there are no handlers, and no stop.
    """
    request, previous = StopRequest(mesh), dict[int, Any]()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def restore(numbers: Iterable[int]) -> None:
        for number in numbers:
            if (handler := previous.pop(number, None)) is not None:
                signal.signal(number, handler)

    def receive(number: int, frame: FrameType | None) -> None:
        del frame
        request.received = request.received or signal.Signals(number).name
        text = f"{signal.Signals(number).name}: finishing this step, then saving and stopping"
        # A closing terminal may send SIGHUP twice, and systemd sends it after SIGTERM: counted as
        # the second signal, it would cost the save.
        if number != signal.SIGHUP:
            restore(previous.keys() - {signal.SIGHUP})
            text += "; once more to stop at once"
        write_error(text)

    previous |= catch(receive, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    try:
        yield request
    finally:
        restore(list(previous))
