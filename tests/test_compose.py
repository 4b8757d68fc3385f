"""The formulas of compositions. Oracles: the papers' definitions, element by element in plain Python; PEFT's own
functions on true deltas; numpy's SVD."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

from lorafold_adapters.compose import Composition, Piece, check_weights, combine, dropped, mask_seed, trimmed
from lorafold_adapters.errors import CompositionInvalid
from lorafold_adapters.truncate import EXACT_SIZE, truncated, truncated_product
from tests.models import DEVICES

SHAPE = (24, 40)
CLOSE = 1e-6
"""fp32 sums of a few elements against fp64 ones."""


def deltas(count: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def composed(spec: Composition, parts: Sequence[Tensor], weights: Sequence[float], name: str = "w") -> Tensor:
    pieces = zip(parts, weights, strict=True)
    return combine(
        spec,
        (
            Piece(index=index, weight=weight, delta=lambda part=part: part.clone())  # type: ignore[misc]
            for index, (part, weight) in enumerate(pieces)
        ),
        name,
    )


def paper_trim(tau: list[float], density: float) -> list[float]:
    """TIES, step 1: the top share by magnitude, the rest 0."""
    order = sorted(range(len(tau)), key=lambda place: (-abs(tau[place]), place))
    kept = set(order[: int(density * len(tau))])
    return [value if place in kept else 0.0 for place, value in enumerate(tau)]


def paper_elect(taus: list[list[float]]) -> list[float]:
    """TIES, steps 2 and 3: gamma = sgn(sum of tau); the mean over those whose sign is gamma."""
    result = []
    for values in zip(*taus, strict=True):
        gamma = np.sign(sum(values))
        agreeing = [value for value in values if gamma != 0 and np.sign(value) == gamma]
        result.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return result


def by_the_paper(method: str, parts: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    taus: list[list[float]] = [part.double().flatten().tolist() for part in parts]
    if method in ("ties", "magnitude_prune"):
        taus = [paper_trim(tau, density) for tau in taus]
    if method in ("dare_linear", "dare_ties"):
        masks = [dropped(torch.ones(SHAPE), density, mask_seed(0, "w", index)) for index in range(len(parts))]
        taus = [
            [value / density if kept else 0.0 for value, kept in zip(tau, mask.flatten().tolist(), strict=True)]
            for tau, mask in zip(taus, masks, strict=True)
        ]
    vectors = [[weight * value for value in tau] for tau, weight in zip(taus, weights, strict=True)]
    flat = paper_elect(vectors) if "ties" in method else [sum(values) for values in zip(*vectors, strict=True)]
    return torch.tensor(flat).reshape(parts[0].shape)


METHODS = ["linear", "ties", "magnitude_prune", "dare_linear", "dare_ties"]
WEIGHTS = [(1.0,), (-1.0,), (1.0, 1.0), (0.7, -0.4), (0.5, 1.5, -1.0)]


def spec_of(method: str, density: float = 0.4, **options: Any) -> Composition:
    return Composition(method=method, density=None if method == "linear" else density, **options)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_the_formula_of_its_paper(method: str, weights: tuple[float, ...]) -> None:
    parts = deltas(len(weights))
    result = composed(spec_of(method), parts, weights)
    torch.testing.assert_close(result, by_the_paper(method, parts, weights, 0.4), rtol=CLOSE, atol=CLOSE)
    others = [other for other in METHODS if other != method]
    if len(weights) > 1:  # Negative control: no two methods are the same.
        for other in others:
            assert not torch.allclose(result, by_the_paper(other, parts, weights, 0.4), atol=1e-2), other


PEFT: dict[str, Callable[..., Tensor]] = {
    "linear": lambda parts, weights, density: merge_utils.task_arithmetic(parts, weights),
    "magnitude_prune": merge_utils.magnitude_prune,
    "ties": merge_utils.ties,
}


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 0.5, 0.5), (0.7, -0.4, 1.2)], ids=str)
@pytest.mark.parametrize("method", PEFT)
def test_peft_computes_the_same_on_true_deltas(method: str, weights: tuple[float, ...]) -> None:
    """PEFT's TIES elects signs before weighting, so that unequal weights are given to it inside the deltas."""
    parts = deltas(len(weights))
    result = composed(spec_of(method), parts, weights)
    weighted = [part * weight for part, weight in zip(parts, weights, strict=True)]
    inside = PEFT[method](weighted, torch.ones(len(weights)), 0.4)
    torch.testing.assert_close(result, inside, rtol=CLOSE, atol=CLOSE)
    outside = PEFT[method](parts, torch.tensor(weights), 0.4)
    same = torch.allclose(result, outside, atol=1e-5)
    assert same == (method != "ties" or len(set(weights)) == 1)


def test_a_task_and_its_negation_leave_nothing() -> None:
    tau = deltas(1)[0]
    for method in ("linear", "ties", "magnitude_prune"):
        assert not composed(spec_of(method), [tau, tau], (1.0, -1.0)).any()
        assert composed(spec_of(method), [tau, tau], (1.0, 1.0)).any()
    assert merge_utils.ties([tau, -tau], torch.ones(2), 0.4).any()  # PEFT elects plus where votes are equal.


def test_trimming_keeps_the_first_of_equal_magnitudes() -> None:
    tau = torch.tensor([[1.0, -2.0, 2.0], [2.0, 0.0, -2.0]])
    assert trimmed(tau.clone(), 0.5).tolist() == [[0.0, -2.0, 2.0], [2.0, 0.0, 0.0]]
    assert torch.equal(trimmed(tau.clone(), 1.0), tau)
    assert int(trimmed(tau.clone(), 0.01).count_nonzero()) == 1
    assert not trimmed(torch.zeros(4, 4), 0.3).any()


