"""Mixed batches, whatever is shared or stacked in them. Oracle: PEFT with each row's adapter alone."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lorafold_adapters import AdapterManager
from lorafold_adapters.kernels import Kernels, Reference
from lorafold_adapters.lone import EVERY, LoneProducts, LoneWork
from lorafold_adapters.parts import SpanShrink
from lorafold_adapters.paths import LowRankPath
from lorafold_adapters.router import Router
from lorafold_adapters.spans import Routing, Span, Spans
from lorafold_adapters.stacks import stackable
from tests.interpreter import interpreted
from tests.models import DEVICES, KINDS, apart, logits_of, on, prompts, tiny_llama
from tests.tolerances import EFFECT, LOGITS

MakeAdapter = Callable[..., Path]
Rows = Sequence[str | None]
NAMES = ["rslora", "dora", "saved-head", "saved-embedding", "patterns", "head", "all-linear", "one-layer"]
ORDERS: dict[str, Rows] = {
    "one": ["dora"] * 4,
    "one and the base": [None, "dora", "dora", None],
    "distinct, in order": NAMES,
    "distinct, out of order": [NAMES[index] for index in (5, 2, 7, 0, 3, 6, 1, 4)],
    "skewed": ["all-linear"] * 18 + ["dora", "patterns"],
    "scattered": ["dora", None, "rslora", "dora", "patterns", None, "rslora", "dora", "head"],
}


@pytest.fixture(params=["stacks", "reference", "triton"])
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels | None]:
    """What mixed batches run on; on a GPU stacks give way to kernels."""
    if request.param != "triton":
        yield None if request.param == "stacks" else Reference()
        return
    products = pytest.importorskip("lorafold_adapters.kernels.triton_products")
    with nullcontext() if torch.cuda.is_available() else interpreted(products):
        yield products.TritonProducts()


@pytest.fixture
def folders(adapter_on_llama: MakeAdapter) -> dict[str, Path]:
    return {name: adapter_on_llama(seed=index, **KINDS[name]) for index, name in enumerate(NAMES)}


def loaded(folders: dict[str, Path], device: str = "cpu", **options: Any) -> tuple[Any, AdapterManager]:
    model = on(device, tiny_llama())
    manager = AdapterManager(model, **options)
    for name, folder in folders.items():
        manager.load(name, folder)
    return model, manager


def alone(folder: Path | None, ids: Tensor) -> Tensor:
    model: Any = on(str(ids.device), tiny_llama())
    return logits_of(model if folder is None else PeftModel.from_pretrained(model, str(folder)).eval(), ids)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", ORDERS)
def test_every_row_equals_its_adapter_alone_in_any_order(
    order: str, device: str, kernels: Kernels | None, folders: dict[str, Path]
) -> None:
    rows = ORDERS[order]
    model, manager = loaded(folders, device, kernels=kernels)
    ids = prompts(len(rows), 1).to(device)
    for _ in range(2):  # The first forward learns which modules share their inputs, the second makes use of it.
        with manager.routed(rows):
            mixed = logits_of(model, ids)
    for index, name in enumerate(rows):
        row = slice(index, index + 1)
        assert apart(mixed[row], alone(folders.get(name or ""), ids[row])) < LOGITS[torch.float32], name
    other = "dora" if rows[0] != "dora" else "rslora"
    assert apart(mixed[:1], alone(folders[other], ids[:1])) > EFFECT  # Negative control.


def test_stacks_follow_the_batch_as_requests_join_and_leave(folders: dict[str, Path]) -> None:
    model, manager = loaded(folders)
    ids = prompts(8, 1)
    expected = {name: alone(folders[name], ids) for name in NAMES}
    for rows in (NAMES[:3], NAMES[:4], NAMES[1:4], NAMES[4:6] + NAMES[1:3], NAMES, NAMES[6:], NAMES[::-1]):
        with manager.routed(rows):
            mixed = logits_of(model, ids[: len(rows)])
        for index, name in enumerate(rows):
            assert apart(mixed[index : index + 1], expected[name][index : index + 1]) < LOGITS[torch.float32]
    assert manager.stack_bytes > 0
    manager.drop("dora")
    assert manager.stack_bytes == 0


def test_beyond_their_budget_adapters_run_one_by_one(folders: dict[str, Path]) -> None:
    model, manager = loaded(folders, stack_bytes=1000)
    ids = prompts(len(NAMES), 1)
    with manager.routed(NAMES):
        mixed = logits_of(model, ids)
    assert manager.stack_bytes == 0
    for index, name in enumerate(NAMES):
        row = slice(index, index + 1)
        assert apart(mixed[row], alone(folders[name], ids[row])) < LOGITS[torch.float32]


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def counted(manager: AdapterManager, model: Any, rows: Rows) -> Counter[str]:
    products = Products()
    with manager.routed(rows), products:
        logits_of(model, prompts(len(rows), 1))
    return products.counts


def test_modules_that_share_their_inputs_share_the_product_with_a(folders: dict[str, Path]) -> None:
    model, manager = loaded({name: folders[name] for name in ("all-linear", "rslora")})
    base = counted(manager, model, [None] * 2)
    first, second = (counted(manager, model, ["all-linear"] * 2) for _ in range(2))
    assert first["aten.mm.default"] - base["aten.mm.default"] == 2 * 7
    assert second["aten.mm.default"] - base["aten.mm.default"] == 2 * 4  # q, k and v; o; gate and up; down.
    mixed = counted(manager, model, ["all-linear", "rslora"])
    assert (mixed["aten.bmm.default"] - base["aten.bmm.default"], mixed["aten.baddbmm_.default"]) == (2 * 4, 2 * 7)


class Siblings(nn.Module):
    """Two layers that get the same tensor, which may be written to in between."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 6)
        self.two = nn.Linear(8, 4)

    def forward(self, inputs: Tensor, factor: float = 1.0) -> Tensor:
        first = self.one(inputs)
        if factor != 1:
            inputs.mul_(factor)
        return torch.cat([first, self.two(inputs)], dim=-1)


