"""The structure check `.ci/structure.py` finds planted faults and no others."""

import importlib.util
from pathlib import Path

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
    spec = importlib.util.spec_from_file_location("structure", ROOT / ".ci" / "structure.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_functions_are_measured(structure):
    """A function extends from its template line to its closing brace, including lambdas."""
    native = [("Sum", 7, 4), ("value", 11, 1), ("wait", 14, 9)]
    assert list(structure.cpp_functions(NATIVE)) == native
    python = "import x\n\nasync def wait():\n    def inner():\n        pass\n    inner()\n"
    assert list(structure.python_functions(python)) == [("wait", 3, 4), ("inner", 4, 2)]


def test_import_cycles_are_found(structure):
    """A cycle through an import inside a function is found, and each of its imports is named."""
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
        ("docs/guide.md", "the map of the ho" + "use has no r" + "ooms", 2),
        ("namernn_fast/nn.py", "module.pre" + "pack()", 1),
        ("csrc/plan.h", "const Ste" + "ps& steps; layer->pac" + "ked = options.packed", 2),
        ("csrc/contract.h", "int64_t grad_h_n_st" + "ep; Layout::packed", 1),
        ("namernn_fast/names/training.py", "train_step(optimizer.step)", 0),
        ("docs/architecture.md", "| panel | not pac" + "ked weights |", 0),
    ],
)
def test_banned_words_are_found(structure, path, text, count):
    assert len(list(structure.banned_words(path, text))) == count
