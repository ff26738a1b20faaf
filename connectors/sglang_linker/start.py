"""The start of a linker: from SGLang's configuration to a store that is open and can be relied on.

Here everything may raise ConfigError, for nothing runs yet: what could not work later is said now.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

from connectors.sglang.identity import device_name, page_namespace
from connectors.sglang.updates import watch
from connectors.sglang_linker.config import WHERE, parse_linker_config
from connectors.sglang_linker.core import LinkerCore
from connectors.sglang_linker.loads import LayerCounter
from connectors.sglang_linker.pools import check_components, device_pages
from connectors.sglang_linker.ranks import Ranks
from kvstore.devices.base import Device
from kvstore.opening import open_configured

log = logging.getLogger("sglang.kvstore")


def open_core(
    server_args: Any,
    params: Any,
    components: Collection[Any],
    extra: Mapping[str, Any],
    make_counter: Callable[[int], LayerCounter],
    version: str,
) -> LinkerCore:
    """Open the store, in this process or by its daemon, and make the core over it. Raises ConfigError.

    make_counter: makes SGLang's counter of so many layers. version: SGLang's.
    """
    config = parse_linker_config(extra)
    check_components(components)
    pages = device_pages(params, params.page_size)
    ranks = Ranks.of(params, is_replicated=pages.is_replicated)
    namespace = page_namespace(
        server_args,
        pages.layout,
        ranks.name,
        seat="linker",
        where=WHERE,
        weights=config.fields.weights,
        version=version,
        device=device_name(pages.table.keep_alive[0].device),
        adapters_by_name=config.fields.adapters_by_name,
    )
    store = open_configured(config.store, pages.layout, namespace)
    try:
        load_device, save_device = _devices(pages.table.keep_alive[0])
        mark = functools.partial(watch().mark, by_name=config.fields.updates_by_name)
        core = LinkerCore(store, pages, load_device, save_device, make_counter(pages.num_layers), ranks, mark)
    except BaseException:
        store.close(0)
        raise
    log.info(
        "kvstore linker: pages of %d KiB in %d layers, namespace %s%s",
        pages.table.page_bytes >> 10,
        pages.num_layers,
        namespace.root().hex()[:12],
        f", {ranks.name}" if ranks.name else "",
    )
    return core


def _devices(tensor: Any) -> tuple[Device, Device]:
    """Devices for loads and for saves of pools on the device of a tensor.

    SGLang's events are waited for by our threads before they copy. So a stream that nobody computes on is what a copy
    is ordered after: one that waited for the forward's stream would wait for layers that wait for it.
    """
    if tensor.device.type == "cpu":
        from kvstore.devices.cpu import CpuDevice

        return CpuDevice(), CpuDevice()
    import torch

    from kvstore.devices.cuda import CudaDevice

    index = tensor.device.index or 0

    def device() -> Device:
        return CudaDevice(index, engine_stream=torch.cuda.Stream(tensor.device))  # type: ignore[no-untyped-call]

    return device(), device()
