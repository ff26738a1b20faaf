"""The C extensions; everything else is in pyproject.toml.

Each is optional: where no compiler is at hand the package installs without it, and a Python twin does the same more
slowly. In place, for work in a checkout: python setup.py build_ext --inplace
"""

from pathlib import Path

from setuptools import Extension, setup  # type: ignore[import-untyped]

SOURCES = {
    "radix._chain": "radix/_chain.c",
    "radix._ordered": "radix/_ordered.c",
    "kvstore.devices._copy": "kvstore/devices/_copy.c",
}
HEADERS = ["radix/_ordered.h", "radix/_ordered_walk.h"]

setup(
    ext_modules=[
        Extension(name, [source], depends=HEADERS, extra_compile_args=["-O3"], optional=True)
        for name, source in SOURCES.items()
        if (Path(__file__).parent / source).exists()
    ]
)
