"""One memory with a limit: who is in it, and who goes first when somebody else needs room. Pure bookkeeping.

Every call takes constant time, beside one step for each victim and each member that was skipped as it is held.
"""

from collections import OrderedDict


class Tier:
    """Members with sizes, from the least to the most recently used."""

    def __init__(self, *, slots: int | None, budget: int) -> None:
        """`slots`: how many members there may be; None for any number. `budget`: bytes that they may take."""
        self.slots = slots
        self.budget = budget
        self.nbytes = 0
        """That the members take now."""
        self._sizes: dict[str, int] = {}
        self._free: OrderedDict[str, None] = OrderedDict()
        """Those that may leave, least recently used first."""
        self._free_bytes = 0

    def __contains__(self, digest: object) -> bool:
        """True for a member."""
        return digest in self._sizes

    def __len__(self) -> int:
        """How many members there are."""
        return len(self._sizes)

    def place(self, digest: str, size: int) -> None:
        """A new member, which may leave; there must be room."""
        assert digest not in self._sizes
        self._sizes[digest] = size
        self.nbytes += size
        self._free[digest] = None
        self._free_bytes += size
        assert self.nbytes <= self.budget, "no room was made"
        assert self.slots is None or len(self._sizes) <= self.slots, "no slot was freed"

    def leave(self, digest: str) -> None:
        """A member is gone, whether it might leave or not."""
        self.hold(digest, held=True)
        self.nbytes -= self._sizes.pop(digest)

    def hold(self, digest: str, *, held: bool) -> None:
        """Whether a member may leave; one that now may is the most recently used."""
        if held and digest in self._free:
            del self._free[digest]
            self._free_bytes -= self._sizes[digest]
        elif not held and digest not in self._free:
            self._free[digest] = None
            self._free_bytes += self._sizes[digest]

    def touch(self, digest: str) -> None:
        """A member is the most recently used."""
        if digest in self._free:
            self._free.move_to_end(digest)

    def room(self, digest: str, size: int) -> list[str] | None:
        """The members that must leave for `digest`, least recently used first; None if that would not do."""
        if digest in self._sizes:
            return []
        over = self.nbytes + size - self.budget
        crowd = 0 if self.slots is None else len(self._sizes) + 1 - self.slots
        if over > self._free_bytes or crowd > len(self._free):
            return None
        victims: list[str] = []
        for member in self._free:
            if over <= 0 and crowd <= 0:
                break
            victims.append(member)
            over, crowd = over - self._sizes[member], crowd - 1
        return victims
