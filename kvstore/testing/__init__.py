"""For tests of what is built on the store, by us and by others.

contracts      suites to inherit, one for each interface
pages          keys, bytes that follow from a key, aligned slots
redis_server   a Redis server of one's own, for as long as a test runs
"""
