"""Help that lists what is registered, read only when it is shown: the registries import torch."""

import copy
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from layercrit.registry import Registry

__all__ = ["ModelCommand", "RegisteredOption"]


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
