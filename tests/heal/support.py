"""Models that are healed, and what they are compared by."""

import copy
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from tensorlayers.convert import convert_model
from tensorlayers.formats import LowRank


def mlp():
    return nn.Sequential(nn.Linear(36, 48), nn.Tanh(), nn.Dropout(0.2), nn.Linear(48, 36), nn.Tanh(), nn.Linear(36, 8))


def pair(format=None, make=mlp, **options):
    """A dense model, and what it was converted to."""
    torch.manual_seed(1)
    teacher = make().eval()
    return convert_model(teacher, format or LowRank(4), force=True, **options), teacher


def rows(count=8, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 36, generator=generator) for _ in range(count)]


def error(model, teacher, batches):
    """Relative error of the outputs in float64."""
    x = torch.cat(batches).double()
    with torch.no_grad():
        found, wanted = (copy.deepcopy(one).double().eval()(x) for one in (model, teacher))
    return float((found - wanted).norm() / wanted.norm())


def same(first, second):
    values = second.state_dict()
    return all(torch.equal(value, values[name]) for name, value in first.state_dict().items())


class Sentences(nn.Module):
    """Of ids with a mask: hidden states of each position, or logits and a loss."""

    def __init__(self, classes=None):
        super().__init__()
        self.table = nn.Embedding(30, 16)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True) for _ in range(2))
        self.head = None if classes is None else nn.Linear(16, classes)

    def forward(self, input_ids, attention_mask, labels=None):
        x = self.table(input_ids)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~attention_mask.bool())
        if self.head is None:
            return SimpleNamespace(last_hidden_state=x)
        logits = self.head(x[:, 0])
        return SimpleNamespace(logits=logits, loss=None if labels is None else F.cross_entropy(logits, labels))


def sentences(count=6, labels=False):
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        ids = torch.randint(30, (8, 6), generator=generator)
        lengths = torch.randint(2, 7, (8, 1), generator=generator)
        made.append({"input_ids": ids, "attention_mask": (torch.arange(6) < lengths).long()})
        if labels:
            made[-1]["labels"] = ids[:, 0] % 5
    return made
