"""Write the tables of docs/benchmarks.md and docs/advise.md from what the benchmarks measured.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json
    python benchmarks/replay.py --json benchmarks/results/replay.json
    python benchmarks/tables.py

In a page, the tables of a benchmark stand between two comments that name it.
"""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
PAGES = [HERE.parent / "docs" / name for name in ("benchmarks.md", "advise.md")]


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(page: str) -> str:
    """Return a page with the tables of all results that it has a place for."""
    for results in sorted((HERE / "results").glob("*.json")):
        name = results.stem
        if f"<!-- {name}.py -->" not in page:
            continue
        tables = benchmark(name).markdown(json.loads(results.read_text()))
        page, n = re.subn(
            rf"(<!-- {name}\.py -->\n).*?(\n<!-- end of {name}\.py -->)",
            lambda found, tables=tables: f"{found[1]}\n{tables}\n{found[2]}",
            page,
            flags=re.DOTALL,
        )
        if n != 1:
            raise SystemExit(f"{n} places for {name}.py in a page: one is expected")
    return page


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(written(path.read_text()))
