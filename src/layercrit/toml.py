"""TOML: ``tomllib`` of the standard library reads it, before Python 3.11 the package that it was made from.

The standard library writes none; what study files have, tables of plain values, is little.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["toml_section", "tomllib"]


def toml_section(title: str, values: Mapping[str, Any]) -> str:
    """Return a table under its title, such as ``[study]``; what is None is left out."""
    lines = [f"{key} = {_toml(value)}" for key, value in values.items() if value is not None]
    return "\n".join([title, *lines, ""])


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_toml(key)} = {_toml(one)}" for key, one in value.items()) + " }"
    # JSON's texts, numbers, truth values and lists are TOML's, too, but for one character that JSON leaves as it is
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
