"""Keep everything: the ordinary KV cache."""

from memory.base import Memory  # noqa: F401
