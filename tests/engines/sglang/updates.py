"""An update of weights by SGLang's own manager, with runners that have none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput
from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
from sglang.srt.runtime_context import get_context

from connectors.sglang import updates


class Weights:
    """The weights of this process. Made before any seat; the test's end forgets what was done to them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(updates, "_updates", None)
        monkeypatch.setattr(WeightUpdater, "update_weights_from_disk", lambda self, *_, **__: (True, "done"))
        self.num_flushes = 0
        runner = SimpleNamespace(weight_updater=object.__new__(WeightUpdater))
        self._manager = object.__new__(SchedulerWeightUpdaterManager)
        self._manager.tp_worker = SimpleNamespace(weight_update_runners=lambda: [("target", runner)])
        self._manager.draft_worker = self._manager.metrics_collector = None
        self._manager.scheduler = SimpleNamespace(record_weight_version_change=self._record)
        self._manager.flush_cache = self._flush

    def update(self, version: str | None = None, *, flush: bool = True) -> None:
        """`/update_weights_from_disk`."""
        request: Any = UpdateWeightFromDiskReqInput(model_path="elsewhere", weight_version=version, flush_cache=flush)
        assert self._manager.update_weights_from_disk(request).success

    def _record(self, new_version: str | None) -> None:
        if new_version is not None:
            get_context().override("test", weight_version=new_version)

    def _flush(self, empty_cache: bool) -> bool:
        self.num_flushes += 1
        return True
