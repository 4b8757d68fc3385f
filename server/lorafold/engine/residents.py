"""Which adapters are on the device, who needs them there, and who makes room. On the engine's thread, between steps.

An adapter that deployments point at, or requests in flight need, is known; its tensors are on the device, in host
memory, or on disk only. Rows start when their adapter is on the device, and hold it there as long as they have a place.
One that is wanted gets its place first and is brought by somebody else meanwhile (`Fetch`): steps go on.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import structlog

from lorafold.recipes import Source
from lorafold_adapters import AdapterManager
from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.errors import AdapterNotLoaded, BaseCorrupt, LorafoldError
from lorafold_adapters.residency import Limits, Residency
from lorafold_adapters.staging import Staged

log = structlog.get_logger(__name__)


class Fetch(Protocol):
    """Brings an adapter, in its own time: `arrived` or `failed` is called then. Must not block."""

    def __call__(self, digest: str, source: Source, bound: BoundAdapter | None) -> object:
        """`bound`: its copy in host memory; None: it must be read from `source`."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """How many adapters are where, and what they take there."""

    known: int
    """Those that deployments point at, or requests need."""
    on_device: int
    """Those there or on their way, as they have their place already."""
    device_bytes: int
    on_host: int
    host_bytes: int
    fetches: int
    """How often one was brought as requests waited for it."""


class Residents:
    """All known adapters."""

    def __init__(self, manager: AdapterManager, limits: Limits) -> None:
        self.limits = limits
        self._manager = manager
        self._same_memory = manager.model.device.type == "cpu"
        self._residency = Residency(limits, device_is_host=self._same_memory)
        self._wanted: Counter[str] = Counter()
        """Deployments that point at each."""
        self._fetches = 0
        self._unwanted: set[str] = set()
        """Those that no deployment points at any more."""
        self._sources: dict[str, list[Source]] = {}
        """Where deployments have each from."""
        self._routable: set[str] = set()
        self._host: dict[str, BoundAdapter] = {}
        self._here: dict[str, None] = {}
        """Those on the device, in the order in which they came."""
        self._coming: set[str] = set()
        self._reserved: set[str] = set()
        """Those that came for rows which have not started yet."""
        self._held: str | None = None
        """One that an operator holds in the weights."""
        self._leaving: str | None = None
        """One that rows hold, and that takes no more of them, so that another one gets its place."""
        self.fetch: Fetch | None = None
        """Who brings adapters; without one, only those are served that are on the device."""
        self.changed: Callable[[], object] = lambda: None
        """Called whenever other rows may start than before."""
        self.give_back: Callable[[str], object] = lambda _: None
        """Called before an adapter leaves the device: it must not be in the weights then. Raises BaseCorrupt."""

    # What deployments want.

    def acquire(
        self,
        bound: BoundAdapter,
        source: Source,
        *,
        staged: Staged | None = None,
        pinned: bool = False,
        instead_of: Iterable[str] = (),
    ) -> None:
        """One more deployment points at this adapter; it goes on the device if there is room, or can be made.

        `instead_of`: pinned ones whose `release` follows once this is in force. Raises DeviceFull if it can never
        fit, or if too many are pinned.
        """
        digest = bound.digest
        if digest not in self._residency:
            size = self._manager.device_bytes(bound)
            self._residency.add(digest, host_bytes=bound.nbytes, device_bytes=size)
        self._unwanted.discard(digest)
        self._sources.setdefault(digest, []).append(source)
        if bound.route_refusal is None:
            self._routable.add(digest)
        try:
            if pinned:
                self._residency.pin(digest, instead_of=instead_of)
            self._settle(bound, staged, pinned=pinned)
        except LorafoldError:
            self._forget_source(digest, source)
            if not self._wanted[digest]:
                self._unwanted.add(digest)
            raise
        self._wanted[digest] += 1

    def _forget_source(self, digest: str, source: Source) -> None:
        """It is read from another folder from now on; the last one stays for requests in flight."""
        if len(self._sources[digest]) > 1:
            self._sources[digest].remove(source)

    def _settle(self, bound: BoundAdapter, staged: Staged | None, *, pinned: bool) -> None:
        """Puts it on the device if there is room, or can be made."""
        try:
            self._keep_on_host(bound)
            if bound.digest not in self._residency.device and self._take_place(bound.digest):
                self._load(bound.digest, staged or bound)
        except LorafoldError:
            if pinned:
                self._residency.unpin(bound.digest)
            raise

    def release(self, digest: str, source: Source, *, pinned: bool = False) -> None:
        """One deployment less points at this adapter, which it had from `source`."""
        self._forget_source(digest, source)
        self._wanted[digest] -= 1
        if pinned:
            self._residency.unpin(digest)
        if not self._wanted[digest]:
            del self._wanted[digest]
            self._unwanted.add(digest)

    def sweep(self, needed: set[str]) -> None:
        """Forgets the adapters that no deployment points at and no row needs, and reservations that nobody uses."""
        for digest in [found for found in self._reserved - self._coming if found not in needed]:
            self._unreserve(digest)
        for digest in [found for found in self._unwanted - self._coming if found not in needed]:
            if digest == self._held:
                self.hold(None)
            if digest in self._residency.device and not self._evict(digest):
                return
            if digest in self._residency.host:
                self._leave_host(digest)
            self._residency.remove(digest)
            self._unwanted.discard(digest)
            self._routable.discard(digest)
            del self._sources[digest]
            log.info("adapter dropped", adapter=digest)

    def hold(self, digest: str | None) -> None:
        """What an operator holds in the weights from now on stays on the device; None: nothing."""
        if digest == self._held:
            return
        if self._held is not None:
            self._residency.unuse(self._held)
        self._held = digest
        if digest is not None:
            self._residency.use(digest)

    def leaving(self, digest: str) -> bool:
        """True while an adapter that no deployment points at is still there."""
        return digest in self._unwanted

    @property
    def places(self) -> Places:
        """Where adapters are now."""
        device, host = self._residency.device, self._residency.host
        return Places(
            known=len(self._residency),
            on_device=len(device),
            device_bytes=device.nbytes,
            on_host=len(host),
            host_bytes=host.nbytes,
            fetches=self._fetches,
        )

    def require(self, digest: str) -> None:
        """Raises AdapterNotLoaded if the adapter was dropped."""
        if digest not in self._sources:
            raise AdapterNotLoaded(f"adapter {digest[:12]} was removed while the request was on its way: try again")

    def bound(self, digest: str) -> BoundAdapter | None:
        """The adapter, if it is in any memory."""
        return self._host.get(digest) or self._manager.adapters.get(digest)

    def runs_beside(self, digest: str | None) -> bool:
        """True if rows of this adapter can run unmerged."""
        return digest is None or digest in self._routable

    # What rows need.

    def here(self, digest: str | None) -> bool:
        """True if the adapter is on the device."""
        return digest is None or digest in self._here

    def takes(self, digest: str | None) -> bool:
        """True if rows of this adapter may start."""
        return digest is None or (digest in self._here and digest != self._leaving)

    def use(self, digest: str | None) -> None:
        """A row of this adapter has started."""
        if digest is not None:
            self._residency.use(digest)
            if digest in self._reserved:
                self._unreserve(digest)

    def unuse(self, digest: str | None) -> None:
        """A row of this adapter has no place any more."""
        if digest is not None:
            self._residency.unuse(digest)

    def bring(self, lacking: Iterable[str]) -> None:
        """Has adapters brought that are waited for, in this order, then pinned ones, as far as there is room."""
        wanted = dict.fromkeys([*lacking, *self._residency.pinned])
        missing = [digest for digest in wanted if digest not in self._residency.device]
        if not missing:
            self._leave_no_more()
        for digest in missing:
            if not self._take_place(digest):
                self._let_one_leave()
                return
            self._coming.add(digest)
            self._reserve(digest)
            assert self.fetch is not None, "nobody brings adapters"
            self._fetches += 1
            self.fetch(digest, self._sources[digest][-1], self._host.get(digest))

    # What becomes of those that were fetched.

    def arrived(self, bound: BoundAdapter, staged: Staged) -> None:
        """It was brought. Raises DeviceFull if it cannot be loaded after all: `failed` follows."""
        self._coming.discard(bound.digest)
        self._load(bound.digest, staged)
        if bound.digest in self._residency.host:
            self._host[bound.digest] = bound
        else:
            self._keep_on_host(bound)

    def failed(self, digest: str) -> None:
        """It could not be brought."""
        self._coming.discard(digest)
        self._unreserve(digest)
        if digest in self._residency.device:
            self._residency.left_device(digest)
        if digest in self._residency.host and digest not in self._host:
            self._residency.left_host(digest)
        self.changed()

    # Room.

    def _take_place(self, digest: str) -> bool:
        """Makes room on the device and takes it; False if those in use fill it. Raises BaseCorrupt."""
        victims = self._residency.room_on_device(digest)
        if victims is None or not all(self._evict(victim) for victim in victims):
            return False
        if self._same_memory and digest not in self._residency.host and not self._take_host_place(digest):
            return False
        self._residency.placed_on_device(digest)
        return True

    def _take_host_place(self, digest: str) -> bool:
        victims = self._residency.room_on_host(digest)
        if victims is None:
            return False
        for victim in victims:
            self._leave_host(victim)
        self._residency.placed_on_host(digest)
        return True

    def _keep_on_host(self, bound: BoundAdapter) -> None:
        if not self._same_memory and any(tensor.is_cuda for tensor in bound.tensors()):
            return  # As it is on the device: that is no copy.
        if bound.digest not in self._residency.host and self._take_host_place(bound.digest):
            self._host[bound.digest] = bound

    def _leave_host(self, digest: str) -> None:
        self._residency.left_host(digest)
        self._host.pop(digest, None)

    def _load(self, digest: str, adapter: BoundAdapter | Staged) -> None:
        try:
            self._manager.load(digest, adapter)
        except LorafoldError:
            self._residency.left_device(digest)
            raise
        self._here[digest] = None
        self.changed()

    def _evict(self, digest: str) -> bool:
        """Takes an adapter off the device; False if it is in a base that is damaged."""
        try:
            self.give_back(digest)
        except BaseCorrupt:
            return False
        if digest in self._here:
            self._manager.drop(digest)
            del self._here[digest]
        self._residency.left_device(digest)
        if self._leaving == digest:
            self._leaving = None
        self.changed()
        return True

    def _let_one_leave(self) -> None:
        """The one with the fewest rows takes no more of them, or popular ones would keep others out for ever."""
        if self._leaving is not None:
            return
        kept = {self._held, *self._reserved, *self._residency.pinned}
        leaving = [digest for digest in self._here if digest not in kept]
        if leaving:
            self._leaving = min(leaving, key=self._residency.uses)
            self.changed()

    def _leave_no_more(self) -> None:
        if self._leaving is not None:
            self._leaving = None
            self.changed()

    def _reserve(self, digest: str) -> None:
        self._reserved.add(digest)
        self._residency.use(digest)

    def _unreserve(self, digest: str) -> None:
        if digest in self._reserved:
            self._reserved.discard(digest)
            self._residency.unuse(digest)
