"""One step of the model: the tokens that the scheduler picked go in, a token for each row that samples comes out."""

import time
from functools import partial

import structlog
import torch

from lorafold.engine.observer import Observer, count, kind_of, learn, mode_of, time_tokens
from lorafold.engine.rows import Part, Row
from lorafold.engine.runner import Piece, Runner
from lorafold.engine.sampling import Chosen, sample
from lorafold.engine.scheduler import Scheduler
from lorafold.engine.step_clock import StepClock
from lorafold.engine.tracker import Tracker
from lorafold.engine.weights import WeightsControl
from lorafold.errors import StepFailed
from lorafold.requests import Provenance
from lorafold_adapters.errors import DeviceFull, LorafoldError
from lorafold_adapters.policy import Plan, Side

log = structlog.get_logger(__name__)


class Stepper:
    """Runs steps, on the engine's thread."""

    def __init__(
        self,
        runner: Runner,
        weights: WeightsControl,
        scheduler: Scheduler,
        requests: Tracker,
        observer: Observer,
        clock: StepClock,
    ) -> None:
        self._runner = runner
        self._clock = clock
        self._weights = weights
        self._scheduler = scheduler
        self._requests = requests
        self._answers = requests.answers
        self._observer = observer

    def use_device(self) -> None:
        """The present thread is the one that runs steps."""
        self._runner.use_device()

    def run(self, parts: list[Part], plan: Plan) -> None:
        """Runs one step. If it fails, so do the requests in it, but for an AcceleratorError, which is raised."""
        start = time.monotonic()
        self._clock.begin()
        try:
            logits_SV = self._runner.run([piece(part, plan) for part in parts])
            self._answers.tell_rest()  # On a GPU that step still runs. Choosing tokens may wait for it.
            sampling = [part.row for part in parts if part.samples]
            chosen = sample(logits_SV, [row.sampling for row in sampling]) if sampling else None
            self._clock.end(partial(self._observer.step, *kind_of(parts, plan.folded)))
            read = [0 if part.row.ended else self._scheduler.ran(part) for part in parts]
            self._extend(sampling, chosen, plan.folded)
        except torch.AcceleratorError:
            raise  # The device's context is lost, and with it every later step.
        except Exception as error:
            self._fail(parts, error)
            return
        learn(self._weights.costs, parts, plan.folded, time.monotonic() - start)
        count(self._observer, parts, read, plan.folded)
        self._clock.poll()

    def _fail(self, parts: list[Part], error: Exception) -> None:
        log.error("step failed", requests=[part.row.request.id for part in parts], exc_info=True)
        told: LorafoldError = StepFailed(f"the model failed on this batch ({error}): send the request again")
        if isinstance(error, torch.OutOfMemoryError):
            told = DeviceFull("the device's memory is full: lower engine.kv_memory_gib or engine.prefill_tokens")
        failed = {part.row for part in parts}
        self._requests.fail_all(told, lambda row: row in failed)

    def _extend(self, rows: list[Row], chosen: Chosen | None, folded: Side) -> None:
        """Adds the chosen tokens, once they are there."""
        if chosen is None:
            return
        picks = chosen.read()
        generation = self._weights.state.generation
        modes, before = [mode_of(row, folded) for row in rows], [row.last_token for row in rows]
        told = [Provenance(mode=mode, generation=generation) for mode in modes]
        self._answers.extend(rows, picks, told, time.monotonic())
        time_tokens(self._observer, rows, before, modes)
        for row in rows:
            if not row.ended and row.stalled():
                self._scheduler.pause(row)


def piece(part: Part, plan: Plan) -> Piece:
    """What the model is to compute of a row."""
    row = part.row
    return Piece(
        tokens=row.tokens[row.cached : row.cached + part.tokens],
        pages=row.pages,
        past=row.cached,
        adapter=row.request.adapter if plan.folded is None else None,
        samples=part.samples,
    )
