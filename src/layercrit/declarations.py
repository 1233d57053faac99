"""Tables that people write (study files, the zoo): pydantic checks them, and we tell their mistakes in our words."""

import re
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, WrapValidator
from pydantic_core import ErrorDetails, PydanticCustomError

from layercrit.errors import near

__all__ = ["Declaration", "expected", "read_table"]


class Declaration(BaseModel):
    """A table that a person writes; keys that it does not declare, and values of another type, are mistakes."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


_Table = TypeVar("_Table", bound=Declaration)

# What must be in place of a value, by pydantic's name for what is wrong with it.
_WORDS = {
    "bool_type": "true or false",
    "dict_type": "a table",
    "expected": "{words}",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_type": "a whole number",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "literal_error": "text",
    "model_type": "a table",
    "string_type": "text",
}


def expected(words: str) -> WrapValidator:
    """Return what, last in an annotation, says of any value that does not fit: ``KEY must be WORDS``."""

    def check(value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("expected", "{words}", {"words": words}) from None

    return WrapValidator(check)


def read_table(kind: type[_Table], table: Mapping[str, Any], where: str, mistakes: list[str]) -> _Table:
    """Return a table that somebody wrote, checked; of one with mistakes only the keys that are right.

    Args:
        kind: what may stand in it.
        table: as it was written.
        where: its place, as its mistakes begin.
        mistakes: what is wrong is added here.
    """
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        errors = error.errors(include_url=False)
    mistakes += [f"{where} {_mistake(kind, one)}" for one in errors]
    wrong = {key for one in errors for key in one["loc"][:1]}
    missing = dict.fromkeys((key for key, one in kind.model_fields.items() if one.is_required()), "")  # all are texts
    return kind.model_construct(**missing | {key: value for key, value in table.items() if key not in wrong})


def _mistake(kind: type[BaseModel], error: ErrorDetails) -> str:
    """Say in our words what pydantic found wrong; none of its own texts is shown."""
    place, given, context = error["loc"], error["input"], error.get("ctx", {})
    name = "".join(f" no. {part + 1}" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
    if error["type"] == "value_error":
        return str(context["error"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {name!r}. {near(str(place[-1]), _table_at(kind, place).model_fields)}"
    if error["type"] == "missing":
        return f"{name} is missing: {_table_at(kind, place).model_fields[str(place[-1])].description}"
    if error["type"] == "literal_error" and isinstance(given, str):
        choices = re.findall("'([^']*)'", context["expected"])
        return f"unknown {name} {given!r}. {near(given, choices)}"
    limits = {key: f"{value:g}" if isinstance(value, float) else value for key, value in context.items()}
    words = _WORDS.get(error["type"], "of another form").format(**limits)
    return f"{name} must be {words}; got {given!r}"


def _table_at(kind: type[BaseModel], place: tuple[str | int, ...]) -> type[BaseModel]:
    """Return the declaration of the table, within others, in which the last key of a place stands."""
    for key in (part for part in place[:-1] if isinstance(part, str)):
        annotation = kind.model_fields[key].annotation
        inside = (annotation, *typing.get_args(annotation))
        kind = next(one for one in inside if isinstance(one, type) and issubclass(one, BaseModel))
    return kind
