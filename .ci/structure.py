"""Checks the structure of the source tree; `make check` runs it. Needs only Python.

Prints every finding as `file:line: message`, and exits with status 1 if there are findings. Rules:

- Files, functions and parameter lists must not be too long.
- Imports must not form cycles, and must follow the order in ROOMS.
- Only code in the cells' folders may compare names of cells.
- Only TORCH_PRIVATE may use private names of torch.
- Only CONTEXT may check for compilers, transforms and modes.
- Names must not be ambiguous according to the glossary in docs/architecture.md.
"""

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "namernn_fast"
CELLS, NATIVE_CELLS = f"{PACKAGE}/cells/", "csrc/cells/"
# The only module that may use private names of torch.
TORCH_PRIVATE = f"{PACKAGE}/machine/torch_private.py"
# The only module that may check for compilers, transforms and modes. QUESTIONS finds such checks.
CONTEXT = f"{PACKAGE}/machine/context.py"
QUESTIONS = re.compile(
    r"torch\.(compiler|jit)\.is_\w+|_are_functorch_transforms_active|_get_tracing_state|forward_ad\b"
    r"|_is_any_autocast_enabled|_len_torch_\w+_stack|_profiler_enabled"
    r"|from torch\.(compiler|jit) import .*is_\w+"
)
FILE_LINES, FUNCTION_LINES, PARAMETERS = 600, 80, 10

# Maps each file, or file:function, that may be too long to the reason. At most three entries.
EXCEPTIONS = {}
# The modules and folders directly in the package, bottom to top. Each may import only earlier ones.
ROOMS = (
    *("cells", "machine", "equations", "ops", "prepared_ops", "call", "gpu", "gpu_backend"),
    *("integrations", "reference", "torch_operators", "autograd", "step_autograd"),
    *("recompute", "dispatch", "functional", "nn"),
    *("__init__", "testing", "torchao", "names", "bench", "__main__"),
)
# Besides public functions, these may have more than PARAMETERS parameters: constructors, Triton
# kernels, `RecurrentCell.apply`, which is like the public functions of cells, and the operator
# `backward`, because namernn_fast/ops.py defines the operator's schema.
MANY_PARAMETERS = re.compile(
    r".*\.py:(__init__|\w+_kernel)|.*nn/equation\.py:apply|csrc/library/operators\.cpp:backward"
)
# The modules whose `__all__` lists the public functions.
EXPORTING = (f"{PACKAGE}/__init__.py", f"{PACKAGE}/nn/__init__.py")
# Functions that only raise errors may compare cells, because torch's messages depend on the cell.
WORDING = re.compile(r"_refuse_\w+")

# Path prefixes of the code that is searched for BANNED names.
CODE = ("csrc/", f"{PACKAGE}/", "benchmarks/", "tests/", "tools/", "README", "CONTRIBUTING")
EVERYWHERE = (*CODE, "docs/")
NATIVE = ("csrc/", "tests/native/")
GPU = (f"{PACKAGE}/gpu/", "tests/gpu/", "benchmarks/gpu/")
# Names that the glossary makes ambiguous: (pattern, name to use instead, path prefixes to search)
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


