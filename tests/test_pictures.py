"""Pictures say what the data say: bars, labels, curves and colors are read back from the figures."""

import importlib.util

import matplotlib
import pytest
import torch
from torch import nn

import tensorlayers as tl
from tensorlayers import BTT, CP, TT, ConversionError, FactorizedLinear, LowRank, RankError, Tucker
from tensorlayers.figures import color_of, save
from tensorlayers.formats import available
from tensorlayers.pictures import plot_errors, plot_frontier, plot_plan
from tensorlayers.tradeoffs import ErrorCurve, Point, error_curves, frontier
from tests.decomposition import FORMATS

matplotlib.use("agg")


def net():
    return nn.Sequential(nn.Embedding(4000, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 32))


@pytest.fixture(scope="module")
def plan():
    choice = {"1": LowRank(0.25), "3": TT(0.3), "*": None}
    return tl.plan_conversion(net(), choice, force=True, errors=False)


def texts(axes):
    return [text.get_text() for text in axes.texts]


def drawn(figure, path):
    """The figure, on disk: nothing fails when it is rendered."""
    figure.savefig(path / "figure.png")
    assert (path / "figure.png").stat().st_size > 1000
    return figure


# -- the plan ---------------------------------------------------------------------------------------------------------


def test_a_plan_has_a_bar_and_a_text_for_each_layer(plan, tmp_path):
    (axes,) = drawn(plot_plan(plan), tmp_path).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "3", "4"]
    # An embedding that is far larger than the converted layers is cut where the others end.
    assert [bar.get_width() for bar in axes.patches] == [4096, 2048, 480, 4096, plan["3"].parameters[1], 2048]
    shown = texts(axes)
    assert shown[0] == "128k   dense: asked to stay dense"
    assert shown[1] == "2.05k → 480   rank 5"
    assert shown[2].startswith("4.1k → ")
    assert shown[2].endswith(f"rank {plan['3'].network.ranks[0]}")
    assert axes.get_title("left").startswith("2 of 4 layers, 136k → ")
    colors = [matplotlib.colors.to_hex(bar.get_facecolor()).upper() for bar in axes.patches]
    assert colors[2] == color_of("lowrank")
    assert colors[4] == color_of("tt")
    assert colors[0] == colors[1] == colors[3] == colors[5] == "#DDDDDD"


def test_a_plan_that_converts_nothing_and_a_summary(tmp_path):
    (axes,) = drawn(plot_plan(tl.plan_conversion(net(), {"*": None}, errors=False), title="none"), tmp_path).axes
    assert axes.get_title("left") == "none"
    assert max(bar.get_width() for bar in axes.patches) == 4000 * 32
    converted = tl.convert_model(net(), {"1": BTT(0.3)}, force=True)
    (axes,) = plot_plan(tl.summarize(converted)).axes
    assert any("rank" in text for text in texts(axes))


def test_a_plan_of_many_layers_is_long():
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(36)])
    plan = tl.plan_conversion(model, LowRank(8), force=True, errors=False)
    figure = plot_plan(plan)
    assert len(figure.axes[0].get_yticklabels()) == 36
    assert figure.get_figheight() > 8


def test_an_empty_plan_is_refused():
    with pytest.raises(ConversionError, match="plot_plan: a plan with layers; got none"):
        plot_plan(tl.ConversionPlan([], 0))


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", FORMATS)
def test_errors_are_those_of_a_decomposition(cls):
    layer = nn.Linear(24, 30)
    (curve,) = error_curves(layer, cls(0.5), shares=(0.5, 0.2))
    assert (curve.layer, curve.format, curve.output) == ("", cls.name, None)
    assert list(curve.shares) == sorted(curve.shares)
    found = FactorizedLinear.from_dense(layer, cls(0.5))
    assert curve.shares[-1] == found.network.num_parameters / (24 * 30)
    assert found.error <= curve.weight[-1] * 1.02
    assert curve.weight[-1] <= found.error * 1.25
    assert curve.weight[0] > curve.weight[-1]


