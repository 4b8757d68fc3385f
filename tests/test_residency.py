"""Who may be where, against a model that looks at everybody every time."""

import sys
from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle as Names
from hypothesis.stateful import RuleBasedStateMachine, consumes, invariant, precondition, rule

from lorafold_adapters.errors import DeviceFull
from lorafold_adapters.residency import Limits, Residency

SLOTS, DEVICE, HOST = 3, 100, 250
LIMITS = Limits(device_slots=SLOTS, device_bytes=DEVICE, host_bytes=HOST)


@dataclass
class Known:
    """One adapter, as the model sees it."""

    host_bytes: int
    device_bytes: int
    uses: int = 0
    pins: int = 0
    since: dict[str, int] = field(default_factory=dict)
    """By tier, when it was used last there, or became free to leave."""


class Anything(RuleBasedStateMachine):
    """Any calls in any order, as a server would make them."""

    device_is_host = False
    names = Names("names")

    def __init__(self) -> None:
        super().__init__()
        self.residency = Residency(LIMITS, device_is_host=self.device_is_host)
        self.known: dict[str, Known] = {}
        self.free: dict[str, set[str]] = {"device": set(), "host": set()}
        self.now = 0

    def refresh(self, touched: str) -> None:
        self.now += 1
        for tier in ("device", "host"):
            free = {name for name in self.known if self.may_leave(name, tier)}
            for name in free - self.free[tier] | ({touched} & free):
                self.known[name].since[tier] = self.now
            self.free[tier] = free

    def may_leave(self, name: str, tier: str) -> bool:
        one, residency = self.known[name], self.residency
        if tier == "device":
            return name in residency.device and not one.uses and not one.pins
        return name in residency.host and not one.uses and not (self.device_is_host and name in residency.device)

    def victims(self, name: str, tier: str) -> list[str] | None:
        """Least recently used first, until it fits."""
        inside = [one for one in self.known if one in getattr(self.residency, tier)]
        if name in inside:
            return []
        size = {one: getattr(self.known[one], f"{tier}_bytes") for one in self.known}
        limit, slots = (DEVICE, SLOTS) if tier == "device" else (HOST, len(self.known) + 1)
        queue = sorted(
            (one for one in inside if self.may_leave(one, tier)), key=lambda one: self.known[one].since[tier]
        )
        gone: list[str] = []
        while sum(size[one] for one in {*inside, name} - {*gone}) > limit or len(inside) + 1 - len(gone) > slots:
            if not queue:
                return None
            gone.append(queue.pop(0))
        return gone

    def fits_beside(self, pinned: set[str], known: dict[str, Known]) -> bool:
        """Whether each adapter finds a slot and room beside the pinned ones."""
        if not pinned:
            return True
        taken = sum(known[name].device_bytes for name in pinned)
        others = [one.device_bytes for name, one in known.items() if name not in pinned]
        return len(pinned) < SLOTS and all(taken + size <= DEVICE for size in [*others, 0])

    def pinned(self) -> set[str]:
        return {name for name, one in self.known.items() if one.pins}

    @rule(target=names, host=st.integers(1, 90), device=st.integers(1, 60))
    def add(self, host: int, device: int) -> str:
        name = f"adapter {len(self.known)} {self.now}"
        one = Known(host, device)
        if not self.fits_beside(self.pinned(), {**self.known, name: one}):
            with pytest.raises(DeviceFull, match="pin fewer"):
                self.residency.add(name, host_bytes=host, device_bytes=device)
            return "refused"
        self.residency.add(name, host_bytes=host, device_bytes=device)
        self.known[name] = one
        self.refresh(name)
        return name

    @rule(name=names)
    def pin(self, name: str) -> None:
        if name not in self.known:
            return
        if not self.fits_beside(self.pinned() | {name}, self.known):
            with pytest.raises(DeviceFull, match="pin fewer"):
                self.residency.pin(name)
            return
        self.residency.pin(name)
        self.known[name].pins += 1
        self.refresh("")

    @rule(name=names)
    def unpin(self, name: str) -> None:
        if name in self.known and self.known[name].pins:
            self.residency.unpin(name)
            self.known[name].pins -= 1
            self.refresh("")

    @rule(name=names)
    def use(self, name: str) -> None:
        if name in self.known:
            self.residency.use(name)
            self.known[name].uses += 1
            self.refresh(name)

    @rule(name=names)
    def unuse(self, name: str) -> None:
        if name in self.known and self.known[name].uses:
            self.residency.unuse(name)
            self.known[name].uses -= 1
            self.refresh(name)

    @rule(name=names)
    def touch(self, name: str) -> None:
        if name in self.known:
            self.residency.touch(name)
            self.refresh(name)

    @rule(name=names)
    def bring_to_host(self, name: str) -> None:
        if name in self.known and name not in self.residency.host:
            victims = self.residency.room_on_host(name)
            assert victims == self.victims(name, "host")
            for victim in victims or ():
                self.residency.left_host(victim)
            if victims is not None:
                self.residency.placed_on_host(name)
                self.refresh(name)

    @rule(name=names)
    def bring_to_device(self, name: str) -> None:
        if name not in self.known or name in self.residency.device:
            return
        if self.device_is_host and name not in self.residency.host:
            return
        victims = self.residency.room_on_device(name)
        assert victims == self.victims(name, "device")
        for victim in victims or ():
            assert not self.known[victim].uses
            assert not self.known[victim].pins
            self.residency.left_device(victim)
            self.refresh("")
        if victims is not None:
            self.residency.placed_on_device(name)
            self.refresh(name)

    @rule(name=names)
    def fail_to_copy(self, name: str) -> None:
        if name in self.residency.device:
            self.residency.left_device(name)
            self.refresh("")

    @rule(name=consumes(names))
    def remove(self, name: str) -> None:
        if name in self.known and not self.known[name].uses and not self.known[name].pins:
            self.residency.remove(name)
            del self.known[name]
            self.refresh("")

    @invariant()
    def budgets_hold_and_counts_balance(self) -> None:
        residency = self.residency
        on_device = [one for name, one in self.known.items() if name in residency.device]
        on_host = [one for name, one in self.known.items() if name in residency.host]
        assert len(on_device) == len(residency.device) <= SLOTS
        assert sum(one.device_bytes for one in on_device) == residency.device.nbytes <= DEVICE
        assert sum(one.host_bytes for one in on_host) == residency.host.nbytes <= HOST
        assert all(residency.uses(name) == one.uses for name, one in self.known.items())
        if self.device_is_host:
            assert all(name in residency.host for name in self.known if name in residency.device)

    @precondition(lambda self: self.known)
    @rule()
    def ask_for_all(self) -> None:
        """Asking changes nothing."""
        for name in self.known:
            for _ in range(2):
                assert self.residency.room_on_device(name) == self.victims(name, "device")
                assert self.residency.room_on_host(name) == self.victims(name, "host")


