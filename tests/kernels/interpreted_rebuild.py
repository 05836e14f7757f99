"""The rebuild kernel, and programs that build the dense weight by it, in Triton's interpreter, against float64.

Not collected by itself: Triton decides on import whether it interprets, so test_interpreted.py runs this file in a
process of its own, with ``TRITON_INTERPRET=1``. It has no bfloat16: inputs are rounded to that and multiplied in
float32.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tensorlayers import contraction, fused_rebuild, launch_tables
from tensorlayers.chain import viewed
from tensorlayers.errors import KernelError
from tensorlayers.formats import BTT, CP, TT, Format, LowRank, Tucker
from tensorlayers.fused_rebuild import FusedRebuild
from tensorlayers.kernels import rebuild as kernel
from tensorlayers.machine import shipped
from tensorlayers.network import Network
from tensorlayers.program import Candidate, Task
from tensorlayers.rebuild import Form, form
from tensorlayers.rebuild import launch as planned
from tests.kernels.support import HALF, SINGLE, TOLERANCE, Watch, error, within_nan

FORMS = {  # the indices of both operands and of the result
    "a train": (("o1", "i1", "r"), ("r", "o2", "i2"), ("o1", "o2", "i1", "i2")),
    "its transpose": (("o1", "i1", "r"), ("r", "o2", "i2"), ("i1", "i2", "o1", "o2")),
    "blocks": (("i1", "o1", "o2", "r"), ("i1", "i2", "o2", "r"), ("o1", "o2", "i1", "i2")),
    "Kronecker": (("o1", "i1"), ("o2", "i2"), ("o1", "o2", "i1", "i2")),
    "low rank": (("o1", "o2", "r"), ("r", "i1", "i2"), ("o1", "o2", "i1", "i2")),
    "columns apart": (("r", "o2", "i2"), ("o1", "i1", "r"), ("o1", "o2", "i1", "i2")),
}
SIZES = {
    "ones": dict.fromkeys(("o1", "o2", "i1", "i2", "r"), 1),
    "primes": {"o1": 3, "o2": 7, "i1": 5, "i2": 11, "r": 3},
    "multiples of 16": {"o1": 2, "o2": 2, "i1": 16, "i2": 16, "r": 32},
    "beyond one tile": {"o1": 11, "o2": 5, "i1": 7, "i2": 17, "r": 41},
}
LARGE = {"m": 64, "n": 64, "k": 32, "warps": 4, "stages": 2}
SMALL = {"m": 32, "n": 16, "k": 16, "warps": 4, "stages": 2}
ROWS, MACHINE = 5, shipped("cuda")


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[launch_tables.Table]:
    """Of problems that are aligned there are other tiles than of the others."""
    kernels = {
        "rebuild": dict.fromkeys(("half", "float32"), SMALL),
        "rebuild_ragged": {"half": LARGE, "float32": SMALL},
    }
    table = replace(launch_tables.shipped(launch_tables.DEFAULT), kernels=kernels)
    monkeypatch.setattr(launch_tables, "table", lambda arch: table)
    monkeypatch.setattr(fused_rebuild, "table_of", lambda arch: table)
    fused_rebuild.candidate.cache_clear()
    yield table
    fused_rebuild.candidate.cache_clear()


# -- the kernel -------------------------------------------------------------------------------------------------------


def drawn(name: str, sizes: dict[str, int], dtype: torch.dtype) -> tuple[Form, Tensor, Tensor, Tensor]:
    """A form, its operands, and the product in float64."""
    left, right, result = FORMS[name]
    found = form(left, right, result)
    assert found is not None
    operands = [torch.randn([sizes[index] for index in indices]).to(dtype) for indices in (left, right)]
    return found, *operands, exact(operands, (left, right), result)


def exact(tensors: Sequence[Tensor], operands: Sequence[Sequence[str]], result: Sequence[str]) -> Tensor:
    letters = {index: chr(ord("a") + k) for k, index in enumerate({i: 0 for indices in operands for i in indices})}
    terms = ",".join("".join(letters[index] for index in indices) for indices in operands)
    wanted = "".join(letters[index] for index in result)
    return torch.einsum(f"{terms}->{wanted}", *(tensor.double() for tensor in tensors))


def views(of: Form, left: Tensor, right: Tensor, out: Tensor, sizes: dict[str, int]) -> tuple[Tensor, ...]:
    """What `Form.run` gives the kernel."""
    roles = *of.roles, (*of.heads, *of.m, *of.n)
    given = zip((left, right, out), (of.left, of.right, of.result), roles, strict=True)
    return tuple(viewed(tensor, indices, axes, sizes) for tensor, indices, axes in given)


def surrounded(view: Tensor) -> tuple[Tensor, Tensor]:
    """`within_nan`, without a margin along axes of size 1."""
    inside, block = within_nan(view.squeeze())
    for axis, size in enumerate(view.shape):
        inside = inside.unsqueeze(axis) if size == 1 else inside
    return inside, block


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FORMS)
def test_parity_within_its_own_memory_and_as_counted(
    watch: Watch, table: launch_tables.Table, name: str, size: str, dtype: torch.dtype
) -> None:
    sizes = SIZES[size]
    if name == "blocks" and size != "ones":  # of heads, which are programs of their own, there are fewer
        sizes = {**sizes, "o1": sizes["o1"] * sizes["i1"], "o2": 2, "i1": 2}
    if dtype == SINGLE and size == "beyond one tile":
        sizes = {**sizes, "o1": 35, "o2": 2, "i1": 2, "r": 19}
    of, left, right, expected = drawn(name, sizes, dtype)
    given = views(of, left, right, torch.full_like(expected, math.nan, dtype=dtype), sizes)
    tensors, blocks = zip(*map(surrounded, given), strict=True)
    for view, around in zip(tensors, blocks, strict=True):
        watch.add(view, around)
    before = watch.counts()
    kernel.run(*tensors)
    out, block = tensors[-1], blocks[-1]
    assert error(out, views(of, left, right, expected, sizes)[-1]) < TOLERANCE[dtype]
    assert block.isnan().sum() == block.numel() - out.numel()
    counted = planned(kernel.problem(*tensors), table)
    loaded, stored, flops = (after - start for after, start in zip(watch.counts(), before, strict=True))
    assert (loaded, stored, flops) == (counted.loaded, counted.stored, counted.flops)


def test_tiles_are_of_a_kind_for_aligned_problems_and_of_another_for_the_rest() -> None:
    for name in ("a train", "blocks"):
        for sizes, is_aligned in ((SIZES["multiples of 16"], True), (SIZES["primes"], False)):
            of, left, right, expected = drawn(name, sizes, HALF)
            problem = kernel.problem(*views(of, left, right, expected.half(), sizes))
            assert problem.aligned is is_aligned
            assert problem == of.problem(sizes, "half")._replace(run=problem.run)
    right, out = (torch.empty(1, 1, 1, *shape, dtype=HALF) for shape in ((16, 16), (16, 1, 16)))
    for strides, is_aligned in (((0, 0, 0, 256, 16), False), ((3, 5, 7, 16, 1), True)):  # none is 1; of axes of size 1
        left = torch.empty(4096, dtype=HALF).as_strided((1, 1, 1, 16, 16), strides)
        assert kernel.problem(left, right, out).aligned is is_aligned


def test_bfloat16_by_emulation() -> None:
    of, left, right, expected = drawn("a train", SIZES["primes"], torch.bfloat16)
    assert error(of.run(left.float(), right.float(), SIZES["primes"]), expected) < TOLERANCE[SINGLE]


@pytest.mark.parametrize("name", ["a train", "blocks"])
def test_operands_of_any_strides(name: str) -> None:
    sizes = {**SIZES["primes"], "o2": 2}
    of, *operands, expected = drawn(name, sizes, SINGLE)
    for axis in range(3):
        moved = [tensor.movedim(axis, 0).contiguous().movedim(0, axis) for tensor in operands]
        gapped = [tensor.repeat_interleave(2, axis).index_select(axis, torch.arange(0, 2 * tensor.shape[axis], 2))
                  for tensor in operands]  # fmt: skip
        strided = [torch.stack([t, torch.full_like(t, math.nan)], axis + 1).select(axis + 1, 0) for t in operands]
        for given in (moved, gapped, strided):
            out = torch.full_like(expected, math.nan, dtype=SINGLE).movedim(axis, 0).contiguous().movedim(0, axis)
            kernel.run(*views(of, *given, out, sizes))
            assert error(out, expected) < TOLERANCE[SINGLE]


def test_operands_may_be_expanded() -> None:
    left, right = torch.randn(1, 3, 2, 5, 4), torch.randn(2, 3, 4, 1, 7)
    expanded = left.expand(2, -1, -1, -1, -1), right.expand(-1, -1, -1, 6, -1)
    out = torch.full((2, 3, 2, 5, 6, 7), math.nan)
    kernel.run(*expanded, out)
    assert error(out, torch.einsum("abcdk,abkef->abcdef", *(t.double() for t in expanded))) < TOLERANCE[SINGLE]


def test_offsets_take_64_bits() -> None:
    # Pages that are not touched take no memory, whatever the system's policy (MAP_NORESERVE).
    pages = mmap.mmap(-1, 6 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    out = torch.frombuffer(pages, dtype=HALF).as_strided((1, 1, 1, 3, 1, 5), (0, 0, 0, (1 << 30) + 16, 0, 1))
    left, right = torch.randn(1, 1, 1, 3, 2).half(), torch.randn(1, 1, 2, 1, 5).half()
    kernel.run(left, right, out)
    expected = left[0, 0, 0].double() @ right[0, 0, :, 0].double()
    assert error(out[0, 0, 0, :, 0], expected) < TOLERANCE[HALF]


@pytest.mark.parametrize("empty", ["o1", "i2", "r"])
def test_empty_operands(empty: str) -> None:
    sizes = {**SIZES["primes"], empty: 0}
    of, left, right, expected = drawn("a train", sizes, SINGLE)
    found = of.run(left, right, sizes)
    assert found.shape == expected.shape
    assert found.eq(0).all()


def test_two_runs_agree_bit_by_bit() -> None:
    of, left, right, _ = drawn("a train", SIZES["beyond one tile"], SINGLE)
    assert torch.equal(*(of.run(left, right, SIZES["beyond one tile"]) for _ in range(2)))


def test_dtypes_are_refused() -> None:
    of, left, right, expected = drawn("a train", SIZES["primes"], SINGLE)
    left, right, out = views(of, left, right, expected.float(), SIZES["primes"])
    for dtypes, message in (
        ((SINGLE, torch.half), "one dtype"),
        ((torch.double,) * 2, "float64"),
        ((torch.bfloat16,) * 2, "bfloat16"),
    ):
        with pytest.raises(KernelError, match=message):
            kernel.run(left.to(dtypes[0]), right.to(dtypes[0]), out.to(dtypes[1]))


# -- programs ---------------------------------------------------------------------------------------------------------

FORMATS = {
    "train": (TT(3), 42, 30),
    "three cores": (TT(2, order=3), 48, 60),
    "blocks": (BTT(2, in_modes=(4, 8), out_modes=(6, 5)), 30, 32),
    "blocks of three cores": (BTT(2, order=3, in_modes=(2, 4, 3), out_modes=(3, 2, 5)), 30, 24),
    "Tucker": (Tucker(3), 42, 30),
    "CP": (CP(5), 30, 24),
    "low rank": (LowRank(5), 30, 24),
    "last mode of 1": (TT(3, in_modes=(6, 1), out_modes=(2, 4)), 8, 6),
}


def network(name: str) -> Network:
    fmt, outs, ins = FORMATS[name]
    assert isinstance(fmt, Format)
    return fmt.network(outs, ins)


def tensors(of: Network, rows: int = ROWS, dtype: torch.dtype = SINGLE) -> tuple[Tensor, Tensor, list[Tensor]]:
    """dy, x and cores."""
    dy, x = (torch.randn(rows, of.features(role)).to(dtype) for role in ("out", "in"))
    return dy, x, [torch.randn(shape).to(dtype) for shape in of.core_shapes]


def reference(of: Network, dy: Tensor, x: Tensor, cores: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The product, and the gradients of x and of the cores, in float64."""
    leaves = [tensor.double().requires_grad_() for tensor in (x, *cores)]
    weight = contraction.to_dense(of, leaves[1:]).reshape(of.features("out"), of.features("in"))
    y = leaves[0] @ weight.mT
    return y.detach(), list(torch.autograd.grad(y, leaves, dy.double()))


