#!/usr/bin/env python3
"""A program `llama-server`: the real server of xllamacpp, with the options that ours gives one.

Builds of llama.cpp are not on the Python index; this is what a user's own program is to us.
"""

from __future__ import annotations

import argparse
import os
import signal


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--model", "--host", "--slot-save-path"):
        parser.add_argument(name)
    for name in ("--port", "--parallel", "--ctx-size", "--threads", "--cache-ram"):
        parser.add_argument(name, type=int)
    for name in ("--cache-type-k", "--cache-type-v"):
        parser.add_argument(name, default="f16")
    parser.add_argument("--slots", action="store_true")
    options = parser.parse_args()

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.hostnames = [options.host]
    params.port = options.port
    params.slot_save_path = f"{options.slot_save_path}/"
    params.endpoint_slots = options.slots
    params.n_ctx, params.n_parallel = options.ctx_size, options.parallel
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    params.cache_type_k, params.cache_type_v = (
        getattr(xllamacpp.ggml_type, f"GGML_TYPE_{name.upper()}")
        for name in (options.cache_type_k, options.cache_type_v)
    )
    params.ui = False
    # As a build of its own would, it ends by its default action at SIGTERM, whatever the library has set.
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.sigwait([signal.SIGINT])
    os._exit(0)


if __name__ == "__main__":
    main()
