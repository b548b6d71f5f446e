"""The rules of the house as a test: the shape of the code is checked like any other behaviour.

Floors, sizes, first sentences and leftovers are read from the syntax tree, so a rule costs one function here and
nobody's attention. Each check returns what it found as lines, and each is tried on a wrong example first, so that none
can pass by being blind.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KORE = ROOT / "kore"

FILE_LINES_MAX = 600
FUNCTION_LINES_MAX = 60
HOT_FUNCTION_LINES_MAX = 120  # marked by a comment "hot path" in the function: inlined on purpose, with its figure

# From the ground up; a module may import its own floor's package and what lies below.
FLOORS = [
    {"kore.errors", "kore.limits", "kore.driver", "kore.version"},
    {"kore.readiness"},
    {"kore.uring", "kore.bsd"},
    {"kore.sandbox"},
    {"kore.reactor"},
    {"kore.tls"},
    {"kore.http"},
    {"kore.clients"},
    {"kore.application"},
    {"kore.process"},
    {"kore.cli"},
    {"kore", "kore.__main__"},
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part(module: str) -> str:
    """The part of the house a module belongs to: kore.http.parser -> kore.http."""
    return ".".join(module.split(".")[:2])


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from runtime_nodes(node)


def imports(nodes: Iterator[ast.AST], known: set[str]) -> set[str]:
    """Modules of kore that are imported; `from kore.http import parser` is kore.http.parser when that is a module."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else node.module)
    return {name for name in found if name == "kore" or name.startswith("kore.")}


def upward(module: str, imported: set[str]) -> list[str]:
    own = LEVEL.get(part(module))
    if own is None:
        return [f"{module}: its part {part(module)} stands on no floor"]
    wrong = []
    for name in sorted(imported):
        level = LEVEL.get(part(name))
        if part(name) != part(module) and (level is None or level > own or (level == own and own > 0)):
            wrong.append(f"{module} imports {name}, which does not lie below")
    return wrong


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """Import cycles, each as one line, by depth-first search."""
    found, done, path = [], set(), []

    def visit(name: str) -> None:
        if name in path:
            found.append(" -> ".join([*path[path.index(name):], name]))
            return
        if name in done:
            return
        path.append(name)
        for other in sorted(graph.get(name, ())):
            visit(other)
        done.add(path.pop())

    for name in sorted(graph):
        visit(name)
    return found


def too_long(path: str, text: str) -> list[str]:
    lines = text.splitlines()
    found = []
    if len(lines) > FILE_LINES_MAX:
        found.append(f"{path}: {len(lines)} lines, more than {FILE_LINES_MAX}")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first, last = node.lineno, node.end_lineno or node.lineno
            hot = any(re.search(r"#.*\bhot path\b", line, re.I) for line in lines[first - 1:last])
            bound = HOT_FUNCTION_LINES_MAX if hot else FUNCTION_LINES_MAX
            if last - first + 1 > bound:
                found.append(f"{path}:{first}: {node.name} has {last - first + 1} lines, more than {bound}")
    return found


def first_sentence(path: str, text: str) -> list[str]:
    doc = ast.get_docstring(ast.parse(text))
    if doc is None:
        return [f"{path}: no docstring"]
    sentence = re.split(r"(?<=[.;])\s", doc.split("\n\n")[0], maxsplit=1)[0].strip()
    if sentence[-1:] not in (".", ":", ";") or len(sentence.split()) < 4:
        return [f"{path}: its first sentence does not say what it is: {sentence!r}"]
    return []


def leftovers(path: str, text: str) -> list[str]:
    found = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", token.string):
            found.append(f"{path}:{token.start[0]}: a leftover: {token.string[:60]}")
        if re.search(r"#\s*pragma\b|type:\s*ignore(?!\[)|noqa(?!: )", token.string):
            found.append(f"{path}:{token.start[0]}: says to look away without saying from what: {token.string}")
    for node in ast.walk(ast.parse(text)):
        # The contract in driver.py is abstract, everything else is done.
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"{path}:{node.lineno}: a bare except")
        if isinstance(node, ast.Raise) and "NotImplementedError" in ast.dump(node) and path != "kore/driver.py":
            found.append(f"{path}:{node.lineno}: a stub")
    return found