def factors(inputs: int, outputs: int) -> LowRankPath:
    return LowRankPath(
        a_IR=torch.randn(inputs, 3), scaled_b_RO=torch.randn(3, outputs), gain_O=None, shift_O=torch.randn(outputs)
    )


def test_a_shared_product_is_not_used_for_a_tensor_that_was_written_to() -> None:
    torch.manual_seed(0)
    model, inputs_N1I = Siblings().requires_grad_(False), torch.randn(5, 1, 8)
    one, two = factors(8, 6), factors(8, 4)
    router = Router(model, None, stack_bytes=0)
    router.add("it", {model.one: one, model.two: two})
    for factor in (1.0, 1.0, 3.0):
        x_N1I = inputs_N1I.clone()
        with router.routed(["it"] * 5, None):
            got_NO = model(x_N1I, factor)[:, 0]
        before_NI, after_NI = inputs_N1I[:, 0], x_N1I[:, 0]
        first_NO = one(before_NI, nn.Linear.forward(model.one, before_NI))
        second_NO = two(after_NI, nn.Linear.forward(model.two, after_NI))
        assert torch.allclose(got_NO, torch.cat([first_NO, second_NO], dim=-1), atol=1e-5)
    stale_NO = two(before_NI, nn.Linear.forward(model.two, after_NI))
    assert not torch.allclose(got_NO[:, 6:], stale_NO, atol=1e-2)  # Negative control.


def test_shared_products_are_let_go_once_every_site_has_had_its_own() -> None:
    products, inputs_NI = LoneProducts(SpanShrink(EVERY, torch.randn(8, 6), (3, 3), False)), torch.randn(4, 8)
    works = [LoneWork(products, piece, factors(8, 6)) for piece in (0, 1)]
    works[0](inputs_NI, torch.zeros(4, 6), 1)
    assert products.inputs is inputs_NI  # Negative control.
    works[1](inputs_NI, torch.zeros(4, 6), 1)
    assert products.inputs is None
    assert products.pieces == ()