def python_functions(text: str) -> Iterator[tuple[str, int, int, int]]:
    """Yields each function: its name, first line, length in lines, and number of parameters."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            parameters = sum(argument.arg not in ("self", "cls", "ctx") for argument in arguments)
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            yield node.name, node.lineno, lines, parameters


def without_comments(text: str) -> str:
    """Returns C++ code with comments, literals and preprocessor lines blanked out."""
    skipped = r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'|^[ ]*#(?:\\\n|[^\n])*"
    return re.sub(skipped, lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.DOTALL | re.M)


FUNCTION = re.compile(
    r"(?P<name>operator\W{1,3}|~?\w+)\s*\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
    r"\s*(?:const\b|noexcept\b|override\b|final\b|->[^;{}]*)*\s*(?::[^:].*)?$",
    re.DOTALL,
)


def cpp_parameters(signature: str) -> int:
    """Returns the number of parameters in a signature such as `name(int a, int b)`."""
    inner = signature[signature.index("(") + 1 :]
    depth, parameters = 0, int(not inner.lstrip().startswith(")"))
    for character in inner:
        depth += (character in "(<[{") - (character in ")>]}")
        if depth < 0:
            break
        parameters += character == "," and depth == 0
    return parameters


def cpp_functions(text: str) -> Iterator[tuple[str, int, int, int]]:
    """Yields each function that has a body, as `python_functions` does.

    Nested functions, such as lambdas, count as part of the enclosing function.
    """
    code = without_comments(text)
    header = 0  # where the text before the next brace starts
    # One entry per open brace: (name, number of parameters, start) if the brace opens a function,
    # "value" if it opens an initializer, and None otherwise.
    open_braces: list[tuple[str, int, int] | str | None] = []
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
            open_braces.append((found["name"], cpp_parameters(found[0]), begin) if found else None)
        elif brace[0] == "}" and open_braces:
            function = open_braces.pop()
            if function == "value":
                continue
            if function:
                first, last = (code.count("\n", 0, place) + 1 for place in (function[2], at))
                yield function[0], first, last - first + 1, function[1]
        header = at + 1


def exported_names(files: dict[str, str]) -> set[str]:
    """Returns the strings in the `__all__` of the modules in EXPORTING."""
    return {
        node.value
        for path in EXPORTING
        for statement in ast.parse(files[path]).body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__"
        for node in ast.walk(statement.value)
        if isinstance(node, ast.Constant)
    }


def computed(node: ast.expr, values: dict[str, ast.expr]) -> str | None:
    """Returns the string value of an expression, or None if `values` does not determine it.

    Args:
        node: the expression.
        values: the expression assigned to each variable.
    """
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    others = {name: value for name, value in values.items() if name not in names}
    try:
        known = {name: computed(values[name], others) for name in names}
        found = eval(ast.unparse(node), {"__builtins__": {}}, known)
    except (AttributeError, LookupError, NameError, TypeError, ValueError):
        return None
    return found if isinstance(found, str) else None


def imports_by_name(
    module: str, is_package: bool, tree: ast.Module
) -> Iterator[tuple[int, str | None]]:
    """Yields (line, imported module) for each call of `import_module` or `__import__`.

    The module is None if the module's name cannot be computed from the file. Names that a function
    gets from its caller are left out, because `imports` finds these strings in the caller.
    """
    nodes = [*ast.walk(tree)]
    stored = Counter(
        node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    )
    values: dict[str, ast.expr] = {
        node.targets[0].id: node.value
        for node in nodes
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and stored[node.targets[0].id] == 1
    }
    package = module if is_package else module.rpartition(".")[0]
    values |= {"__name__": ast.Constant(module), "__package__": ast.Constant(package)}
    for node in nodes:
        if not isinstance(node, ast.Call):
            continue
        if ast.unparse(node.func).rpartition(".")[2] not in ("import_module", "__import__"):
            continue
        given = dict(zip(("name", "package"), node.args, strict=False))
        given |= {keyword.arg: keyword.value for keyword in node.keywords}
        name = computed(given["name"], values)
        if name is not None and name.startswith("."):
            relative_to = computed(given["package"], values)
            name = resolve_name(name, relative_to) if relative_to else None
        source = given["name"]
        if isinstance(source, ast.Name):
            source = values.get(source.id, source)
        if name is not None or not isinstance(source, ast.Name):
            yield node.lineno, name


def imports(module: str, is_package: bool, tree: ast.Module, modules: set[str]):
    """Yields (line, imported module) for each import from the package, even inside functions.

    A string that equals a module's name counts as an import, because the string may be passed to a
    function that imports the module. The module is None if its name cannot be computed.
    """
    parts = module.split(".")
    for line, name in imports_by_name(module, is_package, tree):
        if name is None or (name in modules and name != module):
            yield line, name
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
        elif isinstance(node, ast.Constant) and node.value in modules - {PACKAGE}:
            names = [node.value]
        else:
            continue
        for name in dict.fromkeys(names):
            if name in modules and name != module:
                yield node.lineno, name


def modules_of(
    files: dict[str, str],
) -> tuple[dict[str, str], dict[str, list[tuple[int, str | None]]]]:
    """Returns the path of each module, and the results of `imports` for each module."""
    paths = {}
    for path in files:
        parts = path.removesuffix(".py").split("/")
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    edges = {}
    for module, path in paths.items():
        tree = ast.parse(files[path])
        found = imports(module, path.endswith("__init__.py"), tree, set(paths))
        edges[module] = list(dict.fromkeys(found))
    return paths, edges


def upward_imports(files: dict[str, str]) -> Iterator[tuple[str, int, str]]:
    """Yields the path, line and message for each import that violates the order in ROOMS."""
    paths, edges = modules_of(files)

    def room(module: str) -> str:
        return (*module.split("."), "__init__")[1]

    for module, targets in edges.items():
        if room(module) not in ROOMS:
            yield paths[module], 1, f"{room(module)} has no place in ROOMS (.ci/structure.py)"
            continue
        for line, target in targets:
            if target is None:
                yield paths[module], line, "imports a module by a computed name: write the name out"
            elif room(target) in ROOMS[ROOMS.index(room(module)) + 1 :]:
                yield paths[module], line, f"{room(module)} must not import {room(target)} above it"


def import_cycles(files: dict[str, str]) -> Iterator[tuple[str, int, str]]:
    """Yields the path, line and message for each import that is part of a cycle."""
    paths, edges = modules_of(files)

    def route(start: str, end: str, seen: set[str]) -> list[str]:
        if start == end:
            return [end]
        seen.add(start)
        for _, target in edges[start]:
            if target and target not in seen and (rest := route(target, end, seen)):
                return [start, *rest]
        return []

    for module, targets in edges.items():
        for line, target in targets:
            if target and (way_back := route(target, module, set())):
                yield paths[module], line, "import cycle: " + " -> ".join([module, *way_back])


def names_of_cells(files: dict[str, str]) -> set[str]:
    """Returns the `name` argument of each `Cell(...)` call in the cells' folder."""
    return {
        keyword.value.value
        for path, text in files.items()
        if path.startswith(CELLS)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Cell"
        for keyword in node.keywords
        if keyword.arg == "name" and isinstance(keyword.value, ast.Constant)
    }


