"""The tt2_dcore kernel in Triton's interpreter, against float64; run by test_tt2_dcores.py as its neighbour is."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tensorlayers.errors import KernelError
from tensorlayers.kernels import tt2_dcores
from tests.kernels.support import CASES, NAMES, SINGLE, TOLERANCE, Watch, draw, error, tt, within_nan


@pytest.fixture(autouse=True)
def _interpreter() -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_tt2_dcores.py, with TRITON_INTERPRET=1"


@pytest.fixture(autouse=True)
def _filled_with_nan() -> Iterator[None]:
    """What `launch` allocates is NaN before the kernel runs."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["one share of the rows", "a share a row"])
def shares(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tt2_dcores, "PROGRAMS", 1 if request.param == "one share of the rows" else 10**9)


def exact(dy: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """(r, o1, i1) in float64."""
    return torch.einsum("bop,brpi->roi", dy.double(), torch.einsum("bil,rpl->brpi", x.double(), g.double()))


@pytest.mark.usefixtures("shares")
@pytest.mark.parametrize(("dtype", "out_modes", "in_modes", "rank", "batch"), CASES, ids=NAMES)
def test_both_gradients_touch_only_their_own_memory(
    watch: Watch, dtype: torch.dtype, out_modes: tuple[int, int], in_modes: tuple[int, int], rank: int, batch: int
) -> None:
    network = tt(out_modes, in_modes, rank)
    x, a, g = draw(network, batch, dtype)
    x = x.reshape(batch, *in_modes)
    dy = torch.randn(batch, *out_modes).to(dtype)
    for operands in ((dy, x, g), (dy.mT, x.mT, a.permute(2, 0, 1))):
        before = watch.touched
        views, blocks = zip(*map(within_nan, operands), strict=True)
        for view, block in zip(views, blocks, strict=True):
            watch.add(view, block)
        found = tt2_dcores.launch(*views)
        assert found.dtype == torch.float32
        assert error(found.sum(0), exact(*operands)) < TOLERANCE[dtype]
        assert watch.touched - before >= sum(view.numel() for view in views)


def test_a_share_is_no_larger_than_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, g = draw(tt((7, 13), (11, 5), 3), 7, SINGLE)
    dy, x = torch.randn(7, 7, 13), x.reshape(7, 11, 5)
    monkeypatch.setattr(tt2_dcores, "PROGRAMS", 9)
    assert tt2_dcores.launch(dy, x, g).shape == (3, 3, 7, 11)  # 3, 3 and 1 rows; 3 programs each


def test_two_runs_agree_bit_by_bit() -> None:
    x, _, g = draw(tt((7, 13), (11, 5), 3), 7, SINGLE)
    operands = torch.randn(7, 7, 13), x.reshape(7, 11, 5), g
    assert torch.equal(tt2_dcores.tt2_dcore(*operands), tt2_dcores.tt2_dcore(*operands))


@pytest.mark.parametrize("batch", [0, 3])
def test_opcheck(batch: int) -> None:
    x, a, g = draw(tt((3, 4), (5, 2), 2), batch, SINGLE)
    dy, x = torch.randn(batch, 3, 4), x.reshape(batch, 5, 2)
    torch.library.opcheck(tt2_dcores.tt2_dcore, (dy, x, g))
    torch.library.opcheck(tt2_dcores.tt2_dcore, (dy.mT, x.mT, a.permute(2, 0, 1)))


def test_dtypes_are_refused() -> None:
    x, _, g = draw(tt((3, 4), (5, 2), 2), 3, SINGLE)
    dy, x = torch.randn(3, 3, 4), x.reshape(3, 5, 2)
    for dtypes, message in (((SINGLE, torch.half), "one dtype"), ((torch.double,) * 2, "float64")):
        with pytest.raises(KernelError, match=message):
            tt2_dcores.launch(dy.to(dtypes[0]), x.to(dtypes[0]), g.to(dtypes[1]))
    with pytest.raises(KernelError, match="bfloat16"):
        tt2_dcores.launch(dy.bfloat16(), x.bfloat16(), g.bfloat16())
