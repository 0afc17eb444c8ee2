"""What can be wrong with a model folder; the core's ``jaxpaged.errors`` lists both in its tree."""


class CheckpointError(ValueError):
    """A model folder is broken: a missing or truncated file, a malformed field, a tensor of the wrong shape."""


class UnsupportedModelError(ValueError):
    """A well-formed model that this decoder cannot compute, named by the field and its value."""
