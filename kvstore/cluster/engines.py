"""The engines that replicas of a cluster may have.

    transformers   `kvstore replica`: light, starts in seconds, one sequence per forward
    vllm           `kvstore vllm`: a front before vLLM's own server, with our connector in it
    llamacpp       `kvstore llamacpp`: a front before a llama-server, on a GGUF file

One contract for all: a replica is one process that listens at its port, answers OpenAI's API, says at `/readyz` whether
it takes requests and how it is called, at `/v1/lookup` what it would have to compute of a prompt, and at `/metrics`
what it did, under the names `kvstore_replica_*`. So neither supervisor nor router, load generator nor dashboard know
engines: what differs is here, and is the command of a replica and what it needs of a model.

Pure but for `find_server`. A new engine is a class here and a line in `ENGINES`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from kvstore.cluster.programs import find_llama_server, find_vllm
from kvstore.errors import ConfigError


class Weights(str, Enum):
    """The form in which an engine takes a model."""

    TRANSFORMERS = "transformers"  # a directory or hub id
    GGUF = "gguf"  # a file


@dataclass(frozen=True, slots=True)
class ReplicaPlace:
    """One replica, whatever its engine.

    dtype:     of weights and cache; "" leaves it to the engine.
    server:    the engine's own program, as `find_server` gave it; "" where it needs none.
    engine_log: file for what the engine's own server prints; "" leaves it to the replica.
    settings:  FIELD=VALUE of the store; one of them says where its node is.
    arguments: further ones of its command, last.
    """

    name: str
    host: str
    port: int
    model: str
    dtype: str = ""
    threads: int = 1
    server: str = ""
    engine_log: str = ""
    settings: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()


class ClusterEngine(Protocol):
    """One kind of engine. Stateless."""

    @property
    def name(self) -> str:
        """As --engine calls it."""

    @property
    def weights(self) -> Weights:
        """The form of model it takes."""

    def find_server(self, given: str | None) -> str:
        """The program that it needs, "" for none. given: as --server names it. Raises KVStoreError with what to do."""

    def command(self, replica: ReplicaPlace) -> tuple[str, ...]:
        """The command of a replica. Raises ConfigError for what this engine cannot have."""


class TransformersKind:
    """The light default."""

    name = "transformers"
    weights = Weights.TRANSFORMERS

    def find_server(self, given: str | None) -> str:
        """It needs none."""
        if given is not None:
            raise ConfigError(f"--server {given}: transformers runs in our own process; leave it out, or give --engine")
        return ""

    def command(self, replica: ReplicaPlace) -> tuple[str, ...]:
        """`kvstore replica`."""
        options = [*_common(replica), "--dtype", replica.dtype or "float32", "--threads", str(replica.threads)]
        return kvstore_command("replica", *options, settings=replica.settings, last=replica.arguments)


class VllmKind:
    """vLLM's own server, with our connector."""

    name = "vllm"
    weights = Weights.TRANSFORMERS

    def find_server(self, given: str | None) -> str:
        """`vllm`, or a Python that has it."""
        return find_vllm(given)

    def command(self, replica: ReplicaPlace) -> tuple[str, ...]:
        """`kvstore vllm`. Its `arguments` may hold a `--`, after which come vLLM's own."""
        options = [*_common(replica), "--server", replica.server, "--threads", str(replica.threads)]
        options += ["--dtype", replica.dtype] if replica.dtype else []
        options += ["--engine-log", replica.engine_log] if replica.engine_log else []
        return kvstore_command("vllm", *options, settings=replica.settings, last=replica.arguments)


class LlamacppKind:
    """llama-server, with our front."""

    name = "llamacpp"
    weights = Weights.GGUF

    def find_server(self, given: str | None) -> str:
        """A llama-server; "" for that of the package."""
        return find_llama_server(given) or ""

    def command(self, replica: ReplicaPlace) -> tuple[str, ...]:
        """`kvstore llamacpp`. Its `arguments` may hold a `--`, after which come llama-server's own."""
        if replica.dtype:
            raise ConfigError("--dtype: a GGUF file has its own; leave it out (of the cache: -- --cache-type)")
        options = [*_common(replica), "--threads", str(replica.threads)]
        options += ["--server", replica.server] if replica.server else []
        options += ["--engine-log", replica.engine_log] if replica.engine_log else []
        return kvstore_command("llamacpp", *options, settings=replica.settings, last=replica.arguments)


ENGINES: dict[str, ClusterEngine] = {one.name: one for one in (TransformersKind(), VllmKind(), LlamacppKind())}
DEFAULT_ENGINE = TransformersKind.name


def find_engine(name: str) -> ClusterEngine:
    """The engine called `name`. Raises ConfigError."""
    if name not in ENGINES:
        raise ConfigError(f"--engine is {name!r}; it must be one of {', '.join(ENGINES)}")
    return ENGINES[name]


def kvstore_command(
    command: str, *options: str, settings: Sequence[str] = (), last: Sequence[str] = ()
) -> tuple[str, ...]:
    """One of our own commands, with settings."""
    assignments = [part for setting in settings for part in ("--set", setting)]
    return (sys.executable, "-m", "kvstore", command, *options, *assignments, *last)


def _common(replica: ReplicaPlace) -> list[str]:
    return ["--model", replica.model, "--name", replica.name, "--host", replica.host, "--port", str(replica.port)]
