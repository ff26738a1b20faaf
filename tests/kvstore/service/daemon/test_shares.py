"""Whatever the others do, there is something left for a tenant."""

from kvstore.service.daemon.shares import has_room, kept


def take_all(tenant: str, taken: dict[str, int], most: int, num_tenants: int) -> int:
    while has_room(tenant, taken, most, num_tenants):
        taken[tenant] = taken.get(tenant, 0) + 1
    return taken.get(tenant, 0)


def test_one_tenant_may_have_all() -> None:
    assert take_all("local", {}, 256, 1) == 256


def test_none_of_several_may_have_above_half_and_each_gets_what_is_kept_for_it() -> None:
    taken: dict[str, int] = {}

    assert take_all("greedy", taken, 256, 4) == 128
    assert take_all("second", taken, 256, 4) == 64
    assert take_all("third", taken, 256, 4) == 32
    assert take_all("fourth", taken, 256, 4) == 32 == kept(256, 4)


def test_more_tenants_than_places_still_get_one_each_as_long_as_there_are_some() -> None:
    taken: dict[str, int] = {}

    assert take_all("greedy", taken, 8, 1000) == 4
    assert take_all("second", taken, 8, 1000) == 4
    assert not has_room("third", taken, 8, 1000)


def test_two_may_use_what_the_other_does_not_need_kept() -> None:
    assert take_all("local", {}, 256, 2) == 192
