"""The model families by the ``architectures`` entry of their config.json."""

from collections.abc import Mapping

from jaxpaged.models.errors import UnsupportedModelError
from jaxpaged.models.families import llama, mistral, qwen2, qwen3
from jaxpaged.models.families.family import Family

FAMILIES: Mapping[str, Family] = {
    family.architecture: family for family in (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY)
}


def family_of(architecture: str) -> Family:
    """The family with this architecture name; ``UnsupportedModelError`` lists the known ones otherwise."""
    try:
        return FAMILIES[architecture]
    except KeyError:
        known = ", ".join(FAMILIES)
        raise UnsupportedModelError(
            f"architecture {architecture!r} is not supported; known: {known}"
        ) from None