class OnOneMemory(Anything):
    device_is_host = True


TestOnTwoMemories = Anything.TestCase
TestOnOneMemory = OnOneMemory.TestCase


def test_the_least_recently_used_goes_first() -> None:
    residency = Residency(Limits(device_slots=2, device_bytes=100, host_bytes=100))
    for name in "abc":
        residency.add(name, host_bytes=10, device_bytes=10)
    for name in "ab":
        assert residency.room_on_device(name) == []
        residency.placed_on_device(name)
    assert residency.room_on_device("c") == ["a"]
    residency.touch("a")
    assert residency.room_on_device("c") == ["b"]
    residency.use("b")
    assert residency.room_on_device("c") == ["a"]
    residency.use("a")
    assert residency.room_on_device("c") is None  # All are in use: somebody waits.
    residency.unuse("b")
    assert residency.room_on_device("c") == ["b"]


@pytest.mark.parametrize(
    ("host", "device", "same", "refused"),
    [
        (10, 101, False, True),
        (10, 101, True, True),
        (101, 10, True, True),
        (101, 10, False, False),
        (100, 100, True, False),
    ],
)
def test_an_adapter_that_can_never_fit_is_refused(host: int, device: int, same: bool, refused: bool) -> None:
    residency = Residency(Limits(device_slots=1, device_bytes=100, host_bytes=100), device_is_host=same)
    if refused:
        with pytest.raises(DeviceFull, match=r"101 bytes .* may take 100: allow them more"):
            residency.add("a", host_bytes=host, device_bytes=device)
        assert "a" not in residency
    else:
        residency.add("a", host_bytes=host, device_bytes=device)
        assert residency.room_on_host("a") == (None if host > 100 else [])


def test_ten_thousand_adapters_cost_what_a_hundred_do() -> None:
    """Steps are counted, not timed: each call touches its victims and nobody else."""
    per_call = []
    for count in (100, 10_000):
        residency = Residency(Limits(device_slots=count // 2, device_bytes=10**9, host_bytes=10**9))
        for index in range(count):
            name = str(index)
            residency.add(name, host_bytes=10, device_bytes=10)
            residency.placed_on_host(name)
            for victim in residency.room_on_device(name) or ():
                residency.left_device(victim)
            residency.placed_on_device(name)
        lines = count_lines(residency)
        per_call.append(lines)
    assert per_call[0] == per_call[1]


def count_lines(residency: Residency) -> int:
    """Lines that run while one adapter takes another's place and is used."""
    seen = 0

    def trace(frame: object, event: str, _: object) -> object:
        nonlocal seen
        seen += event == "line"
        return trace

    name = "0"
    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        victims = residency.room_on_device(name)
        residency.left_device((victims or [])[0])
        residency.placed_on_device(name)
        residency.use(name)
        residency.touch(name)
        residency.unuse(name)
    finally:
        sys.settrace(None)
    return seen
