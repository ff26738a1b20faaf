"""All settings: one frozen section per part, read once, at the edge. Tiers bring sections of their own.

`Config.load()` lays the sources over each other, lowest first: the defaults below, a TOML file (the path given, else
$KVSTORE_CONFIG, else ./kvstore.toml), environment variables KVSTORE_<SECTION>__<FIELD>, keyword arguments.
`Config(host={"policy": "sieve"})` takes defaults and keywords only. Both raise ConfigError, which names every wrong
field, its value, where the value came from and what would be right.

A size may be given as "512MiB" and a time as "24h"; inside they are bytes and seconds (values.py). Reading the
sources is sources.py, printing a configuration reference.py. Defaults marked as guesses have not been
measured.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from kvstore.config.section import Section
from kvstore.config.sources import (
    KEYWORD,
    Setting,
    explain,
    nest,
    read_all,
    read_environment,
    read_file,
    read_keywords,
    sections,
    unknown_section,
)
from kvstore.config.values import (
    Bytes,
    Count,
    DaemonUrl,
    HostNames,
    Number,
    OrNone,
    PathOrNone,
    Policy,
    Seconds,
    SocketOrNone,
    TimesByWord,
)
from kvstore.errors import ConfigError
from kvstore.tiers import registry
from kvstore.tiers.kind import TierKind
from kvstore.units import GiB, MiB, format_seconds


class StoreConfig(Section):
    """Identity, lookup and planning."""

    block_size: Count = Field(default=64, ge=1, le=65536, description="Tokens per block, the unit of reuse.")
    hash: Literal["sha256", "xxh3_128"] = Field(
        default="sha256",
        description="Block hash; xxh3_128 is cheaper, for one tenant only, and hits compare the tokens themselves.",
    )
    min_hit_blocks: Count = Field(default=1, ge=1, description="A match of fewer blocks than this counts as a miss.")
    load_or_recompute: bool = Field(
        default=True, description="Cut a match where loading it would be slower than computing it, by measured rates."
    )
    lookup_deadline_s: Seconds = Field(
        default=0.05,
        ge=0,
        le=60,
        description="Longest wait of a lookup for a shared tier's answer; 0 never waits.",
    )
    load_deadline_s: Seconds = Field(
        default=2.0, gt=0, le=600, description="Longest wait for the pages of a hit; what is missing then is computed."
    )
    single_flight: bool = Field(
        default=False,
        description="Connectors (transformers, vLLM) wait for a prompt that another request is computing already.",
    )
    compute_wait_s: Seconds = Field(
        default=10.0,
        ge=0,
        le=600,
        description="Longest wait without progress for another request that computes the same blocks; 0 never waits.",
    )
    max_prefetch_slots_fraction: Number = Field(
        default=0.25,
        ge=0,
        le=1,
        description="Share of the host slots that prefetches may hold at once; 0 means none.",
    )
    max_dirty_fraction: Number = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Share of the host slots that may wait to be written behind.",
    )
    max_pinned_fraction: Number = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of the host slots (of a tenant's own) that pins and retain_until may keep; 0 keeps none.",
    )
    pin_max_s: Seconds = Field(
        default=86400.0,
        gt=0,
        description="Longest time a pin or a retain_until keeps pages in host memory, whoever asked for it.",
    )
    ttl_after: TimesByWord = Field(
        default={},
        description="Pages that one session alone has used live no longer than this after its reply ended so, until "
        "their next use: by finish reason (tool_use, end_turn, length, cancelled, or an engine's own word).",
    )
    lane_batch_pages: Count = Field(default=8, ge=1, le=1024, description="Pages a lane moves in one batch (a guess).")
    touch_interval_s: Seconds = Field(
        default=60.0,
        ge=0,
        description="Lower tiers are told of a page's use at most this often; 0 tells every use.",
    )
    record: PathOrNone = Field(
        default=None,
        description="File to record requests in, for `kvstore replay`: hashes, times and hits, no text; none: no file.",
    )
    record_bytes: Bytes = Field(
        default=256 * MiB, ge=1 << 16, description="Size of the recording, of which the oldest quarter goes first."
    )


class HostConfig(Section):
    """Host memory, the tier in the middle."""

    capacity_bytes: Bytes = Field(default=GiB, description="Size of the slab of slots in memory, allocated at start.")
    policy: Policy = Field(default="lru", description="Eviction policy: which page leaves first.")
    ttl_s: Seconds = Field(default=0.0, ge=0, description="A page unused for this long is dropped; 0 means never.")
    huge_pages: bool = Field(default=True, description="Ask for huge pages; first touch is 3.5 times cheaper.")


class SpeculationConfig(Section):
    """Bringing the pages of idle sessions to host memory before their next request is likely."""

    mode: Literal["off", "auto", "on"] = Field(
        default="off",
        description="auto stops itself, and tries again now and then, where it wastes too much; on does not.",
    )
    max_slots_fraction: Number = Field(
        default=0.1, ge=0, le=1, description="Share of the host slots for pages that were brought and not used yet."
    )
    bandwidth_bytes: Bytes = Field(
        default=256 * MiB, ge=1, description="Bytes a second that are read from lower tiers for it (a guess)."
    )
    max_waste: Number = Field(
        default=1.0, gt=0, le=100, description="Bytes brought in vain for each that is used, at most."
    )


class HintsConfig(Section):
    """Bounds on KV hints, which come from outside (docs/hints.md)."""

    enabled: bool = Field(default=True, description="Carry out hints; off: each action is rejected.")
    max_bytes: Bytes = Field(default=2 * MiB, le=64 * MiB, description="Longest envelope that is read.")
    max_actions: Count = Field(default=16, ge=1, le=1024, description="Actions of one envelope; the rest is rejected.")
    max_tokens: Count = Field(default=1 << 20, ge=1, le=1 << 24, description="Tokens that one action may name.")
    default_ttl_s: Seconds = Field(
        default=300.0, gt=0, description="How long a pin or retain of a hint lasts that does not say."
    )
    max_ttl_s: Seconds = Field(default=3600.0, gt=0, description="The longest; what asks for more is clipped to it.")
    max_tenant_fraction: Number = Field(
        default=0.25,
        ge=0,
        le=1,
        description="Share of the host slots that pins of one tenant within a store (a salt of requests) may keep.",
    )


class BreakerConfig(Section):
    """When a failing tier is taken out, and how it comes back."""

    failures_to_open: Count = Field(default=3, ge=1, description="Failures in a row after which the tier is taken out.")
    probe_after_s: Seconds = Field(
        default=1.0, gt=0, description="Time until the first probe; each one that fails doubles it."
    )
    probe_max_s: Seconds = Field(
        default=30.0, gt=0, validate_default=True, description="Longest time between two probes."
    )

    @field_validator("probe_max_s")
    @classmethod
    def _not_before_the_first_probe(cls, probe_max_s: float, info: ValidationInfo) -> float:
        first = info.data.get("probe_after_s", 0.0)
        if probe_max_s < first:
            raise ValueError(f"it must be at least probe_after_s, which is {format_seconds(first)}")
        return probe_max_s


class ServiceConfig(Section):
    """The node daemon (`kvstore serve`), and how its clients reach it."""

    url: DaemonUrl = Field(
        default=None,
        description="For clients: the daemon to use, unix:///path/of/socket; none keeps the store in this process.",
    )
    token: Annotated[SecretStr | None, OrNone] = Field(
        default=None, description="For `kvstore top` over HTTP: what proves the tenant to the daemon; never printed."
    )
    client_name: Annotated[str | None, OrNone] = Field(
        default=None,
        max_length=64,
        description="For clients: how the daemon calls this one; none means its program and process id.",
    )
    tls_ca: PathOrNone = Field(
        default=None, description="For `kvstore top` over https: certificates to trust (PEM); none trusts the system's."
    )
    call_timeout_s: Seconds = Field(
        default=1.0, gt=0, le=60, description="For clients: longest wait for an answer beyond what the call may take."
    )
    retry_max_s: Seconds = Field(
        default=2.0, gt=0, le=600, description="For clients: longest time between two tries to reach a daemon again."
    )
    socket: SocketOrNone = Field(
        default=None,
        description="Unix socket of the daemon; none means kvstore.sock in $XDG_RUNTIME_DIR, or /tmp/kvstore-UID.sock.",
    )
    http_host: str = Field(
        default="127.0.0.1",
        description="Address of the HTTP API; anything but loopback needs tokens_file, or http_names.",
    )
    http_names: HostNames = Field(
        default=None,
        description="Names and addresses, by commas, under which other machines use the HTTP API without tokens; for "
        "private networks only, as between containers: whoever reaches it is the local tenant and an operator.",
    )
    http_port: Annotated[Count | None, OrNone] = Field(
        default=8470, ge=0, le=65535, description="Port of the HTTP API; 0 takes any free one, none turns it off."
    )
    tokens_file: PathOrNone = Field(
        default=None, description="TOML file of tenants with their tokens and shares; none: whoever connects is local."
    )
    tls_cert: PathOrNone = Field(
        default=None, description="Certificate chain (PEM) of the HTTP API; with tls_key it speaks TLS only."
    )
    tls_key: PathOrNone = Field(default=None, description="Private key (PEM) of tls_cert.")
    max_namespaces: Count = Field(
        default=1,
        ge=1,
        le=256,
        description="Namespaces (models) that may be open; host and disk capacity are shared equally among them.",
    )
    max_clients: Count = Field(default=256, ge=1, le=65536, description="Clients that may be attached at once.")
    lease_max_s: Seconds = Field(
        default=600.0,
        gt=0,
        description="Longest time a lease is held: then that of a transfer over HTTP ends, a client's is reported.",
    )
    ready_without_redis: bool = Field(
        default=False, description="Be ready although the Redis of redis.url was not reached since the start."
    )
    isolate: bool = Field(
        default=False,
        description="Clients on this machine map the slab for reading only; what they save is copied once more.",
    )
    isolate_bytes: Bytes = Field(
        default=GiB // 4, description="With isolate: memory for the saves of each such client, taken as it is used."
    )
    drain_s: Seconds = Field(
        default=5.0, ge=0, le=600, description="At the end: longest wait for open leases and for what is owed to disk."
    )


class Config(BaseModel):
    """All sections. Frozen; `Config.load` reads file and environment, the constructor only its keywords.

    The section of a tier is an attribute by the tier's name, of its kind's own model (kvstore/tiers/registry.py);
    `tier` and `tiers` return it by name.
    """

    model_config = ConfigDict(frozen=True, extra="allow")  # the sections of tiers, checked by __init__

    store: StoreConfig = Field(default_factory=StoreConfig)
    host: HostConfig = Field(default_factory=HostConfig)
    breaker: BreakerConfig = Field(default_factory=BreakerConfig)
    speculation: SpeculationConfig = Field(default_factory=SpeculationConfig)
    hints: HintsConfig = Field(default_factory=HintsConfig)
    service: ServiceConfig = Field(default_factory=ServiceConfig)
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    def __init__(self, *, _given: Mapping[str, Setting] | None = None, **values: Any) -> None:
        static = {name: value for name, value in values.items() if name in type(self).model_fields}
        tiers, problems = _check_tiers(
            type(self), {name: value for name, value in values.items() if name not in static}, _given
        )
        try:
            super().__init__(**{**static, **tiers})
        except ValidationError as error:
            # `from None`: the library's own error would print a password that is part of a wrong URL.
            problems.insert(0, str(explain(type(self), error, _given)))
        if problems:
            raise ConfigError("\n".join(problems)) from None
        self._origins = {name: setting.origin for name, setting in (_given or {}).items()}

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None = None, **overrides: Any) -> Config:
        """Read file, environment and `overrides` (`host={"ttl_s": 60}` or `**{"host.ttl_s": 60}`), highest last.

        path: the TOML file; None looks at $KVSTORE_CONFIG and then for ./kvstore.toml.
        Raises ConfigError.
        """
        given = read_all(
            partial(read_file, cls, path), partial(read_environment, cls), partial(read_keywords, cls, overrides)
        )
        return cls(_given=given, **nest(given))

    @classmethod
    def section_names(cls) -> list[str]:
        """Return the names of all sections, those of tiers that are installed among them. Imports no tier."""
        return sections(cls)

    def source(self, field: str) -> str:
        """The source of the value of a field such as "host.ttl_s", in words."""
        section, _, name = field.partition(".")
        is_given = section in self.model_fields_set and name in getattr(self, section).model_fields_set
        return self._origins.get(field, KEYWORD if is_given else "default")

    def tier(self, name: str) -> Any:
        """Return the section of a tier, its defaults where nothing was given. Raises ConfigError for no kind of tier.

        Its model is the kind's own, which only the kind knows.
        """
        given = (self.model_extra or {}).get(name)
        return registry.kind_of(name).section() if given is None else given

    def tiers(self) -> list[tuple[TierKind[Any], Any]]:
        """Return kind and section of every tier that is turned on, nearest first."""
        given = self.model_extra or {}
        if not given:
            return []
        # Ours first, as everywhere; the names of others are not looked for where only ours are configured.
        names = registry.OURS if all(map(registry.is_ours, given)) else registry.names()
        both = [(registry.kind_of(name), given[name]) for name in names if name in given]
        return [(kind, section) for kind, section in both if kind.is_on(section)]

    def with_tiers(self, sections: Mapping[str, Any]) -> Config:
        """Return a copy with other sections of tiers, checked already."""
        return self.model_copy(update=dict(sections))

    if not TYPE_CHECKING:  # our own code says `tier`, so that a mistyped section is found

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_") or name in (self.model_extra or ()):
                return super().__getattr__(name)
            kind = registry.find(name)
            if kind is None:
                raise AttributeError(f"Config has no section {name!r}")
            return kind.section()


def _check_tiers(
    settings: type[BaseModel], values: Mapping[str, Any], given: Mapping[str, Setting] | None
) -> tuple[dict[str, Section], list[str]]:
    """Make the sections of tiers from what was given; what is wrong with them comes beside."""
    found: dict[str, Section] = {}
    problems = []
    for name, value in values.items():
        try:
            kind = registry.find(name)
            if kind is None:
                problems.append(unknown_section(settings, name, value, KEYWORD))
            else:
                found[name] = kind.section.model_validate(value)
        except (ConfigError, ValidationError) as error:  # noqa: PERF203 - every problem is told, not the first alone
            told = error if isinstance(error, ConfigError) else explain(settings, error, given, section=name)
            problems.append(str(told))
    return found, problems
