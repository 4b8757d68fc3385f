"""What the choice of one row's next token depends on beside its logits: its settings, its tokens so far, and a number
drawn for its place. Pure Python: no tensors, no neighbours.
"""

import hashlib
import struct
from array import array
from dataclasses import dataclass, field

from lorafold.requests import Sampling


@dataclass(slots=True, eq=False)
class SamplingState:
    """One completion of one request."""

    sampling: Sampling
    tokens: list[int]
    """Prompt and answer so far. The row's own list: it grows from outside and never shrinks."""
    prompt: int
    """How many of `tokens` are the prompt's."""
    index: int = 0
    """Of the completion among those of its request."""
    logprobs: int | None = None
    """How many alternatives to report with each token; None: no log probabilities at all."""
    _read: int = 0
    _place: dict[int, int] = field(default_factory=dict)
    _distinct: "array[int]" = field(default_factory=lambda: array("q"))
    _generated: "array[int]" = field(default_factory=lambda: array("q"))

    def uniform(self) -> float:
        """A number in [0, 1) that depends on seed, completion and position alone.

        So a sequence that is preempted and computed again draws what it would have drawn.
        """
        place = struct.pack("<QIQ", self.sampling.seed, self.index, len(self.tokens) - self.prompt)
        digest = hashlib.blake2b(place, digest_size=8).digest()
        return float((int.from_bytes(digest, "little") >> 11) * 2.0**-53)

    def occurrences(self) -> tuple["array[int]", "array[int]"]:
        """The distinct tokens so far and how often each was generated, as int64; valid until the next call.

        Those of the prompt are there, with 0, only if there is a repetition penalty. Reads only what is new.
        """
        if not self._read and self.sampling.repetition_penalty == 1.0:
            self._read = self.prompt
        for position in range(self._read, len(self.tokens)):
            token = self.tokens[position]
            place = self._place.setdefault(token, len(self._distinct))
            if place == len(self._distinct):
                self._distinct.append(token)
                self._generated.append(0)
            self._generated[place] += position >= self.prompt
        self._read = len(self.tokens)
        return self._distinct, self._generated
