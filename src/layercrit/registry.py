"""Registries: resets, distances, methods and whatever else has a name, open to installed plug-ins."""

import logging
import re
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from layercrit.errors import LayercritError, first_line, near

__all__ = ["Registry", "summary_of"]

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")

Entry = TypeVar("Entry")

_LOG = logging.getLogger(__name__)


def summary_of(entry: object) -> str:
    """Return the first line of the docstring of a function, a class or an object."""
    return (entry.__doc__ or "").strip().partition("\n")[0]


class Registry(MutableMapping[str, Entry]):
    """Entries by name, in the order in which they were registered.

    ``registry[name] = entry`` registers one. A name that is taken is refused, unless the new entry is a function or
    class of the same module and name as the old one: modules may be reloaded, and notebook cells run again.

    An installed package adds entries through an entry point whose value is the module that registers them. Such modules
    are imported when the registry is first read. One that cannot be imported is left out, with a warning that names
    its package.

    Args:
        what: what an entry is called, such as ``reset``.
        error: the error raised for a name that is unknown, not valid or taken.
        group: the group of entry points, such as ``layercrit.resets``; None: plug-ins cannot add entries.
        check: raises where an otherwise valid name cannot be used.
        summary: returns one line about an entry.
    """

    def __init__(
        self,
        what: str,
        error: type[LayercritError],
        group: str | None = None,
        *,
        check: Callable[[str], None] = lambda name: None,
        summary: Callable[[Entry], str] = summary_of,
    ) -> None:
        self._what, self._error, self._check, self._summary = what, error, check, summary
        self._entries: dict[str, Entry] = {}
        self._unread_group = group
        self._broken: list[str] = []  # a sentence for each plug-in that could not be imported

    def __setitem__(self, name: str, entry: Entry) -> None:
        if not _NAME.fullmatch(name):
            raise self._error(
                f"The {self._what} cannot be named {name!r}: expected letters, digits, '_' and '-', starting with a "
                "letter."
            )
        self._check(name)
        if name in self._entries and not _same_origin(self._entries[name], entry):
            raise self._error(
                f"The {self._what} {name!r} exists already ({self._summary(self._entries[name]).rstrip('.')}). "
                "Choose another name."
            )
        self._entries[name] = entry

    def __getitem__(self, name: str) -> Entry:
        self._read_plug_ins()
        return self._entries[name]

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        self._read_plug_ins()
        return iter(self._entries)

    def __len__(self) -> int:
        self._read_plug_ins()
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} ({self._what}): {', '.join(self)}>"

    def find(self, name: str) -> Entry:
        """Return the entry of a name.

        Raises:
            LayercritError: there is none, raised as the registry's ``error``; the message suggests near names.
        """
        if name not in self:
            raise self._error(f"There is no {self._what} {name!r}. {self.hint(name)}")
        return self[name]

    def hint(self, name: str) -> str:
        """Return a hint for an unknown name: near names that are known, and the plug-ins that were left out."""
        return " ".join([near(str(name), self), *self._broken])

    def summaries(self) -> dict[str, str]:
        """Return every name with its summary, for help and tables."""
        return {name: self._summary(entry) for name, entry in self.items()}

    def _read_plug_ins(self) -> None:
        group, self._unread_group = self._unread_group, None  # at once, since a plug-in may read the registry
        if group is None:
            return
        for plug_in in entry_points(group=group):
            try:
                plug_in.load()
                _LOG.info("the plug-in %s adds to %s", _in_words(plug_in), group)
            except Exception as error:  # whatever the code of others raises
                self._broken.append(f"The plug-in {_in_words(plug_in)} could not be imported ({first_line(error)}).")
                warnings.warn(
                    f"{self._broken[-1]} Its entries of {group} are left out. Update or uninstall it.", stacklevel=3
                )


def _in_words(plug_in: EntryPoint) -> str:
    if plug_in.dist is None:
        return plug_in.value
    return f"{plug_in.value} of the package {plug_in.dist.name} {plug_in.dist.version}"


def _same_origin(one: object, other: object) -> bool:
    origin = _origin(one)
    return origin is not None and origin == _origin(other)


def _origin(entry: object) -> tuple[str, str] | None:
    """Return module and name of an entry's function or class; None for lambdas and other functions without a name."""
    made_of = entry if isinstance(entry, type) else getattr(entry, "function", entry)
    if not callable(made_of):
        made_of = type(made_of)
    name = getattr(made_of, "__qualname__", "<lambda>")
    return None if "<lambda>" in name else (made_of.__module__, name)
