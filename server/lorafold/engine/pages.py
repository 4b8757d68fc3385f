"""Which pages of the cache belong to whom, and which hold a prefix that a later sequence may share.

Pure Python: no tensors. A full page is known by its adapter's digest and every token up to its end, so keys and values
are only ever shared by sequences that would compute the very same ones. Pages of sequences that ended stay until their
room is needed, the longest unused first.

Where attention reads sequences as one piece, on a CPU, they get neighbouring pages: the room that one may grow into is
promised to it, and taken from it only when nothing else is left. Old prefixes make room for it, neighbours together.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from lorafold.errors import KvFull

TAKEN, FREE, PROMISED = 0, 1, 2
"""What a page can be; those that are kept for later sequences are taken too."""
Node = int | str
"""What a sealed page is known by; before the first page, the adapter's digest."""
Key = tuple[Node, tuple[int, ...]]
"""The node of the page before, and the page's tokens."""
KEPT = 1 << 62
"""What a page is worth that must not be taken."""
SCRATCH = 0
"""The page that is nobody's: rows that only pad a batch write here."""


@dataclass(slots=True, eq=False)
class Holding:
    """The pages of one sequence, in order."""

    adapter: str
    pages: list[int] = field(default_factory=list)
    promised_until: int = 0
    """One past the last page that the sequence may grow into in one piece."""
    node: Node = field(init=False)
    """Of the last sealed page."""
    sealed: int = 0
    """Pages from the first whose content is settled and known to the pool."""

    def __post_init__(self) -> None:
        self.node = self.adapter


