"""Decoder models in flax.nnx: configurations, Hugging Face checkpoints, and a small embedded model."""

from typing import TYPE_CHECKING

from jaxpaged.models.errors import CheckpointError, UnsupportedModelError
from jaxpaged.models.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from jaxpaged.models.checkpoint import load_config, load_model, save_model
    from jaxpaged.models.config import ModelConfig, RopeScaling
    from jaxpaged.models.decoder import Attend, Decoder
    from jaxpaged.models.embedded import embedded_model_path
    from jaxpaged.models.parameters import Parameters, flat_parameters, split_parameters

__all__ = [
    "Attend",
    "CheckpointError",
    "Decoder",
    "ModelConfig",
    "Parameters",
    "RopeScaling",
    "UnsupportedModelError",
    "embedded_model_path",
    "flat_parameters",
    "load_config",
    "load_model",
    "save_model",
    "split_parameters",
]

# The engine's host state needs only the errors, and no jax.
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Attend": "jaxpaged.models.decoder",
        "Decoder": "jaxpaged.models.decoder",
        "ModelConfig": "jaxpaged.models.config",
        "Parameters": "jaxpaged.models.parameters",
        "RopeScaling": "jaxpaged.models.config",
        "embedded_model_path": "jaxpaged.models.embedded",
        "flat_parameters": "jaxpaged.models.parameters",
        "load_config": "jaxpaged.models.checkpoint",
        "load_model": "jaxpaged.models.checkpoint",
        "save_model": "jaxpaged.models.checkpoint",
        "split_parameters": "jaxpaged.models.parameters",
    },
)
