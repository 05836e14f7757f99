"""collect(model, batches): moments against those by hand, and a model that is left as it was."""

import itertools
import math

import pytest
import torch
from torch import nn

from tensorlayers import LowRank, calibrate, plan_conversion
from tensorlayers.calibrate import Calibration, collect
from tensorlayers.errors import CheckpointError, ConversionError
from tensorlayers.layers import layer_types
from tensorlayers.testing import assert_close
from tests.models import Aside
from tests.snapshot import Snapshot


def outer(rows):
    return rows.double().T @ rows.double()


class Classifier(nn.Module):
    """Of sentences, with a mask."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.drop, self.unused = nn.Dropout(0.5), nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask):
        x = self.table(input_ids)
        x = x + self.down(self.drop(torch.relu_(self.up(x))))
        return x * attention_mask[..., None]


def sentences(count=3):
    lengths = torch.randint(1, 7, (count, 4, 1))
    masks = (torch.arange(6) < lengths).long()
    return [{"input_ids": torch.randint(20, (4, 6)), "attention_mask": mask} for mask in masks]


@pytest.mark.parametrize("gradients", [0, 3])
def test_moments_of_what_is_not_masked(gradients):
    model, batches = Classifier(), sentences()
    before = Snapshot(model)
    found = collect(model, batches, gradients=gradients)
    assert before == Snapshot(model)
    masks = [batch["attention_mask"].bool() for batch in batches]
    ids = torch.cat([batch["input_ids"][mask] for batch, mask in zip(batches, masks, strict=True)])
    x = model.table.weight.detach()[ids]
    hidden = torch.relu(model.up(x)).detach()
    assert set(found) == {"table", "up", "down"}
    assert found.silent == ("unused",)
    assert torch.equal(found["table"].inputs, torch.bincount(ids, minlength=20).double())
    for name, rows in (("up", x), ("down", hidden)):
        assert found[name].count == len(ids)
        assert_close(found[name].inputs, outer(rows), torch.float32)
        assert_close(found[name].mean, rows.double().mean(0), torch.float32)
        assert (found[name].outputs is None) == (not gradients)
    if gradients:
        # Of random signs the squares are 1.
        assert_close(found["down"].outputs.diagonal(), torch.full((8,), float(len(ids))).double(), torch.float32)


def test_gradients_are_those_of_the_output():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    found = collect(model, [torch.randn(2000, 6)], gradients=8)
    expected = (model[1].weight.T @ model[1].weight).detach().double()
    assert torch.dist(found["0"].outputs / found["0"].count, expected) < 0.1 * expected.norm()
    weighted = collect(model, [torch.randn(2000, 6)], gradients=8, output=lambda y: y[:, :1])
    first = model[1].weight[:1].detach().double()
    assert torch.dist(weighted["0"].outputs / 2000, first.T @ first) < 1e-4 * (first.T @ first).norm()


def test_logits_count_by_their_likelihood():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 5)

        def forward(self, x):
            return type("Output", (), {"logits": self.head(x)})()

    model, x = Model(), torch.randn(3000, 6)
    found = collect(model, [x], gradients=8)["head"]
    p = model.head(x).softmax(1).detach().double()
    fisher = torch.diag(p.mean(0)) - p.T @ p / len(p)
    assert torch.dist(found.outputs / found.count, fisher) < 0.1 * fisher.norm()


def convolutions():
    for d, transposed in itertools.product((1, 2, 3), (False, True)):
        name = f"Conv{'Transpose' if transposed else ''}{d}d"
        kernel = (3, 2, 1)[:d]
        for groups, stride, dilation in itertools.product((1, 2), (1, 2), (1, 2)):
            options = {"stride": stride, "dilation": dilation, "groups": groups, "padding": 1 if kernel[-1] > 1 else 0}
            if transposed:
                options["output_padding"] = stride - 1
            yield pytest.param(name, kernel, options, id=f"{name}-{groups}-{stride}-{dilation}")
    for mode in ("circular", "reflect", "replicate"):
        yield pytest.param("Conv2d", (3, 3), {"padding": 1, "padding_mode": mode}, id=mode)
    yield pytest.param("Conv2d", (3, 2), {"padding": "same", "dilation": 2}, id="same")


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("name", "kernel", "options"), list(convolutions()))
def test_convolutions_are_products_with_their_windows(name, kernel, options):
    module = getattr(nn, name)(4, 6, kernel, **options)
    layer = next(one for one in layer_types() if one.matches(module))
    x = torch.randn(2, 4, *(7, 6, 5)[: len(kernel)])
    settings = layer.settings_of(module)
    weight = layer.to_axes(module.weight.detach(), settings)
    columns = layer.columns(module, x)
    bias = module.bias.view(-1, *(1 for _ in kernel))
    y = layer.gradients(module, (module(x) - bias).detach())
    if settings["groups"] > 1:
        found = torch.einsum("...gn,gmn->...gm", columns, weight.flatten(2))
    else:
        found = columns @ weight.flatten(1).T
    assert_close(found, y, torch.float32)
    moments = collect(nn.Sequential(module), [x, x[0]])["0"]
    rows = columns.reshape(-1, *columns.shape[1 + len(kernel) :]).double()
    rows = torch.cat([rows, rows[: len(rows) // 2]])
    expected = torch.einsum("p...n,p...k->...nk", rows, rows)
    assert_close(moments.inputs, expected, torch.float32)
    assert moments.outputs.shape == (*expected.shape[:-2], y.shape[-1], y.shape[-1])


def test_projections_of_attention():
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
    x = torch.randn(3, 5, 8)
    found = collect(model, [x])
    assert {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "linear1"} <= set(found)
    assert_close(found["self_attn.q_proj"].inputs, outer(x.flatten(0, 1)), torch.float32)
    assert type(model.self_attn) is nn.MultiheadAttention


def test_several_passes_give_the_same():
    model, batches = Classifier(), sentences()
    once = collect(model, batches, gradients=0)
    again = collect(model, batches, gradients=0, max_bytes=1)
    assert set(once) == set(again)
    assert all(torch.equal(once[name].inputs, again[name].inputs) for name in once)
    with pytest.raises(ConversionError, match="take 4 passes: batches that can be gone over again"):
        collect(model, iter(batches), max_bytes=1)
    assert set(collect(model, iter(batches), gradients=0)) == set(once)


def test_saved_and_loaded(tmp_path):
    found = collect(Classifier(), sentences())
    found.save(tmp_path / "calibration.safetensors")
    again = Calibration.load(tmp_path / "calibration.safetensors")
    assert list(again) == list(found)
    assert again.silent == found.silent
    for name, one in found.items():
        other = again[name]
        assert (one.count, one.is_lookup) == (other.count, other.is_lookup)
        for a, b in ((one.total, other.total), (one.inputs, other.inputs), (one.outputs, other.outputs)):
            assert (a is None and b is None) or torch.equal(a, b)
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.safetensors"]
    for text in (b"", b"x" * 100):
        (tmp_path / "bad").write_bytes(text)
        with pytest.raises(CheckpointError, match="no calibration"):
            Calibration.load(tmp_path / "bad")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("gradients", [0, 2])
def test_what_is_not_finite_is_refused(value, gradients):
    model = Classifier()
    model.up.bias.data[3] = value
    before = Snapshot(model)
    with pytest.raises(ConversionError, match="layer 'down': every activation is finite"):
        collect(model, sentences(), gradients=gradients)
    assert before == Snapshot(model)


def test_a_batch_that_raises_leaves_no_trace():
    class Halfway(Classifier):
        def forward(self, input_ids, attention_mask):
            found = super().forward(input_ids, attention_mask)
            if len(input_ids) == 1:
                raise KeyError("halfway")
            return found

    model, batches = Halfway(), sentences()
    batches.append({name: value[:1] for name, value in batches[0].items()})
    before = Snapshot(model)
    with pytest.raises(KeyError, match="halfway"):
        collect(model, batches)
    assert before == Snapshot(model)


def test_large_means_do_not_hide_what_varies():
    x = 300 + torch.randn(4000, 24) * torch.logspace(0, -2, 24)
    moments = collect(nn.Linear(24, 8), [x[:3000], x[3000:]], gradients=0)[""]
    found = moments.inputs / moments.count - moments.mean.outer(moments.mean)
    expected = x.double().T.cov(correction=0)
    assert float((found - expected).norm()) < 1e-3 * float(expected.norm())
    assert float(torch.linalg.eigvalsh(found)[0]) > 0


def test_activations_whose_squares_overflow():
    with pytest.raises(ConversionError, match="collect: layer '': every second moment is finite"):
        collect(nn.Linear(3, 2), [torch.randn(5, 3) * 1e25], gradients=0)


def test_a_seed_decides_and_torchs_own_generator_stays():
    model, batches = Classifier(), sentences()
    before = torch.get_rng_state()
    found = [collect(model, batches, seed=seed)["up"].outputs for seed in (1, 1, 2)]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_layers_that_the_output_does_not_depend_on():
    found = collect(Aside(), [torch.randn(30, 32)])
    assert found["fc"].reaches_output
    assert not found["aside"].reaches_output
    assert found["aside"].outputs.shape == (31, 31)


def test_outputs_in_a_dict_are_judged_by_their_logits():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x):
            logits = self.fc(x)
            return {"loss": 0 * logits.sum(), "logits": logits}

    assert collect(Model(), [torch.randn(30, 6)])["fc"].reaches_output


def test_windows_are_gathered_in_parts(monkeypatch):
    model, batches = nn.Conv2d(4, 6, 3, 2, 1), [torch.randn(7, 4, 9, 9)]
    whole = collect(model, batches)[""]
    monkeypatch.setattr(calibrate, "PART_BYTES", 9000)
    parts = collect(model, batches)[""]
    assert parts.count == whole.count
    assert_close(parts.inputs, whole.inputs, torch.float32)
    assert_close(parts.outputs, whole.outputs, torch.float32)


def test_folded_layers():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 4))
    batches = [torch.randn(30, 6)]
    assert list(collect(model, batches)) == ["1"]
    calibration = collect(model, batches, fold=True)
    assert list(calibration) == ["0", "1"]
    plan = plan_conversion(model, LowRank(2), calibration=calibration, fold=True, force=True)
    assert all(0 < entry.output_error < 1 for entry in plan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradients": 2.5}, "gradients: an integer of at least 0; got 2.5"),
        ({"gradients": -1}, "gradients: an integer of at least 0; got -1"),
        ({"max_bytes": None}, "max_bytes: an integer of at least 1; got None"),
        ({"seed": "a"}, "seed: an integer of at least 0; got 'a'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConversionError, match=message):
        collect(nn.Linear(3, 2), [torch.zeros(4, 3)], **options)


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (nn.Linear(3, 2, device="meta"), [torch.zeros(4, 3)], "a model with values; this one is on the meta device"),
        (nn.Linear(3, 2), [], "at least one batch; got none"),
        (nn.Linear(3, 2), torch.zeros(4, 3), "an iterable of what the model takes; got Tensor"),
        (nn.Linear(3, 2), {"x": torch.zeros(4, 3)}, "got dict"),
        (nn.Linear(3, 2), 7, "got int"),
        (nn.ReLU(), [torch.zeros(4, 3)], "a model with layers that can be converted"),
        ("model", [torch.zeros(4, 3)], "a model; got str"),
    ],
)
def test_bad_arguments_are_refused(model, batches, message):
    with pytest.raises(ConversionError, match=message):
        collect(model, batches)


def test_an_output_that_cannot_be_differentiated():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(x).detach()

    with pytest.raises(ConversionError, match="gradients=0 does without"):
        collect(Model(), [torch.randn(4, 3)])
    assert collect(Model(), [torch.randn(4, 3)], gradients=0)["fc"].count == 4
