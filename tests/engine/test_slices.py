"""Products summed over slices of a bond, and the gradients of merged cores, against the reference."""

import itertools

import pytest
import torch

from tensorlayers import CP, adjoint, contraction, decision, products
from tensorlayers.autograd import built
from tensorlayers.formats import available
from tensorlayers.machine import shipped
from tensorlayers.program import Task
from tensorlayers.slices import slices
from tensorlayers.testing import assert_close
from tests.engine.support import NETWORKS, operands, truth

WIDE = CP(80, out_modes=(8, 6), in_modes=(6, 4)).network(48, 24)
"""Its Khatri-Rao products take five times the memory of the dense weight."""

SEVERAL = {name: network for name, network in NETWORKS.items() if len(network.cores) > 1}


def merged(network, rows=64):
    return decision.decide(network, Task(rows, True, True), shipped("cpu"), "merged").program


def test_no_slice_has_more_merged_cores_than_the_dense_weight_has_elements():
    found = slices(WIDE, merged(WIDE))
    assert [piece.start for piece in found] == list(itertools.accumulate([0, *(p.length for p in found[:-1])]))
    assert sum(piece.length for piece in found) == 80
    for piece in found:
        assert piece.bond == "r"
        assert piece.length * (48 + 24) <= 48 * 24


@pytest.mark.parametrize("kind", sorted(available()))
def test_what_is_no_larger_is_not_sliced(kind):
    network = available()[kind](4).network(48, 24)
    for forced in decision.NAMES:
        assert slices(network, decision.decide(network, Task(64), shipped("cpu"), forced).program) == ()


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_products_in_slices(rows):
    x, cores, bias = operands(WIDE, rows)
    dy = torch.randn(rows, 48, dtype=torch.float64)
    y, expected = truth(WIDE, x, cores, dy)
    product = built(products.row_product(WIDE, "merged"))
    assert_close(product.forward(x, cores, bias), y + bias, torch.float64)
    for needs in itertools.product([False, True], repeat=5):
        if not any(needs):
            continue
        found = product.gradients(dy, x, cores, needs)
        for gradient, wanted, is_needed in zip(found, expected, needs, strict=True):
            assert (gradient is None) == (not is_needed)
            if is_needed:
                assert_close(gradient, wanted, torch.float64)


@pytest.mark.parametrize("network", SEVERAL.values(), ids=SEVERAL)
def test_gradients_of_a_contraction(network):
    plan = contraction.dense_plan(network)
    cores = [core.requires_grad_() for core in operands(network, 1)[1]]
    dense = contraction.execute(plan, cores)
    dy = torch.randn_like(dense)
    expected = torch.autograd.grad(dense, cores, dy)
    with torch.no_grad():
        for needs in itertools.islice(itertools.product([True, False], repeat=len(cores)), 8):
            found = adjoint.gradients(plan, cores, dy, needs)
            for gradient, wanted, is_needed in zip(found, expected, needs, strict=True):
                assert (gradient is None) == (not is_needed)
                if is_needed:
                    assert_close(gradient, wanted, torch.float64)
