"""The one thing setup.cfg cannot say: how the native kernel is compiled.

The kernel is a plain shared library with C functions, loaded through ctypes; setuptools builds it
as an extension so that wheels, editable installs and compilers are handled as usual. `optional`
keeps an install without a C++ compiler alive: the numpy backend then runs, and says so.
"""

from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("workers/kernels/native")

# One set of flags for all files and no -march: what needs newer instructions says so itself
# (native/target.h) and is chosen at run time. Contraction is off because a product and a sum must
# not become one FMA in one tile size and stay two operations in another.
COMPILE_ARGS = [
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-g0",
]

setup(
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
    ]
)
