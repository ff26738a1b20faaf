"""Sessions are those that a trace names, or those whose prompts grow out of each other."""

from __future__ import annotations

from dataclasses import replace

from kvstore.lab.sessions import num_sessions
from tests.kvstore.lab.test_replay import trace_of


def test_prompts_that_grow_are_one_session_though_their_last_block_changes() -> None:
    trace = trace_of((0, 1, 2, 3), (0, 5, 6, 7), (0, 1, 2, 3, 4), (0, 1, 2, 8, 9), (0, 5, 6, 7, 10))

    assert num_sessions(trace) == 2


def test_a_shared_first_block_makes_no_session() -> None:
    assert num_sessions(trace_of((0,), (0, 1), (0, 2), (0, 3, 4))) == 4


def test_names_are_believed() -> None:
    trace = trace_of((1, 2, 3), (4, 5, 6), (1, 2, 3))
    requests = tuple(replace(r, session=n % 2) for n, r in enumerate(trace.requests))

    assert num_sessions(replace(trace, requests=requests)) == 2
