"""Silent connections push each other out, and never one that is being worked for."""

from kvstore.web.connections import Connection, Connections, State


def enter(among: Connections, peer: str = "a") -> tuple[Connection, list[str]]:
    dropped: list[str] = []
    connection = among.enter(peer, lambda: dropped.append("dropped"))
    assert connection is not None
    return connection, dropped


def test_the_one_that_has_said_nothing_for_longest_makes_room() -> None:
    among = Connections(2)
    (_, first), (_, second) = enter(among), enter(among)

    enter(among)

    assert (first, second) == (["dropped"], [])
    assert (len(among), among.num_dropped) == (2, 1)


def test_one_that_waits_for_its_next_request_stays_longer_than_one_that_never_made_any() -> None:
    among = Connections(2)
    idle, gone = enter(among)
    _, silent = enter(among)
    idle.move(State.IDLE)

    enter(among)

    assert (gone, silent) == ([], ["dropped"])


def test_none_that_is_worked_for_goes_and_the_new_one_is_refused() -> None:
    among = Connections(2)
    busy = [enter(among) for _ in range(2)]
    for connection, _ in busy:
        connection.move(State.BUSY)

    assert among.enter("b", lambda: None) is None
    assert [dropped for _, dropped in busy] == [[], []]
    assert among.num_refused == 1


def test_one_address_pushes_out_its_own() -> None:
    among = Connections(4, most_of_peer=2)
    _, other = enter(among, "other")
    _, own = enter(among, "greedy")
    enter(among, "greedy")

    enter(among, "greedy")

    assert (other, own) == ([], ["dropped"])
    assert len(among) == 3


def test_one_that_has_left_is_counted_no_more() -> None:
    among = Connections(1, most_of_peer=1)
    connection, dropped = enter(among)
    connection.leave()
    connection.leave()
    connection.move(State.BUSY)

    enter(among)

    assert dropped == []
    assert len(among) == 1
