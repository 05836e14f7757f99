"""What the tests of real architectures share: a model, how it is called, and what is converted of it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers
from torch import nn

LOOKUP = "a lookup"
NOTHING = "nothing saved"


@dataclass(frozen=True)
class Architecture:
    """A model, how it is called, and the two lists: what LowRank(0.5) converts, and what stays dense and why.

    Reasons may be given by their beginning.
    """

    build: Callable[[], nn.Module]
    call: Callable[[nn.Module], torch.Tensor]
    converted: set[str]
    dense: dict[str, str] = field(default_factory=dict)

    @property
    def hugging_face(self) -> bool:
        return isinstance(self.build(), transformers.PreTrainedModel)

    @property
    def convertible(self) -> set[str]:
        """What `force` converts: all but what is blocked."""
        return self.converted | {name for name, why in self.dense.items() if why.startswith((LOOKUP, NOTHING))}


def ids(rows=2, length=7, vocabulary=100):
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


def floats(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def like(model, values):
    return values.to(next(model.parameters()).dtype)


MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
