"""What is registered, in help and in the completion of shells; missing plug-ins.

The registries import torch, so help reads them only when it is shown. Completion, which has to be quick, reads names
from the text of the modules that register them: those of layercrit itself, not those of plug-ins.
"""

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from layercrit.errors import LayercritError

if TYPE_CHECKING:
    from layercrit.registry import Registry

__all__ = [
    "ModelCommand",
    "RegisteredOption",
    "complete_files",
    "complete_methods",
    "complete_pitfalls",
    "complete_zoo",
    "missing_plug_ins_named",
]

_PACKAGE = Path(__file__).parents[1]
_REGISTERED = re.compile(r"^@\w+\(\s*\"([\w-]+)\"", re.MULTILINE)  # the decorator that registers, and the name


class RegisteredOption(click.Option):
    """An option whose values are names in a registry, which its help lists.

    Args:
        registry: where it is, such as ``layercrit.resets:RESETS``.
        only_names: whether they are listed without what they stand for, as there are many.
        more: a heading and another registry, whose names are listed behind.
    """

    def __init__(
        self, *args: Any, registry: str, only_names: bool = False, more: tuple[str, str] | None = None, **settings: Any
    ) -> None:
        super().__init__(*args, **settings)
        self.registry, self.only_names, self.more = registry, only_names, more

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the option and its help, with the names and what they stand for."""
        lines = _lines(_registry(self.registry))
        listed = "; ".join(f"{name}: {line.rstrip('.')}" if line else name for name, line in lines.items())
        shown = copy.copy(self)
        shown.help = f"{self.help} {', '.join(lines) if self.only_names else listed}."
        if self.more is not None:
            heading, registry = self.more
            shown.help += f" {heading} {', '.join(_registry(registry))}."
        return click.Option.get_help_record(shown, ctx)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return the names that begin as the last of those that were typed, which commas separate."""
        if self._custom_shell_complete is not None:
            return super().shell_complete(ctx, incomplete)
        return _complete(_names_in(self.registry.partition(":")[0]), incomplete)


def complete_methods(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the training methods whose names begin so."""
    return _complete(_names_in("layercrit.training"), incomplete)


def complete_zoo(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the models of the zoo whose identifiers begin so."""
    text = (_PACKAGE / "models" / "zoo" / "zoo.toml").read_text(encoding="utf-8")
    return _complete(re.findall(r'^\[models\."([^"]+)"\]', text, re.MULTILINE), incomplete)


def complete_pitfalls(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the pitfalls whose names begin so."""
    text = (_PACKAGE / "pitfalls.py").read_text(encoding="utf-8")
    return _complete(re.findall(r'^ +Pitfall\(\s*"([\w-]+)"', text, re.MULTILINE), incomplete)


def complete_files(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete names of files and folders."""
    return [CompletionItem(incomplete, type="file")]


def _complete(names: list[str], incomplete: str) -> list[CompletionItem]:
    before, comma, begun = incomplete.rpartition(",")
    return [CompletionItem(f"{before}{comma}{name}") for name in names if name.startswith(begun)]


def _names_in(module: str) -> list[str]:
    """Return the names that a module, or those of a package, register."""
    place = _PACKAGE.parent.joinpath(*module.split("."))
    files = sorted(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    return [name for file in files for name in _REGISTERED.findall(file.read_text(encoding="utf-8"))]


class ModelCommand(click.Command):
    """A command with an argument MODEL, whose help lists the kinds of references."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the kinds of model references."""
        from layercrit.models.sources import MODEL_SOURCES

        forms = [", ".join(source.forms) for source in MODEL_SOURCES.values()]
        with formatter.section("MODEL is a reference"):
            formatter.write_dl(list(zip(forms, _lines(MODEL_SOURCES).values(), strict=True)))


def _registry(where: str) -> "Registry[Any]":
    """Return the registry that is named ``MODULE:NAME``."""
    module, _, name = where.partition(":")
    found: Registry[Any] = getattr(import_module(module), name)
    return found


def _lines(registry: "Registry[Any]") -> dict[str, str]:
    """Return the names and what they stand for, as a terminal shows it."""
    return {name: text.replace("``", "") for name, text in registry.summaries().items()}


@contextlib.contextmanager
def missing_plug_ins_named(recorded: Callable[[], Mapping[str, str]]) -> Iterator[None]:
    """Say in errors that are raised here which plug-ins an earlier result was made with that are not installed.

    Args:
        recorded: returns the versions that the earlier result names.
    """
    try:
        yield
    except LayercritError as error:
        from layercrit.provenance import missing_plug_ins

        if not (missing := missing_plug_ins(recorded())):
            raise
        raise type(error)(
            f"{error}\n  What is there was made with plug-ins that are not installed here: {', '.join(missing)}. "
            "Install them, then run the same command again."
        ) from error
