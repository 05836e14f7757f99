"""The kinds and formats that the tests of convolutions run over."""

import pytest
import torch

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
