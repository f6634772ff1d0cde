"""Models of the GFT repository: GFT itself and the baseline it calls TransFG."""

from common.models.gft import GFT
from common.models.transfg import TransFG

__all__ = ["GFT", "TransFG"]
