"""Who starts when, and who is refused at once: deadlines, slow readers, limits. On a real engine without a server."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from lorafold.engine.deadlines import Deadlines
from lorafold.engine.start_times import StartTimes
from lorafold.errors import DeadlineExceeded, QueueFull
from lorafold.requests import Delta, Failed, Finished
from lorafold.services.mailbox import Mailbox
from tests.engines import Bench, Collected
from tests.models import prompts, tiny_llama
from tests.test_parity import generated
from tests.test_scheduler import row, scheduler_of

PROMPT = prompts(1, 9)[0].tolist()


@pytest.fixture
def bench() -> Iterator[Bench]:
    with Bench(tiny_llama(), slots=1) as made:
        yield made


class Slow(Collected):
    """A reader that takes nothing more after some events, until it is told to."""

    def __init__(self, takes: int) -> None:
        super().__init__()
        self.takes = takes
        self.paused = threading.Event()

    def stalled(self) -> bool:
        if len(self.events) < self.takes:
            return False
        self.paused.set()
        return True


def test_a_slow_reader_pauses_its_own_request_and_nobody_elses(bench: Bench) -> None:
    expected = generated(tiny_llama(), PROMPT, 100)
    slow = Slow(takes=20)
    bench.engine.submit(bench.request("slow", PROMPT, 100), slow, slow.stalled)
    assert slow.paused.wait(30)
    other = bench.submit("other", PROMPT, 100)  # There is one place, which the slow one gave up.
    assert isinstance(other.last, Finished)
    assert other.tokens == expected
    assert len(slow.events) == 20
    slow.takes = 1000
    bench.engine.resume("slow")
    assert isinstance(slow.last, Finished)
    assert slow.tokens == expected
    bench.engine.resume("slow")  # Unknown by now.


def test_a_paused_request_can_be_cancelled_and_its_deadline_counts(bench: Bench) -> None:
    slow, late = Slow(takes=5), Slow(takes=5)
    bench.engine.submit(bench.request("slow", PROMPT, 100), slow, slow.stalled)
    assert slow.paused.wait(30)
    bench.engine.cancel("slow")
    soon = bench.engine.now() + 0.3
    bench.engine.submit(bench.request("late", PROMPT, 100, deadline=soon), late, late.stalled)
    assert late.paused.wait(30)
    assert isinstance(late.last, Failed)
    assert isinstance(late.last.error, DeadlineExceeded)
    assert bench.engine.call(lambda: bench.scheduler.rows).result(30) == ()


def test_a_mailbox_says_when_it_is_full_and_when_there_is_room_again() -> None:
    async def read() -> list[bool]:
        resumed: list[int] = []
        mailbox = Mailbox(lambda: resumed.append(mailbox._unread), limit=8)
        found = []
        for token in range(8):
            found.append(mailbox.stalled())
            mailbox.put(Delta(index=0, text="", token_id=token, logprobs=None))
        found.append(mailbox.stalled())
        for token in range(8):
            event = await mailbox.take()
            assert isinstance(event, Delta)
            assert event.token_id == token
        assert resumed == [4]
        return found

    assert asyncio.run(read()) == [False] * 8 + [True]


def test_a_mailbox_that_never_stalled_resumes_nobody() -> None:
    async def read() -> None:
        mailbox = Mailbox(lambda: pytest.fail("nothing was paused"), limit=8)
        for token in range(8):
            mailbox.put(Delta(index=0, text="", token_id=token, logprobs=None))
        for _ in range(8):
            await mailbox.take()

    asyncio.run(read())


def test_a_request_that_cannot_start_in_time_is_refused_at_once(bench: Bench) -> None:
    for number in range(3):
        bench.submit(f"known{number}", PROMPT, 100).done.wait(30)
    blocked = [bench.submit(f"before{number}", PROMPT, 100) for number in range(200)]
    late = bench.submit("late", PROMPT, 5, deadline=bench.engine.now() + 0.2)
    assert isinstance(late.last, Failed)
    assert isinstance(late.last.error, DeadlineExceeded)
    assert "wait already" in str(late.last.error)
    other = bench.submit("other", PROMPT, 5, deployment="other", deadline=bench.engine.now() + 60)
    assert isinstance(other.last, Finished)  # Nobody of its own deployment is before it.
    for number in range(200):
        bench.engine.cancel(f"before{number}")
    del blocked


def test_nobody_is_refused_who_might_just_start_in_time() -> None:
    times = StartTimes()
    asked = row("asked", deadline=10.0)
    times.check(asked, ahead=1000, places=1, now=0.0)  # Nothing is known yet.
    served = row("served")
    served.admitted = 1.0
    times.ended(served, 3.0)
    times.check(asked, ahead=10, places=1, now=0.0)
    times.check(asked, ahead=40, places=4, now=0.0)
    with pytest.raises(DeadlineExceeded, match=r"11 completions of 'd' wait already, which takes 11\.0 s at the very"):
        times.check(asked, ahead=11, places=1, now=0.0)
    times.check(row("patient"), ahead=1000, places=1, now=0.0)


def test_a_burst_that_finds_places_is_not_refused_for_its_deadline() -> None:
    """Eight places, all free: each of eight requests that arrive at once starts in the next step."""
    with Bench(tiny_llama(), slots=8) as wide:
        warm = wide.submit("warm", PROMPT, 400).last
        assert isinstance(warm, Finished)
        answers = [Collected() for _ in range(8)]

        def arrive() -> None:
            for number, answer in enumerate(answers):
                until = wide.engine.now() + 1.5 * warm.timings.decode
                wide.engine.submit(wide.request(f"{number}", PROMPT, 4, deadline=until), answer)

        wide.engine.call(arrive).result(30)
        assert all(isinstance(answer.last, Finished) for answer in answers)


def test_rows_find_free_places_before_they_count_as_waiting() -> None:
    scheduler = scheduler_of(rows=4)
    for number in range(6):
        assert scheduler.ahead_of(row("next")) == (max(0, number - 4), 4)
        scheduler.add(row(f"{number}"))
    assert scheduler.ahead_of(row("next", max_concurrency=2)) == (4, 2)


def test_what_waited_for_its_client_does_not_say_how_long_others_take() -> None:
    times = StartTimes()
    slow = row("slow")
    slow.admitted, slow.stalled_once = 1.0, True
    times.ended(slow, now=1000.0)
    times.check(row("a", deadline=2000.0), ahead=50, places=1, now=1999.0)
    quick = row("quick")
    quick.admitted = 999.0
    times.ended(quick, now=1000.0)
    with pytest.raises(DeadlineExceeded):
        times.check(row("a", deadline=2000.0), ahead=50, places=1, now=1999.0)


def test_requests_that_nobody_reads_count_as_waiting() -> None:
    scheduler = scheduler_of(rows=2, waiting=3)
    for number in range(5):
        unread = row(f"{number}")
        scheduler.add(unread)
        scheduler.pause(unread)
    with pytest.raises(QueueFull, match=r"engine\.max_queue allows 3"):
        scheduler.add(*[row(f"new-{number}") for number in range(2)])


def test_rows_that_ended_are_not_kept_until_their_deadlines() -> None:
    deadlines = Deadlines()
    first = row("first", deadline=1.0)
    deadlines.add(first)
    for number in range(10_000):
        other = row(f"{number}", deadline=100.0)
        deadlines.add(other)
        other.ended = True
    assert len(deadlines._heap) < 200
    assert deadlines.passed(2.0) == [first]


def test_a_row_of_the_same_request_does_not_forget_that_another_waits_for_room() -> None:
    """With n = 2 the second completion asks after the first was paused, and after the client took an event."""

    async def talk() -> list[int]:
        resumed: list[int] = []
        mailbox = Mailbox(lambda: resumed.append(mailbox._unread), limit=8)
        for _ in range(8):
            mailbox.put(Delta(index=0, text="", token_id=1, logprobs=None))
        assert mailbox.stalled()  # The first completion pauses.
        await mailbox.take()
        assert not mailbox.stalled()  # The second goes on.
        for _ in range(7):
            await mailbox.take()
        return resumed

    assert asyncio.run(talk()) == [4]
