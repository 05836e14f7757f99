"""heal: outputs that come back, by every loss; models that are left as they were."""

import copy
import math

import pytest
import torch
from torch import nn

from tensorlayers.convert import convert_model
from tensorlayers.distillation import Distillation, LayerRegression, Objective, blocks_of, divergence, squared_error
from tensorlayers.errors import ConversionError
from tensorlayers.formats import TT, LowRank
from tensorlayers.heal import heal
from tensorlayers.layers import FactorizedLayer
from tensorlayers.testing import assert_close
from tests.decomposition import FORMATS
from tests.heal.support import Sentences, error, mlp, pair, rows, same, sentences
from tests.snapshot import Snapshot

# -- what it is for ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", FORMATS)
def test_every_format_is_brought_nearer_by_the_defaults_at_any_scale(cls):
    after = []
    for scale in (1e-3, 1.0, 1e3):

        def scaled(scale=scale):
            model = nn.Sequential(nn.Linear(36, 48), nn.Tanh(), nn.Linear(48, 36))
            for parameter in model[2].parameters():
                parameter.data *= scale
            return model

        model, teacher = pair(cls(0.3), scaled)
        before = error(model, teacher, rows(seed=9))
        result = heal(model, teacher, rows(6, 32))
        after.append(error(model, teacher, rows(seed=9)))
        assert after[-1] < 0.98 * before
        assert after[-1] == pytest.approx(after[0], rel=0.03)
        assert result.held_out[-1][1] < result.held_out[0][1]
        assert (result.steps, len(result.losses), result.ended) == (50, 50, "steps")
        assert "loss of the held-out batches" in str(result)


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_cores_are_balanced_before_they_are_trained(factor):
    model, teacher = pair(TT(4))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in other.modules():
            if isinstance(layer, FactorizedLayer):
                layer.cores[0].mul_(factor)
                layer.cores[1].div_(factor)
    heal(model, teacher, rows(), steps=20)
    heal(other, teacher, rows(), steps=20)
    assert_close(other(rows()[0]), model(rows()[0]), torch.float32)


def test_what_is_shared_is_trained_once():
    def make():
        return nn.Sequential(*(nn.Linear(36, 36) for _ in range(3)))

    torch.manual_seed(1)
    teacher = make()
    model = convert_model(teacher, share={r"re:\d": TT(6)}, force=True)
    before = error(model, teacher, rows(seed=9))
    result = heal(model, teacher, rows(), layerwise=0.3)
    assert error(model, teacher, rows(seed=9)) < before
    assert result.parameters == sum(one.numel() for one in model.parameters())
    assert model[0].cores[0] is model[2].cores[0]


def test_convolutions_and_lookups():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Embedding(50, 12), nn.Conv1d(10, 20, 3, padding=1), nn.BatchNorm1d(20), nn.ReLU(True))
    model = convert_model(teacher, {"0": LowRank(0.4), "*": LowRank(0.4)}, force=True)
    batches = [torch.randint(50, (16, 10)) for _ in range(12)]
    result = heal(model, teacher, batches, layerwise=0.3, hidden=0.5)
    assert result.held_out[-1][1] < 0.99 * result.held_out[0][1]


@pytest.mark.parametrize("options", [{}, {"layerwise": 0.4}, {"hidden": 1.0}, {"labels": 0.5}, {"temperature": 3.0}])
def test_packed_attention_logits_and_labels(options):
    labels = "labels" in options
    model, teacher = pair(LowRank(0.4), lambda: Sentences(5))
    batches = sentences(8, labels)
    result = heal(model, teacher, batches, steps=30, **options)
    assert result.held_out[-1][1] < result.held_out[0][1]


# -- losses -----------------------------------------------------------------------------------------------------------


def test_losses_are_those_of_the_definitions():
    a, b = torch.randn(2, 7, 5, dtype=torch.float64)
    assert_close(squared_error(a, b), (a - b).norm() ** 2 / b.norm() ** 2, torch.float64)
    p, q = (b / 3).softmax(1), (a / 3).softmax(1)
    assert_close(divergence(a, b, 3.0), 9 * (p * (p / q).log()).sum() / 7, torch.float64)
    assert float(divergence(b, b)) == 0
    assert_close(squared_error(a, torch.zeros_like(b)), a.norm() ** 2, torch.float64)


def test_what_is_masked_does_not_count():
    model, teacher = pair(LowRank(0.4), Sentences)
    batch = sentences(1)[0]
    mask = batch["attention_mask"].bool()
    other = {**batch, "input_ids": torch.where(mask, batch["input_ids"], 7)}
    with torch.no_grad():
        found = [float(Distillation(model, teacher, [one], Objective(), 0)(0)) for one in (batch, other)]
        y, wanted = (one(**batch).last_hidden_state[mask] for one in (model.eval(), teacher))
    assert found[0] == pytest.approx(float(((y - wanted).norm() / wanted.norm()) ** 2), rel=1e-5)
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    regression = LayerRegression(model, teacher, [batch, other], Objective().mask)
    assert_close(regression(1), regression(0), torch.float32)


