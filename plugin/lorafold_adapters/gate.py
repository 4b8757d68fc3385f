"""Decides whether an adapter may be folded: whether it can be at all, and how much of it the weights would keep."""

from collections.abc import Iterator

from lorafold_adapters.binding import BoundAdapter
from lorafold_adapters.errors import AdapterUnsupported, DeltaLost, FoldFailed
from lorafold_adapters.fidelity import Fidelity, ParameterFidelity, measure
from lorafold_adapters.fold import Weights

MAX_DELTA_ERROR = 0.25
"""Folding is refused if more than this of the delta is lost: up to there each adapter of the demo set keeps over 90 %
of its accuracy; at 0.4 one of them is down to 78 %, at 0.6 to 58 % (`python -m bench.fidelity`)."""
REMEMBERED = 1000
"""Adapters whose fidelity is kept; the one asked for least recently goes first."""


class FoldGate:
    """The fidelity of adapters on one base, each measured once. Reads the model: its thread, between two steps."""

    def __init__(self, weights: Weights, max_delta_error: float, coarse: str) -> None:
        """`coarse`: what rounds, for people, e.g. `torch.bfloat16 weights`."""
        self.max_delta_error = max_delta_error
        self._weights = weights
        self._coarse = coarse
        self._known: dict[str, Fidelity] = {}

    def fidelity(self, bound: BoundAdapter) -> Fidelity:
        """How much of the adapter a fold keeps; takes about three folds the first time."""
        for _ in self.measure(bound):
            pass
        self._known[bound.digest] = found = self._known.pop(bound.digest)  # It is the one asked for last.
        return found

    def measure(self, bound: BoundAdapter) -> Iterator[ParameterFidelity]:
        """The same, parameter by parameter, for whoever has other work to do between two of them."""
        if bound.digest in self._known:
            return
        measured = []
        for name, change, base, rounding in self._weights.planned(bound):
            measured.append(measure(name, change, base, rounding))
            yield measured[-1]
        self._known[bound.digest] = Fidelity(parameters=tuple(measured))
        if len(self._known) > REMEMBERED:
            del self._known[next(iter(self._known))]

    def parameters(self, bound: BoundAdapter) -> int:
        """How many parameters `measure` goes through; none of an adapter that was measured before."""
        return 0 if bound.digest in self._known else sum(1 for _ in self._weights.changes(bound))

    def forget(self) -> None:
        """Everything that was measured is measured again when it is asked for."""
        self._known.clear()

    def check(self, bound: BoundAdapter) -> None:
        """Raises AdapterUnsupported if the adapter cannot be folded into this base, DeltaLost if it should not be.

        Measures its fidelity first if nobody has; raises FoldFailed if that fails.
        """
        if bound.fold_refusal is not None:
            raise AdapterUnsupported(f"the adapter cannot be folded: {bound.fold_refusal}; serve it unmerged")
        try:
            lost = self.fidelity(bound).delta_error
        except Exception as error:
            raise FoldFailed(f"adapter {bound.digest[:12]} cannot be folded, nothing was changed: {error}") from error
        if not lost <= self.max_delta_error:
            raise DeltaLost(
                f"folding would change the adapter's delta by {lost:.3g} of its size, more than max_delta_error "
                f"({self.max_delta_error:g}) allows, as {self._coarse} are too coarse for it: "
                "serve it unmerged, or the base in a finer dtype"
            )
