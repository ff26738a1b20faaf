"""The process behind `kvstore serve`.

daemon                                 puts it together: listens, drains, closes
state                                  what its parts look at
stores                                 one store per tenant and namespace
tenants, shares                        who may have how much
listener, connection, greeting         a client comes
rawsocket, patience, pending           below a connection
clients, session, requests, holdings   what it holds
transfers                              the same for pages over HTTP
isolation                              clients that may only read the slab
events                                 what comes and goes, told to listeners
preflight, summary                     before the first client: can it work, and what is up
"""
