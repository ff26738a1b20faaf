"""The HTTP API's operation on policies: which one each tier has, and what it has learned."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from eviction.policy import BELIEF_SPANS_S
from kvstore.admin import PolicyView
from kvstore.beliefs import as_tree
from kvstore.service.daemon.state import DaemonState
from kvstore.service.daemon.stores import OpenStore
from kvstore.service.http import scope
from kvstore.service.http.answers import BeliefAnswer, PoliciesAnswer, PolicyAnswer
from kvstore.service.http.models import InNamespace
from kvstore.service.http.routes import ApiCall, Route

MAX_CLASSES = 256  # of a policy, in an answer


class PoliciesApi:
    """Operations on policies. The daemon's event loop only."""

    def __init__(self, state: DaemonState) -> None:
        self._state = state

    def routes(self) -> list[Route]:
        """Their part of the table."""
        return [
            Route("GET", "/v1/policies", self.policies, "The policy of each tier, and what it believes.",
                  query=InNamespace, answer=PoliciesAnswer, errors=(404,)),
        ]  # fmt: skip

    async def policies(self, call: ApiCall) -> PoliciesAnswer:
        stores = scope.some(self._state.stores, call)
        return answer([(one, await asyncio.to_thread(one.store.admin.beliefs)) for one in stores], MAX_CLASSES)


def answer(views: Sequence[tuple[OpenStore, Sequence[PolicyView]]], max_classes: int) -> PoliciesAnswer:
    """Return what is told of the policies of some stores."""
    return PoliciesAnswer(
        spans_s=list(BELIEF_SPANS_S),
        policies=[
            PolicyAnswer(
                tenant=opened.tenant.name,
                namespace=opened.id,
                tier=view.tier,
                policy=view.policy,
                learns=view.beliefs is not None,
                num_classes=len(view.beliefs or ()),
                classes=[
                    BeliefAnswer(words=list(one.words), seen=one.seen, within=list(one.within), mean_s=one.mean_s)
                    for one in as_tree(view.beliefs or (), max_classes)
                ],
            )
            for opened, found in views
            for view in found
        ],
    )
