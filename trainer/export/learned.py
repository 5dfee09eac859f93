"""What adapters learned, as exports want it: updates by layer, each in the form that a layout has words for."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from trainer.args import ExportArgs
from trainer.layouts import Modules, by_rows
from trainer.types import Adapter, HasRows, HasUpdates
from trainer.updates import Difference, LoraTensors, Update, nearest_lora

log = logging.getLogger(__name__)


class Learned:
    """The updates of all adapters, and the adapters of token vectors."""

    def __init__(self, adapters: Sequence[Adapter], args: ExportArgs) -> None:
        self._updating = [adapter for adapter in adapters if isinstance(adapter, HasUpdates)]
        self.rows = [adapter for adapter in adapters if isinstance(adapter, HasRows)]
        self.unknown = sorted(
            name
            for adapter in adapters
            if not isinstance(adapter, HasRows | HasUpdates)
            for name in adapter.state_dict()
        )
        self.trained: Modules = {key: up for adapter in self._updating for key, up in adapter.modules().items()}
        self.off: dict[tuple[str, str], float] = {}  # how far the nearest LoRA is, where DoRA is written as one
        self._args = args
        self._nearest: Modules | None = None

    def modules(self) -> Modules:
        """The updates as they are written: as they were trained, or with the nearest LoRA for each DoRA."""
        if self._args.dora == "dora":
            return self.trained
        if self._nearest is None:
            self._nearest = self._reduced()
        return self._nearest

    def readable(self) -> Modules:
        """The same with differences of weights for lengths of rows, which programs do not read alike."""
        modules = self.modules()
        if not any(by_rows(update) for update in modules.values()):
            return modules
        differences = self.differences()
        return {key: differences[key] if by_rows(update) else update for key, update in modules.items()}

    def differences(self) -> Mapping[tuple[str, str], Difference]:
        """W' - W of every layer, as trained."""
        return {key: update for adapter in self._updating for key, update in adapter.differences().items()}

    def sketch(self) -> Modules:
        """What `modules` will give, in kinds and shapes alone: to ask layouts before anything is trained."""
        if self._args.dora == "dora":
            return self.trained
        return {key: _plain(update) for key, update in self.trained.items()}

    def _reduced(self) -> Modules:
        differences = self.differences()
        found: dict[tuple[str, str], Update] = {}
        for key, update in self.trained.items():
            found[key] = update
            if isinstance(update, LoraTensors) and update.magnitude is not None:
                rank = self._args.dora_rank or update.down.shape[0]
                found[key], self.off[key] = nearest_lora(differences[key].weight, rank)
        if self.off:
            log.info("DoRA was written as LoRA, of which %s", self.reduced_to())
        return found

    def reduced_to(self) -> str:
        """How near the nearest LoRAs are, in words; empty where there are none."""
        if not self.off:
            return ""
        worst, mean = max(self.off.values()), sum(self.off.values()) / len(self.off)
        return f"{worst:.1%} of a layer's change is lost at worst, {mean:.1%} on average"


def _plain(update: Update) -> Update:
    if isinstance(update, LoraTensors) and update.magnitude is not None:
        return LoraTensors(update.down, update.up, update.alpha)
    return update