@torch.inference_mode()
def test_a_forward_that_broke_leaves_nothing_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 6).requires_grad_(False)
    path = factors(8, 6)
    router = Router(layer, None, stack_bytes=0)
    router.add("it", {layer: path})
    inputs_N1I = torch.randn(4, 1, 8)  # An inference tensor does not say that it was written to.

    def run() -> Tensor:
        with router.routed(["it"] * 4, None):
            outputs: Tensor = layer(inputs_N1I)[:, 0]
        return outputs

    with monkeypatch.context() as broken:
        broken.setattr(Tensor, "addmm_", out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            run()
    inputs_N1I.mul_(3)
    got_NO = run()
    expected_NO = path(inputs_N1I[:, 0], layer(inputs_N1I)[:, 0])
    assert apart(got_NO, expected_NO) < LOGITS[torch.float32]


def out_of_memory(*_: Any) -> Tensor:
    raise RuntimeError("out of memory")


def test_while_nothing_is_routed_modules_are_those_of_the_bare_base(folders: dict[str, Path]) -> None:
    bare = [(type(module), "forward" in module.__dict__) for module in tiny_llama().modules()]
    model, manager = loaded(folders)

    def code() -> list[tuple[type[nn.Module], bool]]:
        return [(type(module), "forward" in module.__dict__) for module in model.modules()]

    assert code() == bare
    manager.merge_adapter("dora")
    assert code() == bare
    manager.unmerge_adapter()
    with manager.routed([None]):
        assert code() == bare
    with manager.routed(["dora"]):
        assert code() != bare
    assert code() == bare


def test_a_forward_that_somebody_else_put_on_a_module_is_run_and_given_back(folders: dict[str, Path]) -> None:
    model, manager = loaded({"dora": folders["dora"]})
    module, calls = model.get_submodule("model.layers.0.mlp.up_proj"), []

    def theirs(inputs: Tensor) -> Tensor:
        calls.append(inputs.shape)
        return nn.Linear.forward(module, inputs)

    module.forward = theirs
    ids = prompts(2, 3)
    with manager.routed(["dora", "dora"]):
        got = logits_of(model, ids)
    assert module.forward is theirs
    assert len(calls) == 1
    assert apart(got, alone(folders["dora"], ids)) < LOGITS[torch.float32]


def test_neighbours_with_the_same_adapter_are_one_span() -> None:
    assert Spans.of(["a", "a", None, "b", "a"]) == Spans(
        units=5, spans=(Span(0, 2, "a"), Span(3, 4, "b"), Span(4, 5, "a"))
    )
    assert Routing.of(["a"] * 7, ["a"]) == Routing.of(["a"])


@pytest.mark.parametrize(
    ("ranks", "tokens", "expected"),
    [
        ({"a": 16, "b": 16}, {"a": 1, "b": 1}, {"a", "b"}),
        ({"a": 16, "b": 16}, {"a": 1, "b": 500}, set()),
        ({"a": 16, "b": 8, "c": 256}, {"a": 1, "b": 2, "c": 1}, {"a", "b"}),
        ({"a": 256, "b": 256, "c": 8}, {"a": 1, "b": 1, "c": 1}, set()),
        ({"a": 16}, {"a": 1, "replaced": 1}, set()),
    ],
)
def test_adapters_are_stacked_where_that_is_less_work(
    ranks: dict[str, int], tokens: dict[str, int], expected: set[str]
) -> None:
    assert set(stackable(ranks, tokens)) == expected


def test_a_drop_that_shrinks_a_family_leaves_the_others_their_modules(adapter_on_llama: MakeAdapter) -> None:
    manager = AdapterManager(tiny_llama())
    targets = {"a": ["k_proj", "v_proj"], "b": ["k_proj", "v_proj"], "c": ["q_proj"]}
    for seed, (name, modules) in enumerate(targets.items()):
        manager.load(name, adapter_on_llama(seed=seed, r=4, target_modules=modules))
    ids = prompts(3, 1)

    def run(rows: list[str]) -> Tensor:
        with manager.routed(rows):
            return logits_of(manager.model, ids[: len(rows)])

    for _ in range(2):
        run(["c", "a", "b"])  # From now on q, k and v are one family.
    before = run(["a", "b"])
    manager.drop("c")
    assert apart(run(["a", "b"]), before) < LOGITS[torch.float32]
    assert apart(run(["b", "a"]), before) > EFFECT  # Negative control.


@pytest.mark.parametrize("tokens", [2, 100])
def test_small_products_take_one_thread_and_give_the_others_back(tokens: int, folders: dict[str, Path]) -> None:
    model, manager = loaded({"dora": folders["dora"]})
    before, seen = torch.get_num_threads(), set()

    class Threads(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if str(function) == "aten.addmm_.default":
                seen.add(torch.get_num_threads())
            return function(*args, **(kwargs or {}))

    torch.set_num_threads(2)
    try:
        with manager.routed(["dora"]), Threads():  # type: ignore[no-untyped-call]
            logits_of(model, prompts(1, tokens))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == {1 if tokens == 2 else 2}
