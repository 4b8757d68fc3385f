"""Where each adapter is: on the device, in host memory, or on disk only; and who makes room for whom.

Pure bookkeeping: no tensors, no clock, no files. Whoever moves an adapter asks for room first, makes the victims leave,
says that it is placed, which counts its bytes from then on, and only then copies. Time is the order of the calls. Not
thread-safe: one thread asks and tells.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lorafold_adapters.errors import DeviceFull
from lorafold_adapters.tier import Tier

UNLIMITED = 1 << 62
"""Bytes that are no limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How much adapters may take."""

    device_slots: int
    """Adapters on the device."""
    device_bytes: int
    host_bytes: int


@dataclass(slots=True)
class Entry:
    """One adapter."""

    host_bytes: int
    device_bytes: int
    uses: int = 0
    pins: int = 0


class Residency:
    """The adapters of one base, by digest. In use ones leave no tier; pinned ones never leave the device."""

    def __init__(self, limits: Limits, *, device_is_host: bool = False) -> None:
        """With `device_is_host` (a CPU), what is on the device keeps its host tensors, and `device_bytes` are those of
        what it has beside them: every byte is counted once. Otherwise a copy on the host is worth having for what
        may leave the device, and goes like any other when there is no room.
        """
        self._limits = limits
        self._device_is_host = device_is_host
        self._entries: dict[str, Entry] = {}
        self.pinned: dict[str, None] = {}
        """Those that stay on the device once they are there."""
        self.device = Tier(slots=limits.device_slots, budget=limits.device_bytes)
        self.host = Tier(slots=None, budget=limits.host_bytes)

    def __len__(self) -> int:
        """How many adapters are known."""
        return len(self._entries)

    def add(self, digest: str, *, host_bytes: int, device_bytes: int) -> None:
        """Makes an adapter known, on disk only. Raises DeviceFull if it can never fit, or never beside pinned ones."""
        assert digest not in self._entries
        entry = Entry(host_bytes=host_bytes, device_bytes=device_bytes)
        self._refuse_too_large(digest, entry)
        self._refuse_beside_pinned({**self._entries, digest: entry}, pinned=set(self.pinned))
        self._entries[digest] = entry

    def remove(self, digest: str) -> None:
        """Forgets an adapter that is not in use, wherever it is."""
        entry = self._entries[digest]
        assert not entry.uses + entry.pins, "in use"
        for tier in (self.device, self.host):
            if digest in tier:
                tier.leave(digest)
        del self._entries[digest]

    def __contains__(self, digest: object) -> bool:
        """True if the adapter is known."""
        return digest in self._entries

    def uses(self, digest: str) -> int:
        """How many users it has now."""
        return self._entries[digest].uses

    def use(self, digest: str) -> None:
        """One more request needs it: until as many `unuse` it leaves no tier that it is in."""
        self._entries[digest].uses += 1
        self._hold(digest)
        self.touch(digest)

    def unuse(self, digest: str) -> None:
        """One less."""
        entry = self._entries[digest]
        assert entry.uses > 0, "not in use"
        entry.uses -= 1
        self._hold(digest)
        self.touch(digest)

    def pin(self, digest: str, *, instead_of: Iterable[str] = ()) -> None:
        """Once it is on the device, it stays there until as many `unpin` it.

        `instead_of`: those that are about to be unpinned once, which do not count. Raises DeviceFull unless a slot,
        and room for the largest of them, stays for those that are not pinned.
        """
        leaving = Counter(instead_of)
        stay = {found for found in self.pinned if self._entries[found].pins > leaving[found]}
        self._refuse_beside_pinned(self._entries, pinned=stay | {digest})
        self._entries[digest].pins += 1
        self.pinned[digest] = None
        self._hold(digest)

    def unpin(self, digest: str) -> None:
        """One less."""
        entry = self._entries[digest]
        assert entry.pins > 0, "not pinned"
        entry.pins -= 1
        if not entry.pins:
            del self.pinned[digest]
        self._hold(digest)

    def touch(self, digest: str) -> None:
        """It counts as the one used last."""
        for tier in (self.device, self.host):
            if digest in tier:
                tier.touch(digest)

    def room_on_device(self, digest: str) -> list[str] | None:
        """Who must leave the device for it to be placed there, least recently used first; changes nothing.

        None if those that may leave are not enough: ask again when one is no longer in use.
        """
        return self.device.room(digest, self._entries[digest].device_bytes)

    def placed_on_device(self, digest: str) -> None:
        """It takes its place there; call it before the copy, so that nobody else is given the room."""
        entry = self._entries[digest]
        assert not self._device_is_host or digest in self.host, "not on the host, which is the device"
        self.device.place(digest, entry.device_bytes)
        self._hold(digest)
        self.touch(digest)

    def left_device(self, digest: str) -> None:
        """Its memory there is free. Also for one that could not be copied, in use or not.

        Where the device is the host, that is a use of the host's copy: it goes after those that left before it.
        """
        self.device.leave(digest)
        self._hold(digest)

    def room_on_host(self, digest: str) -> list[str] | None:
        """The same for host memory. None: it is used from disk, or must wait where the device is the host."""
        return self.host.room(digest, self._entries[digest].host_bytes)

    def placed_on_host(self, digest: str) -> None:
        """It takes its place there; call it before it is read."""
        self.host.place(digest, self._entries[digest].host_bytes)
        self._hold(digest)
        self.touch(digest)

    def left_host(self, digest: str) -> None:
        """Its memory there is free."""
        assert not (self._device_is_host and digest in self.device), "on the device, which is the host"
        self.host.leave(digest)

    def _hold(self, digest: str) -> None:
        """Says anew whether it may leave its tiers."""
        entry = self._entries[digest]
        if digest in self.device:
            self.device.hold(digest, held=entry.uses > 0 or entry.pins > 0)
        if digest in self.host:
            same_memory = self._device_is_host and digest in self.device
            self.host.hold(digest, held=entry.uses > 0 or same_memory)

    def _refuse_too_large(self, digest: str, entry: Entry) -> None:
        limits = self._limits
        if entry.device_bytes > limits.device_bytes:
            raise DeviceFull(
                f"adapter {digest[:12]} takes {entry.device_bytes:,} bytes on the device, where adapters may take "
                f"{limits.device_bytes:,}: allow them more, or train it with a lower rank"
            )
        if self._device_is_host and entry.host_bytes > limits.host_bytes:
            raise DeviceFull(
                f"adapter {digest[:12]} takes {entry.host_bytes:,} bytes of memory, where adapters may take "
                f"{limits.host_bytes:,}: allow them more, or train it with a lower rank"
            )

    def _refuse_beside_pinned(self, entries: Mapping[str, Entry], *, pinned: set[str]) -> None:
        """Raises DeviceFull unless each of these adapters finds a slot and room beside the pinned ones."""
        slots, most = self._limits.device_slots, self._limits.device_bytes
        if not pinned:
            return
        if len(pinned) >= slots:
            raise DeviceFull(
                f"{len(pinned)} adapters would be pinned, and residency.device_slots is {slots}, of which one must "
                "stay free for the others: pin fewer, or raise it"
            )
        taken = sum(entries[digest].device_bytes for digest in pinned)
        largest = max((entry.device_bytes for digest, entry in entries.items() if digest not in pinned), default=0)
        if taken + largest > most:
            raise DeviceFull(
                f"pinned adapters would take {taken:,} of the {most:,} bytes that adapters may take, and the largest "
                f"other one takes {largest:,}: pin fewer, or raise residency.device_memory_gib"
            )
