"""What ends a command early: Ctrl-C, and the signals of schedulers, of time limits and of terminals that are closed."""

import _thread
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

__all__ = ["Interruption"]

_MOMENT = 0.2  # seconds
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interruption:
    """What may interrupt a command: a signal raises ``KeyboardInterrupt``, again and again until the command heeds it.

    So it keeps what is finished and leaves the terminal as it was. Once is not enough: Python drops what is raised
    while an object is freed, and native code may clear it or make an error of its own of it.

    Attributes:
        cause: the signal that was sent; ``None``: none was.
    """

    def __init__(self) -> None:
        self.cause: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._over, self._lock = threading.Event(), threading.Lock()
        self._in_main_thread = threading.current_thread() is threading.main_thread()  # only there signals have handlers

    @contextlib.contextmanager
    def possible(self) -> Iterator[None]:
        """Let signals interrupt what runs inside, but for those that are ignored already, as under nohup."""
        if not self._in_main_thread:
            yield
            return
        self._before = {number: signal.getsignal(number) or signal.SIG_DFL for number in _SIGNALS}
        report = sys.unraisablehook

        def silent(lost: "sys.UnraisableHookArgs") -> None:
            if not issubclass(lost.exc_type, KeyboardInterrupt):
                report(lost)

        sys.unraisablehook = silent
        for number, handler in self._before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._interrupt)
        try:
            yield
        finally:
            sys.unraisablehook = report

    def rule_out(self) -> None:
        """From now on nothing is interrupted; handlers are what they were, unless a signal was sent.

        What is on its way may still raise ``KeyboardInterrupt`` here: call it until it returns.
        """
        if not self._in_main_thread:
            return
        for number, handler in self._before.items():
            if self.cause or handler is not signal.SIG_IGN:
                signal.signal(number, _do_nothing)
        with self._lock:
            self._over.set()
        if self.cause is None:  # else it may be sent again until the process ends
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _interrupt(self, number: int, _: FrameType | None) -> NoReturn:
        for one in _SIGNALS:  # they often come twice, and the second must not stop the saving
            signal.signal(one, signal.SIG_IGN)
        if hasattr(signal, "SIGCHLD"):  # of torch's data loaders, whose workers may have been sent the signal as well
            signal.signal(signal.SIGCHLD, _do_nothing)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # pressed again, it is meant
        self.cause = signal.Signals(number)
        # not a daemon: ended while it frees what the exception held, it would abort the process
        threading.Thread(target=self._interrupt_again, daemon=False).start()
        raise KeyboardInterrupt

    def _interrupt_again(self) -> None:
        """Interrupt the main thread whenever it goes on as if nothing had been raised, until its work is over."""
        main_thread = threading.main_thread().ident or 0
        while not self._over.wait(_MOMENT):
            with self._lock:
                if not self._over.is_set() and not _is_handling(main_thread):
                    _thread.interrupt_main()


def _do_nothing(number: int, _: FrameType | None) -> None:
    """Take a signal that comes too late; Python complains of one on its way that is to be ignored."""


def _is_handling(thread: int) -> bool:
    """Return whether a thread handles an exception; no reference to it is kept, for its frames hold the network."""
    return sys._current_exceptions().get(thread) not in (None, (None, None, None))  # the latter before Python 3.12
