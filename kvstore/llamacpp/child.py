"""llama-server in a process of its own: `python -m kvstore.llamacpp.child JSON`.

Run by `process`. It is the one of the package `xllamacpp`, or becomes a program of the user's. It ends with
SIGTERM, and with the process that started it, however that ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import NoReturn

PR_SET_PDEATHSIG = 1  # linux/prctl.h; Linux only, elsewhere a program may survive us


def main(settings: dict[str, object]) -> None:
    """Serve until SIGTERM, or until standard input ends: then the process that started us has.

    settings: program, a command to be run instead; or model, port, slot_save_path, n_ctx, n_parallel, n_threads,
    cache_type_k, cache_type_v.
    """
    if (program := settings.get("program")) is not None:
        become([str(one) for one in program] if isinstance(program, list) else [])
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.hostnames = ["127.0.0.1"]
    params.port = settings["port"]
    params.slot_save_path = settings["slot_save_path"]
    params.endpoint_slots = True
    params.n_ctx = settings["n_ctx"]
    params.n_parallel = settings["n_parallel"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["n_threads"]
    for name in ("cache_type_k", "cache_type_v"):
        setattr(params, name, getattr(xllamacpp.ggml_type, f"GGML_TYPE_{str(settings[name]).upper()}"))
    # What was shifted was not computed from its tokens alone, and must not be stored as if it had been.
    params.ctx_shift, params.n_cache_reuse = False, 0
    # What it would keep in memory of its own is the store's affair here.
    params.cache_ram_mib, params.cache_idle_slots = 0, False
    params.ui = False
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the one that started us
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    while os.read(0, 4096):
        pass
    del server
    os._exit(0)


def become(command: list[str]) -> NoReturn:
    """Run a command in this process's place, which gets a SIGTERM when the one that started us has ended."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)  # it ended before that was said
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}; give the path of llama-server")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
