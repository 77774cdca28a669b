"""Names and paths of models, and what becomes of a GGUF file."""

from headwise.runtime.models.names import DEMO_MODEL, resolve

__all__ = ["DEMO_MODEL", "resolve"]
