"""The formats. A format is one file: which index sits on which core, and how the cores are filled."""

from .base import Format, available, from_dict, get
from .btt import BTT
from .cp import CP
from .low_rank import LowRank
from .mode_products import ModeProducts
from .tt import TT
from .tucker import Tucker

__all__ = ["BTT", "CP", "TT", "Format", "LowRank", "ModeProducts", "Tucker", "available", "from_dict", "get"]
