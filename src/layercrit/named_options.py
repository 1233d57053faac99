"""Names with options, such as ``noise(scale=0.5)``: how they are read, checked and written."""

import ast
import inspect
import keyword
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from layercrit.errors import LayercritError, near, shown

__all__ = ["AtLeast", "Option", "checked_options", "name_list", "options_of", "split_name", "with_options"]

_NAME = re.compile(r"\s*([A-Za-z][A-Za-z0-9_-]*)\s*(?:\((.*)\)\s*)?", re.DOTALL)
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CONSTANTS = {"true": True, "false": False, "none": None}
_MISSING: Any = inspect.Parameter.empty
_KINDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}


def name_list(names: Iterable[str]) -> list[str]:
    """Return names as a list; a text is one name, not its letters."""
    return [names] if isinstance(names, str) else list(names)


@dataclass(frozen=True)
class AtLeast:
    """The smallest value of an option, in its annotation: ``scale: Annotated[float, AtLeast(0)] = 1.0``."""

    limit: float


@dataclass(frozen=True)
class Option:
    """An option that a function declares as a keyword with a type.

    Attributes:
        name: its name.
        kind: ``bool``, ``int``, ``float`` or ``str``.
        default: its value where none is given.
        required: whether one must be given.
        choices: the values it may have, or empty.
        limit: the smallest value of a number, or None.
        optional: whether it may be None, which stands for no value and is left out of names.
    """

    name: str
    kind: type
    default: Any
    required: bool
    choices: tuple[Any, ...] = ()
    limit: float | None = None
    optional: bool = False

    def in_words(self) -> str:
        """Return what a value must be."""
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        return _KINDS[self.kind] + (f" of at least {self.limit:g}" if self.limit is not None else "")

    def value_of(self, given: Any) -> Any:
        """Return a value as the option's type.

        Raises:
            ValueError: it is of another type, out of range, or no finite number.
        """
        if given is None and self.optional:
            return None
        is_number = isinstance(given, int | float) and not isinstance(given, bool)
        value: Any = float(given) if self.kind is float and is_number else given
        if type(value) is not self.kind or (self.choices and value not in self.choices):
            raise ValueError
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError
        if self.limit is not None and float(cast(Any, value)) < self.limit:
            raise ValueError
        return value


def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """Return the options that a function declares: its keyword-only parameters.

    Their annotations are ``bool``, ``int``, ``float``, ``str``, or a ``Literal`` of some values of one of these; with
    ``| None`` for an option that may be left away, and as ``Annotated[..., AtLeast(0)]`` for a smallest value.

    Raises:
        TypeError: a parameter is annotated in another way.
    """
    parameters = inspect.signature(function).parameters.values()
    declared = [parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    hints = inspect.get_annotations(function, eval_str=True) if declared else {}
    return {one.name: _option(one.name, hints.get(one.name), one.default) for one in declared}


def _option(name: str, annotation: Any, default: Any) -> Option:
    kind, limit = annotation, None
    choices: tuple[Any, ...] = ()
    if typing.get_origin(kind) is typing.Annotated:
        kind, *about = typing.get_args(kind)
        limit = next((one.limit for one in about if isinstance(one, AtLeast)), None)
    optional = typing.get_origin(kind) in (typing.Union, types.UnionType) and type(None) in typing.get_args(kind)
    if optional:
        kind, *others = (one for one in typing.get_args(kind) if one is not type(None))
        kind = None if others else kind
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        kind = type(choices[0])
    if kind not in _KINDS or any(type(choice) is not kind for choice in choices):
        raise TypeError(
            f"the option {name!r} must be annotated as bool, int, float, str or a Literal of such values; "
            f"got {annotation!r}"
        )
    return Option(name, kind, default, default is _MISSING, choices, limit, optional)


def split_name(text: str, what: str, error: type[LayercritError]) -> tuple[str, dict[str, Any]]:
    """Split ``name(option=value, ...)`` into the name and the values, which are numbers, words, true, false or none.

    Numbers may be fractions such as ``8/255``; words may stand in quotation marks. A text of another form is returned
    whole, without options, so that it is refused as a name that is not known.

    Args:
        text: the name, with or without brackets behind it.
        what: what it names, for messages, such as ``reset``.
        error: the error to raise.

    Raises:
        LayercritError: what stands in the brackets is not written like this, raised as ``error``.
    """
    match = _NAME.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        return text, {}
    values: dict[str, Any] = {}
    try:
        call = ast.parse(f"f({match[2] or ''})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError
        for one in call.keywords:
            if one.arg is None or one.arg in values:
                raise ValueError
            values[one.arg] = _value(one.value)
    except (SyntaxError, ValueError, ArithmeticError, MemoryError, RecursionError) as cause:
        raise error(
            f"The {what} {shown(text)} is not written as {match[1]}(option=value, ...), each option once, with values "
            "that are numbers, words, true or false."
        ) from cause
    return match[1], values


def _value(node: ast.expr) -> Any:
    """Return the value of a constant, a word, or a fraction."""
    if isinstance(node, ast.Name):
        return _CONSTANTS.get(node.id.lower(), node.id)
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float | str | None):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(node.operand)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return _number(node.left) / _number(node.right)
    raise ValueError


def _number(node: ast.expr) -> float:
    value = _value(node)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError
    return value


def checked_options(
    where: str, given: Mapping[str, Any], declared: Mapping[str, Option], error: type[LayercritError]
) -> dict[str, Any]:
    """Return the value of every declared option, in the order of declaration.

    Args:
        where: what has the options, for messages, such as ``The reset 'noise'``.
        given: values as `split_name` returns them.
        declared: as `options_of` returns them.
        error: the error to raise.

    Raises:
        LayercritError: an option is unknown or missing, or a value has the wrong type or is out of range.
    """
    for name in given:
        if name not in declared:
            hint = near(name, declared) if declared else "It has none: leave the brackets out."
            raise error(f"{where} has no option {name!r}. {hint}")
    values = {}
    for name, option in declared.items():
        if name not in given and option.required:
            raise error(f"{where} needs the option {name!r}: {option.in_words()}, written as {name}=...")
        try:
            values[name] = option.value_of(given.get(name, option.default))
        except (ValueError, OverflowError) as cause:
            hint = f" {near(given[name], option.choices)}" if option.choices and isinstance(given[name], str) else ""
            raise error(f"{where}: {name} must be {option.in_words()}; got {shown(given[name])}.{hint}") from cause
    return values


def with_options(name: str, values: Mapping[str, Any]) -> str:
    """Write a name with its options, so that equal options are written alike; those that are None are left out.

    Example:
        >>> with_options("noise", {"scale": 0.50, "kind": "normal", "seed": None})
        'noise(scale=0.5, kind=normal)'
    """
    written = [f"{option}={_written(value)}" for option, value in values.items() if value is not None]
    return f"{name}({', '.join(written)})" if written else name


def _written(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    if isinstance(value, str):
        plain = _WORD.fullmatch(value) and value.lower() not in _CONSTANTS and not keyword.iskeyword(value)
        return value if plain else repr(value)
    return str(value)
