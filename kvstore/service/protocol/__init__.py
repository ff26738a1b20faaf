"""The wire between a client and the node daemon: frames, and what they say. Pure: no socket, no store."""
