"""Registries: resets, distances, methods and whatever else has a name, open to installed plug-ins."""

import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from layercrit.errors import LayercritError, first_line, near

__all__ = ["PlugInWarning", "Registry", "plug_in_that_raised", "summary_of"]

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")

_READ: dict[str, EntryPoint] = {}  # by its outermost package, of all registries

_ADDED: list[list[tuple["Registry[Any]", str, Any]]] = []
"""For each plug-in that is being imported, the innermost last: what it has added, and what had that name before."""

Entry = TypeVar("Entry")

_LOG = logging.getLogger(__name__)


class PlugInWarning(UserWarning):
    """A plug-in was left out."""


def summary_of(entry: object) -> str:
    """Return the first line of the docstring of a function, a class or an object."""
    return (entry.__doc__ or "").strip().partition("\n")[0]


class Registry(MutableMapping[str, Entry]):
    """Entries by name, in the order in which they were registered.

    ``registry[name] = entry`` registers one. A name that is taken is refused, unless the new entry is a function or
    class of the same module and name as the old one: modules may be reloaded, and notebook cells run again.

    An installed package adds entries through an entry point whose value is the module that registers them. Such modules
    are imported when the registry is first read. One that cannot be imported is left out, with what it added before it
    failed, and a warning names its package.

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
        self._plug_ins: list[EntryPoint] = []
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
        if _ADDED:
            _ADDED[-1].append((self, name, self._entries.get(name)))
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

    def hint(self, name: str, limit: int = 5) -> str:
        """Return a hint for an unknown name: near names that are known, and the plug-ins that were left out."""
        return " ".join([near(str(name), self, limit), *self._broken])

    def summaries(self) -> dict[str, str]:
        """Return every name with its summary, for help and tables."""
        return {name: self._summary(entry) for name, entry in self.items()}

    def package_of(self, name: str) -> dict[str, str]:
        """Return name -> version of the installed package whose plug-in registered an entry; else nothing."""
        module = getattr(_made_of(self.get(name)), "__module__", "")
        return next((_package(one) for one in self._plug_ins if _top(one.module) == _top(module)), {})

    def in_words(self, name: str) -> str:
        """Return what an entry is, for messages: ``figure 'share' of the package lab 1.2``."""
        packages = [f" of the package {package} {version}" for package, version in self.package_of(name).items()]
        return f"{self._what} {name!r}{''.join(packages)}"

    def _read_plug_ins(self) -> None:
        group, self._unread_group = self._unread_group, None  # at once, since a plug-in may read the registry
        if group is None:
            return
        self._plug_ins = list(entry_points(group=group))
        for plug_in in self._plug_ins:
            _READ[_top(plug_in.module)] = plug_in
            _ADDED.append([])
            try:
                plug_in.load()
                _LOG.info("the plug-in %s adds to %s", _in_words(plug_in), group)
            except (Exception, SystemExit) as error:  # whatever the code of others raises
                _undo(_ADDED[-1])
                self._broken.append(f"The plug-in {_in_words(plug_in)} could not be imported ({first_line(error)}).")
                warnings.warn(
                    f"{self._broken[-1]} Its entries of {group} are left out. Update or uninstall it.",
                    PlugInWarning,
                    stacklevel=_level_of_user(),
                )
            finally:
                _ADDED.pop()


def _undo(added: list[tuple[Registry[Any], str, Any]]) -> None:
    """Make registries what they were before entries were added."""
    for registry, name, before in reversed(added):
        registry._entries.pop(name, None)
        if before is not None:
            registry._entries[name] = before


def _level_of_user() -> int:
    """Return the ``stacklevel`` of the code that uses the registry, seen from the caller."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and _top(frame.f_globals.get("__name__", "")) in ("layercrit", "collections"):
        frame, level = frame.f_back, level + 1
    return level


def plug_in_that_raised(error: BaseException) -> str | None:
    """Return the plug-in in whose code an exception arose, in words; None where no plug-in had a part in it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    tops = (_top(frame.f_globals.get("__name__", "")) for frame in reversed(frames))
    return next((_in_words(_READ[top]) for top in tops if top in _READ), None)


def _in_words(plug_in: EntryPoint) -> str:
    packages = [f" of the package {package} {version}" for package, version in _package(plug_in).items()]
    return f"{plug_in.value}{''.join(packages)}"


def _package(plug_in: EntryPoint) -> dict[str, str]:
    """Return name -> version of the package that a plug-in belongs to."""
    return {} if plug_in.dist is None else {plug_in.dist.name: plug_in.dist.version}


def _top(module: str) -> str:
    return module.partition(".")[0]


def _same_origin(one: object, other: object) -> bool:
    origin = _origin(one)
    return origin is not None and origin == _origin(other)


def _origin(entry: object) -> tuple[str, str] | None:
    """Return module and name of an entry's function or class; None for lambdas and other functions without a name."""
    made_of = _made_of(entry)
    name = getattr(made_of, "__qualname__", "<lambda>")
    return None if "<lambda>" in name else (made_of.__module__, name)


def _made_of(entry: object) -> Any:
    """Return the function or the class that an entry was made of."""
    made_of = entry if isinstance(entry, type) else getattr(entry, "function", entry)
    return made_of if callable(made_of) else type(made_of)
