"""Builds one static library per ISA and the extension that chooses among them at run time.

Everything else about the package is in pyproject.toml. `NAMERNN_FAST_NO_EXT=1`, or a machine
without a C++ compiler, gives a package without the extension, which says so when it is imported.
`NAMERNN_FAST_SANITIZE=address,undefined` or `thread` builds for those sanitizers: see the Makefile.
"""

import os
import platform
import sys

from setuptools import setup
from setuptools.errors import CCompilerError, ExecError, PlatformError

COMPILE = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
LINK = [] if sys.platform == "darwin" else ["-Wl,--exclude-libs,ALL"]
if SANITIZERS := os.environ.get("NAMERNN_FAST_SANITIZE"):
    LINK += [f"-fsanitize={SANITIZERS}"]
    COMPILE += [*LINK[-1:], "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O1"]
    COMPILE += ["-DNAMERNN_FAST_SANITIZE"]
ISA_FLAGS: dict[str, list[str]] = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    # GCC's default tuning splits some multiply-adds in two, which would make a result depend on the
    # tile that computed it; its tuning for these two does not.
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c", "-mtune=haswell"]
    ISA_FLAGS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
        *("-mprefer-vector-width=512", "-mtune=skylake-avx512"),
    ]
    ISA_FLAGS["avx512_bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]
    ISA_FLAGS["amx"] = [*ISA_FLAGS["avx512"], "-mamx-tile", "-mamx-bf16"]
HEADERS = [
    f"csrc/{name}.h"
    for name in (
        *("kernel", "kernel-inl", "pairs-inl", "pairs-backward-inl", "product-inl", "simd-inl"),
        "team-inl",
    )
]


def extension_arguments() -> dict:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def run(self):
            try:
                super().run()
            except (CCompilerError, ExecError, PlatformError, RuntimeError) as error:
                if SANITIZERS:
                    raise
                print(f"namernn_fast: no C++ extension ({error}); ATen operators will be used.")
                print("namernn_fast: NAMERNN_FAST_NO_EXT=1 chooses this without a try.")

        def build_extension(self, ext):
            for isa, flags in ISA_FLAGS.items():
                objects = self.compiler.compile(
                    [f"csrc/kernel_{isa}.cpp"],
                    output_dir=self.build_temp,
                    depends=HEADERS,
                    extra_postargs=COMPILE + flags,
                )
                library = f"namernn_fast_{isa}"
                self.compiler.create_static_lib(objects, library, output_dir=self.build_temp)
                ext.extra_objects.append(
                    self.compiler.library_filename(library, output_dir=self.build_temp)
                )
            super().build_extension(ext)

    extension = CppExtension(
        "namernn_fast._C",
        ["csrc/library.cpp", "csrc/plan.cpp"],
        depends=HEADERS,
        define_macros=[
            ("Py_LIMITED_API", "0x030A0000"),
            ("TORCH_TARGET_VERSION", "0x020a000000000000"),
        ],
        extra_compile_args=COMPILE,
        extra_link_args=LINK,
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**({} if os.environ.get("NAMERNN_FAST_NO_EXT") == "1" else extension_arguments()))
