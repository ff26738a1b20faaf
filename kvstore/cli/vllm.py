"""`kvstore vllm`: a vLLM server with the connector in it and admission before it, until SIGTERM."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from kvstore.cli.config import overrides
from kvstore.cli.options import (
    ConfigFile,
    Drain,
    EngineLog,
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
from kvstore.errors import ConfigError


def vllm(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- OPTIONS]", help="Passed on to vLLM, e.g. -- --max-model-len 4096"),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Directory or hub id, of the server to start.")
    ] = None,
    url: Annotated[str | None, typer.Option("--url", help="A vLLM server that runs already; none starts one.")] = None,
    api_key: Annotated[str, typer.Option("--api-key", envvar="VLLM_API_KEY", help="With --url: its --api-key.")] = "",
    server: Annotated[
        str | None,
        typer.Option("--server", help="Program to start: vllm, or the python that has it; found unless given."),
    ] = None,
    host: ListenHost = "127.0.0.1",
    port: ListenPort = 8001,
    name: ReplicaName = "vllm",
    dtype: Annotated[
        ReplicaDtype | None, typer.Option("--dtype", help="Of the server to start; float32 without an accelerator.")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=0, help="Of the server to start, on CPU; 0: its own.")] = 0,
    max_queue: MaxQueue = 64,
    max_running: Annotated[
        int, typer.Option("--max-running", min=1, help="Requests that vLLM computes at once (its --max-num-seqs).")
    ] = 8,
    max_tokens_queued: MaxTokensQueued = 65536,
    drain_s: Drain = 30.0,
    start_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="Longest wait until the server to start is ready.")
    ] = 600.0,
    engine_log: EngineLog = None,
    file: ConfigFile = None,
    setting: StoreSettings = None,
    verbose: Verbose = False,
) -> None:
    """Serve a model with vLLM, with a prefix cache behind it and admission before it.

    vLLM runs in an environment of its own, which needs this package too. Requests beyond what may wait, and beyond the
    token budget, get a 429 that says when to come again, by what the engine was measured to do.

    \b
      kvstore vllm --model HuggingFaceTB/SmolLM2-135M-Instruct --set host.capacity_bytes=8GiB
      kvstore vllm --url http://127.0.0.1:8000 --max-tokens-queued 200000
    """
    from kvstore import logs
    from kvstore.cluster.programs import find_vllm
    from kvstore.cluster.server_process import ServerProcess
    from kvstore.config.sections import Config
    from kvstore.ports import free_port
    from kvstore.vllm.command import VllmSettings, command, environment
    from kvstore.vllm.front import VllmFrontSettings, serve
    from kvstore.web.descriptors import raise_limit

    logs.setup(verbose=verbose)
    raise_limit()
    announce = announcer()
    given = overrides(setting or [])
    config = Config.load(file, **given)  # what is wrong is told now, and not in the middle of vLLM's log
    front = VllmFrontSettings(name, host, port, max_queue, max_running, max_tokens_queued, drain_s)
    if url is not None:
        _check_url(url, has_more=server is not None or model is not None or bool(arguments or setting))
        serve(front, url, announce, api_key=api_key)
        return
    if model is None:
        raise ConfigError("no model: give a directory or hub id (--model), or a vLLM server that runs (--url URL)")
    settings = VllmSettings(
        model,
        find_vllm(server),
        "" if dtype is None else dtype.value,
        threads,
        max_running,
        {field: value.value for field, value in given.items()},
        config.service.url is not None,
        file,
        tuple(arguments or ()),
    )
    with contextlib.ExitStack() as stack:
        own_port = free_port()
        log = engine_log
        if log is None:
            log = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvstore-vllm-"))) / "vllm.log"
        process = ServerProcess(
            "vLLM",
            command(settings, own_port),
            f"http://127.0.0.1:{own_port}",
            log,
            environment(settings),
            "vLLM's own options go after --, e.g. -- --max-model-len 4096; if a module is missing, install this "
            f"package in the environment of {settings.program}",
        )
        announce(f"{name}: starting {settings.program} with {model}, its log is {log}")
        stack.callback(process.stop)
        process.start(start_timeout)
        serve(front, process.url, announce, ended=process.ended)


def _check_url(url: str, *, has_more: bool) -> None:
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {url}: it must begin with http:// or https://, such as http://127.0.0.1:8000")
    if has_more:
        raise ConfigError(
            "--model, --server, --set and OPTIONS are for a server to start, --url is one that runs, with its own "
            "--kv-transfer-config; give one"
        )
