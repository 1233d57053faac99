"""Write what the benchmarks measured into docs/benchmarks.md, docs/advise.md and what `layercrit advise` says.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json
    python benchmarks/replay.py --json benchmarks/results/replay.json
    python benchmarks/tables.py

In a page, the tables of a benchmark stand between two comments that name it; in `layercrit/advice/actions.py`, what
regrets say of each action is a text of its own.
"""

import importlib.util
import json
import re
import textwrap
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
ACTIONS = HERE.parent / "src" / "layercrit" / "advice" / "actions.py"
TEXTS = {"freeze": "_FROZEN", "finetune": "_TUNED", "prune": "_PRUNED", "quantise": "_QUANTISED"}
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


def told(code: str) -> str:
    """Return the module of actions with what regrets say of each."""
    evidence = benchmark("regret").evidence(json.loads((HERE / "results" / "regret.json").read_text()))
    for action, name in TEXTS.items():
        lines = textwrap.wrap(evidence[action], 108, break_on_hyphens=False)
        text = "\n".join(f'    "{line} "' for line in lines)[:-2] + '"'
        code, n = re.subn(rf"^{name} = \(\n.*?\n\)$", f"{name} = (\n{text}\n)", code, flags=re.DOTALL | re.MULTILINE)
        if n != 1:
            raise SystemExit(f"{n} texts {name} in {ACTIONS.name}: one is expected")
    return code


if __name__ == "__main__":
    ACTIONS.write_text(told(ACTIONS.read_text()))
    for path in PAGES:
        path.write_text(written(path.read_text()))