def broken_repeats(path: str, text: str) -> list[str]:
    """Possessive repeats of groups, which before 3.11.5 match half a group (python/cpython#106052)."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
            pattern = node.value if isinstance(node.value, str) else node.value.decode("latin-1")
            without_sets = re.sub(r"\[(?:\\.|[^\]\\])*\]", "x", pattern, flags=re.DOTALL)
            if re.search(r"\)(?:[*+?]|\{[0-9,]+\})\+", without_sets):
                found.append(f"{path}:{node.lineno}: a possessive repeat of a group: {pattern[:60]}")
    return found


def undocumented(path: str, text: str) -> list[str]:
    """Public classes and functions of a module without a docstring."""
    return [
        f"{path}:{node.lineno}: {node.name} has no docstring"
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_") and ast.get_docstring(node) is None
    ]


def report(found: list[str]) -> None:
    assert not found, "\n" + "\n".join(found)


def each(check, *folders: str) -> list[str]:
    return [line for path in files(*folders) for line in check(str(path.relative_to(ROOT)), path.read_text())]


WRONG = [
    (first_sentence, "x = 1\n"),
    (first_sentence, '"""helpers"""\n'),
    (too_long, "x = 1\n" * 601),
    (too_long, "def f():\n" + "    x = 1\n" * 61),
    (leftovers, "# {}: later\n".format("TODO")),
    (leftovers, "x = y  # type: {}\n".format("ignore")),
    (leftovers, "x = y  # {}: no cover\n".format("pragma")),
    (leftovers, "try:\n    pass\nexcept:\n    pass\n"),
    (leftovers, "def f():\n    raise NotImplementedError\n"),
    (undocumented, "def f():\n    pass\n"),
    (undocumented, "class F:\n    pass\n"),
]


@pytest.mark.parametrize(("check", "text"), WRONG)
def test_a_check_sees_what_is_wrong(check, text: str) -> None:
    """Each rule finds something in an example that breaks it."""
    assert check("wrong.py", text)


def test_floors_and_cycles_are_seen() -> None:
    """The two rules on imports find a wrong import and a cycle."""
    assert upward("kore.http.parser", {"kore.process.parent"})
    assert upward("kore.uring.ring", {"kore"})
    assert not upward("kore.http.parser", {"kore.errors", "kore.http.status", "kore.reactor"})
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a -> b -> c -> a"]
    assert not cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_imports_point_down() -> None:
    """No module imports from a floor above it, not even inside a function or for a type."""
    known = {module_name(path) for path in files("kore")}
    report([
        line for path in files("kore")
        for line in upward(module_name(path), imports(ast.walk(ast.parse(path.read_text())), known))
    ])


def test_no_import_cycles() -> None:
    """What is imported while running forms no circle; imports for types alone do not count."""
    known = {module_name(path) for path in files("kore")}
    graph = {
        module_name(path): imports(runtime_nodes(ast.parse(path.read_text())), known) - {module_name(path)}
        for path in files("kore")
    }
    report(cycles(graph))


def test_files_and_functions_are_short() -> None:
    """Files and functions stay within what can be read in one go."""
    report(each(too_long, "kore", "tests", "examples", "scripts"))


def test_every_file_says_what_it_is() -> None:
    """A file opens with a docstring whose first sentence says what it is."""
    report(each(first_sentence, "kore", "tests", "examples", "scripts"))


def test_nothing_is_left_over() -> None:
    """No reminders, stubs, bare excepts or unexplained silencers."""
    report(each(leftovers, "kore", "tests", "examples", "scripts"))


def test_patterns_mean_the_same_on_every_python() -> None:
    """No regular expression uses what older Pythons get wrong."""
    assert broken_repeats("x.py", 're.compile(rb"(?:;a)*+")')
    assert broken_repeats("x.py", 're.compile(r"(a[)]){1,2}+")')
    assert not broken_repeats("x.py", 're.compile(rb"(?:[()*+]|;a++)*")')
    report(each(broken_repeats, "kore"))


def test_what_is_public_is_documented() -> None:
    """Public classes and functions of every module have a docstring."""
    report(each(undocumented, "kore"))


def test_public_functions_are_documented_and_typed() -> None:
    """What `import kore` offers to applications has a docstring and annotations throughout."""
    kore = pytest.importorskip("kore")
    found = []
    for name in getattr(kore, "__all__", ()):
        value = getattr(kore, name)
        if isinstance(value, types.FunctionType):
            if not inspect.getdoc(value):
                found.append(f"kore.{name} has no docstring")
            signature = inspect.signature(value)
            if signature.return_annotation is inspect.Signature.empty:
                found.append(f"kore.{name} does not say what it returns")
            found += [
                f"kore.{name}: {parameter.name} has no type" for parameter in signature.parameters.values()
                if parameter.annotation is inspect.Parameter.empty
            ]
    report(found)


def test_no_module_bears_a_public_name() -> None:
    """Importing kore.server as a module would overwrite the function kore.server."""
    kore = pytest.importorskip("kore")
    modules = {path.stem for path in KORE.glob("*.py")} | {path.name for path in KORE.iterdir() if path.is_dir()}
    callables = {name for name in getattr(kore, "__all__", ()) if not inspect.ismodule(getattr(kore, name))}
    report([f"kore.{name} is both a module and a public name" for name in sorted(modules & callables)])


def test_one_version() -> None:
    """The version stands in one place, and the package shows it."""
    kore = pytest.importorskip("kore")
    from kore.version import __version__

    assert getattr(kore, "__version__", None) == __version__
