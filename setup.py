"""Builds one static library per ISA and the extension that chooses among them at run time.

All other settings of the package are in pyproject.toml. The package has no extension if there is no
C++ compiler, on Windows, or with `NAMERNN_FAST_NO_EXT=1`: the wheel is then tagged `py3-none-any`,
and importing the package gives a warning. If there is a compiler, a failed build is an error.

pip caches the wheel that it builds from an sdist or a commit, even a wheel without the extension.
After installing a compiler, run `pip install --force-reinstall --no-cache-dir` to build the
extension. `NAMERNN_FAST_ISA=avx2` leaves out the AVX-512 kernels, which are about half of the work;
the package then raises an error on a processor with AVX-512. `MAX_JOBS` limits the number of files
that are compiled at the same time. `NAMERNN_FAST_SANITIZE=address,undefined` or `thread` builds for
these sanitizers (see the Makefile).
"""

import copy
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

# `-g0` overrides the `-g` in Python's flags: debug information would be seven eighths of the
# extension's size. Symbols stay, because a test looks up the source file of every instruction.
COMPILE = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
COMPILE += ["-g0", "-Icsrc"]
LINK = [] if sys.platform == "darwin" else ["-Wl,--exclude-libs,ALL"]
if SANITIZERS := os.environ.get("NAMERNN_FAST_SANITIZE"):
    LINK += [f"-fsanitize={SANITIZERS}"]
    COMPILE += [*LINK[-1:], "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O1"]
    COMPILE += ["-DNAMERNN_FAST_SANITIZE"]
if os.environ.get("NAMERNN_FAST_TEST_CELLS") == "1":
    COMPILE += ["-DNAMERNN_FAST_TEST_CELLS", "-Itests/native"]
