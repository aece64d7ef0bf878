"""lomix_fast: the LoMix loss for segmentation networks, fused so that its maps never exist in memory."""

from .backends import available_backends
from .functional import lomix_loss
from .joined import NetworkWithLoss, with_loss
from .loss import LoMixLoss
from .ops import MapStatsFunction, map_stats
from .plan import MixPlan
from .trained import DecayedLossWarning, UntrainedLossWarning
from .transfer import transfer

__version__ = "0.1.0.dev0"

__all__ = [
    "DecayedLossWarning",
    "LoMixLoss",
    "MapStatsFunction",
    "MixPlan",
    "NetworkWithLoss",
    "UntrainedLossWarning",
    "available_backends",
    "lomix_loss",
    "map_stats",
    "transfer",
    "with_loss",
]
