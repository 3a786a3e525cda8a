"""Encoders: images and captions -> embeddings. Importing this package registers them all."""

from model.encoders.base import ENCODERS, Encoded, Encoder
from utils.registry import import_modules

__all__ = ["ENCODERS", "Encoded", "Encoder"]

import_modules(__name__)
