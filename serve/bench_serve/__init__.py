"""``jaxpaged bench serve``: load on an OpenAI-compatible endpoint, and what its clients would see of it."""
