"""The chain kernel in Triton's interpreter, against float64.

Not collected by itself: Triton decides on import whether it interprets, so test_interpreted.py runs this file in a
process of its own, with ``TRITON_INTERPRET=1``. The interpreter has no bfloat16 (it computes on bit patterns): inputs
are rounded to bfloat16 and multiplied in float32 instead, and test_aot.py compiles the bfloat16 kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tensorlayers import launch, launch_tables
from tensorlayers.chain import Chain, chains
from tensorlayers.errors import KernelError
from tensorlayers.kernels import chain as kernel
from tensorlayers.launch import Launch
from tests.kernels.support import HALF, SINGLE, TOLERANCE, Watch, error, within_nan

FORMS = {  # the indices of three operands and of the result
    "two cores of a train": (("o1", "i1", "r"), ("b", "i1", "i2"), ("r", "o2", "i2"), ("b", "o1", "o2")),
    "the gradient of its rows": (("o1", "i1", "r"), ("b", "o1", "o2"), ("r", "o2", "i2"), ("b", "i1", "i2")),
    "the gradient of a core": (("b", "o1", "o2"), ("b", "i1", "i2"), ("r", "o2", "i2"), ("o1", "i1", "r")),
    "Kronecker": (("o1", "i1"), ("b", "i1", "i2"), ("o2", "i2"), ("b", "o1", "o2")),
    "blocks": (("b", "i1", "i2"), ("i1", "i2", "o2", "r"), ("i1", "o1", "o2", "r"), ("b", "o1", "o2")),
    "the gradient of blocks": (("b", "o1", "o2"), ("b", "i1", "i2"), ("i1", "o1", "o2", "r"), ("i1", "i2", "o2", "r")),
    "low rank": (("b", "i1"), ("r", "i1"), ("o1", "r"), ("b", "o1")),
}
SIZES = {
    "ones": dict.fromkeys(("b", "o1", "o2", "i1", "i2", "r"), 1),
    "primes": {"b": 7, "o1": 7, "o2": 13, "i1": 11, "i2": 5, "r": 3},
    "multiples of 16": {"b": 3, "o1": 64, "o2": 16, "i1": 32, "i2": 64, "r": 2},
    "beyond one tile": {"b": 3, "o1": 67, "o2": 65, "i1": 33, "i2": 17, "r": 2},
    "beyond what is held": {"b": 2, "o1": 3, "o2": 5, "i1": 131, "i2": 129, "r": 2},
}


@pytest.fixture(params=["few programs", "as many as there can be"], autouse=True)
def processors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one processor a program takes several heads and all steps; of many, each one head and one step."""
    count, step = (1, 1e-12) if request.param == "few programs" else (10**9, 1.0)
    table = replace(launch_tables.shipped(launch_tables.DEFAULT), processors=count, step=step)
    monkeypatch.setattr(launch_tables, "table", lambda arch: table)
    monkeypatch.setattr(kernel, "SIZE", 1024)  # fewer programs: in the interpreter each takes tens of milliseconds
    monkeypatch.setattr(kernel, "PARTS", 4)


def sizes_for(form: str, size: str, dtype: torch.dtype) -> dict[str, int]:
    sizes = dict(SIZES[size])
    if dtype == SINGLE and size.startswith("beyond"):
        sizes = {index: min(n, 35) for index, n in sizes.items()}  # float32 has smaller tiles
    if "blocks" in form:  # a program for each
        sizes |= {"i1": min(sizes["i1"], 2), "o2": min(sizes["o2"], 3)}
    return sizes


