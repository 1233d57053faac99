"""Reading TOML: ``tomllib`` of the standard library, and before Python 3.11 the package that it was made from."""

import sys

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["tomllib"]
