"""For tests of what is built on the store: a private redis-server."""
