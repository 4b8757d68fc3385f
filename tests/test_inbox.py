"""Commands to the engine's thread. No engine runs."""

import pytest

from lorafold.engine.inbox import Inbox
from lorafold.errors import EngineStopped


def test_commands_run_in_order_and_their_results_arrive() -> None:
    inbox, ran = Inbox(), list[int]()
    first = inbox.call(lambda: ran.append(1))
    second = inbox.call(lambda: len(ran))
    inbox.run_all(wait=0)
    assert (first.result(0), second.result(0)) == (None, 1)


def test_commands_that_bring_forth_others_let_steps_run_between_them() -> None:
    inbox, ran = Inbox(), list[int]()

    def again() -> None:
        ran.append(len(ran))
        if len(ran) < 100:
            inbox.call(again)

    inbox.call(again)
    inbox.run_all(wait=0)
    assert 0 < len(ran) <= 2
    while len(ran) < 100:
        before = len(ran)
        inbox.run_all(wait=0)
        assert len(ran) > before


def test_a_command_that_fails_keeps_nobody_from_running() -> None:
    inbox = Inbox()
    failed, fine = inbox.call(lambda: 1 // 0), inbox.call(lambda: "fine")
    inbox.run_all(wait=0)
    assert fine.result(0) == "fine"
    with pytest.raises(ZeroDivisionError):
        failed.result(0)


def test_a_closed_inbox_refuses_what_is_queued_and_what_comes() -> None:
    inbox = Inbox()
    queued = inbox.call(lambda: None)
    inbox.close()
    for future in (queued, inbox.call(lambda: None)):
        with pytest.raises(EngineStopped):
            future.result(0)
