"""What is registered, in help and in the completion of shells.

The registries import torch, so help reads them only when it is shown. Completion, which has to be quick, reads names
from the text of the modules that register them: those of layercrit itself, not those of plug-ins.
"""

import copy
import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from layercrit.registry import Registry

__all__ = ["ModelCommand", "RegisteredOption", "complete_files", "complete_methods", "complete_zoo"]

_PACKAGE = Path(__file__).parents[1]
_REGISTERED = re.compile(r"^@\w+\(\s*\"([\w-]+)\"", re.MULTILINE)  # the decorator that registers, and the name


class RegisteredOption(click.Option):
    """An option whose values are names in a registry, which its help lists.

    Args:
        registry: where it is, such as ``layercrit.resets:RESETS``.
    """

    def __init__(self, *args: Any, registry: str, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.registry = registry

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the option and its help, with the names and what they stand for."""
        module, _, name = self.registry.partition(":")
        lines = _lines(getattr(import_module(module), name))
        listed = "; ".join(f"{name}: {line.rstrip('.')}" if line else name for name, line in lines.items())
        shown = copy.copy(self)
        shown.help = f"{self.help} {listed}."
        return click.Option.get_help_record(shown, ctx)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return the names that begin as the last of those that were typed, which commas separate."""
        return _complete(_names_in(self.registry.partition(":")[0]), incomplete)


def complete_methods(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the training methods whose names begin so."""
    return _complete(_names_in("layercrit.training"), incomplete)


def complete_zoo(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Return the models of the zoo whose identifiers begin so."""
    text = (_PACKAGE / "models" / "zoo" / "zoo.toml").read_text(encoding="utf-8")
    return _complete(re.findall(r'^\[models\."([^"]+)"\]', text, re.MULTILINE), incomplete)


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


def _lines(registry: "Registry[Any]") -> dict[str, str]:
    """Return the names and what they stand for, as a terminal shows it."""
    return {name: text.replace("``", "") for name, text in registry.summaries().items()}