def drawn(form: str, sizes: dict[str, int], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Operands, and the product in float64."""
    *operands, result = FORMS[form]
    tensors = [torch.randn([sizes[index] for index in indices]).to(dtype) for indices in operands]
    return tensors, exact(tensors, operands, result)


def exact(tensors: Sequence[Tensor], operands: Sequence[Sequence[str]], result: Sequence[str]) -> Tensor:
    letters = {index: chr(ord("a") + k) for k, index in enumerate({i: 0 for indices in operands for i in indices})}
    terms = ",".join("".join(letters[index] for index in indices) for indices in operands)
    wanted = "".join(letters[index] for index in result)
    return torch.einsum(f"{terms}->{wanted}", *(tensor.double() for tensor in tensors))


def cheap(form: str, sizes: dict[str, int]) -> list[Chain]:
    """The ways that take the fewest tiles: in the interpreter each program takes tens of milliseconds."""
    *operands, result = FORMS[form]
    found = chains(operands, result)
    assert found
    table = launch_tables.table(launch_tables.DEFAULT)
    return sorted(found, key=lambda one: launch.launch(one.problem(sizes, "half"), table).programs)[:1]


def run_watched(watch: Watch, given: Sequence[Tensor], activation: str = "none") -> tuple[Tensor, Launch]:
    """Run the kernel on views within NaN; the fourth is the result, a fifth a bias. What it touches is as counted."""
    views, blocks = zip(*map(within_nan, given), strict=True)
    for view, around in zip(views, blocks, strict=True):
        watch.add(view, around)
    make = Tensor.new_empty

    def noted(like: Tensor, size: Sequence[int], **options: Any) -> Tensor:
        return watch.sums(size) if options.get("dtype") == SINGLE else make(like, size, **options)

    before = (*watch.counts(), watch.bytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "new_empty", noted)  # the partial sums; the interpreter's own have no dtype
        kernel.run(*views, activation=activation)
    after = (*watch.counts(), watch.bytes)
    loaded, stored, flops, moved = (now - then for now, then in zip(after, before, strict=True))
    out = views[3]
    counted = launch.launch(kernel.problem(*views[:4], activation), launch_tables.table(launch_tables.DEFAULT))
    added, whole = (0, 0) if counted.parts == 1 else (counted.stored, out.numel())
    of_bias = out.numel() * (len(given) - 4)
    assert flops == counted.flops == counted.cost.flops
    assert loaded == counted.loaded + added + of_bias
    assert stored == counted.stored + whole
    assert moved == counted.cost.bytes(out.element_size()) + of_bias * views[-1].element_size()
    assert blocks[3].isnan().sum() == blocks[3].numel() - out.numel()
    return out, counted


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_parity_within_its_own_memory_and_as_counted(watch: Watch, form: str, size: str, dtype: torch.dtype) -> None:
    sizes = sizes_for(form, size, dtype)
    tensors, expected = drawn(form, sizes, dtype)
    for how in cheap(form, sizes):
        out = how.as_result(torch.full_like(expected, math.nan, dtype=dtype), how.result, sizes)
        found, _ = run_watched(watch, [*how.views(tensors, sizes), out])
        assert error(found, how.as_result(expected, how.result, sizes)) < TOLERANCE[dtype], how.roles


def test_bfloat16_by_emulation() -> None:
    sizes = SIZES["primes"]
    tensors, _ = drawn("two cores of a train", sizes, torch.bfloat16)
    singles = [tensor.float() for tensor in tensors]
    *operands, result = FORMS["two cores of a train"]
    out = torch.empty([sizes[index] for index in result])
    how = chains(operands, result)[0]
    kernel.run(*how.views(singles, sizes), how.as_result(out, result, sizes))
    assert error(out, exact(singles, operands, result)) < TOLERANCE[SINGLE]


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@pytest.mark.parametrize("activation", ["none", "relu", "silu", "gelu", "gelu_tanh"])
def test_bias_and_activation(watch: Watch, activation: str, dtype: torch.dtype) -> None:
    apply = {"none": lambda y: y, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh")}.get(
        activation, getattr(F, activation, None)
    )
    for form in ("two cores of a train", "blocks"):
        sizes = sizes_for(form, "primes", dtype)
        tensors, expected = drawn(form, sizes, dtype)
        bias = torch.randn([sizes[index] for index in FORMS[form][-1][1:]]).to(dtype)
        how = cheap(form, sizes)[0]
        out = how.as_result(torch.full_like(expected, math.nan, dtype=dtype), how.result, sizes)
        along = how.as_result(bias, how.result[1:], sizes)
        found, counted = run_watched(watch, [*how.views(tensors, sizes), out, along], activation)
        assert (counted.parts > 1) == (launch_tables.table(launch_tables.DEFAULT).processors > 1)
        assert apply is not None
        wanted = how.as_result(apply(expected + bias.double()), how.result, sizes)
        assert error(found, wanted) < 2 * TOLERANCE[dtype]  # of the sum and of the bias


def test_a_bias_that_differs_from_head_to_head(watch: Watch) -> None:
    sizes, form = SIZES["primes"], "two cores of a train"
    tensors, expected = drawn(form, sizes, HALF)
    bias = torch.randn(sizes["o1"], sizes["o2"])
    how = next(one for one in chains(FORMS[form][:3], FORMS[form][3]) if one.roles[0] == ("o1",))
    out = how.as_result(torch.full_like(expected, math.nan, dtype=HALF), how.result, sizes)
    found, counted = run_watched(watch, [*how.views(tensors, sizes), out, how.as_result(bias, ("o1", "o2"), sizes)])
    assert (counted.parts > 1) == (launch_tables.table(launch_tables.DEFAULT).processors > 1)
    assert error(found, how.as_result(expected + bias.double(), how.result, sizes)) < 2 * TOLERANCE[HALF]


def test_operands_of_any_strides() -> None:
    sizes = SIZES["primes"]
    tensors, expected = drawn("two cores of a train", sizes, SINGLE)
    *operands, result = FORMS["two cores of a train"]
    how = chains(operands, result)[0]
    for axis in range(3):
        moved = [tensor.movedim(axis, 0).contiguous().movedim(0, axis) for tensor in tensors]
        gapped = [tensor.repeat_interleave(2, axis).index_select(axis, torch.arange(0, 2 * tensor.shape[axis], 2))
                  for tensor in tensors]  # fmt: skip
        strided = [torch.cat([t, torch.full_like(t, math.nan)], axis).narrow(axis, 0, t.shape[axis]) for t in tensors]
        for given in (moved, gapped, strided):
            out = torch.full_like(expected, math.nan, dtype=SINGLE).movedim(axis, 0).contiguous().movedim(0, axis)
            kernel.run(*how.views(given, sizes), how.as_result(out, result, sizes))
            assert error(out, expected) < TOLERANCE[SINGLE]


@pytest.mark.parametrize("empty", ["b", "r", "o1"])
def test_empty_operands(empty: str) -> None:
    sizes = {**SIZES["primes"], empty: 0}
    tensors, expected = drawn("two cores of a train", sizes, SINGLE)
    *operands, result = FORMS["two cores of a train"]
    how = chains(operands, result)[0]
    out = torch.full_like(expected, math.nan, dtype=SINGLE)
    kernel.run(*how.views(tensors, sizes), how.as_result(out, result, sizes))
    assert out.eq(0).all()


def test_two_runs_agree_bit_by_bit() -> None:
    sizes = SIZES["primes"]
    tensors, expected = drawn("the gradient of a core", sizes, SINGLE)
    how = cheap("the gradient of a core", sizes)[0]
    outs = [torch.empty_like(expected, dtype=SINGLE) for _ in range(2)]
    for out in outs:
        kernel.run(*how.views(tensors, sizes), how.as_result(out, how.result, sizes))
    assert torch.equal(*outs)


def test_dtypes_are_refused() -> None:
    tensors, expected = drawn("low rank", SIZES["primes"], SINGLE)
    how = cheap("low rank", SIZES["primes"])[0]
    left, middle, right = how.views(tensors, SIZES["primes"])
    out = how.as_result(expected.float(), how.result, SIZES["primes"])
    for dtypes, message in (
        ((SINGLE, torch.half), "one dtype"),
        ((torch.double,) * 2, "float64"),
        ((torch.bfloat16,) * 2, "bfloat16"),
    ):
        with pytest.raises(KernelError, match=message):
            kernel.run(left.to(dtypes[0]), middle.to(dtypes[0]), right.to(dtypes[0]), out.to(dtypes[1]))
