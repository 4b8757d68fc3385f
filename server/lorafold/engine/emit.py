"""What becomes of a chosen token: text, events, and the end of the completion. No tensors."""

from dataclasses import dataclass

from lorafold.engine.detokenize import Decode, TextStream
from lorafold.engine.rows import Row
from lorafold.engine.sampling import Pick
from lorafold.requests import (
    Delta,
    Finished,
    FinishReason,
    Provenance,
    Request,
    Sink,
    Stalled,
    Started,
    Timings,
    TokenLogprobs,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """What the engine needs to know of a tokenizer and a model's configuration."""

    decode: Decode
    end_of_sequence: frozenset[int]

    def rows(self, request: Request, sink: Sink, stalled: Stalled) -> list[Row]:
        """One row for each completion of the request, with nothing generated yet; the first one leads the others."""
        rows = [
            Row(
                request=request,
                sink=sink,
                stalled=stalled,
                text=TextStream(self.decode, request.prompt, request.stop),
                index=index,
                tokens=list(request.prompt),
            )
            for index in range(request.n)
        ]
        for row in rows[1:]:
            row.leader = rows[0]
        return rows

    def ends(self, request: Request, token_id: int) -> FinishReason | None:
        """Why a completion ends with this token, if it does."""
        if token_id in self.end_of_sequence and not request.ignore_eos:
            return FinishReason.END_OF_SEQUENCE
        return FinishReason.STOP_TOKEN if token_id in request.stop_token_ids else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """A token that was added to a row, and what its sink is to be told."""

    row: Row
    id: int
    logprobs: TokenLogprobs | None
    ended: FinishReason | None
    """Why the completion ends with it, as far as ids and length tell."""
    provenance: Provenance
    now: float
    """When it was chosen."""

    @property
    def can_wait(self) -> bool:
        """True if nothing depends on its text and nobody waits for it as the first or the last one."""
        return self.ended is None and not self.row.request.stop and self.row.generated > 1


def add(row: Row, pick: Pick, provenance: Provenance, vocabulary: Vocabulary, now: float) -> Token:
    """Adds a token to a row; nobody is told yet.

    Raises what choosing the token raised, and ValueError if the model's logits were not numbers.
    """
    if pick.fault is not None:
        raise pick.fault
    if pick.token is None:
        raise ValueError("the model computed NaN or infinity")
    if not row.generated:
        row.first_token, row.swap_wait_before_first = now, row.swap_wait
    row.last_token = now
    row.tokens.append(pick.token)
    ended = vocabulary.ends(row.request, pick.token)
    if ended is None and row.generated >= row.request.max_tokens:
        ended = FinishReason.LENGTH
    return Token(row=row, id=pick.token, logprobs=pick.logprobs, ended=ended, provenance=provenance, now=now)


def tell(token: Token) -> bool:
    """Tells the row's sink of its last token; True if the completion is done.

    A token that ends it is among the ids of the answer, and not part of its text.
    """
    row = token.row
    assert row.tokens[-1] == token.id, "a row has one untold token at most"
    if row.generated == 1:
        since = token.now - row.request.arrived
        row.sink(Started(index=row.index, provenance=token.provenance, seconds=since))
    text = row.text.push(token.id) if token.ended in (None, FinishReason.LENGTH) else ""
    row.sink(Delta(index=row.index, text=text, token_id=token.id, logprobs=token.logprobs))
    if token.ended is None and row.text.stopped_by is None:
        return False
    row.sink(finished(row, token.ended or FinishReason.STOP_STRING, token.provenance, token.now))
    return True


def finished(row: Row, reason: FinishReason, provenance: Provenance, now: float) -> Finished:
    """The last event; a stop string may still turn up in text that was held back."""
    text = row.text.finish()
    stop = row.text.stopped_by
    if stop is not None:
        reason = FinishReason.STOP_STRING
    return Finished(
        index=row.index,
        text=text,
        reason=reason,
        stop=stop or "",
        stop_token=row.tokens[-1] if reason is FinishReason.STOP_TOKEN else None,
        completion_tokens=row.generated,
        timings=timings(row, now),
        provenance=provenance,
    )


def timings(row: Row, now: float) -> Timings:
    """Everything between arrival and now, each second counted once."""
    swap_wait_of_prefill = row.swap_wait_before_first - row.swap_wait_before_start
    return Timings(
        queue=row.admitted - row.request.arrived - row.swap_wait_before_start,
        swap_wait=row.swap_wait,
        prefill=row.first_token - row.admitted - swap_wait_of_prefill,
        decode=now - row.first_token - (row.swap_wait - row.swap_wait_before_first),
    )
