"""Help that lists what is registered, read only when it is shown (the registries import torch); missing plug-ins."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from layercrit.errors import LayercritError

if TYPE_CHECKING:
    from layercrit.registry import Registry

__all__ = ["ModelCommand", "RegisteredOption", "missing_plug_ins_named"]


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
            f"{error}\nWhat is there was made with plug-ins that are not installed here: {', '.join(missing)}. Install "
            "them, then run the same command again."
        ) from error
