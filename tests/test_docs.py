"""What the documentation shows is what happens, and what it lists is what there is.

Four comments in the pages steer these tests, each on a line of its own:

- ``<!-- table: NAME -->`` to ``<!-- end of table -->``: what `TABLES` makes of the registries; ``python
  tests/test_docs.py`` writes all of them anew.
- ``<!-- file: NAME -->`` before a block: the block is a file that later blocks of the page import or read. Blocks of
  Python without it are run in order, and a block of text right behind one is what it prints.
- ``<!-- not run: why -->`` before a block of Python: it is only compiled.
- ``<!-- run -->`` before a block of commands: they are run in order with the other blocks, and a block of text right
  behind it is what they print, lines of three dots standing for any others. Without it, commands are only parsed.
"""

import ast
import contextlib
import functools
import html
import importlib
import importlib.util
import inspect
import io
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

import layercrit
from forked import forked_workers
from layercrit import errors
from layercrit.advice import ACTIONS
from layercrit.cli.exit_codes import ExitCode
from layercrit.cli.root import cli
from layercrit.demo import copy_family
from layercrit.distances import DISTANCES
from layercrit.models.sources import MODEL_SOURCES
from layercrit.models.zoo.fetching import ZOO
from layercrit.named_options import with_options
from layercrit.probes.corruptions import CORRUPTIONS
from layercrit.probes.kinds import IMAGE_SOURCES
from layercrit.reporting.study_figures import FIGURES
from layercrit.resets import RESETS
from layercrit.study.file import read_study_file
from layercrit.study.ray_workers import EXECUTORS
from layercrit.toml import tomllib
from layercrit.trackers import TRACKERS
from layercrit.training.methods import CATEGORIES, METHODS
from small_family import measure_small_family

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "src" / "layercrit"
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.name != "family.md")  # that one a program writes
ARXIV = re.compile(r"\b\d{4}\.\d{5}\b|(?<=arXiv )\d{4}\.\d{4,5}\b")

# --- tables -----------------------------------------------------------------------------------------------------------


def markdown(text: str) -> str:
    """A docstring's line as a cell of a table."""
    return " ".join(text.replace("``", "`").split()).replace("|", r"\|")