class PagePool:
    """Hands out pages 1 to `pages` - 1, each of `size` tokens."""

    def __init__(self, *, pages: int, size: int, neighbours: bool = True) -> None:
        """`neighbours`: sequences get neighbouring pages, at the cost of prefixes that have been unused for long."""
        self.pages = pages
        self.size = size
        self._neighbours = neighbours
        self._state = bytearray([TAKEN] + [FREE] * (pages - 1))
        self._users = [0] * pages
        self._nodes: dict[Key, tuple[int, int]] = {}
        """Node and page."""
        self._keys: dict[int, Key] = {}
        """The key under which a page is found."""
        self._unused: OrderedDict[int, None] = OrderedDict()
        """Pages that nobody uses but a later sequence may, the longest unused first."""
        self._last_node = 0
        self.used = 0
        """Pages that sequences hold."""

    @property
    def tokens(self) -> int:
        """How many tokens one sequence could have alone."""
        return (self.pages - 1) * self.size

    @property
    def available(self) -> int:
        """Pages that can be had now."""
        return self.pages - 1 - self.used

    def pages_for(self, tokens: int) -> int:
        """Pages that so many tokens take."""
        return -(-tokens // self.size)

    def start(self, adapter: str | None, tokens: Sequence[int]) -> Holding:
        """A new sequence, with the pages of its longest known prefix that leaves a token to compute."""
        holding = Holding(adapter or "")
        for end in range(self.size, len(tokens), self.size):
            found = self._nodes.get((holding.node, tuple(tokens[end - self.size : end])))
            if found is None:
                break
            holding.node, page = found
            self._use(page)
            holding.pages.append(page)
            holding.sealed += 1
        return holding

    def grow(self, holding: Holding, tokens: int, *, at_most: int) -> None:
        """Makes room for `tokens` tokens in all; the sequence may come to have `at_most`. Raises KvFull."""
        wanted = self.pages_for(tokens) - len(holding.pages)
        if wanted > self.available:
            raise KvFull(f"{wanted} pages of the cache are wanted, {self.available} are left")
        for _ in range(wanted):
            holding.pages.append(self._next(holding, self.pages_for(at_most) - len(holding.pages)))

    def seal(self, holding: Holding, tokens: Sequence[int], cached: int) -> None:
        """Makes the full pages known whose tokens are all computed, `cached` of `tokens`."""
        while (holding.sealed + 1) * self.size <= cached:
            part = tuple(tokens[holding.sealed * self.size : (holding.sealed + 1) * self.size])
            key = (holding.node, part)
            if key not in self._nodes:
                self._last_node += 1
                page = holding.pages[holding.sealed]
                self._nodes[key] = (self._last_node, page)
                self._keys[page] = key
            holding.node = self._nodes[key][0]
            holding.sealed += 1

    def release(self, holding: Holding) -> None:
        """Gives the pages back; the caller forgets the holding."""
        for page in reversed(holding.pages):
            self._users[page] -= 1
            if not self._users[page]:
                self.used -= 1
                if page in self._keys:
                    self._unused[page] = None
                else:
                    self._state[page] = FREE
        if holding.pages:
            for page in range(holding.pages[-1] + 1, holding.promised_until):
                if self._state[page] == PROMISED:
                    self._state[page] = FREE

    def borrow(self, sequences: int, tokens: int) -> list[range] | None:
        """Free pages in one piece for each of `sequences`; None if there are not so many.

        Old prefixes make room, the longest unused first. The pages stay free: nothing may be asked of the pool while
        they are used.
        """
        width = self.pages_for(tokens)
        found = self._free_pieces(sequences, width)
        if found is None and self._clear(sequences * width) >= 0:
            found = self._free_pieces(sequences, width)
        return found

    def _free_pieces(self, count: int, width: int) -> list[range] | None:
        found, start = list[range](), 0
        for _ in range(count):
            first = self._state.find(bytes([FREE]) * width, start)
            if first < 0:
                return None
            start = first + width
            found.append(range(first, start))
        return found

    def forget(self) -> None:
        """Forgets every prefix: what the pages hold may be wrong. Sequences that run keep theirs."""
        for page in self._unused:
            self._state[page] = FREE
        self._unused.clear()
        self._nodes.clear()
        self._keys.clear()

    def _next(self, holding: Holding, further: int) -> int:
        """A page for the end of a sequence that may grow by `further` pages, this one included."""
        page = holding.pages[-1] + 1 if holding.pages else self.pages
        if not (page < self.pages and self._state[page] in (FREE, PROMISED if page < holding.promised_until else FREE)):
            page = self._run(holding, max(1, further) if self._neighbours else 1)
        self._state[page] = TAKEN
        self._use(page)
        return page

    def _run(self, holding: Holding, wanted: int) -> int:
        """The first page of the longest piece of up to `wanted` that can be had; the rest of it is promised."""
        free, width = bytes([FREE]), wanted
        if not self._unused and free not in self._state:
            free = bytes([PROMISED])  # To others: the last ones go first, which they would need the latest.
        while True:
            page = self._state.rfind(free * width) if free[0] == PROMISED else self._state.find(free * width)
            if page < 0 and free[0] == FREE:
                page = self._clear(width)
            if page >= 0:
                holding.promised_until = page + width
                self._state[page : page + width] = bytes([PROMISED]) * width
                return page
            width //= 2
            assert width, "the caller has checked that there is a page"

    def _clear(self, wanted: int) -> int:
        """Forgets the prefixes in `wanted` neighbouring pages that nobody uses; their first one, or -1.

        Of all such pieces it is the one whose latest used page has been unused the longest.
        """
        if wanted == 1 and self._unused:
            page = next(iter(self._unused))
            self._evict(page)
            return page
        if not self._could_clear(wanted):
            return -1
        age = {page: place for place, page in enumerate(self._unused)}
        worth = [0 if state == FREE else age.get(page, KEPT) for page, state in enumerate(self._state)]
        latest = list(sliding_maxima(worth, wanted))
        first = latest.index(min(latest))
        for page in range(first, first + wanted):
            if page in age:
                self._evict(page)
        return first

    def _could_clear(self, wanted: int) -> bool:
        """True if there are so many neighbouring pages that are free or that nobody uses."""
        if len(self._unused) + self._state.count(FREE) < wanted:
            return False
        state = bytearray(self._state)
        for page in self._unused:
            state[page] = FREE
        return bytes([FREE]) * wanted in state

    def _evict(self, page: int) -> None:
        del self._unused[page]
        del self._nodes[self._keys.pop(page)]
        self._state[page] = FREE

    def _use(self, page: int) -> None:
        self.used += not self._users[page]
        self._users[page] += 1
        self._unused.pop(page, None)

    def check_integrity(self, holdings: Sequence[Holding]) -> None:
        """Every page is free, promised, kept for later, or in use by just those who say so."""
        users = [0] * self.pages
        for holding in holdings:
            for page in holding.pages:
                users[page] += 1
        assert users == self._users
        taken = {page for page, state in enumerate(self._state) if state == TAKEN}
        used = {page for page, count in enumerate(users) if count}
        assert self.used == len(used)
        assert taken == {SCRATCH} | used | set(self._unused)
        assert not used & set(self._unused)


def sliding_maxima(values: Sequence[int], width: int) -> Iterator[int]:
    """The largest of each `width` neighbouring values."""
    # Places of values that may still be the largest: each is larger than those after it.
    falling: deque[int] = deque()
    for place, value in enumerate(values):
        while falling and values[falling[-1]] <= value:
            falling.pop()
        falling.append(place)
        if falling[0] <= place - width:
            falling.popleft()
        if place >= width - 1:
            yield values[falling[0]]
