"""Models of GLSim (arXiv 2407.12891)."""

from glsim.model_utils.config import ViTConfig
from glsim.model_utils.glsim import ViTGLSim

__all__ = ["ViTConfig", "ViTGLSim"]
