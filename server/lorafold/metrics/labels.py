"""Values of labels, few enough for a Prometheus to hold, and buckets of histograms. Knows no metric."""

from collections.abc import Collection

from lorafold.config import BASE

STEP_BUCKETS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Seconds of what the engine does at once."""
LATENCY_BUCKETS = (*STEP_BUCKETS, 10.0, 30.0, 60.0)
"""Seconds that somebody waits."""
OTHER = "other"
SHORT = 12


def short(digest: str) -> str:
    """As much of a digest as tells adapters apart."""
    return digest[:SHORT]


class Names:
    """Deployments that have a label of their own: as many as allowed, those that came first."""

    def __init__(self, most: int) -> None:
        """`most`: beside the base's; any more share the label `other`."""
        self._most = most
        self._known: set[str] = set()

    def label(self, deployment: str) -> str:
        """What a deployment is called in metrics."""
        if deployment in self._known or deployment == BASE:
            return deployment
        if len(self._known) >= self._most:
            return OTHER
        self._known.add(deployment)
        return deployment

    def own(self, deployments: Collection[str]) -> list[str]:
        """Those of these that have a label of their own: all of them if there are not too many."""
        return sorted(deployments if len(deployments) <= self._most else self._known.intersection(deployments))

    def forget(self, deployment: str) -> bool:
        """Makes room for another one; False if it had no label of its own."""
        known = deployment in self._known
        self._known.discard(deployment)
        return known
