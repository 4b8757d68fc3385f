"""What a client asks and what it is answered, to and from messages of `lorafold.v1`. Makes no calls."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorafold.client_errors import ServerError
from lorafold.v1 import generation_pb2 as pb

Messages = Iterable[tuple[str, str]]
Prompt = str | Sequence[int] | Messages
PROMPTS = "a prompt is a text, token ids, or pairs of role and content"


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What may be said about a request beside its prompt; None leaves it to the server."""

    max_tokens: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    n: int | None = None
    """Completions of the prompt: the first is the answer, the rest are its `others`."""
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logprobs: int | None = None
    timeout: float | None = None
    """Seconds; the server stops working on the request then."""


@dataclass(slots=True)
class Answer:
    """A generated text and what generated it."""

    index: int = 0
    """Which completion of its request this is."""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[pb.TokenLogprobs] = field(default_factory=list)
    started: pb.Started = field(default_factory=pb.Started)
    finished: pb.Finished = field(default_factory=pb.Finished)
    others: list["Answer"] = field(default_factory=list)
    """The completions after the first, if `n` of them were asked for."""

    @property
    def finish_reason(self) -> str:
        """`end_of_sequence`, `stop_string`, `stop_token` or `length`."""
        return pb.FinishReason.Name(self.finished.reason).removeprefix("FINISH_REASON_").lower()

    @property
    def mode(self) -> str:
        """By which path the last token was computed: `base`, `merged` or `unmerged`."""
        return pb.Mode.Name(self.finished.answered_by.mode).removeprefix("MODE_").lower()

    def add(self, event: pb.StreamGenerateResponse) -> str:
        """Takes one message of a stream about this completion; returns the text in it."""
        if event.HasField("started"):
            self.started = event.started
        elif event.HasField("finished"):
            self.finished = event.finished
        self.text += event.delta.text
        self.token_ids.extend(event.delta.token_ids)
        self.logprobs.extend(event.delta.logprobs)
        return event.delta.text


def assign(message: Any, name: str, value: object, path: str) -> None:
    """Sets a field unless the value is None. Raises ServerError for a value that it cannot hold."""
    try:
        if value is not None:
            setattr(message, name, value)
    except (ValueError, TypeError) as error:
        raise ServerError("INVALID_ARGUMENT", f"{path}.{name}: {error}", field=f"{path}.{name}") from error


def make_spec(prompt: Prompt, deployment: str, options: Options) -> pb.GenerationSpec:
    """The request message. Raises ServerError for values that no message can hold."""
    try:
        stop = [options.stop] if isinstance(options.stop, str) else options.stop
        spec = pb.GenerationSpec(
            deployment=deployment, stop=stop, stop_token_ids=options.stop_token_ids, ignore_eos=options.ignore_eos
        )
        if isinstance(prompt, str):
            spec.text = prompt
        else:
            for item in prompt:
                if isinstance(item, tuple):
                    role, content = item
                    spec.messages.add(role=role, content=content)
                else:
                    spec.token_ids.append(item)
    except (ValueError, TypeError) as error:
        raise ServerError("INVALID_ARGUMENT", f"the request cannot be written: {error}; {PROMPTS}") from error
    for name in ("max_tokens", "logprobs", "n"):
        assign(spec, name, getattr(options, name), "spec")
    for name in pb.Sampling.DESCRIPTOR.fields_by_name:
        assign(spec.sampling, name, getattr(options, name), "spec.sampling")
    return spec


def whole(response: pb.GenerateResponse) -> Answer:
    """A unary answer: the first completion, with the others."""
    first, *others = (
        Answer(
            index=completion.index,
            text=completion.text,
            token_ids=list(completion.token_ids),
            logprobs=list(completion.logprobs),
            started=completion.started,
            finished=completion.finished,
        )
        for completion in response.completions
    )
    first.others = others
    return first
