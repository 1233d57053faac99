"""Tables that people write (study files, the zoo): checked by pydantic, with mistakes reported in our own words."""

import ast
import contextlib
import inspect
import itertools
import re
import textwrap
import types
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, WrapValidator
from pydantic_core import ErrorDetails, PydanticCustomError

from layercrit.errors import near

__all__ = ["STRICT", "Declaration", "expected", "meanings", "mistakes", "read_table"]


STRICT = ConfigDict(extra="forbid", strict=True)
"""Unknown keys are mistakes, and so are values of another type."""


class Declaration(BaseModel):
    """A table that a person writes; the docstring of an attribute is the meaning of its key."""

    model_config = STRICT


_Table = TypeVar("_Table", bound=Declaration)

# What must be in place of a value, by pydantic's name for what is wrong with it.
_WORDS = {
    "bool_type": "true or false",
    "dataclass_type": "a table",
    "dict_type": "a table",
    "expected": "{words}",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_type": "a whole number",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "tuple_type": "a list",
    "literal_error": "text",
    "model_type": "a table",
    "string_too_short": "text that is not empty",
    "string_type": "text",
    "too_long": "a list of {max_length}",
}


def expected(words: str) -> WrapValidator:
    """Return an annotation, to be given last, that reports any value that does not fit as ``KEY must be WORDS``."""

    def check(value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("expected", "{words}", {"words": words}) from None

    return WrapValidator(check)


def read_table(kind: type[_Table], table: Mapping[str, Any], where: str, found: list[str]) -> _Table:
    """Return a checked table; of one with mistakes, only the keys that are right.

    Args:
        kind: the declaration of its keys.
        table: the table as written.
        where: its place in the file; messages begin with it.
        found: mistakes are appended here.
    """
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        found += [f"{where} {mistake}" for mistake in mistakes(error, kind.model_fields, meanings(kind))]
        wrong = {key for one in error.errors() for key in one["loc"][:1]}
    missing = dict.fromkeys((key for key, one in kind.model_fields.items() if one.is_required()), "")  # all are texts
    return kind.model_construct(**missing | {key: value for key, value in table.items() if key not in wrong})


def meanings(kind: type[Declaration]) -> dict[str, str]:
    """Return key -> the docstring behind it in the source, which pydantic would read in every process, for a second."""
    found = {}
    for one in reversed(kind.__mro__):
        if not issubclass(one, Declaration):
            continue
        with contextlib.suppress(OSError, TypeError):  # a class that is not written in a file
            [declared] = ast.parse(textwrap.dedent(inspect.getsource(one))).body
            lines: list[Any] = vars(declared)["body"]
            for key, text in itertools.pairwise(lines):
                if isinstance(key, ast.AnnAssign) and isinstance(text, ast.Expr):
                    found[ast.unparse(key.target)] = inspect.cleandoc(ast.literal_eval(text.value))
    return found


def mistakes(
    error: ValidationError, keys: Iterable[str], meaning_of: Mapping[str, str] = types.MappingProxyType({})
) -> list[str]:
    """Return in our own words what pydantic found wrong with a table; none of its messages is shown."""
    return [_mistake(one, keys, meaning_of) for one in error.errors(include_url=False)]


def _mistake(error: ErrorDetails, keys: Iterable[str], meaning_of: Mapping[str, str]) -> str:
    place, given, context = error["loc"], error["input"], error.get("ctx", {})
    name = "".join(f" no. {part + 1}" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
    match error["type"]:
        case "value_error":
            return str(context["error"])
        case "extra_forbidden" | "unexpected_keyword_argument":
            return f"unknown key {name!r}. {near(name, keys)}" if name == place[0] else f"unknown key {name!r}"
        case "missing":
            return f"{name} is missing" + (f": {meaning_of[name]}" if name in meaning_of else "")
        case "literal_error" if isinstance(given, str):
            choices = re.findall("'([^']*)'", context["expected"])
            return f"unknown {name} {given!r}. {near(given, choices)}"
    limits = {key: f"{value:g}" if isinstance(value, float) else value for key, value in context.items()}
    words = _WORDS.get(error["type"], "of another form").format(**limits)
    return f"{name} must be {words}; got {given!r}"
