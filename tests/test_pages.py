"""Who owns which page, and which prefixes are known. The oracle is a plain list of what was written."""

from hypothesis import given
from hypothesis import strategies as st

from lorafold.engine.pages import Holding, PagePool, sliding_maxima
from lorafold.engine.step import runs_of
from lorafold.errors import KvFull

SIZE = 4


def sequence(pool: PagePool, tokens: list[int], adapter: str | None = None) -> Holding:
    holding = pool.start(adapter, tokens)
    pool.grow(holding, len(tokens), at_most=len(tokens))
    pool.seal(holding, tokens, len(tokens))
    return holding


def test_a_prefix_is_found_by_adapter_and_every_token_before_it() -> None:
    pool = PagePool(pages=50, size=SIZE)
    first = sequence(pool, list(range(12)))
    again = pool.start(None, list(range(12)))
    assert again.pages == first.pages[:2]  # One token at least is left to compute.
    assert pool.start("x", list(range(12))).pages == []
    assert pool.start(None, [9, *range(1, 12)]).pages == []
    assert pool.start(None, [*range(4), 9, 9, 9, 9, 9]).pages == first.pages[:1]


def test_the_same_page_after_another_one_is_another_page() -> None:
    pool = PagePool(pages=50, size=SIZE)
    sequence(pool, [1, 1, 1, 1, 2, 2, 2, 2, 0])
    assert pool.start(None, [2, 2, 2, 2, 0]).pages == []


def test_prefixes_outlive_their_sequence_until_the_room_is_needed() -> None:
    pool = PagePool(pages=5, size=SIZE)
    pool.release(sequence(pool, list(range(8))))
    assert pool.available == 4
    kept = pool.start(None, list(range(9)))
    assert len(kept.pages) == 2
    pool.release(kept)
    pool.release(sequence(pool, [9] * 16))
    assert pool.start(None, list(range(9))).pages == []


def test_forgotten_prefixes_are_not_found_even_of_sequences_that_run() -> None:
    pool = PagePool(pages=20, size=SIZE)
    running = sequence(pool, list(range(8)))
    pool.forget()
    assert pool.start(None, list(range(9))).pages == []
    pool.grow(running, 12, at_most=12)
    pool.seal(running, list(range(12)), 12)
    assert pool.start(None, list(range(13))).pages == []
    pool.release(running)
    pool.check_integrity([])


def test_sequences_lie_in_one_piece_while_there_is_room() -> None:
    pool = PagePool(pages=41, size=SIZE)
    holdings = [pool.start(None, [index]) for index in range(4)]
    for tokens in range(1, 41):
        for holding in holdings:
            pool.grow(holding, tokens, at_most=40)
    assert all(len(list(runs_of(holding.pages, 40, SIZE))) == 1 for holding in holdings)


def test_promised_room_is_taken_when_nothing_else_is_left() -> None:
    pool = PagePool(pages=11, size=SIZE)
    greedy = pool.start(None, [0])
    pool.grow(greedy, 4, at_most=40)
    other = pool.start(None, [1])
    pool.grow(other, 36, at_most=36)
    pool.check_integrity([greedy, other])
    assert pool.available == 0


def test_sequences_lie_in_one_piece_where_prefixes_that_were_unused_for_long_lay() -> None:
    pool = PagePool(pages=13, size=SIZE)
    prompts = [[index] * 8 for index in range(6)]
    holdings = [sequence(pool, prompt) for prompt in prompts]
    for index in (4, 5, 0, 2, 1, 3):  # Last used: the second pair, and one of the first.
        pool.release(holdings[index])
    piece = pool.start(None, [9])
    pool.grow(piece, 16, at_most=16)
    assert len(list(runs_of(piece.pages, 16, SIZE))) == 1
    known = [len(pool.start(None, [*prompt, 7]).pages) for prompt in prompts]
    assert known == [2, 2, 2, 2, 0, 0]


def test_what_was_promised_to_others_is_taken_as_neighbours() -> None:
    pool = PagePool(pages=41, size=SIZE)
    greedy = pool.start(None, [0])
    pool.grow(greedy, 4, at_most=160)
    other = pool.start(None, [1])
    pool.grow(other, 80, at_most=80)
    assert len(list(runs_of(other.pages, 80, SIZE))) == 1
    pool.grow(greedy, 80, at_most=160)
    assert len(list(runs_of(greedy.pages, 80, SIZE))) == 1
    pool.check_integrity([greedy, other])


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 8))
def test_maxima_of_neighbours(values: list[int], width: int) -> None:
    expected = [max(values[place : place + width]) for place in range(len(values) - width + 1)]
    assert list(sliding_maxima(values, width)) == expected


@given(
    st.lists(
        st.tuples(st.sampled_from(["start", "grow", "release", "forget"]), st.integers(0, 7), st.integers(1, 20)),
        max_size=60,
    )
)
def test_no_two_sequences_share_a_page_that_they_would_fill_differently(actions: list[tuple[str, int, int]]) -> None:
    pool = PagePool(pages=16, size=SIZE)
    running: list[tuple[Holding, list[int]]] = []
    content: dict[int, tuple[int, ...]] = {}
    for action, which, count in actions:
        if action == "start":
            tokens = [which % 2] * count
            holding = pool.start(None, tokens)
            for index, page in enumerate(holding.pages):
                assert content[page] == tuple(tokens[index * SIZE : (index + 1) * SIZE])
            running.append((holding, tokens))
        elif action == "forget":
            pool.forget()
        elif running:
            holding, tokens = running[which % len(running)]
            if action == "release":
                pool.release(holding)
                running.pop(which % len(running))
            else:
                grow(pool, holding, tokens, count, content)
        pool.check_integrity([holding for holding, _ in running])


def grow(pool: PagePool, holding: Holding, tokens: list[int], count: int, content: dict[int, tuple[int, ...]]) -> None:
    try:
        pool.grow(holding, len(tokens), at_most=len(tokens) + count)
    except KvFull:
        return
    for index in range(holding.sealed, len(tokens) // SIZE):
        content[holding.pages[index]] = tuple(tokens[index * SIZE : (index + 1) * SIZE])
    pool.seal(holding, tokens, len(tokens))
    tokens.append(count % 3)
