"""An engine's side of the node daemon.

connect                             from a URL, or a configuration, to a store
store                               RemoteStore: the store's face, spoken over a link
link                                the tie to a daemon: deadlines, finding it again
attachment                          what it has of one daemon
connection                          one connection: a call goes out, its answer comes back
calls                               calls about requests
leases                              those that are open
events                              what came to the daemon's tiers and left them
thread                              the threads that ask for it
memory, slab, split_slab            where the pages lie in this process
"""