@pytest.mark.parametrize("cls", FORMATS)
def test_errors_of_outputs_are_those_on_the_data(cls):
    dense = nn.Linear(12, 16)
    x = torch.randn(128, 12) @ (torch.randn(12, 12) * torch.logspace(0, -2, 12))
    calibration = tl.collect(dense, [x], gradients=0)
    found = []
    for exact in (False, True):
        torch.manual_seed(2)
        found += error_curves(dense, cls(0.5), calibration, shares=(0.3, 0.5), exact=exact)
    rough, exact = found
    assert rough.weight == exact.weight
    assert all(best <= rest * 1.001 for best, rest in zip(exact.output, rough.output, strict=True))
    converted = FactorizedLinear.from_dense(dense, cls(cls(0.5).network(16, 12).ranks), calibration[""])
    assert 0.9 < exact.output[-1] / converted.output_error < 1.4  # CP ends in another optimum


def test_grouped_convolutions_have_errors_of_outputs():
    model = nn.Sequential(nn.Unflatten(1, (8, 4)), nn.Conv1d(8, 12, 3, groups=2))
    calibration = tl.collect(model, [torch.randn(16, 32)])
    (curve,) = error_curves(model, LowRank(0.5), calibration, shares=(0.5,))
    assert 0 < curve.output[0] < 1


def test_a_curve_has_the_points_that_a_format_can_reach():
    curves = error_curves(nn.Linear(8, 8), [LowRank(0.5), BTT(0.5)], shares=(0.01, 0.5))
    assert [len(curve.shares) for curve in curves] == [1, 1]
    assert not error_curves(nn.Linear(8, 8), LowRank(0.5), shares=(0.01,))


def test_errors_have_a_panel_a_layer(tmp_path):
    figure = drawn(plot_errors(net(), [LowRank(0.5), TT(0.5)], shares=(0.2, 0.5)), tmp_path)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["1", "3", "4"]
    for axes in panels:
        assert [line.get_color() for line in axes.lines] == [color_of("lowrank"), color_of("tt")]
    assert figure.get_supxlabel() == "share of the layer's parameters"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["lowrank", "tt"]


def test_many_panels_and_dashed_weights(tmp_path):
    curves = [
        ErrorCurve(f"encoder.layer.{k}.attention.self.query", name, (0.1, 0.5), (0.9, 0.5), (0.8, 0.3))
        for k in range(13)
        for name in ("cp", "tucker")
    ]
    figure = drawn(plot_errors(curves), tmp_path)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == 13
    assert all(len(axes.get_title()) <= 26 for axes in panels)
    assert [line.get_linestyle() for line in panels[0].lines] == [":", "-", ":", "-"]
    assert list(panels[0].lines[1].get_ydata()) == [0.8, 0.3]


# -- the frontier -----------------------------------------------------------------------------------------------------


def test_a_frontier_is_measured(tmp_path):
    model = net()
    ids = torch.randint(0, 4000, (4, 6))
    wanted = model(ids).detach()
    modes = []

    def measure(converted):
        modes.append(converted.training)
        return 1 - float((converted(ids) - wanted).norm() / wanted.norm())

    points = frontier(model, [LowRank(1), Tucker(1)], (0.2, 0.6), measure, timed=ids, repeats=2)
    assert [(point.format, point.share) for point in points] == [
        ("dense", 1.0),
        ("lowrank", 0.2),
        ("lowrank", 0.6),
        ("tucker", 0.2),
        ("tucker", 0.6),
    ]
    assert modes == [False] * 5
    assert model.training
    assert points[0].accuracy == 1
    assert points[0].params == sum(parameter.numel() for parameter in model.parameters())
    assert points[1].params < points[2].params < points[0].params
    assert points[1].macs < points[2].macs < points[0].macs
    assert points[1].accuracy < points[2].accuracy < 1
    assert all(point.latency > 0 for point in points)
    figure = drawn(plot_frontier(points, measure="agreement"), tmp_path)
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "parameters of the model",
        "multiply-accumulates a row",
        "milliseconds a batch",
    ]
    assert figure.axes[0].get_ylabel() == "agreement"
    line = next(line for line in figure.axes[0].lines if line.get_color() == color_of("tucker"))
    assert list(line.get_xdata()) == [point.params for point in points[3:]]
    assert list(line.get_ydata()) == [point.accuracy for point in points[3:]]


