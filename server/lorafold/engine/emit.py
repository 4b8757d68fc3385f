"""What becomes of a chosen token: text, events, and the end of the request. No tensors."""

from dataclasses import dataclass

from lorafold.engine.detokenize import Decode, TextStream
from lorafold.engine.scheduler import Row
from lorafold.requests import (
    Delta,
    Finished,
    FinishReason,
    Provenance,
    Request,
    Started,
    Timings,
    TokenLogprobs,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """What the engine needs to know of a tokenizer and a model's configuration."""

    decode: Decode
    end_of_sequence: frozenset[int]

    def text_stream(self, request: Request) -> TextStream:
        """The text of the request's answer, empty yet."""
        return TextStream(self.decode, request.prompt, request.stop)


def token(
    row: Row,
    token_id: int | None,
    logprobs: TokenLogprobs | None,
    provenance: Provenance,
    vocabulary: Vocabulary,
    now: float,
) -> bool:
    """Adds a token to a row and tells its sink; True if the request is done.

    Raises ValueError if the model's logits were not numbers (`token_id` is None).
    """
    if token_id is None:
        raise ValueError("the model computed NaN")
    if not row.generated:
        row.first_token, row.swap_wait_before_first = now, row.swap_wait
        row.sink(Started(provenance=provenance, seconds=now - row.request.arrived))
    row.tokens.append(token_id)
    ended = token_id in vocabulary.end_of_sequence
    row.sink(Delta(text="" if ended else row.text.push(token_id), token_id=token_id, logprobs=logprobs))
    if not ended and row.text.stopped_by is None and row.generated < row.request.max_tokens:
        return False
    row.sink(finished(row, ended, provenance, now))
    return True


def finished(row: Row, ended: bool, provenance: Provenance, now: float) -> Finished:
    """The last event; a stop string may still turn up in text that was held back."""
    text = row.text.finish()
    stop = row.text.stopped_by
    reason = FinishReason.END_OF_SEQUENCE if ended else FinishReason.LENGTH
    return Finished(
        text=text,
        reason=FinishReason.STOP_STRING if stop is not None else reason,
        stop=stop or "",
        completion_tokens=row.generated,
        timings=timings(row, now),
        provenance=provenance,
    )


def timings(row: Row, now: float) -> Timings:
    """Everything between arrival and now, each second counted once."""
    return Timings(
        queue=row.admitted - row.request.arrived,
        swap_wait=row.swap_wait,
        prefill=row.first_token - row.admitted - row.swap_wait_before_first,
        decode=now - row.first_token - (row.swap_wait - row.swap_wait_before_first),
    )
