"""The C extensions; everything else is in pyproject.toml.

Each is optional: where no compiler is at hand the package installs without it, and a Python twin does the same more
slowly. In place, for work in a checkout: python setup.py build_ext --inplace
"""

from pathlib import Path

from setuptools import Extension, setup  # type: ignore[import-untyped]

SOURCES = {
    "radix._chain": "radix/_chain.c",
    "radix._ordered": "radix/_ordered.c",
    "eviction._visits": "eviction/_visits.c",
    "kvstore.codecs._quant": "kvstore/codecs/_quant.c",
    "kvstore.devices._copy": "kvstore/devices/_copy.c",
    "kvstore.lab._sweep": "kvstore/lab/_sweep.c",
}
ROOT = Path(__file__).parent


# Products are not contracted into sums: a policy's twin in Python must find the same worth, to the last bit.
FLAGS = ["-O3", "-ffp-contract=off"]


def headers_of(source: str) -> list[str]:
    """Return the headers that a source may include: if one of them changes, it is compiled anew."""
    folders = (ROOT / source).parent, ROOT / "eviction"
    return sorted({str(path.relative_to(ROOT)) for folder in folders for path in folder.glob("*.h")})


setup(
    ext_modules=[
        Extension(name, [source], depends=headers_of(source), extra_compile_args=FLAGS, optional=True)
        for name, source in SOURCES.items()
        if (ROOT / source).exists()
    ]
)