def programs(of: Network, task: Task) -> list[FusedRebuild]:
    found = fused_rebuild.candidates(of, task, MACHINE)
    assert found
    assert all(isinstance(one, Candidate) and one.seconds > 0 and not one.largest for one in found)
    made = [one.program for one in found]
    assert all(isinstance(program, FusedRebuild) and not program.intermediate for program in made)
    return made  # type: ignore[return-value]


@pytest.mark.parametrize("name", FORMATS)
def test_every_grouping_gives_the_product_and_all_gradients(name: str) -> None:
    of = network(name)
    dy, x, cores = tensors(of)
    y, gradients = reference(of, dy, x, cores)
    bias = torch.randn(of.features("out"))
    for program in programs(of, Task(ROWS, arch="sm_90")):
        assert error(program.forward(x, cores, bias), y + bias.double()) < TOLERANCE[SINGLE]
    for program in programs(of, Task(ROWS, True, True, arch="sm_90")):
        for found, expected in zip(program.gradients(dy, x, cores, [True] * len(gradients)), gradients, strict=True):
            assert found is not None
            assert found.is_contiguous()
            assert error(found, expected) < 4 * TOLERANCE[SINGLE]


@pytest.mark.parametrize("name", ["train", "three cores", "blocks"])
def test_half_precision(name: str) -> None:
    of = network(name)
    dy, x, cores = tensors(of, dtype=HALF)
    y, gradients = reference(of, dy, x, cores)
    ahead = fused_rebuild.candidate(of, Task(ROWS, False, False, "float16", 2, "sm_90"), MACHINE)
    back = fused_rebuild.candidate(of, Task(ROWS, True, True, "float16", 2, "sm_90"), MACHINE)
    assert ahead is not None
    assert back is not None
    assert error(ahead.program.forward(x, cores, None), y) < 2 * TOLERANCE[HALF]
    for found, expected in zip(back.program.gradients(dy, x, cores, [True] * len(gradients)), gradients, strict=True):
        assert found is not None
        assert error(found, expected) < 4 * TOLERANCE[HALF]


