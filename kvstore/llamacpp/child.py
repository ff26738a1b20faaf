"""llama-server in a process of its own: `python -m kvstore.llamacpp.child JSON`.

Run by `process`. It is the one of the package `xllamacpp`. It ends with SIGTERM, and with the process that started it,
however that ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys


def main(settings: dict[str, object]) -> None:
    """Serve until SIGTERM, or until standard input ends: then the process that started us has.

    settings: model, port, slot_save_path, n_ctx, n_parallel, n_threads, cache_type_k, cache_type_v.
    """
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


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
