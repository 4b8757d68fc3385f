"""What waits and runs: one completion of a request, and what one step does of it. No tensors, no model."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from lorafold.engine.detokenize import TextStream
from lorafold.engine.pages import Holding
from lorafold.engine.sampling_state import SamplingState
from lorafold.requests import Request, Sink, Stalled
from lorafold_adapters.policy import Group, PolicyKind


@dataclass(slots=True, eq=False)
class Waits:
    """Rows that have their turns together, and how long others had theirs."""

    rows: int = 0
    limited: Counter[str] = field(default_factory=Counter)
    """How many of them, by deployment, where that limits how many run."""
    seconds: float = 0.0


@dataclass(slots=True, eq=False)
class Row:
    """One completion of a request on its way through the engine."""

    request: Request
    sink: Sink
    text: TextStream
    stalled: Stalled = lambda: False
    index: int = 0
    """Of the completion among those of its request."""
    tokens: list[int] = field(default_factory=list)
    """Prompt and answer so far."""
    leader: "Row | None" = None
    """The row that reads the same prompt for this one."""
    holding: Holding | None = None
    """Its pages of the cache; None while it waits."""
    kind: PolicyKind = field(init=False)
    """By which paths it may run; its request's policy, unless an operator lets it go on unmerged."""
    cached: int = 0
    """Tokens whose keys and values are in its pages."""
    read: int = 0
    """Prompt tokens that were computed or found."""
    admitted: float = 0.0
    """When it first started; times are in seconds on the engine's clock."""
    first_token: float = 0.0
    """When its first token was chosen."""
    last_token: float = 0.0
    """When its last one was; 0 before the first."""
    swap_wait_before_start: float = 0.0
    swap_wait_before_first: float = 0.0
    """The parts of `swap_wait` before it started, and before its first token."""
    preempted: int = 0
    """How often it gave up its room."""
    stalled_once: bool = False
    """True once it waited for its client."""
    ended: bool = False
    """True once it was removed."""
    sampling: SamplingState = field(init=False)
    """What the choice of its next token depends on beside the logits."""

    _waits: "Waits | None" = field(init=False, default=None)
    _joined: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        request = self.request
        self.kind = request.policy
        self.sampling = SamplingState(request.sampling, self.tokens, len(request.prompt), self.index, request.logprobs)

    @property
    def group(self) -> Group:
        """Those that it takes turns with."""
        return self.request.adapter, self.kind

    @property
    def arrival(self) -> tuple[float, int]:
        """What a queue is ordered by."""
        return self.request.arrived, self.index

    def join(self, waits: "Waits") -> None:
        """From now on it waits for its turn with these."""
        self._joined = waits.seconds - self.swap_wait
        self._waits = waits

    @property
    def swap_wait(self) -> float:
        """Seconds since its arrival in which others had their turn, or weights were changed."""
        return 0.0 if self._waits is None else self._waits.seconds - self._joined

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def at_most(self) -> int:
        """Tokens that it can come to have."""
        return len(self.request.prompt) + self.request.max_tokens

    @property
    def pages(self) -> Sequence[int]:
        """Of the cache, in order; only while it runs."""
        assert self.holding is not None
        return self.holding.pages

    @property
    def ready(self) -> bool:
        """False while another row reads its prompt."""
        return self.leader is None or bool(self.leader.generated) or self.leader.ended


@dataclass(frozen=True, slots=True)
class Part:
    """What one step runs of one row."""

    row: Row
    tokens: int
    """How many, from `row.cached` on."""
    decodes: bool
    """True if the token is the last one of the answer so far; else it is read, for the first time or again."""
    samples: bool
    """True if the step reaches the row's last token, so that the next one can be chosen."""


def decodes(row: Row) -> bool:
    """True if only the last token of the answer so far is to be run."""
    return row.generated > 0 and row.cached == len(row.tokens) - 1
