"""Incremental text. Oracle: the tokenizer decoding everything at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lorafold.engine.detokenize import TextStream, overlap, remembering


def byte_tokenizer() -> Tokenizer:
    """One token per byte, so that most characters beyond ASCII are incomplete for a while."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TOKENIZER = byte_tokenizer()


def decode(ids: object) -> str:
    return str(TOKENIZER.decode(list(ids)))  # type: ignore[call-overload]


REMEMBERED = remembering(decode)
"""As the server decodes."""


def stream(text: str, stop: tuple[str, ...] = (), prompt: str = "prompt: é") -> tuple[list[str], TextStream]:
    out = TextStream(REMEMBERED, TOKENIZER.encode(prompt).ids, stop)
    pieces = []
    for token in TOKENIZER.encode(text).ids:
        pieces.append(out.push(token))
        if out.stopped_by is not None:
            break
    return [*pieces, out.finish()], out


def test_single_ids_are_decoded_once_and_longer_ones_anew() -> None:
    asked: list[list[int]] = []
    decode_once = remembering(lambda ids: str(asked.append(list(ids)) or list(ids)))  # type: ignore[func-returns-value]
    assert [decode_once(ids) for ids in ([5], [5], [5, 6], [6], [5, 6])] == ["[5]", "[5]", "[5, 6]", "[6]", "[5, 6]"]
    assert asked == [[5], [5, 6], [6], [5, 6]]


@given(st.text(max_size=60))
def test_pieces_add_up_to_the_whole_text(text: str) -> None:
    pieces, _ = stream(text)
    assert "".join(pieces) == text


def test_no_piece_has_half_a_character() -> None:
    pieces, _ = stream("aé漢🙂z")
    assert [piece for piece in pieces if piece] == ["a", "é", "漢", "🙂", "z"]


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    out = TextStream(decode, [])
    assert [out.push(token) for token in TOKENIZER.encode("é").ids[:1]] == [""]
    assert out.finish() == "\ufffd"


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings_cut_where_a_search_of_the_whole_text_would(text: str, stop: list[str]) -> None:
    pieces, out = stream(text, tuple(stop))
    # The stop string that is complete first; of those complete with the same character, the one that starts first.
    ends = [text.find(item) + len(item) for item in stop if item in text]
    if not ends:
        assert "".join(pieces) == text
        assert out.stopped_by is None
    else:
        seen = text[: min(ends)]
        assert "".join(pieces) == text[: min(seen.find(item) for item in stop if item in seen)]
        assert out.stopped_by in stop


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    pieces, out = stream("one END. two", ("END!",))
    assert pieces[4:8] == ["", "", "", "END."]
    assert out.stopped_by is None


@pytest.mark.parametrize(
    ("text", "stop", "size"), [("abc", "cd", 1), ("abab", "abac", 2), ("x", "y", 0), ("aa", "aa", 1)]
)
def test_overlap(text: str, stop: str, size: int) -> None:
    assert overlap(text, stop) == size
