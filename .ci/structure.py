"""Checks the structure of the source tree and a few names; `make check` runs it.

Prints every finding as `file:line: message` and exits with status 1 if there is any. It limits the
length of files and functions, forbids import cycles, and bans names that are ambiguous by the
glossary of docs/architecture.md. It needs only Python.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "namernn_fast"
FILE_LINES, FUNCTION_LINES = 400, 80

# Files, or file:function, that may be longer, and why. At most three.
EXCEPTIONS = {}

# Where words are looked for, as prefixes of paths.
CODE = ("csrc/", f"{PACKAGE}/", "benchmarks/", "tests/", "tools/", "README", "CONTRIBUTING")
EVERYWHERE = (*CODE, "docs/")
NATIVE = ("csrc/", "tests/native/")
GPU = (f"{PACKAGE}/gpu/", "tests/gpu/", "benchmarks/gpu/", "tools/lint/")
# Names that could mean two things of the glossary: (pattern, what to write instead, where)
BANNED = [
    (r"\blayer(\.|->)packed\b", "panels", NATIVE),
    (r"\bRows\b(<|&| \w+[;,)])", "RowStrides", NATIVE),
    (r"(class|:|->|import) Rows\b|\bRows\(", "SequenceLayout", GPU),
    (r"\b(grad_)?(h_n|hx|input|output|row|unit|feature|column)_step\b", "…_stride", EVERYWHERE),
    (r"\b(time|batch)_step\b", "…_stride", GPU),
]
WORD_FILES = {".py", ".h", ".cpp", ".md"}


def source_files(*folders: str, suffixes: set[str]) -> Iterator[tuple[str, str]]:
    """Yields the path and the text of each file, sorted by path."""
    for folder in folders:
        top = ROOT / folder
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.suffix in suffixes and path.is_file():
                yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def python_functions(text: str) -> Iterator[tuple[str, int, int]]:
    """Yields the name, first line and number of lines of each function."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1


def without_comments(text: str) -> str:
    """Returns C++ code with comments, literals and preprocessor lines blanked out."""
    skipped = r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'|^[ ]*#(?:\\\n|[^\n])*"
    return re.sub(skipped, lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.DOTALL | re.M)


FUNCTION = re.compile(
    r"(?P<name>operator\W{1,3}|~?\w+)\s*\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
    r"\s*(?:const\b|noexcept\b|override\b|final\b|->[^;{}]*)*\s*(?::[^:].*)?$",
    re.DOTALL,
)


def cpp_functions(text: str) -> Iterator[tuple[str, int, int]]:
    """Yields the name, first line and number of lines of each function that has a body.

    Nested functions, such as lambdas, count as part of the enclosing one.
    """
    code = without_comments(text)
    header = 0  # where the text before the next brace begins
    open_braces: list[tuple[str, int] | str | None] = []  # a function's name and start, if any
    for brace in re.finditer(r"[{};]", code):
        at = brace.start()
        if brace[0] == "{":
            # clang-format puts no space before an initializer's brace, as in `member{1}`.
            if not code[at - 1].isspace():
                open_braces.append("value")
                continue
            begin = at - len(code[header:at].lstrip())
            outside = not any(open_braces) and "=" not in code[begin:at].split("(")[0]
            found = FUNCTION.search(code[begin:at].rstrip()) if outside else None
            open_braces.append((found["name"], begin) if found else None)
        elif brace[0] == "}" and open_braces:
            function = open_braces.pop()
            if function == "value":
                continue
            if function:
                first, last = (code.count("\n", 0, place) + 1 for place in (function[1], at))
                yield function[0], first, last - first + 1
        header = at + 1


def imports(module: str, is_package: bool, tree: ast.Module, modules: set[str]):
    """Yields (line, imported module) for each import from the package, also inside functions."""
    parts = module.split(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                base = parts[: len(parts) - node.level + is_package] + base
            source = ".".join(base)
            within = [f"{source}.{alias.name}" for alias in node.names]
            names = [name if name in modules else source for name in within]
        else:
            continue
        for name in dict.fromkeys(names):
            if name in modules and name != module:
                yield node.lineno, name


def import_cycles(files: dict[str, str]) -> Iterator[tuple[str, int, str]]:
    """Yields the path, line and message for each import that is part of a cycle."""
    paths = {}
    for path in files:
        parts = path.removesuffix(".py").split("/")
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    edges = {}
    for module, path in paths.items():
        tree = ast.parse(files[path])
        edges[module] = list(imports(module, path.endswith("__init__.py"), tree, set(paths)))

    def way(start: str, end: str, seen: set[str]) -> list[str]:
        if start == end:
            return [end]
        seen.add(start)
        for _, target in edges[start]:
            if target not in seen and (rest := way(target, end, seen)):
                return [start, *rest]
        return []

    for module, targets in edges.items():
        for line, target in targets:
            if back := way(target, module, set()):
                yield paths[module], line, "import cycle: " + " -> ".join([module, *back])


def banned_words(path: str, text: str) -> Iterator[tuple[int, str]]:
    """Yields the line and a message for each banned name."""
    for pattern, instead, places in BANNED:
        if path.startswith(places):
            for found in re.finditer(pattern, text):
                line = text.count("\n", 0, found.start()) + 1
                # The glossary's own table may mention the banned names.
                if path == "docs/architecture.md" and text.splitlines()[line - 1].startswith("|"):
                    continue
                yield line, f"ambiguous name {found[0].strip()!r}: write {instead}"


def findings() -> Iterator[str]:
    """Yields every finding as `file:line: message`."""
    used = set()
    for path, text in source_files("csrc", PACKAGE, suffixes={".h", ".cpp", ".py"}):
        functions = python_functions if path.endswith(".py") else cpp_functions
        sizes = [("", 1, len(text.splitlines()), FILE_LINES)]
        sizes += [(f":{name}", *size, FUNCTION_LINES) for name, *size in functions(text)]
        for name, line, lines, most in sizes:
            if lines > most and (excepted := {path, path + name} & EXCEPTIONS.keys()):
                used |= excepted
            elif lines > most:
                what = f"function {name[1:]}" if name else "file"
                yield f"{path}:{line}: {what} has {lines} lines, more than {most}"
    for name in EXCEPTIONS.keys() - used:
        yield f".ci/structure.py:1: the exception {name} is not needed"
    if len(EXCEPTIONS) > 3:
        yield f".ci/structure.py:1: {len(EXCEPTIONS)} exceptions, more than 3"
    for path, line, message in import_cycles(dict(source_files(PACKAGE, suffixes={".py"}))):
        yield f"{path}:{line}: {message}"
    tops = [top for top in EVERYWHERE if top.endswith("/")] + ["README.md", "CONTRIBUTING.md"]
    for path, text in source_files(*tops, suffixes=WORD_FILES):
        for line, message in banned_words(path, text):
            yield f"{path}:{line}: {message}"


if __name__ == "__main__":
    found = list(findings())
    print("\n".join([*found, f"{len(found)} findings"]))
    sys.exit(bool(found))
