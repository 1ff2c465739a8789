"""The one thing setup.cfg cannot say: how the native kernel is compiled.

The kernel is a plain shared library with C functions, loaded through ctypes; setuptools builds it
as an extension so that wheels, editable installs and compilers are handled as usual. `optional`
keeps an install without a C++ compiler alive: the numpy backend then runs, and says so.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("workers/kernels/native")

# One set of flags for all files and no -march: what needs newer instructions says so itself
# (native/target.h) and is chosen at run time. Contraction is off because a product and a sum must
# not become one FMA in one tile size and stay two operations in another. Setuptools puts the flags
# that Python was built with before these, -fwrapv among them: with it GCC 12 keeps sums in memory
# (AVX2's bf16 products of 16 rows and more took twice as long).
COMPILE_ARGS = [
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    "-fno-wrapv",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-g0",
]


class BuildExtOnAllCpus(build_ext):
    """Compiles the files of an extension side by side: setuptools takes one after the other."""

    def build_extensions(self) -> None:
        compile_in_turn = self.compiler.compile

        def compile_side_by_side(sources: list[str], *args: Any, **options: Any) -> list[str]:
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                objects = pool.map(
                    lambda source: compile_in_turn([source], *args, **options), sources
                )
                return [name for names in objects for name in names]

        self.compiler.compile = compile_side_by_side
        super().build_extensions()


setup(
    cmdclass={"build_ext": BuildExtOnAllCpus},
    ext_modules=[
        Extension(
            "furiosa_llm.workers.kernels._native",
            sources=sorted(str(path) for path in NATIVE.glob("*.cpp")),
            depends=sorted(str(path) for path in NATIVE.glob("*.h")),
            language="c++",
            extra_compile_args=COMPILE_ARGS,
            extra_link_args=["-pthread"],
            optional=True,
        )
    ],
)
