"""What the engine thread does to the model's weights between steps: turns of the policy, calls of an operator, and
adapters that come and go. Knows no requests, only lanes.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import structlog
from torch import nn

from lorafold.errors import BaseReloading
from lorafold_adapters import AdapterManager
from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.errors import AdapterNotLoaded, BaseCorrupt, LorafoldError
from lorafold_adapters.policy import Lane, LaneView, Policy, PolicyKind

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsState:
    """Which adapter is in the weights, and why."""

    generation: int
    folded: str | None
    """Content digest; None: the weights are the base's."""
    pinned: bool
    reason: str
    undo_bytes: int
    """Memory that is held to give the base back."""
    reloads: int
    """How often the base was found damaged and loaded again."""
    provenance: str
    """What folds into a quantised base start from; empty if it is not quantised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What one change of the weights took."""

    state: WeightsState
    seconds: float
    weight_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """What reading every weight found."""

    tensors: int
    mismatched: tuple[str, ...]
    base_fingerprint: str


class WeightsControl:
    """Carries out plans. Every method runs on the engine's thread, between steps."""

    def __init__(
        self,
        manager: AdapterManager,
        policy: Policy,
        on_change: Callable[[Change], None],
        load_base: Callable[[], nn.Module],
    ) -> None:
        """`load_base` loads the base anew, for a base that turned out damaged."""
        self._manager = manager
        self._load_base = load_base
        self._damaged = False
        self._reloads = 0
        self._policy = policy
        self._on_change = on_change
        self._wanted: Counter[str] = Counter()
        self._pinned: str | None = None
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
            pinned=self._pinned is not None,
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
        self._pinned = None
        try:
            if self._damaged:
                raise BaseCorrupt(self._reason)
            self._manager.unmerge_adapter()
            self._reason = "given back at the second attempt"
        except BaseCorrupt as error:
            log.critical("base is damaged: loading it again", error=str(error))
            self._manager.reload(self._load_base())
            self._reloads += 1
            self._reason = f"loaded again: {error}"
        self._damaged = False
        self._on_change(Change(state=self.state, seconds=time.perf_counter() - start, weight_bytes=0))
        log.warning("base is whole again", generation=self.state.generation, reason=self._reason)

    @property
    def held(self) -> str | None:
        """The adapter that MergeAdapter holds folded, if any."""
        return self._pinned

    def lane(self, adapter: str | None, kind: PolicyKind, rows: dict[Lane, int]) -> Lane:
        """The lane of a row that starts now."""
        if adapter is not None and adapter == self._pinned:
            return adapter
        if kind is PolicyKind.AUTO and adapter in self._unfoldable:
            return None
        return self._policy.lane(adapter, kind, self._view(rows))

    def next_lane(self, rows: dict[Lane, int], now: float) -> Lane:
        """Plans the next step and makes the weights what it needs.

        Raises TurnFailed if the adapter cannot be folded; the base may be damaged then.
        """
        plan = self._policy.plan(self._view(rows), now)
        if plan.folded == self._manager.fold_state.folded:
            return plan.folded
        try:
            self._change(plan.folded, plan.reason)
        except LorafoldError as error:
            self._pinned = None
            self._unfoldable.add(plan.folded)
            raise TurnFailed(plan.folded, error) from error
        return plan.folded

    def pin(self, adapter: str) -> Change:
        """Folds `adapter` and keeps it folded over the policy. Raises what `merge_adapter` raises."""
        change = self._change(adapter, "held by MergeAdapter")
        self._pinned = adapter
        log.info("adapter held", adapter=adapter, seconds=change.seconds)
        return replace(change, state=self.state)

    def unpin(self) -> Change:
        """Gives the base back and the weights to the policy again."""
        self._pinned = None
        log.info("weights given back to the policies")
        return self._change(None, "given back by UnmergeAdapter")

    def verify(self) -> Verification:
        """Gives the base back, reads every weight, and folds again what was pinned."""
        self._change(None, "given back by VerifyBase")
        mismatched = self._manager.verify_base()
        if mismatched:
            self._damaged = True
            self._reason = f"{len(mismatched)} tensors are not what was loaded, '{mismatched[0]}' for one"
        elif self._pinned is not None:
            self._change(self._pinned, "held by MergeAdapter")
        base = self._manager.base
        return Verification(tensors=len(base.tensors), mismatched=tuple(mismatched), base_fingerprint=base.digest)

    def acquire(self, bound: BoundAdapter) -> None:
        """One more deployment points at this adapter; it is put on the device if it is not there yet."""
        if bound.digest not in self._manager.adapters:
            self._manager.load(bound.digest, bound)
            if extra := self._manager.extra_bytes(bound):
                log.info("folding this adapter takes memory beside the base", adapter=bound.digest, bytes=extra)
        self._wanted[bound.digest] += 1

    def release(self, adapter: str) -> None:
        """One deployment less points at this adapter."""
        self._wanted[adapter] -= 1

    def sweep(self, used: set[str]) -> None:
        """Drops the adapters that no deployment points at and no row uses; on a damaged base, later."""
        if self.damaged:
            return
        for adapter in [name for name, count in self._wanted.items() if count <= 0]:
            if adapter == self._pinned:
                self._pinned = None
                log.info("hold released: no deployment points at the held adapter any more", adapter=adapter)
            if adapter in used:
                continue
            if self._manager.fold_state.folded == adapter:
                with contextlib.suppress(BaseCorrupt):
                    self._change(None, "no deployment points at the folded adapter any more")
            if self.damaged:
                return
            self._manager.drop(adapter)
            self._unfoldable.discard(adapter)
            log.info("adapter dropped", adapter=adapter)
            del self._wanted[adapter]

    def leaving(self, adapter: str) -> bool:
        """True while an adapter that no deployment points at is still on the device."""
        return self._wanted.get(adapter, 1) <= 0

    def require(self, adapter: str) -> None:
        """Raises AdapterNotLoaded if the adapter was dropped."""
        if adapter not in self._manager.adapters:
            raise AdapterNotLoaded(f"adapter {adapter[:12]} was removed while the request was on its way: try again")

    def _view(self, rows: dict[Lane, int]) -> LaneView:
        return LaneView(pinned=self._pinned, rows=rows)

    def _change(self, adapter: str | None, reason: str) -> Change:
        if self.damaged:
            raise BaseReloading(f"the base is damaged and about to be loaded again: {self._reason}")
        before = self._manager.fold_state.generation
        start = time.perf_counter()
        written = 0
        self._reason = reason
        try:
            if adapter is None:
                self._manager.unmerge_adapter()
            else:
                written = self._manager.merge_adapter(adapter)
        except LorafoldError as error:
            self._reason = str(error)
            raise
        finally:
            change = Change(state=self.state, seconds=time.perf_counter() - start, weight_bytes=written)
            if change.state.generation != before:
                log.debug("weights changed", folded=change.state.folded, generation=change.state.generation)
                self._on_change(change)
        return change


class TurnFailed(Exception):
    """The lane's adapter could not be folded; the base is back unless `WeightsControl.damaged`."""

    def __init__(self, lane: Lane, error: LorafoldError) -> None:
        super().__init__(str(error))
        self.lane = lane
        self.error = error
