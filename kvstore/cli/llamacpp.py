"""`kvstore llamacpp`: a llama-server with a prefix cache behind it, until SIGTERM."""

from __future__ import annotations

import contextlib
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from kvstore.cli.config import overrides
from kvstore.cli.options import (
    ConfigFile,
    EngineLog,
    ListenHost,
    ListenPort,
    ReplicaName,
    StoreSettings,
    Verbose,
    announcer,
)
from kvstore.errors import ConfigError


class CacheType(str, Enum):
    """Of K and V in llama.cpp."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"
    q4_0 = "q4_0"


def llamacpp(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- OPTIONS]", help="Passed on to a --server program, e.g. -- --n-gpu-layers 99"),
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="GGUF file: of the server to start, or of the one at --url.")
    ] = None,
    url: Annotated[str | None, typer.Option("--url", help="A llama-server that runs already; none starts one.")] = None,
    slots_folder: Annotated[
        Path | None, typer.Option("--slots", metavar="DIR", help="With --url: its --slot-save-path, on this machine.")
    ] = None,
    api_key: Annotated[str, typer.Option("--api-key", envvar="LLAMA_API_KEY", help="With --url: its --api-key.")] = "",
    server: Annotated[
        str | None, typer.Option("--server", help="Program to start; without it that of xllamacpp, else llama-server.")
    ] = None,
    host: ListenHost = "127.0.0.1",
    port: ListenPort = 8080,
    name: ReplicaName = "llamacpp",
    parallel: Annotated[int, typer.Option("--parallel", min=1, max=256, help="Slots of the server to start.")] = 2,
    context: Annotated[int, typer.Option("--context", min=64, help="Tokens of a slot of the server to start.")] = 8192,
    threads: Annotated[int, typer.Option("--threads", min=0, help="Of the server to start; 0 takes the cores.")] = 0,
    cache_type: Annotated[
        CacheType, typer.Option("--cache-type", help="Of K and V, of the server to start.")
    ] = CacheType.f16,
    weights: Annotated[
        str,
        typer.Option("--weights", help="How the GGUF file is identified: sampled, full, or a name that you vouch for."),
    ] = "sampled",
    engine_log: EngineLog = None,
    file: ConfigFile = None,
    setting: StoreSettings = None,
    verbose: Verbose = False,
) -> None:
    """Serve a GGUF model with OpenAI's API, with a prefix cache behind llama.cpp.

    What a prompt shares with earlier ones, also with those before a restart or on other machines, is restored into a
    slot of llama-server instead of computed. Every restore is checked against the server's own counts.

    \b
      kvstore llamacpp --model model.gguf --set disk.path=/srv/kv
      kvstore llamacpp --url http://127.0.0.1:8081 --slots /dev/shm/slots
    """
    from kvstore import logs
    from kvstore.cluster.programs import find_llama_server
    from kvstore.config.sections import Config
    from kvstore.limits import usable_cpus
    from kvstore.llamacpp.front import FrontSettings, serve
    from kvstore.llamacpp.process import LlamaProcess, LlamaSettings
    from kvstore.ports import free_port
    from kvstore.web.descriptors import raise_limit

    logs.setup(verbose=verbose)
    raise_limit()
    config = Config.load(file, **overrides(setting or []))
    announce = announcer()
    with contextlib.ExitStack() as stack:
        child: LlamaProcess | None = None
        if url is None:
            if slots_folder is not None:
                raise ConfigError("--slots is for a server that runs: name it, too (--url URL), or leave --slots out")
            gguf = _gguf(model)
            program = find_llama_server(server, bool(arguments))
            settings = LlamaSettings(
                gguf,
                program,
                parallel,
                context,
                threads or usable_cpus(),
                cache_type.value,
                tuple(arguments or ()),
            )
            announce(f"starting {program or 'the llama-server of xllamacpp'} with {settings.model}")
            child = stack.enter_context(LlamaProcess(settings, free_port(), engine_log))
            url, slots_folder = child.url, child.folder
        else:
            _check_url(url, slots_folder)
            if server is not None or arguments:
                raise ConfigError("--server and OPTIONS are for a server to start, --url is one that runs; give one")
        assert slots_folder is not None

        front = FrontSettings(host, port, name, None if model is None else str(model), weights)
        ended = (lambda: "") if child is None else child.ended
        serve(front, config, url, slots_folder, announce, api_key=api_key, ended=ended)


def _gguf(model: Path | None) -> Path:
    if model is None:
        raise ConfigError(
            "no model: give a GGUF file (--model FILE), or a llama-server that runs (--url URL --slots DIR)"
        )
    if not model.is_file():
        raise ConfigError(f"--model {model}: there is no such file; give a GGUF file")
    with model.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ConfigError(f"--model {model}: it is no GGUF file; convert the model, or use `kvstore replica`")
    return model.absolute()


def _check_url(url: str, folder: Path | None) -> None:
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {url}: it must begin with http:// or https://, such as http://127.0.0.1:8081")
    if folder is None:
        raise ConfigError("--url needs --slots DIR: the directory that llama-server was given as --slot-save-path")
    if not folder.is_dir():
        raise ConfigError(f"--slots {folder}: there is no such directory; give llama-server's --slot-save-path")
