"""The exit codes of commands."""

from enum import IntEnum

from layercrit.errors import TRY_AGAIN

__all__ = ["ExitCode"]


class ExitCode(IntEnum):
    """With what a command ends.

    Attributes:
        meaning: what the code tells a script.
    """

    meaning: str

    def __new__(cls, code: int, meaning: str) -> "ExitCode":
        """Make a member of a code and its meaning."""
        member = int.__new__(cls, code)
        member._value_, member.meaning = code, meaning
        return member

    DONE = 0, "all is done"
    ERROR = 1, "an error, which stderr explains; some of a study's trials or models failed; `doctor` found a problem"
    USAGE = 2, "no such command or option, or one is missing or makes no sense"
    BUG = 70, "a bug in layercrit; please report it with what `--traceback` shows"
    TRY_AGAIN = TRY_AGAIN, "not yet: a shard waits for the pilots of others; the same command works later"
    HANGUP = 129, "the terminal was closed (SIGHUP)"
    INTERRUPTED = 130, "Ctrl-C"
    READER_GONE = 141, "nobody reads the output any more, as behind `| head`"
    TERMINATED = 143, "ended by SIGTERM, as by a scheduler"
