"""Token ids to text, one at a time: whole characters only, and nothing that may still become a stop string.

Knows a tokenizer only as something that decodes a list of ids.
"""

from collections.abc import Callable, Sequence

CONTEXT = 6
"""Prompt tokens to decode along with the first ones: some tokenizers write a token differently at the start."""
INCOMPLETE = "\ufffd"

Decode = Callable[[Sequence[int]], str]


def remembering(decode: Decode) -> Decode:
    """`decode`, with what single ids gave remembered: every other call of a `TextStream` is for one."""
    texts: dict[int, str] = {}

    def remembered(ids: Sequence[int]) -> str:
        if len(ids) != 1:
            return decode(ids)
        if ids[0] not in texts:
            texts[ids[0]] = decode(ids)
        return texts[ids[0]]

    return remembered


class TextStream:
    """The text of one answer, as it grows."""

    def __init__(self, decode: Decode, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._ids = list(prompt[-CONTEXT:])
        self._stop = tuple(stop)
        self._told = 0
        """Ids whose text is known to be out; decoding starts here so that it stays short."""
        self._read = len(self._ids)
        """Ids whose text is complete."""
        self._held = ""
        """Text that may be the start of a stop string."""
        self.stopped_by: str | None = None
        """The stop string that was met, if any."""

    def push(self, token: int) -> str:
        """Adds a token; returns the text that is certain now. After a stop string there is no more."""
        self._ids.append(token)
        before = self._decode(self._ids[self._told : self._read])
        now = self._decode(self._ids[self._told :])
        if now.endswith(INCOMPLETE) or len(now) <= len(before):
            return ""
        self._told, self._read = self._read, len(self._ids)
        return self._release(now[len(before) :])

    def finish(self) -> str:
        """The text that was held back; call once, at the end."""
        if self.stopped_by is not None:
            return ""
        before = self._decode(self._ids[self._told : self._read])
        rest = self._release(self._decode(self._ids[self._told :])[len(before) :])
        held, self._held = self._held, ""
        return rest if self.stopped_by is not None else rest + held

    def _release(self, text: str) -> str:
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            place, self.stopped_by = min(found, key=lambda hit: hit[0])
            self._held = ""
            return text[:place]
        keep = max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` starts with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
