"""The node daemon: one cache for all engine processes of a machine, and the client that speaks to it.

protocol    what goes over the wire: frames, messages, namespaces as JSON
client      an engine's side: `connect`, RemoteStore, the slab it maps
daemon      the process: stores, tenants, clients' sessions and leases, their connections
http        the HTTP API: its operations, models, errors, metrics
dashboard   the page at `/`, `kvstore top`, and the operations behind both

Each imports what stands above it in this list, client and daemon not each other; only `daemon.daemon`, which puts the
process together, knows them all.
"""
