"""Plans for a GPU, by the constants that are shipped."""

import warnings

import pytest
import torch
from torch import nn

import tensorlayers as tl
from tensorlayers import TT, ConversionPlan, LowRank
from tensorlayers.entry import Work


@pytest.mark.parametrize(
    ("format", "is_converted"), [(TT(8), True), (TT(32), False), (TT(0.1), False), (LowRank(0.1), True)]
)
def test_on_a_gpu_in_half_precision(format, is_converted):
    """By the shipped constants, with Triton's kernels: a tensor train pays up to a rank of about 12."""
    model = nn.Sequential(nn.Linear(4096, 4096, device="meta", dtype=torch.bfloat16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = tl.plan_conversion(model, format, device="cuda", rows=4096)
    assert plan.work == Work(4096, "cuda", "bfloat16")
    assert (plan.converted == ("0",)) is is_converted
    if not is_converted:
        assert "predicted slower" in plan["0"].reason
        assert "pays: up to TT(rank=1" in plan["0"].advice
    assert ConversionPlan.from_json(plan.to_json()).work == plan.work
