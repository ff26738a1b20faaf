"""What the ranks of an engine have to answer alike.

Each rank runs a scheduler of its own, with its own linker and its own leases. How much is loaded is SGLang's to settle:
it intersects what the ranks' lookups have answered. But a load that one rank refuses must be refused by all, or they
would compute batches of different shapes; SGLang does not look at that, so the ranks ask each other here, in the groups
in which SGLang's cache does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Ranks:
    """This rank among those that load together. The scheduler's thread.

    groups: process groups whose members call alike, in the same order; without one, this rank is alone.
    name:   of this rank's share of the KV, "" where the ranks do not share it out.
    """

    groups: tuple[Any, ...] = ()
    name: str = ""

    @classmethod
    def of(cls, params: Any, *, is_replicated: bool) -> Ranks:
        """The ranks of SGLang's CacheInitParams."""
        import torch.distributed as dist

        context, tensor = params.attn_cp_cache_group, params.attn_tp_cache_group
        groups = [group for group in (context, tensor) if group is not None and dist.get_world_size(group) > 1]
        whole = params.tp_cache_group
        if not groups and whole is not None and dist.get_world_size(whole) > 1:
            groups = [whole]
        heads = tensor if tensor is not None else whole
        parts = [] if is_replicated or heads is None else [f"tp{dist.get_rank(heads)}/{dist.get_world_size(heads)}"]
        if params.attn_cp_size > 1:
            parts.append(f"cp{params.attn_cp_rank}/{params.attn_cp_size}")
        return cls(tuple(groups), " ".join(parts))

    def agree(self, is_right: bool) -> bool:
        """Whether it is so on every rank. All have to ask."""
        if not self.groups:
            return is_right
        import torch
        import torch.distributed as dist

        answer = torch.tensor([int(is_right)], dtype=torch.int)
        for group in self.groups:
            dist.all_reduce(answer, op=dist.ReduceOp.MIN, group=group)
        return bool(answer.item())
