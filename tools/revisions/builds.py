"""Builds a revision of the library in a folder of its own, which is kept for the next comparison.

A revision is anything that names a commit or a tree for git. The working tree as it stands is
written to git's object store first, through an index of its own, so that it is built in the same
way as a commit and is found again as long as no file changes.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tools.revisions import planting

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "revisions"
WORKING_TREE = "the working tree"
# What the extension is compiled from.
NATIVE = ("csrc", "setup.py", "pyproject.toml")


@dataclass(frozen=True)
class Build:
    """A built revision."""

    name: str
    """The revision as the user named it."""
    tree: str
    """The hash of the revision's tree in git."""
    library: Path
    """The folder that holds `namernn_fast` and nothing else."""
    seconds: float
    """The time that building took on the clock."""
    processor_seconds: float
    """The time that the compiler and its helpers took on all processors together."""

    @property
    def extension(self) -> Path:
        """The compiled extension."""
        return next((self.library / "namernn_fast").glob("_C*.so"))

    def __str__(self) -> str:
        return f"{self.name} (tree {self.tree[:10]})"


class BuildError(RuntimeError):
    """A revision could not be built."""


def git(*arguments: str, **options) -> str:
    """Runs git at the root of the repository.

    Args:
        *arguments: the arguments of the git command.
        **options: further arguments of `subprocess.run`.

    Returns:
        What git printed, without the last line break.

    Raises:
        BuildError: git failed, for instance because a revision is unknown.
    """
    ran = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, **options)
    if ran.returncode:
        raise BuildError(f"git {' '.join(arguments)}: {ran.stderr.strip()}")
    return ran.stdout.strip()


def tree_of(revision: str) -> str:
    """Returns the hash of a revision's tree; `WORKING_TREE` names the files as they stand."""
    if revision != WORKING_TREE:
        return git("rev-parse", "--verify", f"{revision}^{{tree}}")
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "GIT_INDEX_FILE": f"{folder}/index"}
        git("read-tree", "HEAD", env=environment)
        git("add", "--all", env=environment)
        return git("write-tree", env=environment)


def content(tree: str, *paths: str) -> str:
    """Returns a text that changes with the files of a tree from which the library is built."""
    return git("ls-tree", "-r", tree, "--", *(paths or (*NATIVE, "namernn_fast")))


def toolchain() -> str:
    """Returns a hash of what a build depends on besides the revision."""
    compiler = subprocess.run(
        [os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True
    ).stdout
    variables = [os.environ.get(name, "") for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS")]
    versions = [platform.python_version(), importlib.metadata.version("torch"), compiler]
    return hashlib.sha256("\n".join([*versions, *variables]).encode()).hexdigest()


def build(revision: str, cache: Path, plant: bool = False) -> Build:
    """Builds a revision, or finds it built.

    Args:
        revision: the revision in git's words, or `WORKING_TREE`.
        cache: the folder that keeps the builds.
        plant: whether one coefficient of tanh is changed in its last place before building.

    Returns:
        The built revision.

    Raises:
        BuildError: the revision is unknown, or it did not compile.
    """
    tree = tree_of(revision)
    native = content(tree, *NATIVE) + toolchain() + "planted" * plant
    native, python = (hashlib.sha256(t.encode()).hexdigest()[:12] for t in (native, content(tree)))
    folder = cache.resolve() / f"{native}-{python}"
    record = folder / "build.json"
    if not record.exists():
        print(f"Building {revision} in {folder} …", flush=True)
        begun = folder.with_name(f"{folder.name}.{os.getpid()}")
        export(tree, begun / "tree")
        if plant:
            print(planting.plant(begun / "tree" / "csrc"))
        compiled = next(cache.resolve().glob(f"{native}-*/build.json"), None)
        if compiled is None:
            times = compile_in_place(begun / "tree", begun / "build.log")
        else:  # another revision has the same C++
            times = json.loads(compiled.read_text())
            for extension in compiled.parent.glob("library/namernn_fast/_C*.so"):
                shutil.copy2(extension, begun / "tree" / "namernn_fast")
        (begun / "library").mkdir()
        (begun / "library" / "namernn_fast").symlink_to("../tree/namernn_fast")
        (begun / "build.json").write_text(json.dumps(times))
        shutil.rmtree(folder, ignore_errors=True)
        begun.rename(folder)
    name = f"{revision} with a planted change" if plant else revision
    return Build(name, tree, folder / "library", **json.loads(record.read_text()))


def export(tree: str, folder: Path) -> None:
    """Writes the files of a tree of git into a new folder."""
    folder.mkdir(parents=True)
    archive = subprocess.Popen(["git", "archive", tree], cwd=ROOT, stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x", "-C", folder], stdin=archive.stdout, check=True)
    if archive.wait():
        raise BuildError(f"git could not archive {tree}")


def compile_in_place(tree: Path, log: Path) -> dict[str, float]:
    """Compiles the extension of an exported tree, with the torch of this Python.

    Args:
        tree: the folder of the exported tree.
        log: the file that receives what the compiler prints.

    Returns:
        The times that `Build` has.

    Raises:
        BuildError: compiling failed, or gave no extension, whatever the exit status said.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("NAMERNN_FAST_")}
    start = time.perf_counter()
    with log.open("w") as output:
        child = subprocess.Popen(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=tree,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if child.returncode or not list((tree / "namernn_fast").glob("_C*.so")):
        raise BuildError(f"no extension was built; {log} ends:\n{log.read_text()[-2000:]}")
    shutil.rmtree(tree / "build", ignore_errors=True)
    return {"seconds": seconds, "processor_seconds": usage.ru_utime + usage.ru_stime}


def command(build: Build, module: str, *arguments: str) -> list[str]:
    """Returns the command that runs a module of this package for one build."""
    return [
        sys.executable,
        "-m",
        f"{__package__}.{module}",
        "--library",
        str(build.library),
        *arguments,
    ]


def environment_of(build: Build, **variables: str) -> dict[str, str]:
    """Returns the environment in which Python finds the build first, and then this package."""
    inherited = {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"}
    return {**inherited, "PYTHONPATH": f"{build.library}{os.pathsep}{ROOT}", **variables}
