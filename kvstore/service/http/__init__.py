"""The HTTP API of the node daemon.

app                                           one request: who asks, its body, its errors
routes                                        the table that is served and described
api, clients_api, tiers_api, explain, pages   the operations
scope                                         which namespaces one means
models, parsing, problems                     bodies and errors
metrics                                       for Prometheus
"""
