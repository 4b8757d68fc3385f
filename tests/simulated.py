"""A machine that serves rows in simulated time: what a policy is worth, the same in every run."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from bench.arrivals import Arrival, arrivals
from lorafold_adapters.costs import Costs
from lorafold_adapters.policy import Group, Policy, PolicyKind, QueueView, Side

ANSWER, PLACES, ADAPTERS = 24, 16, 16
Make = Callable[[Costs], Policy]


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What things take there, seconds."""

    step: float
    """Of one row on folded weights."""
    row: float
    """Each further one."""
    beside: float
    """Two-path over plain steps."""
    adapter: float
    """Each adapter beside the weights after the first."""
    fold: float
    restore: float

    def plain(self, rows: int) -> float:
        return self.step + self.row * (rows - 1)

    def two_path(self, rows: int, adapters: int) -> float:
        return self.plain(rows) * self.beside + self.adapter * (adapters - 1)

    def change(self, before: Side, after: Side) -> float:
        return self.restore if after is None else self.fold if before is None else self.fold + self.restore


@dataclass(kw_only=True, slots=True)
class Answer:
    due: float
    adapter: str
    left: int = ANSWER


class Server:
    """Serves answers of one policy on a machine."""

    def __init__(self, machine: Machine, kind: PolicyKind, make: Make) -> None:
        self._machine, self._kind, self._costs = machine, kind, Costs()
        self._policy = make(self._costs)
        self._noise = random.Random(0)
        self._folded: Side = None
        self.now = 0.0

    def step(self, queue: list[Answer]) -> None:
        """Plans, changes the weights if need be, and gives one token to each row that runs."""
        rows: Counter[Group] = Counter((answer.adapter, self._kind) for answer in queue)
        plan = self._policy.plan(QueueView(held=None, folded=self._folded, rows=rows, places=PLACES), self.now)
        if plan.folded != self._folded:
            took = self._took(self._machine.change(self._folded, plan.folded))
            was, self._folded = self._folded, plan.folded
            self._costs.changed(was_folded=was is not None, is_folded=plan.folded is not None, seconds=took)
        running = [answer for answer in queue if plan.runs((answer.adapter, self._kind))][:PLACES]
        beside = len({answer.adapter for answer in running}) if plan.folded is None else 0
        usual = self._machine.two_path(len(running), beside) if beside else self._machine.plain(len(running))
        self._costs.step(adapters=beside, rows=len(running), seconds=self._took(usual))
        for answer in running:
            answer.left -= 1

    def rest(self, until: float) -> None:
        """Nobody wants anything before."""
        self._policy.pause()
        self.now = max(self.now, until)

    def _took(self, usual: float) -> float:
        seconds = usual * self._noise.uniform(1, 1.1)
        self.now += seconds
        return seconds


def seconds_a_token(server: Server, traffic: list[Arrival]) -> float:
    """The mean over all answers, from when each was due to its end."""
    coming = iter(traffic)
    following = next(coming, None)
    queue: list[Answer] = []
    took = []
    while queue or following:
        if following and not queue:
            server.rest(following.at)
        while following and following.at <= server.now:
            queue.append(Answer(due=following.at, adapter=f"{following.adapter:02}"))
            following = next(coming, None)
        server.step(queue)
        took += [(server.now - answer.due) / ANSWER for answer in queue if not answer.left]
        queue = [answer for answer in queue if answer.left]
    return fmean(took)


def tokens_a_second(server: Server, answers: list[Answer]) -> float:
    """Of answers that do not end, in a minute."""
    before = sum(answer.left for answer in answers)
    while server.now < 60:
        server.step(answers)
    return (before - sum(answer.left for answer in answers)) / server.now


def usual(machine: Machine, kind: str, load: float, policy: PolicyKind, make: Make) -> float:
    """Seconds a token at this share of what the machine can do with everybody beside the weights."""
    rate = load * PLACES / ANSWER / machine.two_path(PLACES, PLACES)
    means = []
    for seed in range(4):
        traffic = arrivals(kind, rate=rate, seconds=400 / rate, adapters=ADAPTERS, seed=seed)
        means.append(seconds_a_token(Server(machine, policy, make), traffic))
    return fmean(means)
