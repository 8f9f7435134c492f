"""Work beside the main thread that never holds the process at its end."""

import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future


class Background:
    """Daemon threads that take one call after the other. The interpreter waits for an executor's threads before it ends, and one
    of them may hang in a download; it does not wait for these."""

    def __init__(self, threads: int = 1):
        self._threads, self._calls = threads, None

    def submit(self, function: Callable, *args) -> Future:
        if self._calls is None:
            self._calls = queue.SimpleQueue()
            for _ in range(self._threads):
                threading.Thread(target=_work, args=(self._calls,), daemon=True).start()
        future = Future()
        self._calls.put((future, function, args))
        return future

    def map(self, function: Callable, items: Iterable) -> list:
        futures = [self.submit(function, item) for item in items]
        return [future.result() for future in futures]

    def __del__(self):
        if self._calls is not None:
            for _ in range(self._threads):
                self._calls.put(None)


def at_once(function: Callable, *args) -> Future:
    """As `submit`, but in this thread; an error is raised here."""
    future = Future()
    future.set_result(function(*args))
    return future


def _work(calls: queue.SimpleQueue) -> None:
    while (call := calls.get()) is not None:
        future, function, args = call
        error = result = call = None
        try:
            result = function(*args)
        except BaseException as e:  # whoever asks for the result gets it
            error = e
        function = args = None  # before the caller goes on: what it frees then must not be left to this thread
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
        future = error = result = None
