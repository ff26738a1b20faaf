"""A web server that strangers may knock at: the daemon's, the replica's and the router's; and reading its streams.

server        an aiohttp application behind connections of ours
listener      a socket that accepts them
connections   how many there may be, and which goes first
descriptors   how many files the process may open
bodies        requests read whole, within a time and a size
sse           server-sent events of another server, as they are read
"""
