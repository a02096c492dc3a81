"""Tests that `.ci/structure.py` finds planted faults and reports nothing else."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
NATIVE = """
#define MACRO(x) \\
  { x
namespace {
template <class Scalar>
struct Sum {
  Sum(int a, int b)  // a brace { in a comment
      : a_(a), b_{b} {
    call("}");
  }
  int value() const { return a_; }
  static constexpr int table[2] = {1, 2};
};
template <class Scalar>
void wait(const Sum<Scalar>& sum,
          int (*function)(int)) {
  for (int i = 0; i < 3; ++i) {
    run([&](int x) {
      return x;
    });
  }
}
}  // namespace
"""


@pytest.fixture
def structure():
    return SimpleNamespace(**runpy.run_path(str(ROOT / ".ci" / "structure.py")))


def test_function_lengths_are_measured(structure):
    """A function extends from its template line to its closing brace, and includes its lambdas."""
    native = [("Sum", 7, 4, 2), ("value", 11, 1, 0), ("wait", 14, 9, 2)]
    assert list(structure.cpp_functions(NATIVE)) == native
    python = "import x\n\nasync def wait():\n    def inner(self, a, *b, c=1):\n        pass\n"
    python += "    inner()\n"
    assert list(structure.python_functions(python)) == [("wait", 3, 4, 0), ("inner", 4, 2, 2)]


@pytest.mark.parametrize(
    ("signature", "count"),
    [("f()", 0), ("f(int a)", 1), ("f(A<int, B> a, void (*g)(int, int), C c = {1, 2}) const", 3)],
)
def test_parameters_are_counted(structure, signature, count):
    assert structure.cpp_parameters(signature) == count


def test_comparisons_with_the_name_of_a_cell_are_found(structure):
    files = {
        "namernn_fast/cells/a.py": "A = Cell(name='rnn')\nB = 'rnn' == x\n",
        "namernn_fast/b.py": "x = kind == 'rnn'\ny = kind in ('gru', 'rnn')\nz = {'rnn': 1}\n",
        "namernn_fast/c.py": "def _refuse_it(kind):\n    return kind == 'rnn'\n",
        "namernn_fast/d.py": "x = kind == 'gru'\ny = f('rnn')\nz = {1: 'rnn'}\n",
        "csrc/cells/gru.h": "CellKind kind = CellKind::gru;\n",
        "csrc/plan.cpp": "\nif (cell == CellKind::gru) return;\n",
    }
    found = [(path, line) for path, line, _ in structure.questions_about_cells(files)]
    in_python = [("namernn_fast/b.py", line) for line in (1, 2, 3)]
    assert found == [*in_python, ("csrc/plan.cpp", 2)]


def test_private_names_of_torch_are_found(structure):
    files = {
        structure.TORCH_PRIVATE: "import torch\na = torch._C._f\nb = '_parameters'\n",
        "namernn_fast/a.py": (
            "import torch, sys\nfrom torch._C import f\nfrom torch.nn.modules.module import _any\n"
            "from torch.autograd import forward_ad as ad\nx = torch._C._g()\ny = ad._level\n"
            "when_imported('torch._dynamo')\nz = layer()._flat\n"
        ),
        "namernn_fast/b.py": (
            "import torch\nfrom . import _C\nx = layer._parameters, torch.nn.RNN, sys._getframe\n"
            "class A:\n    def _f(self):\n        self._y = self._f()._y\n'torch.nn', '_x', '._x'\n"
            "_C._f(x.__dict__, torch.__version__)\n"
        ),
    }
    found = [(path, line) for path, line, _ in structure.private_names_of_torch(files)]
    assert sorted({*found}) == [("namernn_fast/a.py", line) for line in (2, 3, 5, 6, 7, 8)]


def test_upward_imports_are_found(structure):
    files = {
        "namernn_fast/__init__.py": "from .nn import A\n",
        "namernn_fast/ops.py": "import torch\nfrom .call.checks import f\n",
        "namernn_fast/call/checks.py": "from .. import ops\n",
        "namernn_fast/nn/__init__.py": "from ..call import checks\n",
        "namernn_fast/attic.py": "",
    }
    assert list(structure.upward_imports(files)) == [
        ("namernn_fast/ops.py", 2, "ops must not import call above it"),
        ("namernn_fast/attic.py", 1, "attic has no place in ROOMS (.ci/structure.py)"),
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import_module('namernn_fast.nn.gru')", "namernn_fast.nn.gru"),
        ("importlib.import_module('.nn.gru', 'namernn_fast')", "namernn_fast.nn.gru"),
        ("importlib.import_module(name='..nn', package=__name__)", "namernn_fast.nn"),
        ("importlib.import_module(f'{__package__}.nn')", "namernn_fast.nn"),
        ("NN = '.nn'\nimport_module(__name__.partition('.')[0] + NN)", "namernn_fast.nn"),
        ("__import__('namernn_fast.nn')", "namernn_fast.nn"),
        ("require('namernn_fast.nn')", "namernn_fast.nn"),
        ("def f(x):\n    return import_module(f'{__package__}.{x}')", None),
        ("def f(x):\n    name = '.'.join(x)\n    return import_module(name)", None),
    ],
)
def test_dynamic_imports_are_found(structure, text, found):
    files = {
        "namernn_fast/ops.py": text,
        "namernn_fast/nn/__init__.py": "",
        "namernn_fast/nn/gru.py": "from ..ops import f\n",
    }
    message = "imports a module by a computed name: write the name out"
    if found is not None:
        message = "ops must not import nn above it"
    ((path, _, said),) = structure.upward_imports(files)
    assert (path, said) == ("namernn_fast/ops.py", message)
    assert bool([*structure.import_cycles(files)]) == (found == "namernn_fast.nn.gru")


@pytest.mark.parametrize(
    "text", ["import_module('torch.nn')", "def f(x):\n    return importlib.import_module(x)"]
)
def test_dynamic_imports_of_other_packages_are_allowed(structure, text):
    files = {"namernn_fast/ops.py": text, "namernn_fast/nn/__init__.py": ""}
    assert not [*structure.upward_imports(files)]


@pytest.mark.parametrize(
    "text",
    [
        "torch.compiler.is_compiling()",
        "from torch.compiler import is_exporting",
        "from .torch_private import _get_tracing_state",
    ],
)
def test_queries_of_the_call_context_are_found(structure, text):
    files = dict.fromkeys(("namernn_fast/ops.py", structure.CONTEXT), text)
    ((path, line, _),) = structure.questions_about_context(files)
    assert (path, line) == ("namernn_fast/ops.py", 1)


def test_import_cycles_are_found(structure):
    """The check follows imports inside functions, and names every import in a cycle."""
    files = {
        "namernn_fast/__init__.py": "from .a import f\n",
        "namernn_fast/a.py": "from . import b\n",
        "namernn_fast/b.py": "def g():\n    from namernn_fast.c.d import h\n",
        "namernn_fast/c/__init__.py": "from .d import h\n",
        "namernn_fast/c/d.py": "import torch\nfrom ..a import f\n",
    }
    cycle = [f"namernn_fast.{name}" for name in ("a", "b", "c.d", "a", "b")]
    assert list(structure.import_cycles(files)) == [
        ("namernn_fast/a.py", 1, "import cycle: " + " -> ".join(cycle[:4])),
        ("namernn_fast/b.py", 2, "import cycle: " + " -> ".join(cycle[1:5])),
        ("namernn_fast/c/d.py", 2, "import cycle: " + " -> ".join([*cycle[2:5], cycle[2]])),
    ]


@pytest.mark.parametrize(
    ("path", "text", "count"),
    [
        ("csrc/plan.h", "const Ro" + "ws& rows; layer->pac" + "ked = options.packed", 2),
        ("csrc/contract.h", "int64_t grad_h_n_st" + "ep; Layout::packed", 1),
        ("namernn_fast/names/training.py", "train_step(optimizer.step)", 0),
        ("docs/architecture.md", "| stride | not row_st" + "ep |", 0),
    ],
)
def test_banned_words_are_found(structure, path, text, count):
    assert len(list(structure.banned_words(path, text))) == count
