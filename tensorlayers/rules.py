"""Ranks that the weight decides: by the energy that is kept, by the error, by variational Bayes."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .errors import RankError
from .rank import RankRule
from .spectra import Spectrum


@dataclass(frozen=True)
class SpectralRule(RankRule):
    """A rule that reads the ranks of all bonds off the spectra of a weight."""

    in_metric: ClassVar[bool] = True
    """Whether the weight is seen in the metric of the data, where there are some."""

    @abstractmethod
    def ranks(self, spectra: Mapping[str, Spectrum]) -> tuple[int, ...]:
        """A rank of at least 1 for each spectrum, in their order."""


@dataclass(frozen=True)
class Energy(SpectralRule):
    """The lowest ranks that keep a share of the squared norm; in the metric of the data where there are some.

    Each of n bonds may cut off 1/n of what may be lost, so that all together never cut off more.

    Parameters
    ----------
    share : float
        In (0, 1].

    Raises
    ------
    RankError
        If it is not.

    Examples
    --------
    >>> import torch, tensorlayers as tl
    >>> weight = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.1]))
    >>> tl.LowRank(tl.Energy(0.9)).decompose(weight).network.ranks
    (2,)
    """

    share: float

    def __post_init__(self) -> None:
        _check_share(self, self.share)

    def ranks(self, spectra: Mapping[str, Spectrum]) -> tuple[int, ...]:
        return _within(spectra, 1 - self.share)


@dataclass(frozen=True)
class RelativeError(SpectralRule):
    """The lowest ranks whose relative error is certainly not above this one: `Energy` of 1 - error^2.

    Parameters
    ----------
    error : float
        ``||W - W_hat|| / ||W||``, in (0, 1]; in the metric of the data, where there are some, that of the outputs.

    Raises
    ------
    RankError
        If it is not.
    """

    error: float

    def __post_init__(self) -> None:
        _check_share(self, self.error)

    def ranks(self, spectra: Mapping[str, Spectrum]) -> tuple[int, ...]:
        return _within(spectra, self.error**2)


@dataclass(frozen=True)
class EVBMF(SpectralRule):
    """The ranks that stand out from noise: empirical variational Bayesian matrix factorization of each unfolding.

    The global solution in closed form, the variance of the noise estimated. Always of the weight itself, not in a
    metric of data: the noise is the weight's. Of a batch of unfoldings the mean rank counts, rounded up.

    Parameters
    ----------
    weaken : float
        In (0, 1]: how much of what is found to be noise is cut off all the same. 1 keeps the ranks that stand out
        alone; at .8, a fifth of what they leave out is kept.

    References
    ----------
    Nakajima et al. 2013, Global analytic solution of fully-observed variational Bayesian matrix factorization,
    corollary 2; Kim et al. 2015, Compression of deep convolutional neural networks, section 3.2 (its use).
    """

    weaken: float = 1.0
    in_metric: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_share(self, self.weaken)

    def ranks(self, spectra: Mapping[str, Spectrum]) -> tuple[int, ...]:
        found = []
        for spectrum in spectra.values():
            rows, columns = min(spectrum.sides), max(spectrum.sides)
            kept = math.ceil(sum(evbmf_rank(one, rows, columns) for one in spectrum.energies) / len(spectrum.energies))
            found.append(max(1, kept + round((1 - self.weaken) * (rows - kept))))
        return tuple(found)


def evbmf_rank(energies: Tensor, rows: int, columns: int) -> int:
    r"""The rank of a matrix of so many rows and at least as many columns by EVBMF, from its squared singular values.

    A component stands out where its singular value is above :math:`\sqrt{M \sigma^2 \underline{x}}`, with
    :math:`\underline{x} = (1 + \underline{\tau})(1 + \alpha / \underline{\tau})`, :math:`\alpha = L / M` and
    :math:`\underline{\tau} \approx 2.5129 \sqrt{\alpha}`; the variance of the noise minimises the free energy.
    """
    from scipy.optimize import minimize_scalar  # not at import: it takes longer than all else

    energies = energies.double()
    total = float(energies.sum())
    if not total:
        return 0
    ratio = rows / columns
    tau = 2.5129 * math.sqrt(ratio)
    threshold = (1 + tau) * (1 + ratio / tau)

    def free_energy(log_variance: float) -> float:
        scaled = energies / (columns * math.exp(log_variance))
        above, below = scaled[scaled > threshold], scaled[scaled <= threshold].clamp_min(1e-300)
        gap = above - (1 + ratio)
        taus = (gap + (gap.square() - 4 * ratio).clamp_min(0).sqrt()) / 2
        terms = (below - below.log()).sum() + (above - taus + ((taus + 1) / above).log()).sum()
        return float(terms + ratio * (taus / ratio + 1).log().sum())

    # At most this many components can stand out, so that the others are noise alone.
    most = max(math.ceil(rows / (1 + ratio)) - 1, 0)
    rest = energies[most:] if most < len(energies) else energies[-1:]
    lower = max(float(rest[0]) / (columns * threshold), float(rest.mean()) / columns, total * 1e-30)
    upper = max(total / (rows * columns), lower * (1 + 1e-9))
    found = minimize_scalar(free_energy, bounds=(math.log(lower), math.log(upper)), method="bounded")
    return int((energies > columns * math.exp(float(found.x)) * threshold).sum())


def _within(spectra: Mapping[str, Spectrum], lost: float) -> tuple[int, ...]:
    """The lowest ranks at which each bond cuts off no more than an equal part of a share of the squared norm."""
    found = []
    for one in spectra.values():
        allowed = (lost / len(spectra) + 1e-12) * one.tails[0]
        found.append(max(1, next(rank for rank, tail in enumerate(one.tails) if tail <= allowed)))
    return tuple(found)


def _check_share(rule: SpectralRule, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise RankError(f"{rule}: a number above 0 and at most 1; got {value!r}")
