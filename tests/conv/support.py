"""The kinds and formats that the tests of convolutions run over."""

import pytest
import torch
from hypothesis import strategies as st

from tensorlayers import LowRank, Tucker, layers
from tensorlayers.formats import available

KINDS = {cls.kind: cls for cls in layers.layer_types() if cls.kind.startswith("conv")}
VARIANTS = [cls(3) for _, cls in sorted(available().items())] + [Tucker(2, spatial=True), LowRank(3, split="spatial")]
FORMATS = [pytest.param(format, id=str(format)) for format in VARIANTS]
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def example(cls, format, channels=(6, 8), kernel=3, dtype=None, **options):
    return cls(*channels, kernel, format=format, dtype=dtype, **options)


def image(layer, batch=2, size=9, dtype=None):
    return torch.randn(batch, layer.in_channels, *(size,) * layer.dimensions, dtype=dtype)


@st.composite
def options(draw, count, transposed):
    """Channels, torch's options, splits of the channels, and the shape of an input."""

    def each(values):
        return draw(st.one_of(st.sampled_from(values), st.tuples(*[st.sampled_from(values)] * count)))

    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = [groups * draw(st.sampled_from([1, 2, 5, 7])) for _ in range(2)]
    chosen = {
        "kernel_size": each([1, 2, 3, 4]),
        "stride": each([1, 2, 3]),
        "padding": each([0, 1, 2]),
        "dilation": each([1, 2]),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if not transposed:
        chosen["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        if draw(st.booleans()):
            chosen["padding"] = draw(st.sampled_from(["same", "valid"]))
            chosen["stride"] = 1 if chosen["padding"] == "same" else chosen["stride"]
    elif draw(st.booleans()):
        chosen["output_padding"] = draw(st.integers(0, 1))
        chosen["dilation"] = 2
    splits = {}
    if draw(st.booleans()):
        sizes = [channel // groups for channel in channels]
        splits = {side: (2, -(-size // 2)) for side, size in zip(("in_modes", "out_modes"), sizes, strict=True)}
    lead = draw(st.sampled_from([(2,), (1,), ()]))
    lengths = draw(st.tuples(*[st.integers(7, 9)] * count))
    return channels, chosen, splits, (*lead, channels[0], *lengths)
