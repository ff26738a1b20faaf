"""`kvstore replica`: one model behind OpenAI's API, until SIGTERM."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from kvstore.cli.config import overrides
from kvstore.cli.options import (
    ConfigFile,
    Drain,
    ListenHost,
    ListenPort,
    MaxQueue,
    MaxTokensQueued,
    ReplicaDtype,
    ReplicaName,
    StoreSettings,
    Verbose,
    announcer,
)
from kvstore.errors import KVStoreError
from kvstore.extras import how_to_install, require


class ReplicaReuse(str, Enum):
    """The promise of a hit."""

    exact = "exact"
    any = "any"


class ReplicaSave(str, Enum):
    """The answers whose pages are saved."""

    auto = "auto"
    all = "all"
    prompt = "prompt"


def replica(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Directory or hub id of a causal language model of transformers, or 'random' for a small one with "
            "random weights; without it SmolLM2-135M.",
        ),
    ] = None,
    host: ListenHost = "127.0.0.1",
    port: ListenPort = 8001,
    name: ReplicaName = "replica-0",
    dtype: Annotated[
        ReplicaDtype, typer.Option("--dtype", help="Element type of weights and cache.")
    ] = ReplicaDtype.float32,
    threads: Annotated[
        int, typer.Option("--threads", min=1, help="Of torch; replicas that share pages need the same number.")
    ] = 1,
    prefill_chunk: Annotated[
        int, typer.Option("--prefill-chunk", min=1, help="Prompt tokens per forward, a multiple of store.block_size.")
    ] = 128,
    reuse: Annotated[
        ReplicaReuse,
        typer.Option("--reuse", help="exact: the same bits as without a cache. any: more hits, equal up to rounding."),
    ] = ReplicaReuse.exact,
    save: Annotated[
        ReplicaSave,
        typer.Option(
            "--save",
            help="Of answers, with --reuse any: auto: those that the next turn can begin with, by the chat template. "
            "all. prompt: none.",
        ),
    ] = ReplicaSave.auto,
    max_queue: MaxQueue = 64,
    max_running: Annotated[
        int, typer.Option("--max-running", min=1, help="Requests computed in turns, each with a KV cache of its own.")
    ] = 8,
    max_tokens_queued: MaxTokensQueued = 65536,
    drain_s: Drain = 30.0,
    watch_prefixes: Annotated[
        bool,
        typer.Option("--watch-prefixes", help="Follow where sessions leave their prefix: GET /v1/prefix, metrics."),
    ] = False,
    file: ConfigFile = None,
    setting: StoreSettings = None,
    verbose: Verbose = False,
) -> None:
    """Serve one model with OpenAI's API, with a prefix cache behind it.

    The cache is a store in this process, or, with --set service.url=..., that of the node daemon (kvstore serve).
    Of requests that miss the same prompt one computes it and the others wait (--set store.single_flight=false: all do).
    It listens at once and answers 503 until the model is loaded and warm; GET /readyz tells. SIGTERM drains.

    \b
      kvstore replica --model random --port 8001
      curl http://127.0.0.1:8001/v1/completions -d '{"prompt": "Once upon a time", "max_tokens": 8}'
    """
    from kvstore import logs
    from kvstore.cluster.replica import ModelSpec, ReplicaSettings, serve
    from kvstore.config.sections import Config
    from kvstore.demo.models import RANDOM, resolve_model
    from kvstore.web.descriptors import raise_limit

    logs.setup(verbose=verbose)
    raise_limit()
    require("cluster", "a replica")
    if watch_prefixes:
        require("prefix", "--watch-prefixes")
    config = Config.load(file, **overrides(setting or []))
    if config.service.client_name is None:
        named = config.service.model_copy(update={"client_name": name[:64]})
        config = config.model_copy(update={"service": named})
    announce = announcer()
    # Where many users share a prompt it pays; so it is on here, unless somebody has said otherwise.
    single_flight = config.store.single_flight or config.source("store.single_flight") == "default"
    found = resolve_model(model, announce)
    spec = ModelSpec(
        found.source,
        RANDOM if model == RANDOM else found.name,
        dtype.value,
        threads,
        prefill_chunk,
        reuse.value,
        single_flight,
        save.value,
    )
    settings = ReplicaSettings(
        name, host, port, spec, max_queue, max_running, max_tokens_queued, drain_s, watch_prefixes
    )
    try:
        serve(settings, config, announce)
    except ImportError as error:
        raise KVStoreError(f"a replica cannot start: {error}; {how_to_install('cluster')}") from error
    except (OSError, ValueError) as error:
        if isinstance(error, KVStoreError):
            raise
        raise KVStoreError(f"the model {found.source} cannot be loaded: {str(error)[:500]}") from error
