"""The node daemon: one cache for all engine processes of a machine, and the client that speaks to it.

    protocol     frames, the same over a unix socket and over an upgraded HTTP connection
    messages     what they say: requests, calls, answers
    namespaces   layouts and namespaces as JSON, checked
    stores       the daemon's stores, one per namespace, each over a slab in shared memory
    known        the requests of one client, each with the keys that came so far
    session      what the daemon holds for one client: its requests and leases
    pending      an answer that is not there yet
    events       what came to which tier and what left, for routers and clients that listen
    channel      one connection of a client, in the daemon's event loop
    rawsocket    the socket below it: what asyncio leaves undone
    clients      who is attached, and what they hold
    daemon       the process: listens, drains, closes
    attachment   what a client has of one daemon: a session, its connections, the slab
    link         a client's tie to its daemon: deadlines, finding it again
    errand       a thread of a client's own: the link's seeker, the follower
    calls        calls about requests over a link; grants whose answer never came
    memory       where the pages of a client's leases lie in its process
    leases       those that are open
    follower     what comes to a daemon's tiers and leaves them, as its client is told
    client       RemoteStore: the store's face, spoken over a link
    slab         the slab in an engine's other processes: attach_slab

asyncio lives here and nowhere else but in kvstore/aio.py.
"""
