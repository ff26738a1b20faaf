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
    "kvstore.lab._sweep": "kvstore/lab/_sweep.c",
}
ROOT = Path(__file__).parent


def headers_of(source: str) -> list[str]:
    """Return the headers beside a source: if one of them changes, it is compiled anew."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / source).parent.glob("*.h"))


setup(
    ext_modules=[
        Extension(name, [source], depends=headers_of(source), extra_compile_args=["-O3"], optional=True)
        for name, source in SOURCES.items()
        if (ROOT / source).exists()
    ]
)
