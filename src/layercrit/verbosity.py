"""How much is told beside results and errors: nothing, notices and progress bars, or also what layercrit logs."""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar

__all__ = ["is_quiet", "logged", "quiet"]

_QUIET = ContextVar("quiet", default=False)
_BARS_OF_OTHERS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")  # read on import


def is_quiet() -> bool:
    """Return whether this is inside `quiet`."""
    return _QUIET.get()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, no progress bar is shown and no notice is printed, whatever asks for one."""
    missing = [name for name in _BARS_OF_OTHERS if name not in os.environ]
    os.environ |= dict.fromkeys(missing, "1")
    token = _QUIET.set(True)
    try:
        yield
    finally:
        _QUIET.reset(token)
        for name in missing:
            os.environ.pop(name, None)


@contextlib.contextmanager
def logged(write: Callable[[str], None], *, debug: bool = False) -> Iterator[None]:
    """Inside, what layercrit logs is written line by line.

    Args:
        write: writes a line, such as ``12:30:59 INFO layercrit.measuring: ...``.
        debug: whether details are written, too.
    """
    import logging  # here, since `layercrit --help` does without it

    class Written(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            write(self.format(record))

    logger, handler = logging.getLogger("layercrit"), Written()
    handler.setFormatter(logging.Formatter("{asctime} {levelname} {name}: {message}", "%H:%M:%S", style="{"))
    before = logger.level, logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [handler], False  # what trackers set up for all loggers would repeat it
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before[0])
        _, logger.handlers, logger.propagate = before
