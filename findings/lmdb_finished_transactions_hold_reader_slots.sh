#!/usr/bin/env bash
# py-lmdb 3.0.0: a read transaction that was aborted, or left by `with`, still holds one of the environment's reader slots,
# until its Python object is collected.
#
# A process that reads one transaction after the other, with nothing open at any time, gets ReadersFullError once something
# keeps the finished objects: a list, or an exception whose traceback has the frame. For a cache that keeps "the last
# error" per tier, or a test runner that keeps tracebacks, that is a slot each. Seen on 2026-11-30, Python 3.11, Linux:
#
#   lmdb 3.0.0, max_readers=8
#   200 transactions, one after the other, none kept: no error
#   finished transactions kept in a list: ReadersFullError at number 9 with none open
#   the same after `del` of the list: no error
#   exceptions kept, raised inside `with`: ReadersFullError at number 9 with none open
#
# Exits with 1 if any of that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet lmdb==3.0.0
"$work/venv/bin/python" - "$work/env" <<'PY'
import sys

import lmdb

SLOTS = 8
env = lmdb.open(sys.argv[1], max_readers=SLOTS, max_spare_txns=0)
with env.begin(write=True) as txn:
    txn.put(b"key", b"value")


def first_failure(read, attempts=20):
    for number in range(1, attempts + 1):
        try:
            read()
        except lmdb.ReadersFullError:
            return number
    return None


def read():
    with env.begin() as txn:
        assert txn.get(b"key") == b"value"
    return txn


def fail_inside():
    with env.begin() as txn:
        raise LookupError(txn.get(b"other"))


print(f"lmdb {lmdb.__version__}, max_readers={SLOTS}")
assert first_failure(read, 200) is None
print("200 transactions, one after the other, none kept: no error")

kept = []
number = first_failure(lambda: kept.append(read()))
print(f"finished transactions kept in a list: ReadersFullError at number {number} with none open")
assert number == SLOTS + 1
del kept
assert first_failure(read) is None
print("the same after `del` of the list: no error")

errors = []


def keep_error():
    try:
        fail_inside()
    except LookupError as error:
        errors.append(error)


number = first_failure(keep_error)
print(f"exceptions kept, raised inside `with`: ReadersFullError at number {number} with none open")
assert number == SLOTS + 1
PY
