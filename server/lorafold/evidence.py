"""Gathers what advice about a deployment goes by. Runs on the event loop."""

from lorafold.advice import Evidence, nearest
from lorafold.deployments import Deployments
from lorafold.engine.loop import Engine
from lorafold.engine.traffic import Moments
from lorafold.overheads import Overheads
from lorafold_adapters.made_up import rank_of


class Witness:
    """Knows where everything is."""

    def __init__(self, deployments: Deployments, engine: Engine, overheads: Overheads) -> None:
        self._deployments = deployments
        self._engine = engine
        self._overheads = overheads

    async def evidence(self, name: str) -> Evidence:
        """What is known of a deployment now. Raises DeploymentNotFound or DeploymentUnservable."""
        found = self._deployments.get(name)
        served = found.served
        moments, swap, rank = await self._engine.asked(lambda: self._seen(found.digest))
        count = max(1, moments.count)
        known = self._overheads.known
        cell = nearest(known, rank, moments.all_rows / count, moments.adapters / count)
        overhead, age = (None, 0.0) if cell is None else (known[cell][0], self._overheads.age(cell))
        fidelity = served.folding.fidelity
        return Evidence(
            name=name,
            policy=found.wanted.policy,
            fold_refusal=served.folding.refusal or served.facts.fold_refusal or "",
            route_refusal=served.facts.route_refusal or "",
            moments=moments.count,
            alone=moments.alone / count,
            rows=moments.all_rows / count,
            overhead=overhead,
            age=age,
            swap_seconds=swap,
            delta_error=None if fidelity is None else fidelity.delta_error,
        )

    def _seen(self, digest: str) -> tuple[Moments, float, int | None]:
        """Traffic, seconds of a swap, rank. On the engine's thread."""
        bound = self._engine.residents.bound(digest)
        rank = None if bound is None else rank_of(bound)
        return self._engine.traffic.of(digest), self._engine.weights.costs.swap_seconds, rank