def table(*columns: str, rows) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (columns, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


def resets() -> str:
    donors = {"initialiser": "a fresh network", "checkpoint": "a checkpoint", "model": "another model", None: "-"}
    rows = [
        (
            f"`{one.name}`",
            markdown(one.summary),
            markdown("; ".join(option_in_words(option) for option in one.declared.values()) or "-"),
            "yes" if one.random else "no",
            donors[one.donor],
        )
        for one in RESETS.values()
    ]
    return table("name", "new values of the layer", "options", "trials differ", "donor", rows=rows)


def option_in_words(option) -> str:
    default = with_options("", {option.name: option.default}).strip("()")
    return f"``{default or option.name}``: {option.in_words()}"


def distances() -> str:
    rows = [(f"`{one.name}`", markdown(one.summary), f"{one.upper:.4g}") for one in DISTANCES.values()]
    return table("name", "what it is", "largest", rows=rows)


def corruptions() -> str:
    def strengths(values: tuple[float, ...]) -> str:
        return ", ".join(f"{value:g}" for value in values)

    rows = [
        (one.family, f"`{one.name}`", markdown(one.summary), one.unit, strengths(one.small), strengths(one.large))
        for one in CORRUPTIONS.values()
    ]
    return table("family", "kind", "what it is", "strength", "at 32 pixels", "at 224 pixels", rows=rows)


def model_sources() -> str:
    texts = MODEL_SOURCES.summaries()
    rows = [
        (" or ".join(f"`{form}`" for form in source.forms), markdown(texts[kind]))
        for kind, source in MODEL_SOURCES.items()
    ]
    return table("reference", "model", rows=rows)


def trackers() -> str:
    return table(
        "name", "where it shows a run", rows=[(f"`{k}`", markdown(v)) for k, v in TRACKERS.summaries().items()]
    )


def methods() -> str:
    members = [one for category in CATEGORIES for one in METHODS.values() if one.category == category]
    rows = [(one.category, f"`{one.name}`", markdown(one.changes), markdown(one.paper)) for one in members]
    return table("category", "method", "what it changes", "source", rows=rows)


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def first_line(path: Path) -> str:
    """The first line of a module's docstring."""
    return markdown((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0])


def tree() -> str:
    """A heading for each package, and under it what the package and each of its modules is."""
    parts = []
    for init in sorted(path for path in modules() if path.name == "__init__.py"):
        parts += [f"### `{init.parent.relative_to(PACKAGE.parent)}/`", "", first_line(init), ""]
        inside = [path for path in modules() if path.parent == init.parent and path != init]
        parts += [*(f"- `{path.name}`: {first_line(path)}" for path in inside), ""]
    return "\n".join(parts).rstrip()


def papers_of_methods() -> str:
    named: dict[str, list[str]] = {}
    for one in METHODS.values():
        for paper in one.paper.split("; models of "):
            identified = re.match(r".*?arXiv \d+\.\d+", paper)
            named.setdefault(identified[0] if identified else paper, []).append(f"`{one.name}`")
    return table("paper", "methods", rows=[(markdown(paper), " ".join(names)) for paper, names in named.items()])


def papers_of_zoo() -> str:
    counts: dict[tuple[str, str, str, str], int] = {}
    for entry in ZOO.values():
        cited = entry.citation
        key = cited.authors.replace(" and ", ", "), cited.title, str(cited.year), cited.arxiv or "-"
        counts[key] = counts.get(key, 0) + 1
    rows = [[*map(markdown, key), str(n)] for key, n in sorted(counts.items(), key=lambda one: one[0][0].split(",")[0])]
    return table("authors", "title", "first version", "arXiv", "checkpoints", rows=rows)


def figures() -> str:
    rows = [(f"`{name}`", markdown(summary)) for name, summary in FIGURES.summaries().items()]
    return table("figure", "what it shows", rows=rows)


def exit_codes() -> str:
    return table("code", "meaning", rows=[(str(code.value), markdown(code.meaning)) for code in ExitCode])


TABLES: dict[str, Callable[[], str]] = {
    "exit codes": exit_codes,
    "figures": figures,
    "resets": resets,
    "distances": distances,
    "corruptions": corruptions,
    "model sources": model_sources,
    "methods": methods,
    "trackers": trackers,
    "modules": tree,
    "papers of methods": papers_of_methods,
    "papers of the zoo": papers_of_zoo,
}
_MARKED = re.compile(r"<!-- table: ([\w ]+) -->\n.*?<!-- end of table -->", re.DOTALL)


def with_tables(text: str) -> str:
    """A page's text with its tables written anew."""
    return _MARKED.sub(
        lambda found: f"<!-- table: {found[1]} -->\n\n{TABLES[found[1]]()}\n\n<!-- end of table -->", text
    )


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_page__tables_are_those_of_the_registries(path):
    text = path.read_text(encoding="utf-8")
    assert text == with_tables(text), f"{path.name} is out of date: run `python tests/test_docs.py`"


def test_pages__hold_every_table_once():
    named = [name for path in PAGES for name in _MARKED.findall(path.read_text(encoding="utf-8"))]
    assert sorted(named) == sorted(TABLES)


def test_architecture__lists_every_module():
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    listed = []
    for package in re.split(r"^### (?=`layercrit/)", text, flags=re.MULTILINE)[1:]:
        folder = PACKAGE.parent / package.split("`")[1]
        assert folder.joinpath("__init__.py").is_file()
        listed += [folder / name for name in re.findall(r"^- `(\w+\.py)`: \S", package, re.MULTILINE)]
    assert sorted(listed) == [path for path in modules() if path.name != "__init__.py"]


def test_architecture__names_files_that_exist():
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`(src/[^`]+)`", text)
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


# --- blocks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    code: str
    file: str | None
    mark: str
    shown: str | None
    heading: str


_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path, *languages: str) -> Iterator[Block]:
    text = path.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        if found[2] not in languages:
            continue
        above = text[: found.start()].rstrip().rpartition("\n")[2]
        behind = _FENCE.match(text, found.end() + len(re.match(r"\s*", text[found.end() :])[0]))
        named = re.fullmatch(r"<!-- file: (\S+) -->", above.strip())
        yield Block(
            page=path,
            line=text.count("\n", 0, found.start()) + 2,
            language=found[2],
            code=textwrap.dedent(found[3]),
            file=named[1] if named else None,
            mark=above.strip(),
            shown=behind[3] if behind and behind[2] == "text" else None,
            heading=re.findall(r"^#+ (.*)$", text[: found.start()], re.MULTILINE)[-1],
        )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder in which the family of the demo lies."""
    folder = tmp_path_factory.mktemp("docs")
    copy_family(folder / "layercrit-demo")
    (folder / "images" / "val").mkdir(parents=True)  # study files are checked down to their images
    return folder


@pytest.fixture
def as_a_reader(demo, monkeypatch):
    """In the demo's folder, as a program there; what the pages register or import is forgotten afterwards."""
    registries = (RESETS, DISTANCES, MODEL_SOURCES, IMAGE_SOURCES, METHODS, TRACKERS, CORRUPTIONS, FIGURES, EXECUTORS)
    before, known = [dict(registry) for registry in registries], set(sys.modules)
    monkeypatch.chdir(demo)
    monkeypatch.setattr(sys, "path", [str(demo), *sys.path])
    importlib.invalidate_caches()
    with forked_workers():
        yield demo
    for registry, kept in zip(registries, before, strict=True):
        registry.clear()
        registry.update(kept)
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(demo)):
            del sys.modules[name]


NUMBER = re.compile(r"(?<![\w.])\d+\.\d+%?")  # not those in names of layers
BAR = re.compile(r"[█-▏]+")  # of another length where processors round otherwise


def assert_prints(printed: str, shown: str, where: str) -> None:
    pattern = re.escape(" ".join(NUMBER.sub("#", BAR.sub("", shown)).split()))
    pattern = pattern.replace(re.escape(" ... "), " .* ").replace(re.escape("#"), f"({NUMBER.pattern})")
    found = re.fullmatch(pattern, " ".join(BAR.sub("", printed).split()))
    assert found, f"{where} prints\n{printed}"
    for mine, theirs in zip(found.groups(), NUMBER.findall(shown), strict=True):
        tolerance = 2 if theirs.endswith("%") else 0.02
        assert float(mine.rstrip("%")) == pytest.approx(float(theirs.rstrip("%")), abs=tolerance), (
            f"{where} prints\n{printed}"
        )


WITH_CODE = [path for path in PAGES if any(blocks(path, "python", "toml"))]


@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: path.stem)
def test_page__code_does_what_is_shown(path, as_a_reader):
    namespace = {"__name__": "__main__"}
    if '"layercrit-demo/study"' in path.read_text(encoding="utf-8"):
        measure_small_family(as_a_reader / "layercrit-demo", "few.toml")
    for block in blocks(path, "python", "toml", "sh"):
        where = f"{path.name}, line {block.line},"
        if block.language == "toml":
            tomllib.loads(block.code)
        if block.file:
            (as_a_reader / block.file).write_text(block.code, encoding="utf-8")
            importlib.invalidate_caches()
            if block.language == "toml":
                read_study_file(as_a_reader / block.file)
        elif block.language == "python":
            if block.heading == "Test it":  # which is to become a file of its own
                assert "my_" in block.code, where
                namespace = {"__name__": "__main__"}
            program = compile(block.code, where, "exec")
            if block.mark.startswith("<!-- not run: "):
                continue
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(program, namespace)
            if block.shown is not None:
                assert_prints(printed.getvalue(), block.shown, where)
        elif block.mark == "<!-- run -->":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                for line in commands(block):
                    cli.main(shlex.split(line), prog_name="layercrit", standalone_mode=False)
            if block.shown is not None:
                assert_prints(printed.getvalue(), block.shown, where)


TEMPLATES = ROOT / "tests" / "plugin_package" / "src" / "layercrit_example"


@pytest.mark.parametrize("path", sorted((DOCS / "extending").glob("*.md")), ids=lambda path: path.stem)
def test_extending__templates_are_the_modules_of_the_example_package(path):
    """Which tests/test_plug_ins.py installs."""
    (template,) = [block for block in blocks(path, "python") if block.file]
    assert template.code == (TEMPLATES / template.file.removeprefix("my_")).read_text(encoding="utf-8")


def test_extending__the_project_file_is_that_of_the_example_package():
    """But for its names, and for the entry points of other pages."""
    (shown,) = [block.code for block in blocks(DOCS / "extending" / "reset.md", "toml") if "[project]" in block.code]
    shown, example = (
        tomllib.loads(text.replace("my-package = ", "example = ").replace("my_package", "layercrit_example"))
        for text in (shown, (TEMPLATES.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    )
    resets = shown["project"].pop("entry-points").pop("layercrit.resets")
    assert resets == example["project"].pop("entry-points")["layercrit.resets"]
    assert shown["project"].pop("name") == "my-package"
    assert shown["project"].keys() == example["project"].keys() - {"name"}
    assert {key: value for key, value in shown.items() if key != "project"} == {
        key: value for key, value in example.items() if key != "project"
    }


def test_extending__names_every_registry_that_is_open_to_plug_ins():
    made = re.compile(r'Registry(?:\[[^(]*\])?\(\s*"[\w ]+", \w+, "(layercrit\.\w+)"')
    groups = sorted(group for path in modules() for group in made.findall(path.read_text(encoding="utf-8")))
    assert len(groups) >= 10
    text = (DOCS / "extending.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| .*\| `(layercrit\.\w+)` \|$", text, re.MULTILINE)) == groups
    example = tomllib.loads((TEMPLATES.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    assert sorted(example["project"]["entry-points"]) == groups


def commands(block: Block) -> Iterator[str]:
    """Lines of a shell block that call layercrit, those that end in a backslash joined with the next."""
    for line in block.code.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\||;", line.partition("#")[0]):
            words = shlex.split(part.partition(" > ")[0])
            if "layercrit" in words[:1] or ("uvx" in words[:1] and "layercrit" in words):
                yield shlex.join(words[words.index("layercrit") + 1 :])


def find_command(words: list[str]) -> tuple[click.Command, str, list[str]]:
    """The command that words name, how it is called, and what follows its name."""
    command: click.Command = cli
    name, rest = "layercrit", list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        found = command.get_command(click.Context(command), rest[0])
        assert found is not None, f"there is no command {name} {rest[0]}"
        command, name, rest = found, f"{name} {rest[0]}", rest[1:]
    return command, name, rest


COMMANDS = sorted({(path.stem, line) for path in PAGES for block in blocks(path, "sh") for line in commands(block)})


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_page__commands_can_be_given(page, line):
    command, name, rest = find_command(shlex.split(line))
    if isinstance(command, click.Group):
        assert rest, f"{page}: {name} is a group of commands"
        assert rest[0] in {flag for one in command.params for flag in one.opts}, f"{page}: {name} has no {rest[0]}"
    else:
        command.make_context(name, rest)  # raises where an argument is wrong or missing


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_page__commands_in_sentences_exist(path):
    prose = _FENCE.sub("", path.read_text(encoding="utf-8"))
    for line in re.findall(r"`layercrit( [^`]+)`", prose):
        command, name, rest = find_command(shlex.split(line))
        known = {"--help", *(flag for one in command.params for flag in one.opts)}
        for word in rest:
            assert not word.startswith("--") or word.partition("=")[0] in known, f"{path.name}: {name} has no {word}"


def test_commands__are_all_somewhere_in_the_pages():
    text = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    for name, command in cli.commands.items():
        members = getattr(command, "commands", {"": None})
        for member in members:
            assert f"layercrit {name} {member}".rstrip() in text, f"no page shows layercrit {name} {member}"


def leaves(group: click.Group, name: str) -> Iterator[str]:
    for member, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, f"{name} {member}")
        else:
            yield f"{name} {member}"


ROWS = re.findall(
    r"^\| `(layercrit [^`]+)` \| (.+) \|$", (DOCS / "python.md").read_text(encoding="utf-8"), re.MULTILINE
)


def test_python__has_a_call_for_every_command():
    assert sorted({command.partition(" --")[0] for command, _ in ROWS}) == sorted(leaves(cli, "layercrit"))


@pytest.mark.parametrize(("command", "calls"), ROWS, ids=[command for command, _ in ROWS])
def test_python__every_call_can_be_made(command, calls):
    made = [text for text in re.findall(r"`([^`]+)`", calls) if text.startswith("layercrit.")]
    assert made
    for text in made:
        call = ast.parse(text, mode="eval").body
        while isinstance(call.func.value, ast.Call):  # such as load_study(DIR).progress()
            call = call.func.value
        module, _, name = ast.unparse(call.func).rpartition(".")
        try:
            function = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError:  # a method of a class or registry
            module, _, owner = module.rpartition(".")
            function = getattr(getattr(importlib.import_module(module), owner), name)
        inspect.signature(function).bind(*call.args)  # raises where there are too few or too many


RENAMED = re.findall(
    r"^\| `(--[a-z]+)` of `layercrit ([^`]+)` \| `(\w+)` of `([\w.]+)`",
    (DOCS / "python.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


@pytest.mark.parametrize(("option", "command", "argument", "call"), RENAMED)
def test_python__arguments_with_other_names_than_their_options(option, command, argument, call):
    found = cli
    for part in command.split():
        found = found.commands[part]
    assert any(option in one.opts for one in found.params)
    module, _, name = call.rpartition(".")
    assert argument in inspect.signature(getattr(importlib.import_module(module), name)).parameters


# --- lists ------------------------------------------------------------------------------------------------------------


def test_errors__every_class_has_a_section():
    sections = re.findall(r"^## `(\w+)`$", (DOCS / "errors.md").read_text(encoding="utf-8"), re.MULTILINE)
    classes = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, Exception)]
    assert sorted(sections) == sorted(one.__name__ for one in classes)


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def literal(node: ast.expr) -> str:
    """The text of an expression, with a mark where a value is put in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(part) for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "\0"


def has_in_order(text: str, parts: list[str]) -> bool:
    for part in parts:
        _, found, text = text.partition(part) if part else ("", True, text)
        if not found:
            return False
    return True


def test_errors__messages_are_those_of_the_code():
    texts = {
        literal(node)
        for path in modules()
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Constant | ast.JoinedStr)
    }
    for registry in (RESETS, DISTANCES, METHODS, TRACKERS):  # whose messages have a value for what they hold
        with pytest.raises(errors.LayercritError) as refused:
            registry.find("zzz")
        texts.add(str(refused.value))
    headings = re.findall(r"^### (.+)$", (DOCS / "errors.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(headings) > 15
    for heading in headings:
        parts = [part.strip() for part in heading.replace("`", "").split("...")]
        assert any(has_in_order(text, parts) for text in texts), f"no message reads {heading}"


def variables_read(path: Path) -> Iterator[str]:
    """The environment variables that a module names where it reads them."""
    for node in ast.walk(tree_of(path)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "get"
            and node.args
        ):
            of, name = node.func.value, node.args[0]
        elif isinstance(node, ast.Subscript):
            of, name = node.value, node.slice
        else:
            continue
        if getattr(of, "attr", None) == "environ" and isinstance(name, ast.Constant):
            yield name.value


def test_command_line__lists_every_variable_that_is_read():
    text = (DOCS / "command-line.md").read_text(encoding="utf-8")
    listed = re.findall(r"`([A-Z][A-Z_]+)(\.\.\.)?`", text.partition("## Environment variables")[2])
    names, families = {name for name, more in listed if not more}, tuple(name for name, more in listed if more)
    read = {name for path in modules() for name in variables_read(path)}
    assert {"LAYERCRIT_CACHE", "NO_COLOR", "RANK", "HF_ENDPOINT"} <= read, "the test sees them"
    assert [name for name in sorted(read - names) if not name.startswith(families)] == []


def sources_of_papers() -> Iterator[str]:
    for path in [*modules(), *PACKAGE.rglob("*.toml"), ROOT / "CITATION.cff"]:
        yield path.read_text(encoding="utf-8").replace("arXiv:", "arXiv ")


def test_bibliography__has_the_papers_that_the_code_cites_and_no_others():
    text = (DOCS / "bibliography.md").read_text(encoding="utf-8")
    code = "\n".join(sources_of_papers())
    cited = set(re.findall(r"(?:arXiv |arxiv = \")(\d{4}\.\d{4,5})", code))
    assert set(re.findall(r"\b\d{4}\.\d{4,5}\b", text)) == cited
    people = re.findall(r"\b([A-Z][\w-]+)(?:, [A-Z]\w+)*(?: et al\.| & [A-Z]\w+)? ((?:19|20)\d\d)\b", code)
    for name, year in set(people):
        if name not in ("Xiv", "v"):
            assert re.search(rf"^.*\b{name}\b.*\b{year}\b", text, re.MULTILINE), f"{name} {year} is missing"


# --- the site ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    started = time.monotonic()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "CI": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - started < 30
    return folder


def test_site__is_built_without_warnings_and_has_every_page(site):
    for path in DOCS.rglob("*.md"):
        assert (site / path.relative_to(DOCS)).with_suffix(".html").is_file(), path
    assert (site / "search" / "search_index.json").is_file()
    for path in DOCS.glob("notebooks/*.ipynb"):
        assert (site / path.relative_to(DOCS)).is_file(), path


def test_site__reference_has_every_name_with_its_example(site):
    page = (site / "reference.html").read_text(encoding="utf-8")
    for name in layercrit.__all__:
        assert f'id="layercrit.{name}"' in page
    assert page.count("Examples:") == len(layercrit.__all__)
    text = html.unescape(re.sub("<[^>]+>", "", page))
    assert text.count(">>> import layercrit") == len(layercrit.__all__)
    assert not re.search(r"&(?:amp|lt|gt|quot|#\d+);", text), "something is escaped twice"
    assert "(among the model's outputs)" in " ".join(text.split()), "a text of several lines is cut into items"


def test_site__asks_nothing_of_any_network(site):
    outside = re.compile(r"(?:https?:)?//", re.IGNORECASE)
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc=[\"']?([^\"' >]+)", text)
        loaded += re.findall(r"<link\b[^>]*\brel=[\"']?(?:stylesheet|preconnect|preload|icon)\b[^>]*", text)
        assert loaded, f"{path.name} loads nothing: the patterns of this test are out of date"
        for one in loaded:
            assert not outside.search(one.partition("data:")[0]), f"{path.name} loads {one}"
    for path in site.rglob("*.css"):
        for one in re.findall(r"url\(([^)]+)\)|@import ([^;]+)", path.read_text(encoding="utf-8")):
            address = "".join(one).strip("\"'")
            assert address.startswith("data:") or not outside.search(address), f"{path.name} loads {address}"


def test_benchmarks__tables_are_those_of_the_results():
    path = ROOT / "benchmarks" / "tables.py"
    spec = importlib.util.spec_from_file_location("tables", path)
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    pages = [page.read_text(encoding="utf-8") for page in tables.PAGES]
    for page in pages:
        assert tables.written(page) == page, "run python benchmarks/tables.py"
    for results in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert sum(f"<!-- {results.stem}.py -->" in page for page in pages) == 1, results.name


def test_advice__says_what_was_measured():
    path = ROOT / "benchmarks" / "regret.py"
    spec = importlib.util.spec_from_file_location("regret", path)
    regret = sys.modules["regret"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(regret)
    told = regret.evidence(json.loads((path.parent / "results" / "regret.json").read_text(encoding="utf-8")))
    assert {name: action.evidence for name, action in ACTIONS.items()} == told


def test_package__is_the_one_that_is_described():
    """It is that of the checkout, or installed from it."""
    installed = Path(layercrit.__file__).parent
    for path in PACKAGE.rglob("*.py"):
        assert (installed / path.relative_to(PACKAGE)).read_bytes() == path.read_bytes()


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
