"""Which adapters' tensors are on the device and in host memory, and who leaves for whom. On the engine's thread."""

from collections.abc import Callable

import structlog

from lorafold_adapters import AdapterManager
from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.errors import BaseCorrupt, LorafoldError
from lorafold_adapters.residency import Limits, Residency
from lorafold_adapters.staging import Staged

log = structlog.get_logger(__name__)


class AdapterMemory:
    """The adapters that `books` know: takes places for them there, and moves them."""

    def __init__(self, manager: AdapterManager, limits: Limits) -> None:
        self._manager = manager
        self._same_memory = manager.model.device.type == "cpu"
        self.books = Residency(limits, device_is_host=self._same_memory)
        """Who is where, who is in use, and who is pinned."""
        self._host: dict[str, BoundAdapter] = {}
        self.on_device: dict[str, None] = {}
        """Those whose tensors are there, in the order in which they came; `books` also count those on their way."""
        self.changed: Callable[[], object] = lambda: None
        """Called whenever the device has other adapters than before."""
        self.give_back: Callable[[str], object] = lambda _: None
        """Called before an adapter leaves the device: it must not be in the weights then. Raises BaseCorrupt."""

    def add(self, bound: BoundAdapter) -> None:
        """Makes it known, unless it is. Raises DeviceFull if it can never fit."""
        if bound.digest not in self.books:
            size = self._manager.device_bytes(bound)
            self.books.add(bound.digest, host_bytes=bound.nbytes, device_bytes=size)

    def on_host(self, digest: str) -> BoundAdapter | None:
        """Its copy in host memory."""
        return self._host.get(digest)

    def bound(self, digest: str) -> BoundAdapter | None:
        """The adapter, if it is in any memory."""
        return self._host.get(digest) or self._manager.adapters.get(digest)

    def settle(self, bound: BoundAdapter, staged: Staged | None) -> None:
        """Puts it on the device if there is room, or can be made. Raises DeviceFull."""
        self._keep_on_host(bound)
        if bound.digest not in self.books.device and self.take_place(bound.digest):
            self._load(bound.digest, staged or bound)

    def take_place(self, digest: str) -> bool:
        """Makes room on the device and takes it; False if those in use fill it."""
        victims = self.books.room_on_device(digest)
        if victims is None or not all(self._evict(victim) for victim in victims):
            return False
        if self._same_memory and digest not in self.books.host and not self._take_host_place(digest):
            return False
        self.books.placed_on_device(digest)
        return True

    def fill_place(self, bound: BoundAdapter, staged: Staged) -> None:
        """It was brought to the place that was taken for it. Raises DeviceFull if it cannot be loaded after all."""
        self._load(bound.digest, staged)
        if bound.digest in self.books.host:
            self._host[bound.digest] = bound
        else:
            self._keep_on_host(bound)

    def leave_place(self, digest: str) -> None:
        """It will not be brought."""
        if digest in self.books.device:
            self.books.left_device(digest)
        if digest in self.books.host and digest not in self._host:
            self.books.left_host(digest)

    def forget(self, digest: str) -> bool:
        """Frees what it takes anywhere; False if it is in a base that is damaged."""
        if digest in self.books.device and not self._evict(digest):
            return False
        if digest in self.books.host:
            self._leave_host(digest)
        self.books.remove(digest)
        return True

    def _take_host_place(self, digest: str) -> bool:
        victims = self.books.room_on_host(digest)
        if victims is None:
            return False
        for victim in victims:
            self._leave_host(victim)
        self.books.placed_on_host(digest)
        return True

    def _keep_on_host(self, bound: BoundAdapter) -> None:
        if not self._same_memory and any(tensor.is_cuda for tensor in bound.tensors()):
            return  # As it is on the device: that is no copy.
        if bound.digest not in self.books.host and self._take_host_place(bound.digest):
            self._host[bound.digest] = bound

    def _leave_host(self, digest: str) -> None:
        self.books.left_host(digest)
        self._host.pop(digest, None)

    def _load(self, digest: str, adapter: BoundAdapter | Staged) -> None:
        try:
            self._manager.load(digest, adapter)
        except LorafoldError:
            self.books.left_device(digest)
            raise
        self.on_device[digest] = None
        self.changed()

    def _evict(self, digest: str) -> bool:
        """Takes an adapter off the device; False if it is in a base that is damaged."""
        try:
            self.give_back(digest)
        except BaseCorrupt:
            return False
        if digest in self.on_device:
            self._manager.drop(digest)
            del self.on_device[digest]
        self.books.left_device(digest)
        self.changed()
        return True
