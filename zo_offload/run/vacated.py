"""A model whose weights are in a run: empties the model, and gives it its weights back."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..devices.placing import Homes, move_what_stays
from ..errors import BudgetError
from ..lanes.hollow import hollow
from ..modules.away import Away
from ..modules.parameters import untie
from ..stream.ingest import ModuleBase, load_kept
from ..system.closing import Closing
from ..system.host_memory import available_bytes
from ..system.units import show_bytes
from .opening import Opened


class Vacated:
    """The model of one run. All methods may be interrupted and called again."""

    def __init__(self, opened: Opened) -> None:
        self._opened, self._params = opened, opened.prepared.plan.params
        self._ties, self._offloaded = opened.ties, opened.offloaded
        self._homes: Homes | None = None
        self._away: Away | None = None

    def leave(self, closing: Closing) -> None:
        """Make the parameters hollow, move buffers to the compute device, and put a guard on the model.

        closing: gets the call that tells the guard that the run is closed.
        """
        model, device = self._opened.model, self._opened.device.torch_device
        if self._offloaded is not None:
            closing.add(self._offloaded.put_back)
            self._offloaded.set_aside()
        self._homes = Homes(model)
        kept = set(self._opened.prepared.plan.tree.kept.values())
        load_kept(model, kept, self._opened.base)
        hollow(model, device, self._params)
        move_what_stays(model, device, kept)
        self._away = Away(model, self._params)
        closing.add(self._away.close)

    def undo(self) -> None:
        """Restore the model to its state before `leave`, which may be incomplete; its base still has the values."""
        self._lift_guard()
        base = self._opened.base
        if self._offloaded is not None:
            self._offloaded.set_aside()
        if isinstance(base, ModuleBase) and self._homes is not None and base.is_here:
            here = {name: base.values[name] for name in self._params if name in base.values}
            self._homes.bring_back(self._opened.model, here)
        if self._offloaded is not None:
            self._offloaded.put_back()
        self._homes = None

    def bring_back(self, values: Mapping[str, Tensor]) -> None:
        """Put values into the parameters, on the devices where they were."""
        assert self._homes is not None
        self._lift_guard()
        if self._offloaded is None:
            return self._homes.bring_back(self._opened.model, values)
        self._offloaded.set_aside()
        self._homes.bring_back(self._opened.model, values)
        self._offloaded.give(values)
        self._offloaded.put_back()

    def check_room(self) -> None:
        """Raise BudgetError if the weights were in files, and the host's memory cannot hold them."""
        if self._offloaded is not None and (need := self._offloaded.file_bytes) > (free := available_bytes()):
            raise BudgetError(
                f"restore() puts the trained weights into host memory: {show_bytes(need)} that accelerate had "
                f"offloaded to files, which are left as they are; {show_bytes(free)} is free. "
                "engine.save_pretrained(directory) writes them, engine.close() ends without them"
            )

    def hand_back(self) -> nn.Module:
        """The module as it was given, with its own names for shared parameters."""
        untie(self._opened.model, self._ties)
        self._ties = ()
        return self._opened.given if self._opened.given is not None else self._opened.model

    def _lift_guard(self) -> None:
        if self._away is not None:
            self._away.lift()
            self._away = None
