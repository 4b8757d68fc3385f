"""From a `GenerationSpec` to a checked, tokenised `Request`. Everything that can be wrong with one is found here,
before it costs anything.
"""

import asyncio
import math
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from lorafold.config import EngineConfig
from lorafold.deployments import Target
from lorafold.errors import InvalidField
from lorafold.model import LoadedBase
from lorafold.requests import MAX_TOP_LOGPROBS, Request, Sampling
from lorafold.v1 import generation_pb2 as pb

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256


class RequestBuilder:
    """Knows the model's limits."""

    def __init__(self, base: LoadedBase, config: EngineConfig) -> None:
        self._base = base
        self._default_max_tokens = config.default_max_tokens
        self._longest_token = max((len(token) for token in base.tokenizer.get_vocab()), default=1)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lorafold-tokenizer")
        self.context = min(config.max_context, base.context)
        """Tokens of prompt and answer together."""

    def build(
        self,
        spec: pb.GenerationSpec,
        request_id: str,
        prompt: Sequence[int],
        target: Target,
        now: float,
        time_left: float | None,
    ) -> Request:
        """The request for the engine. Raises InvalidField."""
        return Request(
            id=request_id,
            deployment=spec.deployment or "base",
            adapter=target.adapter,
            policy=target.policy,
            prompt=tuple(prompt),
            max_tokens=self._max_tokens(spec, len(prompt)),
            stop=stop_strings(spec),
            sampling=sampling(spec),
            logprobs=logprobs(spec),
            arrived=now,
            deadline=None if time_left is None else now + time_left,
        )

    def check_size(self, spec: pb.GenerationSpec) -> None:
        """Refuses at once what can never fit the context, before anything reads it. Raises InvalidField."""
        characters = self.context * self._longest_token
        for field, size, most, unit in (
            ("spec.text", len(spec.text), characters, "characters"),
            ("spec.token_ids", len(spec.token_ids), self.context, "tokens"),
            ("spec.messages", len(spec.messages), self.context, "messages"),
        ):
            if size > most:
                raise InvalidField(field, f"has {size} {unit}, which can never fit a context of {self.context} tokens")
        if sum(len(message.content) for message in spec.messages) > characters:
            raise InvalidField("spec.messages", f"can never fit a context of {self.context} tokens: send fewer")

    async def tokens(self, spec: pb.GenerationSpec) -> list[int]:
        """The prompt as token ids, whichever way it was given. Raises InvalidField.

        Tokenises in a thread of its own: the event loop goes on, and no two threads use the tokenizer's settings.
        """
        check_options(spec)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._tokens, spec)

    def _tokens(self, spec: pb.GenerationSpec) -> list[int]:
        given = [
            name
            for name, there in (
                ("spec.text", spec.HasField("text")),
                ("spec.token_ids", bool(spec.token_ids)),
                ("spec.messages", bool(spec.messages)),
            )
            if there
        ]
        if not given:
            raise InvalidField("spec.text", "there is no prompt: set text, token_ids or messages")
        if len(given) > 1:
            raise InvalidField(given[1], f"{' and '.join(given)} contradict each other: set one of them")
        ids = self._tokenised(spec)
        if not ids:
            raise InvalidField(given[0], "the prompt is empty: give at least one token")
        if len(ids) >= self.context:
            raise InvalidField(
                given[0],
                f"the prompt has {len(ids)} tokens, the context {self.context}: send at most {self.context - 1}",
            )
        return ids

    def _tokenised(self, spec: pb.GenerationSpec) -> list[int]:
        if spec.token_ids:
            size = self._base.vocabulary_size
            for token in spec.token_ids:
                if not 0 <= token < size:
                    raise InvalidField("spec.token_ids", f"{token} is not in the vocabulary: ids are 0 to {size - 1}")
            return list(spec.token_ids)
        if spec.messages:
            return self._rendered(spec)
        if not spec.text:
            return []
        return list(self._base.tokenizer(spec.text)["input_ids"])

    def _rendered(self, spec: pb.GenerationSpec) -> list[int]:
        tokenizer = self._base.tokenizer
        if not tokenizer.chat_template:
            raise InvalidField("spec.messages", "this model has no chat template: send text or token_ids")
        messages = [{"role": message.role, "content": message.content} for message in spec.messages]
        for index, message in enumerate(messages):
            if not message["role"]:
                raise InvalidField(f"spec.messages[{index}].role", "is empty: say 'user', 'assistant' or 'system'")
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # Templates are programs of the model's author and raise what they like.
            raise InvalidField("spec.messages", f"the model's chat template refuses them: {error}") from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def _max_tokens(self, spec: pb.GenerationSpec, prompt: int) -> int:
        room = self.context - prompt
        if not spec.HasField("max_tokens"):
            return min(self._default_max_tokens, room)
        if spec.max_tokens > room:
            raise InvalidField(
                "spec.max_tokens",
                f"is {spec.max_tokens}, but {prompt} prompt tokens leave {room} of {self.context}: ask for less",
            )
        return spec.max_tokens


def check_options(spec: pb.GenerationSpec) -> None:
    """Everything about a request but its prompt. Raises InvalidField."""
    sampling(spec)
    stop_strings(spec)
    logprobs(spec)
    if spec.HasField("max_tokens") and spec.max_tokens == 0:
        raise InvalidField("spec.max_tokens", "is 0: ask for at least one token, or leave it out")


def sampling(spec: pb.GenerationSpec) -> Sampling:
    """Raises InvalidField."""
    given = spec.sampling
    temperature = given.temperature if given.HasField("temperature") else 0.0
    if not (math.isfinite(temperature) and 0.0 <= temperature <= 100.0):
        raise InvalidField("spec.sampling.temperature", f"is {temperature:g}: give 0 (greedy) to 100")
    top_p = given.top_p if given.HasField("top_p") else 1.0
    if not 0.0 < top_p <= 1.0:
        raise InvalidField("spec.sampling.top_p", f"is {top_p:g}: give more than 0 and at most 1")
    if not given.HasField("temperature"):
        for name in ("top_k", "top_p", "seed"):
            if given.HasField(name):
                raise InvalidField(
                    f"spec.sampling.{name}", "has no effect without a temperature: set one, or 0 for greedy"
                )
    if temperature == 0.0:
        return Sampling()
    seed = given.seed if given.HasField("seed") else secrets.randbits(63)
    return Sampling(temperature=temperature, top_k=given.top_k, top_p=top_p, seed=seed)


def stop_strings(spec: pb.GenerationSpec) -> tuple[str, ...]:
    """Raises InvalidField."""
    if len(spec.stop) > MAX_STOP_STRINGS:
        raise InvalidField("spec.stop", f"has {len(spec.stop)} strings: give at most {MAX_STOP_STRINGS}")
    for stop in spec.stop:
        if not 0 < len(stop) <= MAX_STOP_LENGTH:
            raise InvalidField(
                "spec.stop", f"has a string of {len(stop)} characters: 1 to {MAX_STOP_LENGTH} are possible"
            )
    return tuple(spec.stop)


def logprobs(spec: pb.GenerationSpec) -> int | None:
    """Raises InvalidField."""
    if not spec.HasField("logprobs"):
        return None
    if spec.logprobs > MAX_TOP_LOGPROBS:
        raise InvalidField("spec.logprobs", f"is {spec.logprobs}: give at most {MAX_TOP_LOGPROBS}")
    return spec.logprobs
