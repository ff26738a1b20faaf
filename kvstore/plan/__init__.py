"""The brain: what is loaded, saved, moved and evicted. No I/O, no thread, no clock of its own.

planner                                                        its verbs
books, state, records                                          what its parts share; what crosses to callers and lanes
lookup, match, probes, cost, resume                            what is stored of a prompt, and how much of it pays
loads, fetches, saves, single_flight, claims                   who brings pages, who computes them
catalog, host, slots                                           what is known of each page, and host memory
journal                                                        what came and went
lower_tier, lower_tiers, transfers, debts, deletes, flushing   what lies below it, and what is owed there
retention, prefixes                                            what is kept, and a walk over all of it
mend                                                           after an exception in a step
"""