def questions_about_cells(files: dict[str, str]) -> Iterator[tuple[str, int, str]]:
    """Yields the path, line and message for code that compares or looks up a cell's name."""
    names = names_of_cells(files)

    def named(node: ast.AST | None) -> bool:
        items = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
        return any(isinstance(item, ast.Constant) and item.value in names for item in items)

    def visit(node: ast.AST) -> Iterator[int]:
        if isinstance(node, ast.FunctionDef) and WORDING.fullmatch(node.name):
            return
        if (
            (isinstance(node, ast.Compare) and any(map(named, [node.left, *node.comparators])))
            or (isinstance(node, ast.Dict) and any(map(named, node.keys)))
            or (isinstance(node, ast.MatchValue) and named(node.value))
        ):
            yield node.lineno
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    for path, text in files.items():
        if path.endswith(".py") and not path.startswith(CELLS):
            for line in visit(ast.parse(text)):
                yield path, line, f"asks for the name of a cell: put what differs into {CELLS}"
        if not path.endswith(".py") and not path.startswith(NATIVE_CELLS):
            for found in re.finditer(r"CellKind::", text):
                line = text.count("\n", 0, found.start()) + 1
                yield path, line, f"asks for a cell: put what differs into {NATIVE_CELLS}"


def dotted_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields the line and the dotted name of each import, attribute and string in a module.

    The first part of an attribute's name is replaced with the name that it was imported from, or
    with "?" if it was not imported.
    """
    origins: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
                origins[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{'.' * node.level}{node.module or ''}.{alias.name}"
                yield node.lineno, name
                origins[alias.asname or alias.name] = name
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif isinstance(node, ast.Attribute):
            parts, inner = [node.attr], node.value
            while isinstance(inner, ast.Attribute):
                parts.append(inner.attr)
                inner = inner.value
            first = origins.get(inner.id, "?") if isinstance(inner, ast.Name) else "?"
            yield node.lineno, ".".join([first, *reversed(parts)])


PRIVATE = r"_(?!_)\w+"
OF_TORCH = re.compile(rf"torch(\.\w+)*\.{PRIVATE}(\.\w+)*")
OF_OTHERS = {"_asdict", "_getframe", "_replace"}  # documented names in named tuples and `sys`


def private_names_of_torch(files: dict[str, str]) -> Iterator[tuple[str, int, str]]:
    """Yields the path, line and message for each private name of torch outside TORCH_PRIVATE.

    A dotted name is private if one of its parts starts with an underscore. Also finds private
    attributes of other objects, unless the package defines them or TORCH_PRIVATE lists them.
    """
    trees = {path: ast.parse(text) for path, text in files.items()}
    known = set(OF_OTHERS)
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                known.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                known.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                known.add(node.id)
            elif path == TORCH_PRIVATE and isinstance(node, ast.Constant):
                known.add(node.value)
    for path, tree in trees.items():
        for line, name in dotted_names(tree) if path != TORCH_PRIVATE else ():
            last = name.rpartition(".")[2]
            unknown = re.fullmatch(rf"\?.*\.{PRIVATE}", name) and last not in known
            if OF_TORCH.fullmatch(name) or unknown:
                yield path, line, f"private name {name.lstrip('?.')}: put it into {TORCH_PRIVATE}"


def questions_about_context(files: dict[str, str]) -> Iterator[tuple[str, int, str]]:
    """Yields the path, line and message for each check that only CONTEXT may contain."""
    for path, text in files.items():
        for found in QUESTIONS.finditer(text) if path not in (CONTEXT, TORCH_PRIVATE) else ():
            line = text.count("\n", 0, found.start()) + 1
            yield path, line, f"asks {found[0]}: let {CONTEXT} answer"


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
    python = dict(source_files(PACKAGE, suffixes={".py"}))
    files = python | dict(source_files("csrc", suffixes={".h", ".cpp"}))
    public = exported_names(python)
    for path, text in files.items():
        functions = [*(python_functions if path.endswith(".py") else cpp_functions)(text)]
        sizes = [("", 1, len(text.splitlines()), FILE_LINES)]
        sizes += [(f":{name}", *size, FUNCTION_LINES) for name, *size, _ in functions]
        for name, line, _, parameters in functions:
            is_limited = name not in public and not MANY_PARAMETERS.fullmatch(f"{path}:{name}")
            if parameters > PARAMETERS and is_limited:
                message = f"function {name} has {parameters} parameters, more than {PARAMETERS}"
                yield f"{path}:{line}: {message}"
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
    imported = (*import_cycles(python), *upward_imports(python))
    named = (
        *questions_about_cells(files),
        *questions_about_context(python),
        *private_names_of_torch(python),
    )
    for path, line, message in (*imported, *named):
        yield f"{path}:{line}: {message}"
    tops = [top for top in EVERYWHERE if top.endswith("/")] + ["README.md", "CONTRIBUTING.md"]
    for path, text in source_files(*tops, suffixes=WORD_FILES):
        for line, message in banned_words(path, text):
            yield f"{path}:{line}: {message}"


if __name__ == "__main__":
    found = list(findings())
    print("\n".join([*found, f"{len(found)} findings"]))
    sys.exit(bool(found))
