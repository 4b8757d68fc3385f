"""Judges what a load came to: which requests were lost, and which answers are not what their adapter gives alone."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import LlamaForCausalLM

from bench.alone import right
from bench.load import Reply

Question = tuple[int, tuple[int, ...]]
"""Index of the prompt, and the tokens of an answer to it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Of all replies."""

    requests: int
    lost: int
    """Without a proper end."""
    judged: int
    wrong: int
    """Of those that were judged."""
    told_apart: float
    """Share of the different answers that another adapter than theirs would not give: what the judgement is worth."""


def judge(
    base: LlamaForCausalLM, folders: Mapping[str, Path], prompts: Sequence[Sequence[int]], replies: Sequence[Reply]
) -> Verdict:
    """`folders`: by digest, every adapter whose answers may be among the replies. Any other digest is wrong."""
    ended = [reply for reply in replies if not reply.lost]
    by_digest: dict[str, set[Question]] = defaultdict(set)
    for reply in ended:
        by_digest[reply.digest].add(question(reply))
    good: set[tuple[str, Question]] = set()
    apart: list[bool] = []
    for digest, neighbour in zip(folders, [*list(folders)[1:], next(iter(folders))], strict=True):
        asked = sorted(by_digest[digest])
        good.update((digest, each) for each in passed(base, folders[digest], prompts, asked))
        others = passed(base, folders[neighbour], prompts, asked)
        apart += [each not in others for each in asked]
    return Verdict(
        requests=len(replies),
        lost=len(replies) - len(ended),
        judged=len(ended),
        wrong=sum((reply.digest, question(reply)) not in good for reply in ended),
        told_apart=round(sum(apart) / max(1, len(apart)), 4),
    )


def question(reply: Reply) -> Question:
    """What a reply claims."""
    return reply.prompt, tuple(reply.tokens)


def passed(
    base: LlamaForCausalLM, folder: Path, prompts: Sequence[Sequence[int]], asked: Sequence[Question]
) -> set[Question]:
    """Those of the answers that this adapter gives."""
    if not asked:
        return set()
    verdicts = right(base, folder, [prompts[prompt] for prompt, _ in asked], [tokens for _, tokens in asked])
    return {each for each, verdict in zip(asked, verdicts, strict=True) if verdict}


def reasons(replies: Iterable[Reply]) -> list[str]:
    """Why requests were lost, each reason once."""
    return sorted({reply.lost for reply in replies if reply.lost})
