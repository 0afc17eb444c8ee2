"""Typed reading of a Hugging Face config.json: every complaint names the field and its value."""

from collections.abc import Mapping
from typing import Any

from jaxpaged.models.errors import CheckpointError, UnsupportedModelError


class HfFields:
    """A config.json's fields over a family's defaults."""

    def __init__(self, fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._fields = {**defaults, **fields}

    def raw(self, name: str) -> Any:
        """The field as it stands; None when absent."""
        return self._fields.get(name)

    def malformed(self, name: str, expected: str) -> CheckpointError:
        """The error to raise for a field that no config may have."""
        return CheckpointError(f"config.json: {name} must be {expected}, got {self.raw(name)!r}")

    def unsupported(self, name: str, expected: str) -> UnsupportedModelError:
        """The error to raise for a legal value that the decoder does not compute."""
        return UnsupportedModelError(f"config.json: {name}={self.raw(name)!r} is not supported: {expected}")

    def positive_int(self, name: str) -> int:
        """An integer of at least 1."""
        value = self.raw(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.malformed(name, "a positive integer")
        return value

    def optional_int(self, name: str) -> int | None:
        """An integer of at least 0, or null."""
        value = self.raw(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.malformed(name, "an integer of at least 0 or null")
        return value

    def positive_float(self, name: str) -> float:
        """A finite number above 0."""
        value = self.raw(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.malformed(name, "a finite number above 0")
        return float(value)

    def boolean(self, name: str) -> bool:
        """true or false; an absent field must have a default."""
        value = self.raw(name)
        if not isinstance(value, bool):
            raise self.malformed(name, "true or false")
        return value

    def optional_list(self, name: str) -> list[Any] | None:
        """A list or null."""
        value = self.raw(name)
        if value is not None and not isinstance(value, list):
            raise self.malformed(name, "a list or null")
        return value

    def optional_mapping(self, name: str) -> Mapping[str, Any] | None:
        """An object or null."""
        value = self.raw(name)
        if value is not None and not isinstance(value, dict):
            raise self.malformed(name, "an object or null")
        return value

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A token id, a list of them, or null (none)."""
        value = self.raw(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.malformed(name, "a token id, a list of token ids or null")
        return tuple(dict.fromkeys(ids))
