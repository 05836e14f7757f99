"""What a converted model is trained to: what the dense model's layers give, its outputs and hidden states, labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .batches import Mask, attention_mask, call, entry_of, named_output, output_of, unmasked
from .errors import ConversionError
from .layers import FactorizedLayer
from .precision import at_least_single
from .scan import scan
from .watch import rows_of_gradient, runnable

Loss = Callable[[Tensor, Tensor], Tensor]
"""What the model gives and what it should, of one shape -> the loss."""


@dataclass(frozen=True)
class Objective:
    """What of two models' outputs is compared, and how.

    Parameters
    ----------
    output : callable or None
        (output) -> tensor, or (output, batch) -> tensor; None for what the model is judged by.
    loss : callable or None
        (found, wanted) -> scalar; None for `divergence` of logits and `squared_error` of all else.
    temperature : float
        Of `divergence`.
    hidden : float
        Weight of the hidden states' squared error.
    hidden_at : tuple of str
        The modules that give them.
    labels : float
        Weight of the model's own loss.
    mask : callable
        (batch) -> (batch, positions) or None, as of `collect`.
    """

    output: Callable[..., Tensor] | None = None
    loss: Loss | None = None
    temperature: float = 1.0
    hidden: float = 0.0
    hidden_at: tuple[str, ...] = ()
    labels: float = 0.0
    mask: Mask = attention_mask


def squared_error(
    found: Tensor,
    wanted: Tensor,
) -> Tensor:  # 0-d
    """The squared error, relative to the squares of what is wanted unless they are all 0."""
    scale = wanted.square().sum()
    return (found - wanted).square().sum() / torch.where(scale > 0, scale, 1)


def divergence(
    found: Tensor,  # (..., classes)
    wanted: Tensor,  # (..., classes)
    temperature: float = 1.0,
) -> Tensor:  # 0-d
    r"""The mean Kullback-Leibler divergence of the classes' probabilities that two tensors of logits give.

    :math:`T^2 \, KL(\mathrm{softmax}(z / T) \,\|\, \mathrm{softmax}(\hat z / T))`, which has gradients of one size at
    any T.

    References
    ----------
    Hinton, Vinyals and Dean 2015, Distilling the knowledge in a neural network.
    """
    logs = [F.log_softmax(logits / temperature, -1).flatten(0, -2) for logits in (found, wanted)]
    return temperature**2 * F.kl_div(logs[0], logs[1], reduction="batchmean", log_target=True)


class Distillation:
    """The loss of the model's outputs, and what else is asked for, against the dense model's.

    Parameters
    ----------
    model, teacher : nn.Module
    batches : sequence
    objective : Objective
    max_bytes : int
        What the teacher gives is kept for the next pass as far as it takes no more than this.
    """

    def __init__(
        self, model: nn.Module, teacher: nn.Module, batches: Sequence[Any], objective: Objective, max_bytes: int
    ) -> None:
        self.model, self.teacher, self.batches, self.objective = model, teacher, batches, objective
        self.with_batch = objective.output is not None and _takes_two(objective.output)
        self.free = max_bytes
        self.kept: dict[int, list[Tensor]] = {}

    def __call__(self, k: int) -> Tensor:
        """The loss of batch k, 0-d; differentiable where gradients are enabled.

        Raises
        ------
        ConversionError
            If the two models give tensors of different shapes, or the model no loss where labels are to count.
        """
        wanted = self._wanted(k)
        found, result, by_classes = self._tensors(self.model, k)
        for one, other in zip(found, wanted, strict=True):
            if one.shape != other.shape:
                shapes = f"{tuple(one.shape)} of the model and {tuple(other.shape)} of the teacher"
                raise ConversionError(f"heal: a teacher with outputs of the model's shape; got {shapes}")
        pairs = [
            (one.to(dtype), other.to(one.device, dtype))
            for one, other in zip(found, wanted, strict=True)
            for dtype in (at_least_single(one.dtype),)
        ]
        loss = self._output_loss(*pairs[0], by_classes)
        if len(pairs) > 1:
            loss = loss + self.objective.hidden * torch.stack([squared_error(*pair) for pair in pairs[1:]]).mean()
        if self.objective.labels:
            own = entry_of(result, "loss")
            if own is None:
                raise ConversionError("heal: labels count where the model gives a loss for its batches; it gives none")
            loss = loss + self.objective.labels * own
        return loss

    def _output_loss(self, found: Tensor, wanted: Tensor, by_classes: bool) -> Tensor:
        if self.objective.loss is not None:
            return self.objective.loss(found, wanted)
        return divergence(found, wanted, self.objective.temperature) if by_classes else squared_error(found, wanted)

    def _wanted(self, k: int) -> list[Tensor]:
        if k in self.kept:
            return self.kept[k]
        with torch.no_grad():
            found = [one.detach() for one in self._tensors(self.teacher, k)[0]]
        size = sum(one.nbytes for one in found)
        if size <= self.free:
            self.free -= size
            # A view would keep all of what it is a view of.
            found = self.kept[k] = [one.clone() if one._base is not None else one for one in found]
        return found

    def _tensors(self, model: nn.Module, k: int) -> tuple[list[Tensor], Any, bool]:
        """The output and the hidden states of a model, masked positions left out; its result; whether of logits."""
        batch, objective = self.batches[k], self.objective
        hidden: list[tuple[str, Tensor]] = []
        with _outputs(model, objective.hidden_at if objective.hidden else (), hidden):
            result = call(model, batch)
        if objective.output is not None:
            output = objective.output(result, batch) if self.with_batch else objective.output(result)
            if not isinstance(output, Tensor):
                raise ConversionError(f"output: a callable that gives a tensor; it gave a {type(output).__name__}")
        else:
            output = output_of(result)
        named = named_output(result)
        logits = objective.output is None and named is not None and named[0] == "logits"
        by_classes = logits and output.dim() in (2, 3) and output.shape[-1] > 1
        mask = objective.mask(batch)
        tensors = [output, *(tensor for _, tensor in sorted(hidden, key=lambda one: one[0]))]
        return [unmasked(one, mask, 1) if one.dim() > 1 else one for one in tensors], result, by_classes


class LayerRegression:
    """The loss of each factorized layer by itself: what it gives, where it takes what the dense layer takes.

    Parameters
    ----------
    model, teacher : nn.Module
        Factorized layers of which the teacher has no dense one of that name are left out.
    batches : sequence
    mask : callable
        As of `collect`.

    Raises
    ------
    ConversionError
        If there are no such layers.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, batches: Sequence[Any], mask: Mask) -> None:
        self.batches, self.mask = batches, mask
        known = {one.name: one for one in scan(teacher)}
        layers = {name: module for name, module in model.named_modules() if isinstance(module, FactorizedLayer)}
        self.layers = {name: layer for name, layer in layers.items() if name in known}
        if not self.layers:
            raise ConversionError("layerwise: factorized layers with the names of the teacher's; got none")
        self.found = {name: known[name] for name in self.layers}
        self.teacher = runnable(teacher, self.found.values())

    def __call__(self, k: int) -> Tensor:
        """The loss of batch k, 0-d: the mean over the layers that run."""
        batch = self.batches[k]
        mask = self.mask(batch)
        seen: list[tuple[str, tuple[Any, ...], dict[str, Any], Tensor]] = []

        def hook_of(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
                # What follows may change it in place.
                seen.append((name, *_copied((args, kwargs)), result.clone()))

            return hook

        with torch.no_grad(), _hooks(self.teacher, {name: hook_of(name) for name in self.layers}):
            call(self.teacher, batch)
        terms = []
        for name, args, kwargs, wanted in seen:
            found = self.layers[name](*args, **kwargs)
            dtype = at_least_single(found.dtype)
            given = self.found[name]
            pair = (rows_of_gradient(given, one.to(found.device, dtype), mask) for one in (found, wanted))
            terms.append(squared_error(*pair))
        if not terms:
            raise ConversionError("layerwise: layers that run; none of them did")
        return torch.stack(terms).mean()


def blocks_of(model: nn.Module) -> tuple[str, ...]:
    """The modules whose outputs are a model's hidden states.

    The members of its outermost lists of modules (ModuleList, Sequential) that hold factorized layers; without such
    lists, these layers.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            for key, child in module.named_children():
                path = f"{name}.{key}" if name else key
                if not any(path.startswith(f"{other}.") for other in found) and any(_layers(child)):
                    found.append(path)
    layers = [name for name, module in model.named_modules() if isinstance(module, FactorizedLayer)]
    return tuple(found or layers)


def _layers(module: nn.Module) -> Iterator[FactorizedLayer]:
    return (child for child in module.modules() if isinstance(child, FactorizedLayer))


def _takes_two(output: Callable[..., Tensor]) -> bool:
    """Whether a callable must be given the batch, too: a default of a second parameter is its own."""
    try:
        parameters = inspect.signature(output).parameters.values()
    except (TypeError, ValueError):
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(one.kind in kinds and one.default is one.empty for one in parameters) > 1


def _copied(value: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)


@contextmanager
def _hooks(model: nn.Module, hooks: dict[str, Callable[..., None]]) -> Iterator[None]:
    handles = []
    try:
        for name, hook in hooks.items():
            handles.append(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _outputs(model: nn.Module, names: Iterable[str], into: list[tuple[str, Tensor]]) -> Any:
    """Collect what modules give while a model runs."""

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            into.append((name, output_of(result)))

        return hook

    return _hooks(model, {name: hook_of(name) for name in names})
