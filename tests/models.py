"""Small models that are converted with data, their inputs, and how far a converted one is from them."""

import torch
from torch import nn


class Block(nn.Module):
    """Three layers on one input, one after them, and one that never runs."""

    def __init__(self, width=24):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out, self.spare = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        weights = (self.query(x) @ self.key(x).mT / 4).softmax(-1)
        return x + torch.tanh(self.out(weights @ self.value(x)))


class Aside(nn.Module):
    """The output that is judged, the first, does not depend on the second layer."""

    def __init__(self, width=32):
        super().__init__()
        self.fc, self.aside = nn.Linear(width, width), nn.Linear(width, width - 1)

    def forward(self, x):
        h = self.fc(x)
        return h, torch.tanh(self.aside(h))


class Sometimes(nn.Module):
    """The second layer runs, twice, on batches of more than 20 rows only."""

    def __init__(self, width=24):
        super().__init__()
        self.always, self.sometimes = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        h = self.always(input=x)
        return h if len(x) <= 20 else self.sometimes(self.sometimes(h))


def blocks():
    return nn.Sequential(Block(), Block(), nn.Linear(24, 24)), lambda n: narrow(n, 7, 24)


def images():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(144, 24),
    )  # fmt: skip
    return model, lambda n: torch.randn(n, 3, 8, 8).cumsum(2).cumsum(3) / 8


def encoder():
    layer = nn.TransformerEncoderLayer(24, 2, 48, dropout=0.3, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), lambda n: narrow(n, 5, 24)


def narrow(*shape):
    """Of which some directions vary little."""
    return torch.randn(*shape) * torch.logspace(0, -1.5, shape[-1]) + torch.linspace(-1, 1, shape[-1])


def error(model, converted, x):
    with torch.no_grad():
        y = model.eval()(x)
        return float((converted.eval()(x) - y).norm() / y.norm())
