"""Values of labels, few enough for a Prometheus to hold, and buckets of histograms. Knows no metric."""

from lorafold.config import BASE

STEP_BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Seconds of what the engine does at once."""
LATENCY_BUCKETS = (*STEP_BUCKETS, 10.0, 30.0, 60.0)
"""Seconds that somebody waits."""
OTHER, UNKNOWN = "other", "unknown"
ALWAYS = (BASE, UNKNOWN)
"""Labels beside those of deployments; UNKNOWN is of requests that name none."""
SHORT = 12


def short(digest: str) -> str:
    """As much of a digest as tells adapters apart."""
    return digest[:SHORT]


class Names:
    """Deployments that have a label of their own: as many as allowed, those that were asked for first."""

    def __init__(self, most: int) -> None:
        """`most`: beside the base's; any more share the label `other`, as do those that are gone."""
        self._most = most
        self._there: set[str] = set()
        self._known: set[str] = set()

    def add(self, deployment: str) -> None:
        """It is there, and gets a label of its own once it is asked for, if there is room."""
        self._there.add(deployment)

    def label(self, deployment: str) -> str:
        """What a deployment is called in metrics."""
        if deployment in self._known or deployment in ALWAYS:
            return deployment
        if len(self._known) >= self._most or deployment not in self._there:
            return OTHER
        self._known.add(deployment)
        return deployment

    def own(self) -> list[str]:
        """Those that have a label of their own: all that are there, unless these are too many."""
        return sorted(self._there if len(self._there) <= self._most else self._known)

    def forget(self, deployment: str) -> bool:
        """It is gone, which makes room for another one; False if it had no label of its own."""
        self._there.discard(deployment)
        known = deployment in self._known
        self._known.discard(deployment)
        return known
