"""The releases of SGLang whose cache interfaces our classes were tried with.

SGLang changes its storage and linker interfaces between patch releases, so a release that was not tried is refused with
a clear message instead of failing somewhere inside a request.
"""

from __future__ import annotations

from kvstore.errors import ConfigError

SUPPORTED = ("0.5.23",)


def check_version(version: str) -> None:
    """Raise ConfigError unless `version` is a release that was tried."""
    if version.split("+")[0] not in SUPPORTED:
        raise ConfigError(
            f"SGLang {version} is not supported by this release of kvtiers; supported is {' and '.join(SUPPORTED)}. "
            f"Install sglang=={SUPPORTED[-1]} or a kvtiers release that names yours"
        )
