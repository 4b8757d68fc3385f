"""From a `GenerationSpec` to a checked, tokenised `Request`. Everything that can be wrong with one is found here,
before it costs anything.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from lorafold.config import EngineConfig
from lorafold.deployments import Target
from lorafold.errors import InvalidField
from lorafold.model import LoadedBase
from lorafold.requests import Request
from lorafold.services.options import check_options, completions, logprobs, sampling, stop_strings, stop_token_ids
from lorafold.v1 import generation_pb2 as pb


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
            priority=target.priority,
            max_concurrency=target.max_concurrency,
            prompt=tuple(prompt),
            max_tokens=self._max_tokens(spec, len(prompt)),
            n=completions(spec),
            stop=stop_strings(spec),
            stop_token_ids=stop_token_ids(spec, self._base.vocabulary_size),
            ignore_eos=spec.ignore_eos,
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
        check_options(spec, self._base.vocabulary_size)
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
