"""What each kind of undo holds, and the checksum that is taken after every unfold. Oracle: copies, torch.equal."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorafold_adapters import AdapterManager
from lorafold_adapters.checksum import checksum, lane_sum
from lorafold_adapters.copies import Copies, MappedFiles
from lorafold_adapters.delta import AddProduct, SetValues
from lorafold_adapters.records import Records
from lorafold_adapters.undo_kinds import make_undo
from tests.models import DEVICES, KINDS, save_adapter, tiny_llama


def product(rms: float) -> AddProduct:
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(768, 16, generator=generator), torch.randn(16, 512, generator=generator)
    return AddProduct(left_NR=left, right_RM=right, scaling=0.02 * rms / 4)


def weight(dtype: torch.dtype) -> Tensor:
    return (0.02 * torch.randn(768, 512, generator=torch.Generator().manual_seed(0))).to(dtype)


@pytest.mark.parametrize(("rms", "share"), [(0.003, 0.005), (0.01, 0.013), (0.03, 0.031), (0.1, 0.076), (0.3, 0.16)])
def test_a_sparse_record_holds_what_rounding_loses_and_no_more(rms: float, share: float) -> None:
    """The known shares of elements for bf16."""
    live = {"w": weight(torch.bfloat16)}
    records = Records(live)
    records.write("w", product(rms))
    assert not torch.equal(live["w"], weight(torch.bfloat16))
    assert records.nbytes / 6 / live["w"].numel() == pytest.approx(share, rel=0.25)  # 4 bytes of index, 2 of value.
    assert torch.equal(records.pristine("w"), weight(torch.bfloat16))
    records.restore("w")
    assert torch.equal(live["w"], weight(torch.bfloat16))
    assert records.nbytes == 0


def test_a_record_that_would_be_larger_than_a_copy_is_a_copy() -> None:
    live = {"w": weight(torch.bfloat16)}
    records = Records(live)
    records.write("w", SetValues(values=torch.randn(768, 512)))
    assert records.nbytes == live["w"].nbytes
    records.restore("w")
    assert torch.equal(live["w"], weight(torch.bfloat16))


def test_a_record_keeps_signed_zeros_subnormals_and_nan() -> None:
    odd = weight(torch.bfloat16)
    odd[0, :4] = torch.tensor([-0.0, 1e-40, float("nan"), float("-inf")])
    live = {"w": odd.clone()}
    records = Records(live)
    records.write("w", product(0.1))
    records.restore("w")
    assert torch.equal(live["w"].view(torch.int16), odd.view(torch.int16))


def test_a_record_that_does_not_fit_the_weights_is_found_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    live = {"w": weight(torch.bfloat16)}
    records = Records(live)
    records.write("w", product(0.1))
    folded = live["w"].clone()
    live["w"][3, 5] += 1.0
    with pytest.raises(ArithmeticError, match="rows"):
        records.restore("w")
    live["w"].copy_(folded)
    records.restore("w")
    assert torch.equal(live["w"], weight(torch.bfloat16))


def test_chunks_do_not_change_what_is_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for chunk in (2**21, 2**12):
        monkeypatch.setattr("lorafold_adapters.delta.CHUNK_ELEMENTS", chunk)
        for make in (Records, lambda live: Copies(live, lambda name: live[name].clone())):
            live = {"w": weight(torch.float32)}
            make(live).write("w", product(0.1))
            results.append(live["w"])
    for result in results[1:]:
        assert torch.allclose(result, results[0], rtol=0, atol=1e-8)
    assert not torch.allclose(results[0], weight(torch.float32), rtol=0, atol=1e-8)


def test_the_checkpoints_files_take_no_memory_and_are_used_only_where_they_hold_the_weights(tmp_path: Path) -> None:
    tiny_llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    adapter = save_adapter(tiny_llama(), tmp_path / "adapter", **KINDS["all-linear"])
    held = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = tiny_llama(dtype=torch.bfloat16)
        torch.nn.Module.to(model, dtype=dtype)
        manager = AdapterManager(model, undo="checkpoint", source=tmp_path / "base")
        manager.load("it", adapter)
        written = manager.merge_adapter("it")
        held[dtype] = manager.fold_state.undo_bytes
        manager.unmerge_adapter()
    assert held == {torch.bfloat16: 0, torch.float32: written}


def test_auto_takes_the_checkpoint_on_a_cpu_if_there_is_one(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    live = dict(model.named_parameters())
    for folder, mapped in ((tmp_path, True), (None, False)):
        chosen = make_undo("auto", live, folder)
        assert isinstance(chosen, Copies)
        assert isinstance(chosen._copy, MappedFiles) == mapped
    assert isinstance(make_undo("sparse", live, tmp_path), Records)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_the_lane_sum_finds_every_small_change(dtype: torch.dtype, device: str) -> None:
    """The checksum for devices, run on each that is here."""
    generator = torch.Generator().manual_seed(2)
    tensor = torch.randint(-100, 100, (131, 1777), generator=generator).to(dtype).to(device)
    before = lane_sum(tensor)
    assert lane_sum(tensor.clone()) == before
    raw = tensor.view(torch.uint8).flatten()
    for place in torch.randint(0, raw.numel(), (50,), generator=generator).tolist():
        raw[place] ^= 1
        assert lane_sum(tensor) != before
        raw[place] ^= 1
    swapped = tensor.clone()
    swapped[[3, 70]] = swapped[[70, 3]]
    assert lane_sum(swapped) != before
    swapped = tensor.clone()
    swapped[:, [0, 4, 8, 900]] = swapped[:, [900, 8, 4, 0]]
    assert lane_sum(swapped) != before
    assert lane_sum(tensor) == before


def test_a_checksum_tells_dtype_and_shape_apart() -> None:
    tensor = weight(torch.bfloat16)
    others = [tensor.view(torch.float16), tensor.view(512, 768), -tensor]
    assert len({checksum(other) for other in [tensor, *others]}) == 4
    assert checksum(tensor) == checksum(tensor.clone())