def test_a_mask_is_of_positions_wherever_they_stand():
    """Of a convolution they come last: with as many channels as positions no shape tells them apart."""
    model, teacher = pair(LowRank(0.4), lambda: nn.Sequential(nn.Conv1d(6, 6, 3, padding=1)))
    x, mask = torch.randn(4, 6, 6), torch.arange(6) < torch.tensor([[2], [3], [6], [1]])
    found = float(LayerRegression(model, teacher, [x], lambda batch: mask)(0).detach())
    with torch.no_grad():
        y, wanted = (one(x).mT[mask] for one in (model, teacher))
    assert found == pytest.approx(float(((y - wanted).norm() / wanted.norm()) ** 2), rel=1e-5)


def test_an_output_may_take_the_batch():
    model, teacher = pair(LowRank(0.4), Sentences)
    batch = sentences(1)[0]

    def pooled(result, batch):
        weights = batch["attention_mask"][..., None].float()
        return (result.last_hidden_state * weights).sum(1) / weights.sum(1)

    with torch.no_grad():
        y, wanted = (pooled(one(**batch), batch) for one in (model, teacher))
        for objective, expected in (
            (Objective(pooled), (y - wanted).norm() ** 2 / wanted.norm() ** 2),
            (Objective(pooled, lambda found, wanted: (found - wanted).abs().sum()), (y - wanted).abs().sum()),
            (Objective(lambda result, k=0: result.last_hidden_state[:, k]), None),
        ):
            found = Distillation(model, teacher, [batch], objective, 0)(0)
            assert found.dim() == 0
            if expected is not None:
                assert_close(found, expected, torch.float32)


def test_hidden_states_are_those_of_blocks():
    model, teacher = pair(LowRank(0.4), Sentences)
    batch = sentences(1)[0]
    assert blocks_of(model) == ("layers.0", "layers.1")
    assert blocks_of(pair()[0]) == ("0", "3", "5")
    assert blocks_of(pair(make=lambda: nn.Linear(36, 8))[0]) == ("",)
    mask = batch["attention_mask"].bool()
    states = {}
    for one in (model, teacher):
        x = one.table(batch["input_ids"])
        for k in range(2):
            x = one.layers[k](x, src_key_padding_mask=~mask)
            states.setdefault(k, []).append(x[mask])
    expected = squared_error(*states[1]) + 2 * (squared_error(*states[0]) + squared_error(*states[1])) / 2
    objective = Objective(hidden=2.0, hidden_at=blocks_of(model))
    assert_close(Distillation(model, teacher, [batch], objective, 0)(0), expected, torch.float32)


def test_layers_are_fitted_to_what_the_dense_ones_give():
    model, teacher = pair()
    x = rows(1)[0]
    inputs = [x, torch.tanh(teacher[0](x))]
    inputs.append(torch.tanh(teacher[3](inputs[1])))
    terms = [squared_error(model[k](y), teacher[k](y)) for k, y in zip((0, 3, 5), inputs, strict=True)]
    assert_close(LayerRegression(model, teacher, [x], Objective().mask)(0), sum(terms) / 3, torch.float32)


def test_what_the_teacher_gives_is_kept_or_computed_again():
    calls = []
    found = []
    for room in (0, 2**20):
        model, teacher = pair()
        teacher.register_forward_hook(lambda *_: calls.append(0))
        heal(model, teacher, rows(), steps=20, max_bytes=room)
        found.append((model, len(calls)))
        calls.clear()
    assert same(found[0][0], found[1][0])
    assert found[0][1] > 20
    assert found[1][1] == 8


# -- what ends a run early, and what is left --------------------------------------------------------------------------


def test_the_best_weights_are_kept_and_patience_ends():
    model, teacher = pair(LowRank(8))
    heal(model, teacher, rows(), steps=200)
    before = copy.deepcopy(model)
    result = heal(model, teacher, rows(), lr=1.0, warmup=0.0, patience=2)
    assert (result.ended, result.best, len(result.held_out)) == ("patience", 0, 3)
    assert_close(model.eval()(rows()[0]), before.eval()(rows()[0]), torch.float32)


@pytest.mark.parametrize("held_out", [0.0, 0.2])
def test_a_loss_that_is_not_finite(held_out):
    model, teacher = pair()
    count = 0

    def loss(found, wanted):
        nonlocal count
        count += torch.is_grad_enabled()
        return squared_error(found, wanted) * (math.nan if count == 13 else 1)

    with pytest.raises(ConversionError, match=r"a finite loss; got nan at step 13, learning rate \S+; the weights are"):
        heal(model, teacher, rows(5), loss=loss, held_out=held_out, lr=1e-3, steps=40)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
    x = rows(seed=7)[0]
    assert bool(torch.isfinite(model(x)).all())


