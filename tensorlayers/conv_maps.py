"""The linear maps that a convolution plan is made of, each with its adjoint: padding, convolving, mixing channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """How a convolution moves over its input; one entry a spatial dimension.

    Parameters
    ----------
    kernel_size, stride, dilation : tuple of int
    padding : tuple of (int, int)
        Before and after.
    padding_mode : {"zeros", "reflect", "replicate", "circular"}
    transposed : bool
        The padding is then symmetric, and of zeros.
    output_padding : tuple of int
        Of a transposed convolution.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    padding_mode: str = "zeros"
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def plain(self) -> tuple[int, ...]:
        """The dimensions of kernel size 1, which have no kernel mode, that are padded or strided all the same."""
        extra = self.output_padding or (0,) * len(self.stride)
        moves = zip(self.kernel_size, self.stride, self.padding, extra, strict=True)
        return tuple(d for d, (k, s, p, e) in enumerate(moves) if k == 1 and (s > 1 or any(p) or e))

    def along(self, dims: Sequence[int]) -> Window:
        """This window where only these dimensions are moved over, and all others left alone.

        It is transposed only where it moves at all: a product at every position is the same either way.
        """

        def each(values: Sequence[int], other: int) -> tuple[int, ...]:
            return tuple(value if d in dims else other for d, value in enumerate(values))

        return replace(
            self,
            kernel_size=each(self.kernel_size, 1),
            stride=each(self.stride, 1),
            padding=tuple(pair if d in dims else (0, 0) for d, pair in enumerate(self.padding)),
            dilation=each(self.dilation, 1),
            transposed=self.transposed and bool(dims),
            output_padding=each(self.output_padding, 0),
        )

    @property
    def pads_first(self) -> bool:
        """Whether the input is padded beforehand, since torch's convolution pads with zeros, and symmetrically."""
        padded = self.padding_mode != "zeros" and any(map(any, self.padding))
        return padded or any(before != after for before, after in self.padding)

    def lengths(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """The spatial sizes of the output for those of an input."""
        found = []
        for d, length in enumerate(lengths):
            reach = self.dilation[d] * (self.kernel_size[d] - 1) + 1
            if self.transposed:
                found.append((length - 1) * self.stride[d] - sum(self.padding[d]) + reach + self.output_padding[d])
            else:
                found.append((length + sum(self.padding[d]) - reach) // self.stride[d] + 1)
        return tuple(found)

    def reaching(self, lengths: Sequence[int], wanted: Sequence[int]) -> Window:
        """This window, transposed, with the output padding that gives an output of the sizes `wanted`.

        Parameters
        ----------
        lengths : sequence of int
            The spatial sizes of the input.
        wanted : sequence of int
            Among those that the stride leaves open.

        Raises
        ------
        ValueError
            As torch's, if there is no such output padding.
        """
        count = len(self.stride)
        if len(wanted) != count:
            raise ValueError(f"output_size {tuple(wanted)}: {count} sizes, or those of the whole output")
        least = replace(self, output_padding=(0,) * count).lengths(lengths)
        for d, (first, size) in enumerate(zip(least, wanted, strict=True)):
            most = first + self.stride[d] - 1
            if not first <= size <= most:
                raise ValueError(f"output_size {tuple(wanted)}: dimension {d} is from {first} to {most}; got {size}")
        return replace(self, output_padding=tuple(size - first for first, size in zip(least, wanted, strict=True)))


def is_last(x: Tensor) -> bool:
    """Whether the channels are the innermost dimension in memory (torch's channels-last), and more than one."""
    return x.dim() > 3 and x.stride(1) == 1 and not x.is_contiguous()


def with_layout(x: Tensor, last: bool) -> Tensor:
    """The tensor with its channels innermost in memory, or contiguous; a copy only where it is not so."""
    if not last or x.dim() < 4:
        return x.contiguous()
    if torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():  # no view: see `_Picked`
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    return x.movedim(1, -1).contiguous().movedim(-1, 1)  # vmap has no other way


class _Picked(torch.autograd.Function):
    """Channels in another order by one operator that is no view, whose gradient is the same operator.

    Inductor's layouts, on the CPU, fail on a view of four dimensions that a convolution keeps for its gradient where
    a graph leaves its sizes open.
    """

    @staticmethod
    def forward(x: Tensor, positions: Tensor, inverse: Tensor) -> Tensor:
        return x.index_select(1, positions)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy.index_select(1, *ctx.saved_tensors), None, None


def permuted(x: Tensor, sizes: Sequence[int], order: Sequence[int]) -> Tensor:
    """The same channels, their indices in another order, in the same layout."""
    count = len(sizes)
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        positions = torch.arange(x.shape[1], device=x.device).reshape(*sizes).permute(*order).flatten()
        picked: Tensor = _Picked.apply(x, positions, positions.argsort())  # type: ignore[no-untyped-call]
        return picked
    if is_last(x):
        parts = x.movedim(1, -1).reshape(x.shape[0], *x.shape[2:], *sizes)
        first = x.dim() - 1
        return parts.permute(*range(first), *(first + k for k in order)).flatten(first).movedim(-1, 1)
    parts = x.reshape(x.shape[0], *sizes, *x.shape[2:])
    return parts.permute(0, *(1 + k for k in order), *range(1 + count, parts.dim())).flatten(1, count)


def permuted_back(x: Tensor, sizes: Sequence[int], order: Sequence[int]) -> Tensor:
    """The adjoint of `permuted`, with the same arguments."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return permuted(x, [sizes[k] for k in order], inverse)


def with_channels(x: Tensor, groups: int, count: int) -> Tensor:
    """Each group of channels cut to, or filled with zeros to, this many; in the same layout.

    Each of the two is the adjoint of the other.
    """
    given = x.shape[1] // groups
    if given == count:
        return x
    parts = torch.split(x, given, 1)
    if count < given:
        parts = tuple(part.narrow(1, 0, count) for part in parts)
    else:
        zeros = x.new_zeros((x.shape[0], count - given, *x.shape[2:]))
        parts = tuple(piece for part in parts for piece in (part, zeros))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _pad(x: Tensor, window: Window) -> Tensor:
    amounts = [amount for pair in reversed(window.padding) for amount in pair]
    return F.pad(x, amounts, mode="constant" if window.padding_mode == "zeros" else window.padding_mode)


def _unpad(dx: Tensor, window: Window) -> Tensor:
    """The adjoint of `_pad`: what was read from inside is added there."""
    # By slices and not by torch's own operators: they are not deterministic on every device, and not all are there.
    for d, (before, after) in enumerate(window.padding):
        dim, size = 2 + d, dx.shape[2 + d] - before - after
        inside = dx.narrow(dim, before, size)
        if window.padding_mode != "zeros" and (before or after):
            head, tail = dx.narrow(dim, 0, before), dx.narrow(dim, before + size, after)
            inside = inside.clone()
            if window.padding_mode == "reflect":
                inside.narrow(dim, 1, before).add_(head.flip(dim))
                inside.narrow(dim, size - 1 - after, after).add_(tail.flip(dim))
            elif window.padding_mode == "replicate":
                inside.narrow(dim, 0, 1).add_(head.sum(dim, keepdim=True))
                inside.narrow(dim, size - 1, 1).add_(tail.sum(dim, keepdim=True))
            else:
                inside.narrow(dim, size - before, before).add_(head)
                inside.narrow(dim, 0, after).add_(tail)
        dx = inside
    return dx


def _arguments(window: Window, groups: int) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
    padding = [0 if window.pads_first else before for before, _ in window.padding]
    extra = list(window.output_padding) or [0] * len(padding)
    return list(window.stride), padding, list(window.dilation), window.transposed, extra, groups


def convolve(x: Tensor, weight: Tensor, window: Window, groups: int, bias: Tensor | None = None) -> Tensor:
    """Torch's convolution with any padding; in the layout of `x`."""
    x = _pad(x, window) if window.pads_first else x
    y: Tensor = torch.convolution(x, weight, bias, *_arguments(window, groups))
    return y


def convolve_back(
    dy: Tensor, x: Tensor, weight: Tensor, window: Window, groups: int, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The adjoints of `convolve` for `x` and for `weight`, those that are needed."""
    inside = _pad(x, window) if window.pads_first else x
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, inside, weight, None, *_arguments(window, groups), [*needs, False]
    )
    return _unpad(dx, window) if needs[0] and window.pads_first else dx, dw


# A product of channels at every position is a matrix product. It reads and writes both layouts at full speed, where
# oneDNN's convolution with a kernel of size 1 reorders a contiguous input and output (half the speed or less).


def mix(x: Tensor, weight: Tensor, last: bool, bias: Tensor | None = None) -> Tensor:
    """The convolution with a kernel of size 1.

    Parameters
    ----------
    x : Tensor
        Shape (batch, channels, ``*spatial``).
    weight : Tensor
        Shape (new channels, channels).
    last : bool
        Whether the channels of the result are to be innermost in memory.
    bias : Tensor, optional
        Shape (new channels,).
    """
    rows, batch, spatial = x.flatten(2), x.shape[0], x.shape[2:]
    if torch.compiler.is_compiling():
        # A matrix product would be seen as a view (see `_Picked`), and the compiler chooses layouts by itself.
        none = [0] * len(spatial)
        kernel = weight.reshape(*weight.shape, *(1 for _ in spatial))
        found: Tensor = torch.convolution(x, kernel, bias, [1] * len(spatial), none, [1] * len(spatial), False, none, 1)
        return found
    if not last:
        matrices = weight.expand(batch, -1, -1), rows
        y = torch.bmm(*matrices) if bias is None else torch.baddbmm(bias[:, None], *matrices)
        return y.reshape(batch, weight.shape[0], *spatial)
    matrices = rows.mT, weight.mT.expand(batch, -1, -1)
    y = torch.bmm(*matrices) if bias is None else torch.baddbmm(bias, *matrices)
    # Moved last: with a batch of one, other ways leave strides that torch takes for those of a contiguous tensor.
    return y.reshape(batch, *spatial, weight.shape[0]).movedim(-1, 1)


def mix_back(dy: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    """The adjoints of `mix` for `x`, in its layout, and for `weight`, those that are needed."""
    dx = mix(dy, weight.mT, is_last(x)) if needs[0] else None
    if not needs[1]:
        return dx, None
    if (is_last(x) and is_last(dy)) or x.dtype.itemsize < 4:  # a running sum would be rounded to half precision
        rows, other = (part.movedim(1, -1).flatten(0, -2) for part in (x, dy))
        return dx, other.mT @ rows
    dw = torch.zeros_like(weight)
    for left, right in zip(dy.flatten(2), x.flatten(2), strict=True):
        dw.addmm_(left, right.mT)  # no stack of matrices, and no copy into one layout
    return dx, dw
