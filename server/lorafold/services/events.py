"""Engine events as messages of `lorafold.v1`."""

from collections.abc import Iterator

from google.protobuf.duration_pb2 import Duration

from lorafold.requests import (
    Delta,
    Event,
    Failed,
    Finished,
    FinishReason,
    Provenance,
    Request,
    Started,
    Timings,
    TokenLogprobs,
)
from lorafold.v1 import generation_pb2 as pb
from lorafold_adapters.policy import Mode

MODES = {Mode.BASE: pb.MODE_BASE, Mode.MERGED: pb.MODE_MERGED, Mode.UNMERGED: pb.MODE_UNMERGED}
REASONS = {
    FinishReason.END_OF_SEQUENCE: pb.FINISH_REASON_END_OF_SEQUENCE,
    FinishReason.STOP_STRING: pb.FINISH_REASON_STOP_STRING,
    FinishReason.STOP_TOKEN: pb.FINISH_REASON_STOP_TOKEN,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}


def messages(request: Request, event: Event) -> Iterator[pb.StreamGenerateResponse]:
    """What a stream says of one event. Raises the error of a failure."""
    if isinstance(event, Failed):
        raise event.error
    if isinstance(event, Started):
        yield pb.StreamGenerateResponse(index=event.index, started=started(request, event))
    elif isinstance(event, Delta):
        yield pb.StreamGenerateResponse(index=event.index, delta=delta(event))
    else:
        if event.text:
            yield pb.StreamGenerateResponse(index=event.index, delta=pb.Delta(text=event.text))
        yield pb.StreamGenerateResponse(index=event.index, finished=finished(request, event))


def add(completion: pb.Completion, message: pb.StreamGenerateResponse) -> None:
    """One message of a stream as part of the whole completion."""
    if message.HasField("started"):
        completion.started.CopyFrom(message.started)
    elif message.HasField("finished"):
        completion.finished.CopyFrom(message.finished)
    completion.text += message.delta.text
    completion.token_ids.extend(message.delta.token_ids)
    completion.logprobs.extend(message.delta.logprobs)


def started(request: Request, event: Started) -> pb.Started:
    """The first message of a completion."""
    return pb.Started(
        request_id=request.id,
        prompt_tokens=len(request.prompt),
        seed=request.sampling.seed,
        answered_by=answered_by(request, event.provenance),
    )


def delta(event: Delta) -> pb.Delta:
    """One token."""
    return pb.Delta(
        text=event.text,
        token_ids=[event.token_id],
        logprobs=[] if event.logprobs is None else [logprobs(event.logprobs)],
    )


def finished(request: Request, event: Finished) -> pb.Finished:
    """The last message of a completion."""
    return pb.Finished(
        reason=REASONS[event.reason],
        stop=event.stop,
        stop_token_id=event.stop_token,
        completion_tokens=event.completion_tokens,
        timings=timings(event.timings),
        answered_by=answered_by(request, event.provenance),
    )


def answered_by(request: Request, provenance: Provenance) -> pb.AnsweredBy:
    """What computed the answer."""
    return pb.AnsweredBy(
        deployment=request.deployment,
        adapter_digest=request.adapter or "",
        mode=MODES[provenance.mode],
        generation=provenance.generation,
    )


def timings(given: Timings) -> pb.Timings:
    """Where the time went."""
    return pb.Timings(
        queue=duration(given.queue),
        swap_wait=duration(given.swap_wait),
        prefill=duration(given.prefill),
        decode=duration(given.decode),
    )


def duration(seconds: float) -> Duration:
    """Seconds, to the nanosecond."""
    return Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))


def logprobs(given: TokenLogprobs) -> pb.TokenLogprobs:
    """Log probabilities of one token."""
    top = [pb.TokenLogprob(token_id=token, logprob=value) for token, value in given.top]
    return pb.TokenLogprobs(token_id=given.token_id, logprob=given.logprob, top=top)
