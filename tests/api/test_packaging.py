"""Tests the source distribution, the wheels built from it, and failing builds."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools")

ROOT = Path(__file__).parents[2]
BUILT = ("*.so", "*.egg-info", "__pycache__", ".*_cache", ".git", ".venv", "build", "dist")
# Runs one build hook, such as build_sdist or build_wheel, in a separate process as pip does.
HOOK = "import sys, setuptools.build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"


def run(*command, check=True, **options):
    ran = subprocess.run(map(str, command), capture_output=True, text=True, **options)
    assert not check or ran.returncode == 0, ran.stdout + ran.stderr
    return ran


def run_hook(hook, tree, folder, check=True, **environment):
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, **environment}
    return run(sys.executable, "-c", HOOK, hook, folder, cwd=tree, env=environment, check=check)


def git_files(*options):
    """Returns the files that git lists in the source tree, or None if git cannot list them."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return None
    listed = run("git", "ls-files", "-z", *options, cwd=ROOT, check=False)
    if listed.returncode:
        return None
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}


def files_below(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def tree(tmp_path):
    """A copy of the source tree without build output."""
    target = tmp_path / "tree"
    names = git_files("--cached", "--others", "--exclude-standard")
    if names is None:
        return shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*BUILT))
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture
def quick_compiler(tmp_path):
    """A C++ compiler that does not optimize, so that builds are quick."""
    script = tmp_path / "c++"
    script.write_text(f'#!/bin/sh\nexec {shutil.which("c++")} "$@" -O0\n')
    script.chmod(0o755)
    return str(script)


needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")


@pytest.mark.slow
@needs_compiler
def test_wheel_built_from_the_sdist_installs_and_runs(tree, quick_compiler, tmp_path):
    """The sdist has every tracked file, and the wheel built from it is complete and works."""
    expected = git_files("--cached") or files_below(tree)
    run_hook("build_sdist", tree, tmp_path / "sdist")
    (sdist,) = (tmp_path / "sdist").iterdir()
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert not expected - packed

    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(
        *(*pip, "wheel", "--no-build-isolation", "--no-deps", "--no-cache-dir"),
        *("--wheel-dir", tmp_path / "wheel", sdist),
        env={**os.environ, "CXX": quick_compiler},
    )
    (wheel,) = (tmp_path / "wheel").iterdir()
    assert "-cp310-abi3-" in wheel.name
    files = {f"namernn_fast/{name}" for name in files_below(tree / "namernn_fast")}
    assert package_files(wheel) == files | {"namernn_fast/_C.abi3.so"}

    installed = tmp_path / "installed"
    run(*pip, "install", "--no-deps", "--no-cache-dir", "--target", installed, wheel)
    tests = ROOT / "tests" / "install"
    run(
        *(sys.executable, "-m", "pytest", "-c", tests / "pytest.ini", tests / "test_installed.py"),
        *("-k", "budget and float32 or extension_is_installed or imported_from_a_checkout"),
        cwd=installed,
        env={
            **os.environ,
            "PYTHONPATH": str(installed),
            "NAMERNN_FAST_INSTALLED_IN": str(installed),
        },
    )


def package_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def plant_leftovers(tree):
    """Adds files that earlier builds could have left to a source tree, such as libraries."""
    for folder in ("build/lib", f"build/lib.{sys.platform}-x86_64-cpython-311", "."):
        package = tree / folder / "namernn_fast"
        package.mkdir(parents=True, exist_ok=True)
        (package / "_C.abi3.so").write_bytes(b"of an earlier build")
    (tree / "build" / "lib" / "namernn_fast" / "removed.py").touch()


@pytest.mark.parametrize("reason", ["requested", "no compiler"])
def test_without_the_extension_the_wheel_is_pure(reason, tree, tmp_path):
    """The wheel is for every platform, and excludes files that earlier builds left behind."""
    environment = {"NAMERNN_FAST_NO_EXT": "1"}
    if reason == "no compiler":
        environment = {"PATH": str(tmp_path)}
    plant_leftovers(tree)
    modules = files_below(tree / "namernn_fast") - {"_C.abi3.so"}
    run_hook("build_wheel", tree, tmp_path / "wheel", **environment)
    (wheel,) = (tmp_path / "wheel").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    assert package_files(wheel) == {f"namernn_fast/{name}" for name in modules}


