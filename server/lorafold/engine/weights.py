"""What the engine thread does to the model's weights between steps: turns of the policy and calls of an operator. Knows
no requests, only how many there are of each kind.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime

import structlog
from torch import nn

from lorafold.engine.weights_state import Change, Result, Transition, Verification, WeightsObserver, WeightsState
from lorafold.errors import BaseReloading
from lorafold_adapters import AdapterManager, FoldState
from lorafold_adapters.costs import Costs
from lorafold_adapters.errors import BaseCorrupt, LorafoldError
from lorafold_adapters.policy import Cause, Group, Hold, Plan, Policy, PolicyKind, QueueView, Side

log = structlog.get_logger(__name__)
REMEMBERED = 16
"""Changes that are told to those who ask."""


class WeightsControl:
    """Carries out plans. Every method runs on the engine's thread, between steps."""

    def __init__(
        self,
        manager: AdapterManager,
        policy: Policy,
        costs: Costs,
        observer: WeightsObserver,
        load_base: Callable[[], nn.Module],
    ) -> None:
        """`costs` learns what changes take. `load_base` loads the base anew, for a base that turned out damaged."""
        self._manager = manager
        self._load_base = load_base
        self._damaged = False
        self._reloads = 0
        self._policy = policy
        self.costs = costs
        """What steps and changes of the weights take."""
        self._observer = observer
        self.decision: Plan | None = None
        """The present plan; None before the first."""
        self.transitions: deque[Transition] = deque(maxlen=REMEMBERED)
        """The latest change first."""
        self._hold: Hold | None = None
        self._unfoldable: set[str | None] = set()
        """Adapters whose fold failed: from then on `auto` leaves them unmerged."""
        self._reason = "nothing was folded yet"

    @property
    def state(self) -> WeightsState:
        """Now."""
        fold = self._manager.fold_state
        return WeightsState(
            generation=fold.generation,
            folded=fold.folded,
            pinned=self._hold is not None,
            reason=self._reason,
            undo_bytes=fold.undo_bytes,
            reloads=self._reloads,
            provenance=fold.provenance or "",
        )

    @property
    def damaged(self) -> bool:
        """True if the weights may be neither the base's nor an adapter's: nothing may run on them until `recover`."""
        return self._damaged or self._manager.fold_state.dirty

    def recover(self) -> None:
        """Gives the base back once more, or else loads it again. Raises BaseCorrupt if that does not help either."""
        start = time.perf_counter()
        self._set_hold(None)
        result = Result.RESTORED
        try:
            if self._damaged:
                raise BaseCorrupt(self._reason)
            self._manager.unmerge_adapter()
            self._reason = "given back at the second attempt"
        except BaseCorrupt as error:
            log.critical("base is damaged: loading it again", error=str(error))
            self._manager.reload(self._load_base())
            self._reloads += 1
            result = Result.RELOADED
            self._reason = f"loaded again: {error}"
        self._damaged = False
        self._tell(self._done(result, start, 0))
        log.warning("base is whole again", generation=self.state.generation, reason=self._reason)

    @property
    def held(self) -> Hold | None:
        """What an operator holds in the weights, if anything."""
        return self._hold

    def plan(self, rows: Mapping[Group, int], places: int, now: float, *, draining: bool = False) -> Plan:
        """What the next step does, of rows that could run; changes nothing yet. `draining` suspends what is held."""
        folded = self._manager.fold_state.folded
        held = None if draining else self._hold
        view = QueueView(held=held, folded=folded, rows=self._foldable(rows), places=places)
        plan = self._policy.plan(view, now)
        if self.decision is None or (plan.folded, plan.cause) != (self.decision.folded, self.decision.cause):
            log.debug("plan", folded=plan.folded, cause=plan.cause.value, reason=plan.reason)
            self._observer.planned(plan)
        self.decision = plan
        return plan

    def pause(self) -> None:
        """No row can run before the next plan."""
        self._policy.pause()

    def _foldable(self, rows: Mapping[Group, int]) -> Mapping[Group, int]:
        """The same, with `auto` rows as unmerged ones where a fold has failed before."""
        if not self._unfoldable:
            return rows
        known: Counter[Group] = Counter()
        for (adapter, kind), count in rows.items():
            beside = kind is PolicyKind.AUTO and adapter in self._unfoldable
            known[adapter, PolicyKind.UNMERGED if beside else kind] += count
        return known

    def needs_change(self, plan: Plan) -> bool:
        """True if `carry_out` would change the weights."""
        return plan.folded != self._manager.fold_state.folded

    def carry_out(self, plan: Plan) -> None:
        """Makes the weights what the plan needs.

        Raises TurnFailed if the adapter cannot be folded; the base may be damaged then.
        """
        if not self.needs_change(plan):
            return
        try:
            self._change(plan.folded, plan.reason, loud=plan.cause is not Cause.TURN)
        except LorafoldError as error:
            self._set_hold(None)
            self._unfoldable.add(plan.folded)
            raise TurnFailed(plan.folded, error) from error

    def refuse_fold(self, adapter: Side) -> None:
        """Raises what folding this adapter would raise, as far as that can be known before."""
        bound = self._manager.adapters.get(adapter) if adapter is not None else None
        if bound is not None:
            self._manager.gate.check(bound)

    def obey(self, folded: Side, *, hold: bool) -> Change:
        """Folds an adapter or gives the base back, over the policy; keeps it so if `hold`.

        Raises what `merge_adapter` and `unmerge_adapter` raise.
        """
        what = "given back" if folded is None else "folded"
        change = self._change(folded, f"{what} by hand{' and held' if hold else ''}")
        self._set_hold(Hold(folded) if hold else None)
        log.info("weights changed by hand", folded=folded, held=hold, seconds=change.seconds)
        return replace(change, state=self.state)

    def let_go(self) -> WeightsState:
        """Hands the weights to the policy, as they are."""
        if self._hold is not None:
            self._set_hold(None)
            self._reason = f"{self._reason}, then released"
            log.info("weights handed to the policy")
        return self.state

    def verify(self) -> Verification:
        """Gives the base back, reads every weight, and folds again what was pinned."""
        self._change(None, "given back by VerifyBase")
        mismatched = self._manager.verify_base()
        self._observer.verified(not mismatched)
        if mismatched:
            self._damaged = True
            self._reason = f"{len(mismatched)} tensors are not what was loaded, '{mismatched[0]}' for one"
        elif self._hold is not None and self._hold.folded is not None:
            self._change(self._hold.folded, "folded by hand and held")
        base = self._manager.base
        return Verification(tensors=len(base.tensors), mismatched=tuple(mismatched), base_fingerprint=base.digest)

    def give_back(self, adapter: str) -> None:
        """Makes sure that an adapter is not in the weights, as it is to leave the device. Raises BaseCorrupt."""
        if self.damaged:
            raise BaseCorrupt(self._reason)
        why = "the folded adapter leaves the device"
        if self._hold == Hold(adapter):
            self._set_hold(None)
            why = "the hold ended: no deployment has its adapter any more"
            log.info("hold released: the held adapter is dropped", adapter=adapter)
        if self._manager.fold_state.folded == adapter:
            self._change(None, why)
        self._unfoldable.discard(adapter)

    def _change(self, adapter: str | None, reason: str, *, loud: bool = True) -> Change:
        if self.damaged:
            raise BaseReloading(f"the base is damaged and about to be loaded again: {self._reason}")
        before = self._manager.fold_state
        start = time.perf_counter()
        written, result = 0, Result.RESTORED if adapter is None else Result.FOLDED
        self._reason = reason
        try:
            if adapter is None:
                self._manager.unmerge_adapter()
            else:
                written = self._manager.merge_adapter(adapter)
            self._learn(before, time.perf_counter() - start)
        except LorafoldError as error:
            self._reason = str(error)
            result = Result.DAMAGED if self.damaged else Result.FAILED
            raise
        finally:
            change = self._done(result, start, written)
            if change.state.generation != before.generation:
                self._tell(change, loud=loud)
        return change

    def _set_hold(self, hold: Hold | None) -> None:
        self._hold = hold
        self._observer.held(hold is not None)

    def _done(self, result: Result, start: float, written: int) -> Change:
        seconds, phases = time.perf_counter() - start, self._manager.take_phases()
        return Change(state=self.state, result=result, seconds=seconds, weight_bytes=written, phases=phases)

    def _tell(self, change: Change, *, loud: bool = True) -> None:
        state = change.state
        (log.info if loud else log.debug)(
            "weights changed",
            folded=state.folded,
            generation=state.generation,
            milliseconds=round(change.seconds * 1000, 1),
            reason=state.reason,
        )
        self.transitions.appendleft(
            Transition(
                time=datetime.now(UTC),
                generation=state.generation,
                folded=state.folded,
                reason=state.reason,
                seconds=change.seconds,
            )
        )
        self._observer.changed(change)
        if change.result is not Result.FOLDED:
            self._observer.verified(change.result is not Result.DAMAGED)

    def _learn(self, before: FoldState, seconds: float) -> None:
        after = self._manager.fold_state
        if after.generation != before.generation:
            was, now = before.folded is not None, after.folded is not None
            self.costs.changed(was_folded=was, is_folded=now, seconds=seconds)


class TurnFailed(Exception):
    """The adapter could not be folded; the base is back unless `WeightsControl.damaged`."""

    def __init__(self, adapter: Side, error: LorafoldError) -> None:
        super().__init__(str(error))
        self.adapter = adapter
        self.error = error
