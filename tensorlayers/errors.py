"""The exceptions tensorlayers raises. Each message states the rule that was broken and the offender."""

from __future__ import annotations


class TensorlayersError(Exception):
    """Base class of every error that tensorlayers raises on purpose."""


class NetworkError(TensorlayersError, ValueError):
    """A tensor network is malformed, or its cores do not fit it."""


class ModeError(TensorlayersError, ValueError):
    """Modes do not fit the dimension that they are to tensorize."""


class RankError(TensorlayersError, ValueError):
    """A rank is below 1, of the wrong length or type, or a fraction that cannot be reached."""


class FormatError(TensorlayersError, ValueError):
    """An unknown format, or a format's option out of its range."""


class DecompositionError(TensorlayersError, ValueError):
    """A dense weight cannot be decomposed (NaN or infinite entries, wrong shape)."""


class ConversionError(TensorlayersError, ValueError):
    """A model or a plan cannot be converted as asked."""


class CheckpointError(TensorlayersError, ValueError):
    """A saved directory is incomplete, damaged, or does not fit the model."""


class ReadOnlyWeightError(TensorlayersError, RuntimeError):
    """An attempt to write into ``.weight`` of a factorized layer, which is computed from the cores."""


class KernelError(TensorlayersError, RuntimeError):
    """A Triton kernel was demanded where none supports the call."""


class CostModelError(TensorlayersError, ValueError):
    """The constants of a machine are missing or malformed."""


MALFORMED = (LookupError, ArithmeticError, TypeError, ValueError, RuntimeError, AssertionError, AttributeError)
"""What torch raises, according to what is wrong, where plain data describe no layer."""
