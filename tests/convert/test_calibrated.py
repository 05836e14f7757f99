"""convert_model with data: the model's outputs are kept better, the model itself is left as it was."""

import pytest
import torch
from torch import nn

from tensorlayers import TT, ConversionError, FactorizedLinear, LowRank, convert_model
from tensorlayers.calibrate import collect
from tensorlayers.layers import FactorizedLayer
from tests.decomposition import FORMATS
from tests.models import Sometimes, blocks, encoder, error, images, narrow
from tests.snapshot import Snapshot

MODELS = {"blocks": blocks, "images": images, "encoder": encoder}


@pytest.mark.parametrize("cls", FORMATS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_outputs_are_kept_better(make, cls):
    torch.manual_seed(0)
    model, draw = make()
    batches, x = [draw(20) for _ in range(8)], draw(100)
    before = Snapshot(model)
    calibration = collect(model, batches)
    options = {"force": True, "formats": cls(0.4)}
    found = [
        convert_model(model, **options),
        convert_model(model, **options, calibration=calibration),
        convert_model(model, **options, calibration=calibration, batches=batches),
        convert_model(model, **options, batches=batches),
    ]
    assert before == Snapshot(model)
    names = [[name for name, module in one.named_modules() if isinstance(module, FactorizedLayer)] for one in found]
    assert names[0] == names[1] == names[2] == names[3]
    for converted in found:
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in converted.modules())
        assert converted.training
    plain, fitted, sequential, alone = (error(model, converted, x) for converted in found)
    assert fitted < plain
    assert sequential < plain
    assert alone < plain


def test_layers_that_never_run_keep_their_weights():
    model, draw = blocks()
    calibration = collect(model, [draw(20)])
    assert calibration.silent == ("0.spare", "1.spare")
    plain = convert_model(model, LowRank(0.4), force=True)
    for options in ({"calibration": calibration}, {"batches": [draw(20)]}):
        found = convert_model(model, LowRank(0.4), force=True, **options)
        assert torch.equal(found[0].spare.to_dense(), plain[0].spare.to_dense())
        assert found[0].spare.output_error is None
        assert 0 < found[0].out.output_error < 1


def test_layers_that_only_some_batches_run():
    batches = [narrow(20, 24), narrow(30, 24), narrow(20, 24)]
    found = convert_model(Sometimes(), LowRank(0.4), force=True, batches=batches)
    assert 0 < found.always.output_error < 1
    assert 0 < found.sometimes.output_error < 1


@pytest.mark.parametrize("bias", [-100.0, 0.0])
def test_inputs_that_do_not_vary(bias):
    """All zero after a ReLU that never opens, or one vector for all: nothing can be told, and the weight is kept."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24))
    model[0].bias.data.fill_(bias)
    batches = [torch.ones(40, 24) for _ in range(3)]
    for calibration in (None, collect(model, batches)):
        found = convert_model(model, LowRank(0.9), force=True, calibration=calibration, batches=batches)
        for k in (0, 2, 4):
            assert found[k].to_dense().norm() < 2 * model[k].weight.norm()
        assert error(model, found, batches[0]) < 1e-3


def test_errors_do_not_pile_up():
    """Each layer sees what those before it give now: the last one makes good for them."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(24, 24, bias=False) for _ in range(5)))
    batches = [narrow(200, 24) for _ in range(4)]
    calibration = collect(model, batches)
    options = {"formats": LowRank(0.5), "force": True, "calibration": calibration}
    errors = [error(model, convert_model(model, **options, batches=given), batches[0]) for given in (None, batches)]
    assert errors[1] < errors[0]


def test_joint_layers_and_data():
    torch.manual_seed(0)
    model, draw = blocks()
    batches = [draw(20) for _ in range(4)]
    share = {r"re:(\d)\.(?:query|key|value)": TT(6)}
    found = [
        convert_model(model, share=share, force=True, calibration=calibration, batches=given)
        for calibration, given in ((None, None), (collect(model, batches), None), (None, batches))
    ]
    errors = [error(model, converted, draw(100)) for converted in found]
    assert max(errors[1:]) < errors[0]
    assert found[1][0].query.cores is found[1][0].key.cores


def test_a_model_that_is_a_layer():
    torch.manual_seed(0)
    model, x = nn.Linear(24, 24), narrow(400, 24)
    found = convert_model(model, LowRank(4), force=True, batches=[x])
    assert isinstance(found, FactorizedLinear)
    assert error(model, found, x) < error(model, convert_model(model, LowRank(4), force=True), x)


def test_a_batch_that_raises_changes_nothing():
    model, draw = blocks()
    before = Snapshot(model)
    with pytest.raises(RuntimeError):
        convert_model(model, LowRank(0.4), force=True, inplace=True, batches=[draw(4), torch.zeros(2, 3, 5)])
    assert before == Snapshot(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": [torch.full((2, 3, 24), torch.nan)]}, "batches: layer '0.query': every activation is finite"),
        ({"calibration": {"0": 1}}, "calibration: what `collect` returns; got dict"),
        ({"batches": []}, "convert_model: at least one batch; got none"),
        ({"batches": torch.zeros(3, 24)}, "convert_model: batches are an iterable"),
    ],
)
def test_bad_data_are_refused(options, message):
    with pytest.raises(ConversionError, match=message):
        convert_model(blocks()[0], LowRank(0.4), force=True, **options)
