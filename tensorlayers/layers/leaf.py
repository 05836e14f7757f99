"""torch.fx: a factorized layer is one call in what `torch.fx.symbolic_trace` records, as torch's own layers are."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy


def is_recorded(input: object) -> bool:
    """Whether the input of a forward stands for one that `torch.fx.symbolic_trace` does not know yet."""
    return isinstance(input, Proxy)


def call(layer: nn.Module, *arguments: Any) -> Any:
    """Record the call of a layer: what its forward returns for the proxies among its arguments."""
    tracer: Any = next(argument.tracer for argument in arguments if isinstance(argument, Proxy))
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), arguments, {})
