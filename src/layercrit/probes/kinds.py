"""Kinds of images with a name, ``NAME:REST``: their registry, and how a source is written."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from layercrit.errors import ProbeError
from layercrit.probes.parts import NoSuchPartError
from layercrit.probes.sources import ImageSource
from layercrit.registry import Registry

__all__ = ["IMAGE_SOURCES", "image_source", "kind_of", "named_kind", "open_named", "without_split"]

Opener = Callable[[str, dict[str, str]], ImageSource]
_Opener = TypeVar("_Opener", bound=Opener)


def _check_kind(name: str) -> None:
    if name in ("corrupt", "attack") or len(name) == 1:
        what = "paths on Windows" if len(name) == 1 else "sources of changed images"
        raise ProbeError(f"A kind of images cannot be named {name!r}: {what} begin like this. Choose another name.")


IMAGE_SOURCES = Registry[Opener]("kind of images", ProbeError, "layercrit.image_sources", check=_check_kind)
"""All kinds of images with a name, ``NAME:REST``, filled by `image_source` and by installed plug-ins."""


def image_source(name: str) -> Callable[[_Opener], _Opener]:
    """Register what opens images that are named ``NAME:REST?option=value&...``.

    It is a function (or a class) of ``REST`` and a dictionary of the options, texts by name, and returns an
    `ImageSource`. It takes the options that it knows out of the dictionary; one that is left is an error. ``split`` is
    the part of the data that is asked for.

    Raises:
        ProbeError: the name is taken or not valid.

    Examples:
        >>> import layercrit
        >>> from layercrit.probes.opening import open_source
        >>> @layercrit.image_source("garments")
        ... def garments(rest, options):
        ...     '''garments:NAME, images of the demo.'''
        ...     return open_source(f"layercrit-demo/{rest}.npz")
        >>> layercrit.ProbeSet.from_source("garments:fashion-mnist-test", n_images=4).n_images
        4
    """

    def register(opener: _Opener) -> _Opener:
        IMAGE_SOURCES[name] = opener
        return opener

    return register


def kind_of(source: str | Path) -> str | None:
    """Return the registered kind of which a text ``NAME:REST`` is; None for a path, and for everything else."""
    name, colon, _ = str(source).partition(":")
    return name if colon and name in IMAGE_SOURCES and not _exists(source) else None


def _exists(path: str | Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - which no name makes raise


def named_kind(source: str | Path) -> str | None:
    """Return the name with which a text ``NAME:REST`` begins, registered or not; None for URLs and everything else."""
    found = re.match(r"([A-Za-z][\w-]+):(?!//)", str(source))
    return None if found is None else found[1]


def without_split(source: str | Path) -> tuple[str | Path, str | None]:
    """Return a source without ``?split=NAME`` at its end, and that name or None; one of a kind stays as it is.

    Raises:
        ProbeError: another option stands there.
    """
    if kind_of(source) is not None:
        named = re.search(r"[?&]split=([^&]+)", str(source))
        return source, None if named is None else named[1]
    found = re.fullmatch(r"(.+)\?(\w+)=(.*)", str(source), re.DOTALL)
    if found is None or _exists(Path(source).expanduser()):
        return source, None
    path, option, name = found.groups()
    if option != "split" or not name:
        raise ProbeError(f"Unknown option {option!r} in '{source}'; expected '{path}?split=NAME', such as split=test.")
    return path, name


def open_named(kind: str, source: str, split: str | None = None) -> ImageSource:
    """Open ``NAME:REST?option=value``; options are taken literally, without ``%`` escapes.

    Args:
        kind: the name, as `kind_of` returns it.
        source: the whole text.
        split: the option of this name, in place of one in the text.

    Raises:
        ProbeError: an option is unknown (`NoSuchPartError` where that is ``split``), or the registered function returns
            something else than images.
    """
    rest, _, query = source.removeprefix(f"{kind}:").partition("?")
    options = dict(part.partition("=")[::2] for part in query.split("&") if part)
    options |= {} if split is None else {"split": split}
    opened = IMAGE_SOURCES[kind](rest, options)
    if not isinstance(opened, ImageSource):
        raise ProbeError(
            f"Cannot read '{source}': the {IMAGE_SOURCES.in_words(kind)} returned {type(opened).__name__}; expected an "
            "ImageSource."
        )
    if options:
        error = NoSuchPartError if [*options] == ["split"] else ProbeError
        words = f"the {IMAGE_SOURCES.in_words(kind)} has no option {next(iter(options))!r}"
        raise error(f"Cannot read '{source}': {words}.")
    opened.description = source if split is None else f"{source}{'&' if query else '?'}split={split}"
    return opened
