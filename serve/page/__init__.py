"""The page at ``/``: a place to try the model, and a live map of the KV pool."""