@pytest.mark.parametrize("name", ["train", "three cores", "blocks"])
def test_every_way_back_gives_the_gradients_that_are_needed(name: str) -> None:
    of = network(name)
    dy, x, cores = tensors(of)
    _, gradients = reference(of, dy, x, cores)
    task = Task(ROWS, cores=True, arch="sm_90")
    planner = fused_rebuild._Planner(fused_rebuild.orders(of, task, MACHINE), fused_rebuild.table_of("sm_90"))
    program = programs(of, task)[0]
    ways = list(planner._ways(program.form))
    assert len(ways) == 1 + len(of.names("in")) + len(of.names("out"))
    for way in ways:
        made = FusedRebuild(of, program.groups, program.form, planner._back(program.form, *way)[0])
        for k in range(len(cores)):
            found = made.gradients(dy, x, cores, [False, *(j == k for j in range(len(cores)))])
            assert [gradient is not None for gradient in found] == [False, *(j == k for j in range(len(cores)))]
            assert error(found[1 + k], gradients[1 + k]) < 4 * TOLERANCE[SINGLE]


class Large(TorchDispatchMode):
    """The operations that write as many elements as the weight has."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.names = elements, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and found.numel() == self.elements and not func.is_view:
            self.names.append(func.__name__)
        return found


@pytest.mark.parametrize("name", ["train", "three cores", "blocks", "low rank"])
def test_the_gradient_of_the_weight_is_not_copied_for_a_few_rows(name: str) -> None:
    of = network(name)
    dy, x, cores = tensors(of)
    program = min(fused_rebuild.candidates(of, Task(ROWS, cores=True, arch="sm_90"), MACHINE), key=lambda c: c.seconds)
    with Large(of.features("out") * of.features("in")) as large:
        program.program.gradients(dy, x, cores, [False, *[True] * len(cores)])
    assert large.names == ["bmm.default"]


def test_no_rows() -> None:
    of = network("train")
    dy, x, cores = tensors(of, rows=0)
    program = programs(of, Task(1, True, True, arch="sm_90"))[0]
    assert program.forward(x, cores, None).shape == (0, 42)
    dx, *others = program.gradients(dy, x, cores, [True] * 3)
    assert dx is not None
    assert dx.shape == x.shape
    assert all(gradient is not None and gradient.eq(0).all() for gradient in others)


def test_needs_of_the_rows_alone_build_the_weight_alone() -> None:
    of = network("train")
    dy, x, cores = tensors(of)
    (program,) = programs(of, Task(ROWS, x=True, arch="sm_90"))
    assert program.back is None
    dx, *others = program.gradients(dy, x, cores, [True, False, False])
    assert dx is not None
    assert error(dx, reference(of, dy, x, cores)[1][0]) < TOLERANCE[SINGLE]
    assert others == [None, None]
