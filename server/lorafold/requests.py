"""Plain data between the services and the engine: what is asked for and what is answered. No tensors, no gRPC."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from lorafold_adapters.errors import LorafoldError
from lorafold_adapters.policy import Mode, PolicyKind

MAX_TOP_LOGPROBS = 20
MAX_COMPLETIONS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen: penalties, temperature, top_k, top_p, min_p, then a seeded draw."""

    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """0 is off."""
    top_p: float = 1.0
    """1 is off."""
    min_p: float = 0.0
    """0 is off."""
    repetition_penalty: float = 1.0
    """1 is off. Divides positive logits, and multiplies negative ones, of the tokens of prompt and answer."""
    presence_penalty: float = 0.0
    """0 is off. Subtracted from the logits of the answer's tokens."""
    frequency_penalty: float = 0.0
    """0 is off. Subtracted from the logit of a token once for each time it occurs in the answer."""
    seed: int = 0
    """Of this request's own draws; not used when greedy."""

    @property
    def greedy(self) -> bool:
        """True if no draw takes place."""
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """True if the tokens so far change the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


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
    n: int = 1
    """Completions of the prompt, each with draws of its own."""
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end the answer as an end-of-sequence token does."""
    ignore_eos: bool = False
    """True: an end-of-sequence token is a token like any other."""
    sampling: Sampling = field(default_factory=Sampling)
    logprobs: int | None = None
    """How many alternatives to report with each token; None: no log probabilities at all."""
    arrived: float = 0.0
    """On the engine's clock, seconds."""
    deadline: float | None = None
    """On the engine's clock, seconds; the request ends in DeadlineExceeded at the first step after it."""
    priority: int = 0
    """Of its deployment: waiting requests of a higher one start first."""
    max_concurrency: int | None = None
    """How many completions of its deployment may run at once; None: as many as there is room for."""


class FinishReason(Enum):
    """Why a request ended well."""

    END_OF_SEQUENCE = "end_of_sequence"
    STOP_STRING = "stop_string"
    STOP_TOKEN = "stop_token"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probability of a generated token and of the most likely ones, before penalties, temperature and cuts."""

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

    @property
    def all(self) -> float:
        """From arrival to the end."""
        return self.queue + self.swap_wait + self.prefill + self.decode


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """The prompt has been read; the first token follows."""

    index: int
    """Of the completion; here and in every other event."""
    provenance: Provenance
    seconds: float
    """Since arrival."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """One more token. `text` is empty while a character is incomplete or a stop string possible."""

    index: int
    text: str
    token_id: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """The last event of a completion that went well."""

    index: int
    text: str
    """What was held back until the end was known."""
    reason: FinishReason
    stop: str
    """The stop string that was met; else empty."""
    stop_token: int | None
    """The stop token that was met, if any."""
    completion_tokens: int
    timings: Timings
    provenance: Provenance


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a completion that did not, and with it of its request."""

    error: LorafoldError


Event = Started | Delta | Finished | Failed
Sink = Callable[[Event], object]
"""Takes a request's events. Called on the engine's thread: must not block."""
Stalled = Callable[[], bool]
"""True if whoever takes a request's events is so far behind that it should pause, until `Engine.resume`."""
