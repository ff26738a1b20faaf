"""Which of the daemon's namespaces a request to its HTTP API means.

What a tenant may not see does not exist for it: another's namespace is a 404, as one that never was.
"""

from __future__ import annotations

from kvstore.service.daemon.stores import OpenStore, Stores
from kvstore.service.http.problems import Problem
from kvstore.service.http.routes import ApiCall


def one(stores: Stores, call: ApiCall, namespace: str | None) -> OpenStore:
    """The namespace that is meant. Problem 404 if there is none such, 409 if it is not clear."""
    if namespace is not None:
        opened = stores.find(call.tenant, namespace)
        if opened is None:
            raise Problem(404, "there is no such namespace", field="namespace")
        return opened
    known = stores.of(call.tenant)
    if len(known) == 1:
        return known[0]
    detail = "none is open" if not known else f"{len(known)} are open; say which: GET /v1/namespaces lists them"
    raise Problem(409, "it is not clear which namespace", detail, "namespace")


def some(stores: Stores, call: ApiCall) -> list[OpenStore]:
    """The namespace of a query, or all of the tenant's."""
    wanted: str | None = call.body.namespace
    return stores.of(call.tenant) if wanted is None else [one(stores, call, wanted)]
