"""Ports that stay free until they are used."""

import socket

import pytest

from kvstore import ports


def test_ports_are_different_and_free() -> None:
    found = ports.free_ports(20)

    assert len(set(found)) == 20
    for port in found:
        with socket.socket() as taken:
            taken.bind((ports.HOST, port))


def test_a_port_that_is_taken_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "FIRST", 16_500)
    monkeypatch.setattr(ports, "LAST", 16_502)
    found = ports.free_ports(2)
    with socket.socket() as taken:
        taken.bind((ports.HOST, found[0]))

        assert ports.free_ports(1) == [found[1]]
        with pytest.raises(OSError, match="no 2 free ports"):
            ports.free_ports(2)
