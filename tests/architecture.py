"""What imports what in layercrit, read from the source; `python tests/architecture.py` draws docs/architecture.svg."""

import ast
import html
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "layercrit"
PAGE, PICTURE = ROOT / "docs" / "architecture.md", ROOT / "docs" / "architecture.svg"


def modules() -> dict[str, Path]:
    """Every module by its dotted name; a package is the module of its `__init__`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: set[str]) -> Iterator[tuple[str, int]]:
    """Yield every module of the package that a module imports, wherever in it the import stands, with its line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}, line {node.lineno}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else str(node.module), node.lineno
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            first = node.args[0]
            if isinstance(first, ast.Constant):
                yield str(first.value), node.lineno


def graph() -> dict[str, dict[str, int]]:
    """Module -> the modules of the package that it imports, each with the line of the import."""
    found, names = modules(), set(modules())
    return {
        name: {target: line for target, line in imports(name, path, names) if target in names}
        for name, path in found.items()
    }


def room_of(module: str) -> str:
    """The package or single module under `layercrit` that a module belongs to; empty for `layercrit` itself."""
    return module.partition(".")[2].partition(".")[0]


def floors() -> list[list[str]]:
    """The rooms from top to bottom as docs/architecture.md lists them; those of one line do not import each other."""
    block = re.search(r"```text\n(cli\n.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None, "docs/architecture.md has no list of packages that begins with cli"
    return [[name.strip().rstrip("/") for name in line.split(",")] for line in block[1].splitlines()]


def circles(edges: dict[str, dict[str, int]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or by way of others."""
    reach: dict[str, set[str]] = {}
    for start in edges:
        seen, todo = set(), list(edges[start])
        while todo:
            module = todo.pop()
            if module not in seen:
                seen.add(module)
                todo.extend(edges[module])
        reach[start] = seen
    groups = {frozenset(other for other in reach[one] if one in reach[other]) for one in reach if one in reach[one]}
    return sorted(sorted(group) for group in groups)


# --- the picture ------------------------------------------------------------------------------------------------------

WIDTH, LINE, PAD, GAP, TOP = 1060, 17, 10, 12, 44
LETTER = 6.9  # width of a letter of the small font


def picture() -> str:
    """The packages as an SVG drawing: a row for each line of the list, imports going down only."""
    files: dict[str, list[str]] = {}
    for name, path in modules().items():
        inner = [] if path.name == "__init__.py" else name.split(".", 2)[2:]  # what is below the room
        files.setdefault(room_of(name), []).extend(part.replace(".", "/") for part in inner)
    y, parts = TOP, []
    for row in floors():
        width = (WIDTH - 2 * GAP - GAP * (len(row) - 1)) / len(row)
        boxes = [_wrapped(sorted(files[room]), width) for room in row]
        height = 2 * PAD + LINE + max(len(lines) for lines in boxes) * LINE
        for place, (room, lines) in enumerate(zip(row, boxes, strict=True)):
            parts.append(_box(GAP + place * (width + GAP), y, width, height, room, lines))
        y += height + GAP
    title = (
        '<text x="12" y="27" font-size="14" fill="#444">Who may import whom: downwards, or within a box. '
        "Boxes of one row do not import each other.</text>"
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" font-family="sans-serif" role="img" '
        f'aria-label="The packages of layercrit from top to bottom">'
    )
    paper = f'<rect width="{WIDTH}" height="{y}" fill="#fff"/>'
    return "\n".join([head, paper, title, *parts, "</svg>", ""])


def _wrapped(names: list[str], width: float) -> list[str]:
    lines = [""]
    for name in names:
        longer = f"{lines[-1]}  {name}".strip()
        if len(longer) * LETTER > width - 2 * PAD and lines[-1]:
            lines.append(name)
        else:
            lines[-1] = longer
    return [line for line in lines if line]


def _box(x: float, y: float, width: float, height: float, room: str, lines: list[str]) -> str:
    fill, edge = ("#eef3fb", "#5b7db1") if lines else ("#f6f6f6", "#b0b0b0")
    texts = [f'<text x="{x + PAD:.0f}" y="{y + PAD + 12}" font-size="15" font-weight="600" fill="#222">{room}</text>']
    texts += [
        f'<text x="{x + PAD:.0f}" y="{y + PAD + 12 + LINE * number}" font-size="12.5" fill="#444" '
        f'xml:space="preserve">{html.escape(line)}</text>'
        for number, line in enumerate(lines, 1)
    ]
    frame = f'<rect x="{x:.0f}" y="{y}" width="{width:.0f}" height="{height}" rx="5" fill="{fill}" stroke="{edge}"/>'
    return "\n".join([frame, *texts])


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
