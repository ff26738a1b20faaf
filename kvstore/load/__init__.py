"""The load generator: plays a workload against an OpenAI-compatible server and tells what the cache did for it.

    workloads, trace   what is asked: pure, from a seed          arrivals   when it is asked
    client, player     ask it: the only code here that waits     summary, compare   numbers from the records
    tables, plot       show them                                 progress   shows them while they come

It knows HTTP and nothing else of what serves: a cluster of ours, one replica, or another engine altogether.
"""
