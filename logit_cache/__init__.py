"""The application: text → token stream → teacher entries, and the commands and reports around them."""

from storage.lazy import public_names

__all__, __getattr__ = public_names(__name__, {})
