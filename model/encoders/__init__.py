"""Encoders: images and captions -> embeddings. Importing this package registers them all."""

from model.encoders import clip, fusion, ivt, token_selection  # noqa: F401
from model.encoders.base import ENCODERS, Encoded, Encoder

__all__ = ["ENCODERS", "Encoded", "Encoder"]
