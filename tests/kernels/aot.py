"""Kernels compiled ahead of time for sm_90: no GPU is needed for that."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_MEMORY = 227 * 1024  # bytes a block may have on sm_90
POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "tf32": "*fp32"}


def compiled(
    kernel: Any,
    dtype: str,
    pointers: Mapping[str, str],
    constants: Mapping[str, Any],
    multiples: Collection[str],
    **options: int,
) -> triton.compiler.CompiledKernel:
    """A kernel as a launch compiles it: arguments of 1 are constants, multiples of 16 are marked.

    Parameters
    ----------
    kernel
    dtype : str
        A key of `POINTERS`: the elements, and how products of float32 are rounded.
    pointers : mapping
        The tensors among the arguments, with their element type where it is not the dtype's.
    constants : mapping
        The values of the arguments that are constants.
    multiples : collection of str
        Arguments that are multiples of 16.
    options
        num_warps, num_stages.
    """
    names = kernel.arg_names
    signature = {
        k: "constexpr" if k in constants else (pointers[k] or POINTERS[dtype]) if k in pointers else "i32"
        for k in names
    }
    attributes = {(names.index(k),): [["tt.divisibility", 16]] for k in set(multiples) - set(constants)}
    return triton.compile(
        ASTSource(kernel, signature, dict(constants), attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"enable_fp_fusion": True, **options},
    )


def check(kernel: triton.compiler.CompiledKernel, dtype: str, tmp_path: Path) -> None:
    """No spilled registers, no stack, shared memory within the chip, and the matrix units where there are some."""
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    assert set(counts) == {"REG", "STACK", "LOCAL"}
    assert counts["STACK"] == counts["LOCAL"] == "0", f"registers are spilled: {counts}"
    assert kernel.metadata.shared <= SHARED_MEMORY
    assert ("wgmma.mma_async" in kernel.asm["ptx"]) == (dtype != "float32")
