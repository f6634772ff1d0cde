"""Models of the GFT repository: GFT itself, and the baseline that it calls TransFG."""

from gft.model import GFT
from gft.transfg import TransFG

__all__ = ["GFT", "TransFG"]
