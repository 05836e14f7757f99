"""PyTorch layers whose weight is a small tensor network, and the converter that swaps them into a model."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a source checkout the kernels lie beside the package; installed, they are tensorlayers.kernels (see setup.cfg).
_here = _Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():
    __path__.append(str(_here.parent))

from .advice import fastest_modes  # noqa: E402
from .backend import use_kernels  # noqa: E402
from .budget import Budget  # noqa: E402
from .calibrate import Calibration, collect  # noqa: E402
from .convert import convert_model, plan_conversion, summarize, to_dense  # noqa: E402
from .errors import (  # noqa: E402
    CheckpointError,
    ConversionError,
    DecompositionError,
    FormatError,
    KernelError,
    ModeError,
    NetworkError,
    RankError,
    ReadOnlyWeightError,
    TensorlayersError,
)
from .explain import explain  # noqa: E402
from .formats import BTT, CP, TT, Format, LowRank, Tucker  # noqa: E402
from .gradual import RankSchedule  # noqa: E402
from .heal import Healing, heal  # noqa: E402
from .interop import from_tltorch, load_tltorch_state  # noqa: E402
from .layers import (  # noqa: E402
    FactorizedConv1d,
    FactorizedConv2d,
    FactorizedConv3d,
    FactorizedConvTranspose1d,
    FactorizedConvTranspose2d,
    FactorizedConvTranspose3d,
    FactorizedEmbedding,
    FactorizedEmbeddingBag,
    FactorizedLinear,
    FactorizedMLP,
    TensorContraction,
    TensorLinear,
    TensorRegression,
    freeze,
    unfreeze,
)
from .learning_rates import parameter_groups  # noqa: E402
from .network import Mode, Network  # noqa: E402
from .pictures import plot_errors, plot_frontier, plot_plan  # noqa: E402
from .plan import ConversionPlan  # noqa: E402
from .regularize import prune_ranks, rank_dropout, rank_penalty, truncate  # noqa: E402
from .rules import EVBMF, Energy, RelativeError  # noqa: E402
from .serialize import load_pretrained, save_pretrained  # noqa: E402
from .tradeoffs import error_curves, frontier  # noqa: E402

__all__ = [
    "BTT",
    "CP",
    "EVBMF",
    "TT",
    "Budget",
    "Calibration",
    "CheckpointError",
    "ConversionError",
    "ConversionPlan",
    "DecompositionError",
    "Energy",
    "FactorizedConv1d",
    "FactorizedConv2d",
    "FactorizedConv3d",
    "FactorizedConvTranspose1d",
    "FactorizedConvTranspose2d",
    "FactorizedConvTranspose3d",
    "FactorizedEmbedding",
    "FactorizedEmbeddingBag",
    "FactorizedLinear",
    "FactorizedMLP",
    "Format",
    "FormatError",
    "Healing",
    "KernelError",
    "LowRank",
    "Mode",
    "ModeError",
    "Network",
    "NetworkError",
    "RankError",
    "RankSchedule",
    "ReadOnlyWeightError",
    "RelativeError",
    "TensorContraction",
    "TensorLinear",
    "TensorRegression",
    "TensorlayersError",
    "Tucker",
    "collect",
    "convert_model",
    "error_curves",
    "explain",
    "fastest_modes",
    "freeze",
    "from_tltorch",
    "frontier",
    "heal",
    "load_pretrained",
    "load_tltorch_state",
    "parameter_groups",
    "plan_conversion",
    "plot_errors",
    "plot_frontier",
    "plot_plan",
    "prune_ranks",
    "rank_dropout",
    "rank_penalty",
    "save_pretrained",
    "summarize",
    "to_dense",
    "truncate",
    "unfreeze",
    "use_kernels",
]
