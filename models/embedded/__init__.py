"""A small model that comes with the package, so that everything can be tried without a download."""

from pathlib import Path


def embedded_model_path() -> Path:
    """A Hugging Face folder: 5.5M parameters, Llama layout, trained on Python sources (see README.md there)."""
    return Path(__file__).parent
