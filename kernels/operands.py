"""What the launches of all kernels share: what they ask of operands, and how kernels are compiled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tensorlayers import launch
from tensorlayers.errors import KernelError

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def elements(name: str, tensors: Sequence[Tensor], other: Tensor | None = None) -> str:
    """What launch tables call the one dtype of some tensors: "half", "tf32" or "float32".

    Parameters
    ----------
    name : str
        The kernel.
    tensors : sequence of Tensor
    other : Tensor, optional
        It has their dtype too, or float32.

    Raises
    ------
    KernelError
        If the dtypes differ, or are neither float16, bfloat16 nor float32, or are bfloat16 on the CPU.
    """
    dtypes = {tensor.dtype for tensor in tensors}
    if other is not None:
        dtypes |= {other.dtype} - {torch.float32}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        raise KernelError(f"{name}: one dtype, float16, bfloat16 or float32; got {sorted(map(str, dtypes))}")
    dtype = tensors[0].dtype
    if dtype == torch.bfloat16 and tensors[0].device.type == "cpu":
        raise KernelError(f"{name}: Triton's interpreter computes bfloat16 wrongly; use float16 or float32 on the CPU")
    if dtype.itemsize == 2:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "float32"


def precision(dtype: str) -> str:
    """How a kernel is told to multiply elements that launch tables call so."""
    return "tf32" if dtype == "tf32" else "ieee"


def strides(operand: Tensor) -> list[int]:
    """Strides, 0 along axes of size 1: so that they neither tell launches apart nor hide an alignment."""
    return [stride if size > 1 else 0 for size, stride in zip(operand.shape, operand.stride(), strict=True)]


def is_aligned(operand: Tensor, *axes: int) -> bool:
    """Whether Triton can see that an operand is addressed in vectors, along one of these axes (or any)."""
    return launch.is_aligned(operand.shape, operand.stride(), axes)


def options(warps: int, stages: int, many_registers: bool = False) -> dict[str, int | bool]:
    """How a kernel is compiled.

    `many_registers`: for a kernel that spills otherwise, because ptxas keeps some back for more programs a processor.
    """
    most = {"maxnreg": 255} if many_registers and not torch.version.hip else {}
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True, **most}