def test_a_size_that_cannot_be_reached_is_left_out_with_a_warning():
    with pytest.warns(UserWarning, match=r"lowrank at 0.01: layer '': rank 0.01: the smallest"):
        points = frontier(nn.Linear(16, 16), LowRank(1), (0.01, 0.5), lambda model: 1.0)
    assert [(point.share, point.latency) for point in points] == [(1.0, None), (0.5, None)]


def test_rows_of_plain_data(tmp_path):
    rows = [
        {"format": "tt healed", "share": 0.5, "params": 50, "accuracy": 0.9},
        {"format": "tt healed", "share": 0.3, "params": 30, "accuracy": 0.8},
        {"format": "smaller dense", "share": 0.3, "params": 30, "accuracy": 0.7},
    ]
    (axes,) = drawn(plot_frontier(rows, title="a model"), tmp_path).axes
    healed, smaller = axes.lines
    assert list(healed.get_xdata()) == [30, 50]
    assert (healed.get_color(), healed.get_linestyle()) == (color_of("tt"), "--")
    assert smaller.get_linestyle() == "-"
    (axes,) = plot_frontier(rows, against=("share",)).axes
    assert axes.get_xlabel() == "share of each layer's parameters"


def test_each_format_has_a_color_of_its_own():
    assert len({color_of(name) for name in available()}) == len(available())
    assert color_of("TT(0.5)") == color_of("tt") == color_of("tt healed")
    assert color_of("") == color_of("dense") == "#777777"


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "plot_frontier: at least one point; got none"),
        ([{"format": "tt"}], {}, "plot_frontier: every point has accuracy"),
        ([{"format": "tt", "accuracy": 1}], {}, "plot_frontier: points with params, macs or latency; got none"),
        ([{"format": "tt", "accuracy": 1}], {"against": ["macs"]}, "plot_frontier: every point has macs"),
        (
            [{"format": "tt", "accuracy": 1, "x": 1}],
            {"against": ["x"]},
            "against: of params, macs, latency, share; got x",
        ),
    ],
)
def test_points_that_lack_something_are_refused(rows, options, message):
    with pytest.raises(ConversionError, match=message):
        plot_frontier(rows, **options)


def test_bad_arguments_are_refused():
    with pytest.raises(ConversionError, match="formats: formats such as"):
        plot_errors(nn.Linear(4, 4))
    with pytest.raises(ConversionError, match="shares: at least one; got none"):
        error_curves(nn.Linear(4, 4), LowRank(1), shares=())
    with pytest.raises(RankError, match="shares: fractions above 0 and at most 1; got 2"):
        frontier(nn.Linear(4, 4), LowRank(1), (2,), float)
    with pytest.raises(ConversionError, match="ReLU: a layer that can be converted; got none"):
        error_curves(nn.ReLU(), LowRank(1))
    with pytest.raises(ConversionError, match="measure: a number; got str"):
        frontier(nn.Linear(4, 4), LowRank(1), (0.5,), lambda model: "good")
    with pytest.raises(ConversionError, match="plot_errors: at least one curve; got none"):
        plot_errors([])


def test_without_matplotlib(monkeypatch, plan):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name))
    for picture in (
        lambda: plot_plan(plan),
        lambda: plot_errors(nn.Linear(8, 8), CP(0.5)),
        lambda: plot_frontier([Point("tt", 0.5, 1, 1, 0.5)]),
    ):
        with pytest.raises(ConversionError, match=r"pictures need matplotlib: pip install 'tensorlayers\[plots\]'"):
            picture()


def test_no_figure_stays_open(plan):
    from matplotlib import pyplot

    before = pyplot.get_fignums(), dict(matplotlib.rcParams)
    plot_plan(plan)
    assert (pyplot.get_fignums(), dict(matplotlib.rcParams)) == before


@pytest.mark.parametrize(("name", "head"), [("plan.png", b"\x89PNG"), ("plan.svg", b"<?xml"), ("plan.PDF", b"%PDF")])
def test_pictures_are_saved_by_their_name(plan, name, head, tmp_path):
    save(plot_plan(plan), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(head)


def test_a_name_that_says_no_kind_is_refused_and_nothing_is_written(plan, tmp_path):
    with pytest.raises(ConversionError, match=r"plan.txt: a name that ends in .*\.png"):
        save(plot_plan(plan), tmp_path / "plan.txt")
    assert not list(tmp_path.iterdir())
