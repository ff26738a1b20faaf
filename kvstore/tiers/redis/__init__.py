"""The Redis tier: pages that replicas and machines share.

tier                           the tier
bound                          how much of a server one may fill
value, parts, claims           what lies there
calls, hedge, probe, refusal   one call of the tier
full                           servers without room, in the log
url, route, slots              which server holds a key
node, connection, parser       the protocol, without copies
info                           what a server says about itself
"""