def test_a_gradient_that_is_not_finite():
    model, teacher = pair()
    before = Snapshot(model)

    def loss(found, wanted):
        return (found - wanted).square().sum() + (0 * found).sqrt().sum()

    with pytest.raises(ConversionError, match="a finite gradient; got nan at step 1,"):
        heal(model, teacher, rows(), loss=loss)
    assert before == Snapshot(model)


@pytest.mark.parametrize("training", [False, True])
def test_models_are_left_as_they_were(training):
    model, teacher = pair()
    teacher.train()
    model.train()
    model[2].eval()
    model[3].cores[0].requires_grad_(False)
    model[5].freeze()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, dense = Snapshot(model), Snapshot(teacher)
    generator = torch.get_rng_state()
    heal(model, teacher, rows(), steps=10, training=training, layerwise=0.2, hidden=0.1)
    after = Snapshot(model)
    assert dense == Snapshot(teacher)
    assert (before.modules, before.parameters) == (after.modules, after.parameters)
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())
    assert not torch.equal(before.values["3.cores.0"], after.values["3.cores.0"])
    assert model[5].frozen
    assert torch.equal(generator, torch.get_rng_state())


def test_what_is_trained_can_be_said():
    model, teacher = pair()
    before = copy.deepcopy(model).state_dict()
    heal(model, teacher, rows(), steps=5, train=lambda name, parameter: name == "3.bias")
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])] == ["3.bias"]
    dense = copy.deepcopy(teacher)
    assert heal(dense, teacher, rows(), steps=5, train=lambda name, parameter: True).best == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "at least one batch; got none"),
        ({"batches": torch.zeros(4, 36)}, "an iterable of what the model takes; got Tensor"),
        ({"model": 3}, "model: an nn.Module; got int"),
        ({"teacher": None}, "teacher: an nn.Module; got NoneType"),
        ({"model": mlp()}, "a model with factorized layers"),
        ({"train": lambda name, parameter: False}, "a model with parameters to train; got none"),
        ({"teacher": nn.Linear(36, 3)}, r"outputs of the model's shape; got \(16, 8\) of the model and \(16, 3\)"),
        ({"teacher": nn.Linear(36, 8), "layerwise": 0.2}, "layerwise: factorized layers with the names of the teacher"),
        ({"steps": 0}, "steps: an integer of at least 1, or None; got 0"),
        ({"steps": 2.0}, "steps: an integer of at least 1, or None; got 2.0"),
        ({"minutes": 0}, "minutes: a number above 0, or None; got 0"),
        ({"patience": 0}, "patience: an integer of at least 1, or None; got 0"),
        ({"every": 0}, "every: an integer of at least 1; got 0"),
        ({"lr": -1}, "lr: a number above 0; got -1"),
        ({"lr": math.nan}, "lr: a number above 0; got nan"),
        ({"clip": True}, "clip: a number above 0; got True"),
        ({"temperature": 0}, "temperature: a number above 0; got 0"),
        ({"warmup": 1.0}, "warmup: a number of at least 0, below 1; got 1.0"),
        ({"held_out": -0.1}, "held_out: a number of at least 0, below 1; got -0.1"),
        ({"layerwise": 1}, "layerwise: a number of at least 0, below 1; got 1"),
        ({"hidden": -1}, "hidden: a number of at least 0; got -1"),
        ({"labels": 1.0}, "labels count where the model gives a loss"),
        ({"output": 3}, "output: a callable, or None; got 3"),
        ({"output": lambda y: None}, "output: a callable that gives a tensor; it gave a NoneType"),
        ({"mask": None}, "mask: a callable; got None"),
        ({"training": 1}, "training: a bool; got 1"),
        ({"seed": -1}, "seed: an integer of at least 0; got -1"),
        ({"hidden_at": "layers"}, "hidden_at: names of modules; got 'layers'"),
        ({"hidden_at": ["nowhere"]}, "hidden_at: modules of both models; the model has no 'nowhere'"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    model, teacher = pair()
    before, dense = Snapshot(model), Snapshot(teacher)
    with pytest.raises(ConversionError, match=message):
        heal(**{"model": model, "teacher": teacher, "batches": rows(), **change})
    assert before == Snapshot(model)
    assert dense == Snapshot(teacher)


def test_a_teacher_of_its_own():
    model, _ = pair()
    with pytest.raises(ConversionError, match=r"a teacher that shares nothing that is trained; it shares '0.bias'"):
        heal(model, model, rows())
    assert heal(pair()[0], pair()[1], rows(1), steps=3).held_out == ()