def test_links_in_the_package_description_are_absolute(tree, tmp_path):
    """A package index shows the README alone, so every link must be absolute."""
    hook = "prepare_metadata_for_build_wheel"
    run_hook(hook, tree, tmp_path / "metadata", NAMERNN_FAST_NO_EXT="1")
    (file,) = (tmp_path / "metadata").glob("*.dist-info/METADATA")
    metadata = file.read_text(encoding="utf-8")
    assert "Description-Content-Type: text/markdown" in metadata
    assert "Fused RNN (vanilla, also called Elman)" in metadata
    links = re.findall(r"\]\(([^)]*)\)", metadata)
    assert [link for link in links if not link.startswith("https://")] == []


def test_the_citation_states_the_package_version():
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert cited[1] == version[1]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("compiler", "'false'"),
        pytest.param("source", "planted", marks=pytest.mark.slow),
    ],
)
def test_a_failing_build_raises_an_error(fault, message, tree, quick_compiler, tmp_path):
    """A failing build must not package the library of an earlier build."""
    plant_leftovers(tree)
    if fault == "source":
        with (tree / "csrc" / "isa" / "baseline.cpp").open("a") as source:
            source.write("\n#error planted\n")
    environment = {"CXX": "false" if fault == "compiler" else quick_compiler, "MAX_JOBS": "1"}
    failed = run_hook("build_wheel", tree, tmp_path / "wheel", check=False, **environment)
    assert failed.returncode != 0
    assert message in failed.stderr
    assert not list((tmp_path / "wheel").iterdir())


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("environment", "stays"), [({"CXX": "false"}, True), ({"NAMERNN_FAST_NO_EXT": "1"}, False)]
)
def test_failing_editable_build_keeps_the_extension(environment, stays, tree, tmp_path):
    """A failing editable build keeps the old library, which other environments may be using."""
    library = tree / "namernn_fast" / "_C.abi3.so"
    library.write_bytes(b"of an earlier build")
    built = run_hook("build_editable", tree, tmp_path / "wheel", check=False, **environment)
    assert (built.returncode != 0) == stays
    assert library.exists() == stays


@pytest.mark.slow
@needs_compiler
def test_build_up_to_avx2_works_or_names_the_missing_kernels(tree, quick_compiler, tmp_path):
    environment = {**os.environ, "CXX": quick_compiler, "NAMERNN_FAST_ISA": "avx2"}
    build = (sys.executable, "setup.py", "build", "--build-lib", tmp_path / "lib")
    run(*build, cwd=tree, env=environment)
    program = "from namernn_fast import ops; print(ops.cpu_kernel())"
    for level in ("default", "avx2", "avx512"):
        environment["ATEN_CPU_CAPABILITY"] = level
        wanted = run(sys.executable, "-c", program, env=environment, cwd=ROOT).stdout
        built = run(
            *(sys.executable, "-c", program), env=environment, cwd=tmp_path / "lib", check=False
        )
        if wanted == "avx512\n":
            assert "NAMERNN_FAST_ISA=avx2 left out these kernels" in built.stderr
        else:
            assert built.stdout == wanted


@pytest.mark.slow
@needs_compiler
def test_second_build_links_the_new_object_files(tree, tmp_path):
    """setuptools links again only if it knows a file that is newer than the library."""
    compiler = tmp_path / "c++"  # compiles a variable whose name is in the environment
    compiler.write_text(
        "#!/bin/sh\n"
        'case " $* " in *" -c "*) ;; *) exec c++ "$@" ;; esac\n'
        'while [ "$1" != -o ]; do shift; done\n'
        'echo "[[gnu::used]] static int $NAME;" | exec c++ -xc++ -fPIC -c - -o "$2"\n'
    )
    compiler.chmod(0o755)
    build = (sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path / "lib")
    for name in ("of_the_first_build", "of_the_second_build"):
        run(*build, cwd=tree, env={**os.environ, "CXX": compiler, "NAME": name})
        assert name.encode() in next(tmp_path.glob("lib/**/_C*.so")).read_bytes()
