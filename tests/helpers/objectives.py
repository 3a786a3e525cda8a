"""Inputs of a single objective."""

from torch import Tensor

from model.objectives import Metadata, Step

METADATA = Metadata(num_pids=5, embed_dim=16, vocab_size=100)


def objective_step(*embeddings: tuple[Tensor, Tensor], pids: Tensor, **batch: Tensor) -> Step:
    """Step with these (image, text) embeddings and without tokens."""
    return Step(embeddings, pids, logit_scale=50.0, batch=batch)