@pytest.mark.parametrize("density", [0.1, 0.29, 0.5, 0.999])
def test_trimming_keeps_as_many_as_it_should(density: float) -> None:
    kept = trimmed(deltas(1)[0], density).count_nonzero()
    assert int(kept) == int(density * math.prod(SHAPE))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_repeats_with_its_seed_whatever_else_is_random(method: str, device: str) -> None:
    parts = [part.to(device) for part in deltas(2)]
    first = composed(spec_of(method, seed=5), parts, (1.0, 0.5))
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    again = composed(spec_of(method, seed=5), parts, (1.0, 0.5))
    assert torch.equal(first, again)
    assert torch.equal(state, torch.random.get_rng_state())
    on_cpu = composed(spec_of(method, seed=5), deltas(2), (1.0, 0.5))
    assert torch.equal(first.cpu() != 0, on_cpu != 0)
    assert not torch.equal(first, composed(spec_of(method, seed=6), parts, (1.0, 0.5)))
    assert not torch.equal(first, composed(spec_of(method, seed=5), parts, (1.0, 0.5), name="another"))


def test_dare_keeps_the_expected_value_and_drops_parts_independently() -> None:
    ones = torch.ones(400, 500)
    spec = spec_of("dare_linear", density=0.2)
    one = composed(spec, [ones], (1.0,))
    assert set(one.flatten().tolist()) == {0.0, 5.0}
    assert float(one.mean()) == pytest.approx(1.0, abs=0.03)  # Six deviations of 200,000 draws.
    both = composed(spec, [ones, ones], (1.0, 1.0))
    assert float((both == 10).float().mean()) == pytest.approx(0.04, abs=0.003)


def test_svd_is_the_best_approximation_of_the_weighted_sum() -> None:
    parts, weights = deltas(2), (0.7, -0.4)
    total = (0.7 * parts[0] - 0.4 * parts[1]).numpy()
    left, values, right = np.linalg.svd(total, full_matrices=False)
    expected = (left[:, :5] * values[:5]) @ right[:5]
    result = composed(Composition(method="svd", rank=5), parts, weights)
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-5)
    assert not np.allclose(result.numpy(), total, atol=1e-2)
    full = composed(Composition(method="svd", rank=24), parts, weights)
    np.testing.assert_allclose(full.numpy(), total, atol=1e-5)


@pytest.mark.parametrize("size", [64, EXACT_SIZE + 40])
def test_a_truncation_is_near_the_best_and_knows_its_error(size: int) -> None:
    (matrix,) = deltas(1, shape=(size, size + 30))
    matrix *= torch.linspace(1, 0, size).pow(4).unsqueeze(1)
    state = torch.random.get_rng_state()
    found = truncated(matrix, 20)
    assert torch.equal(state, torch.random.get_rng_state())
    values = torch.linalg.svdvals(matrix.double())
    lost = float((matrix - found.product).double().square().sum())
    assert found.lost_squares == pytest.approx(lost, rel=1e-4)
    assert found.squares == pytest.approx(float(values.square().sum()), rel=1e-4)
    best = float(values[20:].square().sum())
    assert best * (1 - 1e-4) <= lost <= best * 1.01
    assert torch.equal(found.product, truncated(matrix, 20).product)


def test_a_product_is_truncated_without_being_formed() -> None:
    left, right = deltas(1, shape=(30, 6))[0], deltas(1, 1, shape=(6, 50))[0]
    for rank in (3, 6, 9):
        b, a = truncated_product(left, right, rank)
        assert b.shape == (30, min(rank, 6))
        torch.testing.assert_close(b @ a, truncated(left @ right, rank).product, rtol=1e-4, atol=1e-4)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": ({"method": "soup"}, "method"),
    "no density": ({"method": "ties"}, "density"),
    "density 0": ({"method": "ties", "density": 0.0}, "density"),
    "density above 1": ({"method": "dare_ties", "density": 1.1}, "density"),
    "density NaN": ({"method": "dare_ties", "density": math.nan}, "density"),
    "surplus density": ({"method": "linear", "density": 0.5}, "density"),
    "surplus seed": ({"method": "ties", "density": 0.5, "seed": 1}, "seed"),
    "surplus rank": ({"method": "linear", "rank": 3}, "rank"),
    "svd without rank": ({"method": "svd"}, "rank"),
    "rank 0": ({"method": "svd", "rank": 0}, "rank"),
    "negative seed": ({"method": "dare_linear", "density": 0.5, "seed": -1}, "seed"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_composition_is_refused_with_its_option(name: str) -> None:
    options, field = BAD[name]
    with pytest.raises(CompositionInvalid) as caught:
        Composition(**options)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("weights", "field"), [((), "parts"), ((1.0, math.nan), "parts[1].weight"), ((1e300,), "parts[0].weight")]
)
def test_bad_weights_are_refused(weights: tuple[float, ...], field: str) -> None:
    with pytest.raises(CompositionInvalid) as caught:
        check_weights(weights)
    assert caught.value.field == field
    check_weights([-1.0, 0.0, 3.5])


def test_every_part_and_parameter_has_a_mask_of_its_own() -> None:
    seeds = {mask_seed(*key) for key in itertools.product((0, 1, 11), ("w", "w|1"), (0, 1, 11))}
    assert len(seeds) == 18
