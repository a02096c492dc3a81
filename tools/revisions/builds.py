"""Builds revisions of the library, each in a folder that later comparisons reuse."""

import argparse
import hashlib
import importlib.metadata
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "revisions"
WORKING_TREE = "the working tree"
# The sources of the library. Nothing else is extracted, so a build's folder shadows no package.
SOURCES = ("csrc", "namernn_fast", "setup.py", "pyproject.toml", "README.md", "LICENSE")


class Build(NamedTuple):
    """A built revision."""

    name: str
    library: Path
    """The folder that contains `namernn_fast`."""

    def __str__(self) -> str:
        return self.name

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Starts Python with this build first in PYTHONPATH, followed by the repository."""
        path = f"{self.library}{os.pathsep}{ROOT}"
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.library,
            env=os.environ | {"PYTHONPATH": path} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )


def parser(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser for the arguments that `bits` and `speed` share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("base", metavar="BASE", help="the older revision")
    parser.add_argument("revision", metavar="REVISION", nargs="?", default=WORKING_TREE)
    return parser


def git(*arguments: str, **options) -> bytes:
    """Runs git in the root of the repository and returns its output."""
    ran = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, **options)
    if ran.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {ran.stderr.decode()}")
    return ran.stdout


def tree_of(revision: str) -> str:
    """Returns the hash of a revision's tree.

    The working tree is written through a temporary index, which includes untracked files and
    leaves the user's index alone.
    """
    if revision != WORKING_TREE:
        return git("rev-parse", "--verify", f"{revision}^{{tree}}").decode().strip()
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"GIT_INDEX_FILE": f"{folder}/index"}
        git("read-tree", "HEAD", env=environment)
        git("add", "--all", env=environment)
        return git("write-tree", env=environment).decode().strip()


def build(revision: str) -> Build:
    """Returns the build of a revision, from the cache if possible."""
    tree = tree_of(revision)
    compiler = subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True)
    toolchain = [compiler.stdout, sys.version, importlib.metadata.version("torch")]
    toolchain += [os.environ.get(name) for name in ("CC", "CFLAGS", "CXXFLAGS")]
    sources = git("ls-tree", "-r", tree, "--", *SOURCES)
    key = hashlib.sha256(sources + repr(toolchain).encode()).hexdigest()[:16]
    library = CACHE / key
    if not library.exists():
        print(f"Building {revision} in {library} …", flush=True)
        compile_tree(tree, library)
    built = Build(f"{revision} (tree {tree[:10]})", library)
    # The comparison must not import another installed copy of the library.
    check = built.start("-c", "import namernn_fast; print(namernn_fast.__file__)")
    found = check.communicate()[0].strip()
    if found != f"{library}/namernn_fast/__init__.py":
        raise SystemExit(f"{built}: Python imports {found or 'nothing'} instead of this build")
    return built


def compile_tree(tree: str, library: Path) -> None:
    """Extracts the library from a git tree into a new folder, and compiles it there."""
    unfinished = library.with_suffix(".begun")
    shutil.rmtree(unfinished, ignore_errors=True)
    with tarfile.open(fileobj=io.BytesIO(git("archive", tree, "--", *SOURCES))) as archive:
        archive.extractall(unfinished, filter="data")
    ran = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=unfinished,
        env={k: v for k, v in os.environ.items() if not k.startswith("NAMERNN_FAST_")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    # Without a compiler, setup.py succeeds and builds no extension.
    if ran.returncode or not [*(unfinished / "namernn_fast").glob("_C*.so")]:
        raise SystemExit(f"No extension was built:\n{ran.stdout[-2000:]}")
    shutil.rmtree(unfinished / "build", ignore_errors=True)
    unfinished.rename(library)