# The flags of each file in csrc/isa/. The files are compiled in this order, the slowest first.
ISA_FLAGS: dict[str, list[str]] = {}
if platform.machine().lower() in ("x86_64", "amd64"):
    # GCC's default tuning splits some multiply-adds into two instructions, which makes results
    # depend on the tile that computes them. Tuning for Haswell or Skylake-AVX512 avoids this.
    ISA_FLAGS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
        *("-mprefer-vector-width=512", "-mtune=skylake-avx512"),
    ]
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c", "-mtune=haswell"]
    ISA_FLAGS["int8_avx_vnni"] = [*ISA_FLAGS["avx2"], "-mavxvnni"]
    ISA_FLAGS["int8_avx512_vnni"] = [*ISA_FLAGS["avx512"], "-mavx512vnni"]
    ISA_FLAGS["int8_amx"] = [*ISA_FLAGS["int8_avx512_vnni"], "-mamx-tile", "-mamx-int8"]
    ISA_FLAGS["avx512_bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]
    ISA_FLAGS["amx"] = [*ISA_FLAGS["avx512_bf16"], "-mamx-tile", "-mamx-bf16"]
    ISA_FLAGS["amx_float"] = ISA_FLAGS["amx"]
    # Only processors without AVX2, from before 2013, run these kernels. With -O1, the kernels are
    # 2 to 9 % slower than with -O3, and compile in half the time.
    ISA_FLAGS["baseline"] = ["-O1"]
    if highest := os.environ.get("NAMERNN_FAST_ISA"):
        if highest != "avx2":
            raise SystemExit(f"NAMERNN_FAST_ISA must be avx2 or empty, got {highest!r}")
        ISA_FLAGS = {isa: flags for isa, flags in ISA_FLAGS.items() if "-mavx512f" not in flags}
        COMPILE += ["-DNAMERNN_FAST_WITHOUT_AVX512"]
else:
    ISA_FLAGS["baseline"] = []
SOURCES = sorted(glob("csrc/*.cpp") + glob("csrc/library/**/*.cpp", recursive=True))
# Folders and files that building and testing need, but that setuptools would not put in an sdist.
SDIST_FOLDERS = (".ci", ".github", "benchmarks", "csrc", "docs", "examples", "tests", "tools")
SDIST_FILES = (".clang-format", ".gitignore", ".pre-commit-config.yaml")
SDIST_FILES += ("*.md", "CITATION.cff", "Makefile")


class CleanBuildPy(build_py):
    """Removes the results of earlier builds, which would otherwise become part of this build.

    The extension of an editable install stays until the new one replaces it, because other
    environments may be using it. A build without an extension removes it.
    """

    def run(self):
        shutil.rmtree(Path(self.build_lib, "namernn_fast"), ignore_errors=True)
        if self.editable_mode and not self.distribution.has_ext_modules():
            for library in Path("namernn_fast").glob("_C*.so"):
                library.unlink()
        super().run()


class CompleteSdist(sdist):
    """Packs everything that building and testing need, whether or not the extension is built."""

    def make_distribution(self):
        for folder in SDIST_FOLDERS:
            self.filelist.graft(folder)
        for pattern in SDIST_FILES:
            self.filelist.include(pattern)
        for pattern in ("*.py[cod]", "*.so"):
            self.filelist.global_exclude(pattern)
        super().make_distribution()


def description() -> str:
    """Returns README.md for a package index, which cannot resolve relative paths.

    Images with relative paths are removed, and links with relative paths become plain text.
    """
    text = Path("README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", text)


def has_compiler():
    """Returns whether there is a usable C++ compiler. A compiler in `CXX` is assumed to exist.

    On Windows there is none: the kernels need the vector extension of GCC and Clang, but torch
    builds extensions on Windows only with Microsoft's compiler, which lacks the vector extension.
    """
    if sys.platform == "win32":
        return False
    if "CXX" in os.environ:
        return True
    command = shlex.split(sysconfig.get_config_var("CXX") or "c++")
    try:
        return subprocess.run([*command, "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


def extension_arguments() -> dict:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class ParallelBuild(BuildExtension):
        def copy_file(self, infile, outfile, *args, **kwargs):
            """Copies to a temporary file, then replaces the destination with it atomically."""
            copied = super().copy_file(infile, f"{outfile}.new", *args, **kwargs)
            os.replace(f"{outfile}.new", outfile)
            return outfile, copied[1]

        def build_extension(self, ext):
            """Compiles all files in parallel, and links the extension from the object files."""
            # The ISA files come first because they take longest. They do not use torch's headers.
            jobs = [(f"csrc/isa/{isa}.cpp", [*COMPILE, *ISA_FLAGS[isa]], {}) for isa in ISA_FLAGS]
            with_torch = {"include_dirs": ext.include_dirs, "macros": ext.define_macros}
            jobs += [(source, ext.extra_compile_args, with_torch) for source in ext.sources]

            def compile_one(source, flags, options):
                (compiled,) = self.compiler.compile(
                    [source], output_dir=self.build_temp, extra_postargs=flags, **options
                )
                return compiled

            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
                objects = list(pool.map(compile_one, *zip(*jobs, strict=True)))
            linked = copy.copy(ext)
            linked.sources = []
            linked.extra_objects = objects[len(ISA_FLAGS) :]
            for isa, compiled in zip(ISA_FLAGS, objects, strict=False):
                library = f"namernn_fast_{isa}"
                self.compiler.create_static_lib([compiled], library, output_dir=self.build_temp)
                linked.extra_objects.append(
                    self.compiler.library_filename(library, output_dir=self.build_temp)
                )
            linked.depends = linked.extra_objects  # setuptools links only if one of these is newer
            super().build_extension(linked)

    extension = CppExtension(
        "namernn_fast._C",
        SOURCES,
        define_macros=[
            ("Py_LIMITED_API", "0x030A0000"),
            ("TORCH_TARGET_VERSION", "0x020a000000000000"),
        ],
        extra_compile_args=COMPILE,
        extra_link_args=LINK,
        py_limited_api=True,
    )
    extension.language = "c++"  # chooses the linker; there are no source files to infer it from
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": ParallelBuild.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


arguments: dict = {"cmdclass": {}}
if {"egg_info", "dist_info", "sdist"} & {*sys.argv}:
    pass  # These commands do not build the extension, and importing torch would take seconds.
elif os.environ.get("NAMERNN_FAST_NO_EXT") == "1":
    print("namernn_fast: NAMERNN_FAST_NO_EXT=1: the package has no C++ extension.")
elif not has_compiler():
    print("namernn_fast: there is no GCC or Clang to use: the package has no C++ extension.")
else:
    arguments = extension_arguments()
arguments["cmdclass"] |= {"build_py": CleanBuildPy, "sdist": CompleteSdist}
setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    **arguments,
)
