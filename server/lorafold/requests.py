"""Plain data between the services and the engine: what is asked for and what is answered. No tensors, no gRPC."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from lorafold_adapters.errors import LorafoldError
from lorafold_adapters.policy import Mode, PolicyKind

MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen: temperature, then top_k, then top_p, then a seeded draw."""

    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """0 is off."""
    top_p: float = 1.0
    """1 is off."""
    seed: int = 0
    """Of this request's own generator; not used when greedy."""

    @property
    def greedy(self) -> bool:
        """True if no draw takes place."""
        return self.temperature == 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt to complete, checked and tokenised."""

    id: str
    deployment: str
    adapter: str | None
    """Content digest; None is the base. The request finishes on it, whatever the deployment points at by then."""
    policy: PolicyKind
    prompt: tuple[int, ...]
    max_tokens: int
    stop: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    logprobs: int | None = None
    """How many alternatives to report with each token; None: no log probabilities at all."""
    arrived: float = 0.0
    """On the engine's clock, seconds."""
    deadline: float | None = None
    """On the engine's clock, seconds; the request ends in DeadlineExceeded at the first step after it."""


class FinishReason(Enum):
    """Why a request ended well."""

    END_OF_SEQUENCE = "end_of_sequence"
    STOP_STRING = "stop_string"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probability of a generated token and of the most likely ones, before temperature and cuts."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token id, log probability), most likely first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """What computes an answer, as of one step."""

    mode: Mode
    generation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """Where a request's time went, in seconds."""

    queue: float = 0.0
    swap_wait: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """The prompt has been read; the first token follows."""

    provenance: Provenance
    seconds: float
    """Since arrival."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """One more token. `text` is empty while a character is incomplete or a stop string possible."""

    text: str
    token_id: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The last event of a request that went well."""

    text: str
    """What was held back until the end was known."""
    reason: FinishReason
    stop: str
    completion_tokens: int
    timings: Timings
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a request that did not."""

    error: LorafoldError


Event = Started | Delta | Finished | Failed
Sink = Callable[[Event], object]
"""Takes a request's events. Called on the engine's thread: must not block."""
