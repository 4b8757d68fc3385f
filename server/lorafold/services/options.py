"""The options of a `GenerationSpec`: everything but the prompt and what depends on its length. Each function raises
InvalidField for what is out of range. Knows no model.
"""

import math
import secrets
from dataclasses import replace

from lorafold.errors import InvalidField
from lorafold.requests import MAX_COMPLETIONS, MAX_TOP_LOGPROBS, Sampling
from lorafold.v1 import generation_pb2 as pb

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_TOKENS = 64


def check_options(spec: pb.GenerationSpec, vocabulary: int) -> None:
    """Everything about a request but its prompt; `vocabulary` is how many token ids there are."""
    completions(spec)
    stop_strings(spec)
    stop_token_ids(spec, vocabulary)
    logprobs(spec)
    if spec.HasField("max_tokens") and spec.max_tokens == 0:
        raise InvalidField("spec.max_tokens", "is 0: ask for at least one token, or leave it out")


def sampling(spec: pb.GenerationSpec) -> Sampling:
    """How to choose tokens, with a seed if none was given."""
    given = spec.sampling
    temperature = in_range(given, "temperature", 0.0, 100.0, "0 (greedy) to 100")
    penalties = Sampling(
        repetition_penalty=in_range(given, "repetition_penalty", 0.01, 100.0, "0.01 to 100", unset=1.0),
        presence_penalty=in_range(given, "presence_penalty", -2.0, 2.0, "-2 to 2"),
        frequency_penalty=in_range(given, "frequency_penalty", -2.0, 2.0, "-2 to 2"),
    )
    top_p = in_range(given, "top_p", math.ulp(0.0), 1.0, "more than 0 and at most 1", unset=1.0)
    min_p = in_range(given, "min_p", 0.0, 1.0, "0 to 1")
    if not given.HasField("temperature"):
        for name in ("top_k", "top_p", "min_p", "seed"):
            if given.HasField(name):
                raise InvalidField(
                    f"spec.sampling.{name}", "has no effect without a temperature: set one, or 0 for greedy"
                )
    if temperature == 0.0:
        return penalties
    seed = given.seed if given.HasField("seed") else secrets.randbits(63)
    return replace(penalties, temperature=temperature, top_k=given.top_k, top_p=top_p, min_p=min_p, seed=seed)


def in_range(given: pb.Sampling, name: str, least: float, most: float, remedy: str, *, unset: float = 0.0) -> float:
    """The field's value, or `unset`."""
    value = float(getattr(given, name)) if given.HasField(name) else unset
    if not (math.isfinite(value) and least <= value <= most):
        raise InvalidField(f"spec.sampling.{name}", f"is {value:g}: give {remedy}")
    return value


def completions(spec: pb.GenerationSpec) -> int:
    """How many answers."""
    count = spec.n if spec.HasField("n") else 1
    if not 0 < count <= MAX_COMPLETIONS:
        raise InvalidField("spec.n", f"is {count}: give 1 to {MAX_COMPLETIONS}")
    if sampling(spec).greedy and count > 1:
        raise InvalidField("spec.n", f"is {count}, but greedy answers are all equal: set a temperature, or ask for 1")
    return count


def stop_strings(spec: pb.GenerationSpec) -> tuple[str, ...]:
    """Where the answer's text ends."""
    if len(spec.stop) > MAX_STOP_STRINGS:
        raise InvalidField("spec.stop", f"has {len(spec.stop)} strings: give at most {MAX_STOP_STRINGS}")
    for stop in spec.stop:
        if not 0 < len(stop) <= MAX_STOP_LENGTH:
            raise InvalidField(
                "spec.stop", f"has a string of {len(stop)} characters: 1 to {MAX_STOP_LENGTH} are possible"
            )
    return tuple(spec.stop)


def stop_token_ids(spec: pb.GenerationSpec, vocabulary: int) -> frozenset[int]:
    """Which tokens end the answer."""
    if len(spec.stop_token_ids) > MAX_STOP_TOKENS:
        count = len(spec.stop_token_ids)
        raise InvalidField("spec.stop_token_ids", f"has {count} ids: give at most {MAX_STOP_TOKENS}")
    for token in spec.stop_token_ids:
        if not 0 <= token < vocabulary:
            raise InvalidField(
                "spec.stop_token_ids", f"{token} is not in the vocabulary: ids are 0 to {vocabulary - 1}"
            )
    return frozenset(spec.stop_token_ids)


def logprobs(spec: pb.GenerationSpec) -> int | None:
    """How many alternatives to report with each token; None: no log probabilities."""
    if not spec.HasField("logprobs"):
        return None
    if spec.logprobs > MAX_TOP_LOGPROBS:
        raise InvalidField("spec.logprobs", f"is {spec.logprobs}: give at most {MAX_TOP_LOGPROBS}")
    return spec.logprobs
