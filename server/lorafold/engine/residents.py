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

from lorafold.engine.adapter_memory import AdapterMemory
from lorafold.recipes import Source
from lorafold_adapters import AdapterManager
from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.errors import AdapterNotLoaded, LorafoldError
from lorafold_adapters.residency import Limits
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
        self._memory = AdapterMemory(manager, limits)
        self._books = self._memory.books
        self._wanted: Counter[str] = Counter()
        """Deployments that point at each."""
        self._fetches = 0
        self._unwanted: set[str] = set()
        """Those that no deployment points at any more."""
        self._sources: dict[str, list[Source]] = {}
        """Where deployments have each from."""
        self._routable: set[str] = set()
        self._coming: set[str] = set()
        self._reserved: set[str] = set()
        """Those that came for rows which have not started yet."""
        self._held: str | None = None
        """One that an operator holds in the weights."""
        self._leaving: str | None = None
        """One that rows hold, and that takes no more of them, so that another one gets its place."""
        self.fetch: Fetch | None = None
        """Who brings adapters; without one, only those are served that are on the device."""

    def connect(self, *, changed: Callable[[], object], give_back: Callable[[str], object]) -> None:
        """`changed` is called whenever other rows may start than before; `give_back` before an adapter leaves the
        device: it must not be in the weights then. That may raise BaseCorrupt.
        """

        def leave(digest: str) -> None:
            give_back(digest)
            if digest == self._leaving:
                self._leaving = None

        self._memory.changed, self._memory.give_back = changed, leave

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
        self._memory.add(bound)
        self._unwanted.discard(digest)
        self._sources.setdefault(digest, []).append(source)
        if bound.route_refusal is None:
            self._routable.add(digest)
        try:
            self._settle(bound, staged, pinned=pinned, instead_of=instead_of)
        except LorafoldError:
            self._forget_source(digest, source)
            if not self._wanted[digest]:
                self._unwanted.add(digest)
            raise
        self._wanted[digest] += 1

    def _settle(self, bound: BoundAdapter, staged: Staged | None, *, pinned: bool, instead_of: Iterable[str]) -> None:
        if pinned:
            self._books.pin(bound.digest, instead_of=instead_of)
        try:
            self._memory.settle(bound, staged)
        except LorafoldError:
            if pinned:
                self._books.unpin(bound.digest)
            raise

    def _forget_source(self, digest: str, source: Source) -> None:
        """It is read from another folder from now on; the last one stays for requests in flight."""
        if len(self._sources[digest]) > 1:
            self._sources[digest].remove(source)

    def release(self, digest: str, source: Source, *, pinned: bool = False) -> None:
        """One deployment less points at this adapter, which it had from `source`."""
        self._forget_source(digest, source)
        self._wanted[digest] -= 1
        if pinned:
            self._books.unpin(digest)
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
            if not self._memory.forget(digest):
                return
            self._unwanted.discard(digest)
            self._routable.discard(digest)
            del self._sources[digest]
            log.info("adapter dropped", adapter=digest)

    def hold(self, digest: str | None) -> None:
        """What an operator holds in the weights from now on stays on the device; None: nothing."""
        if digest == self._held:
            return
        if self._held is not None:
            self._books.unuse(self._held)
        self._held = digest
        if digest is not None:
            self._books.use(digest)

    def leaving(self, digest: str) -> bool:
        """True while an adapter that no deployment points at is still there."""
        return digest in self._unwanted

    @property
    def places(self) -> Places:
        """Where adapters are now."""
        device, host = self._books.device, self._books.host
        return Places(
            known=len(self._books),
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
        return self._memory.bound(digest)

    def runs_beside(self, digest: str | None) -> bool:
        """True if rows of this adapter can run unmerged."""
        return digest is None or digest in self._routable

    # What rows need.

    def here(self, digest: str | None) -> bool:
        """True if the adapter is on the device."""
        return digest is None or digest in self._memory.on_device

    def takes(self, digest: str | None) -> bool:
        """True if rows of this adapter may start."""
        return digest is None or (digest in self._memory.on_device and digest != self._leaving)

    def use(self, digest: str | None) -> None:
        """A row of this adapter has started."""
        if digest is not None:
            self._books.use(digest)
            if digest in self._reserved:
                self._unreserve(digest)

    def unuse(self, digest: str | None) -> None:
        """A row of this adapter has no place any more."""
        if digest is not None:
            self._books.unuse(digest)

    def bring(self, lacking: Iterable[str]) -> None:
        """Has adapters brought that are waited for, in this order, then pinned ones, as far as there is room."""
        wanted = dict.fromkeys([*lacking, *self._books.pinned])
        missing = [digest for digest in wanted if digest not in self._books.device]
        if not missing:
            self._leave_no_more()
        for digest in missing:
            if not self._memory.take_place(digest):
                self._let_one_leave()
                return
            self._coming.add(digest)
            self._reserve(digest)
            assert self.fetch is not None, "nobody brings adapters"
            self._fetches += 1
            self.fetch(digest, self._sources[digest][-1], self._memory.on_host(digest))

    # What becomes of those that were fetched.

    def arrived(self, bound: BoundAdapter, staged: Staged) -> None:
        """It was brought. Raises DeviceFull if it cannot be loaded after all: `failed` follows."""
        self._coming.discard(bound.digest)
        self._memory.fill_place(bound, staged)

    def failed(self, digest: str) -> None:
        """It could not be brought."""
        self._coming.discard(digest)
        self._unreserve(digest)
        self._memory.leave_place(digest)
        self._memory.changed()

    # Places that are to become free.

    def _let_one_leave(self) -> None:
        """The one with the fewest rows takes no more of them, or popular ones would keep others out for ever."""
        if self._leaving is not None:
            return
        kept = {self._held, *self._reserved, *self._books.pinned}
        leaving = [digest for digest in self._memory.on_device if digest not in kept]
        if leaving:
            self._leaving = min(leaving, key=self._books.uses)
            self._memory.changed()

    def _leave_no_more(self) -> None:
        if self._leaving is not None:
            self._leaving = None
            self._memory.changed()

    def _reserve(self, digest: str) -> None:
        self._reserved.add(digest)
        self._books.use(digest)

    def _unreserve(self, digest: str) -> None:
        if digest in self._reserved:
            self._reserved.discard(digest)
            self._books.unuse(digest)
