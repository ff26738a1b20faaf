"""The hands: they carry out what the planner decides, each transfer with exactly one outcome.

mover, lane           all tiers' queues, and one
calls                 from a transfer to the call of a tier
breaker, directions   a failing tier is out at once
threads               where the system may refuse one
worker                one thread for small jobs in order
recorder, learned_writer  what is written beside requests
rows                  pages of memory that an engine owns
"""
