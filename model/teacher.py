"""Frozen teachers: what they say of a batch."""

import torch
from torch import Tensor, nn

from model.encoders import Encoder
from model.encoders.fusion import FusionEncoder
from utils.batch import Batch
from utils.precision import precise


class Teacher(nn.Module):
    """An encoder that is not trained any more and always in evaluation mode.

    `inputs` are the batch fields that it reads.

    Args:
        encoder: its weights get no gradient from now on.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.inputs = encoder.inputs | {"images", "caption_ids"}
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Its embeddings of the batch's images and captions, float32 (B, D) each; enriched, where it is a fusion."""
        image, text = self.encoder.enrich(
            self.encoder.encode_image(batch["images"]), self.encoder.encode_text(batch["caption_ids"]), batch
        )
        return precise(image.embedding), precise(text.embedding)


class CachedTeacher(nn.Module):
    """A teacher that sees each training image and caption once, before training; a step costs a look-up and the fusion.

    What it says is of images as they are, not as they are augmented.

    Args:
        teacher: its towers are let go of when the tables are there.
    """

    images: Tensor
    captions: Tensor

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.source: Teacher | None = teacher
        self.inputs = frozenset({"index"})
        self.fusion: nn.ModuleDict | None = None
        if isinstance(teacher.encoder, FusionEncoder):
            self.fusion = teacher.encoder.fusion
            parts = ("image_pairs", "image_mask", "caption_pairs", "caption_mask")
            self.inputs |= {f"support_{part}" for part in parts}
        self.eval()

    def fill(self, images: Tensor, captions: Tensor) -> None:
        """(N, D) each: the teacher's embeddings of the image and the caption of every training pair."""
        self.register_buffer("images", images)
        self.register_buffer("captions", captions)
        self.source = None

    def train(self, mode: bool = True) -> "CachedTeacher":
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As `Teacher`."""
        image, text = self.images[batch["index"]], self.captions[batch["index"]]
        if self.fusion is not None:
            images, captions = self.images[batch["support_image_pairs"]], self.captions[batch["support_caption_pairs"]]
            image = self.fusion["image"](image, images, batch["support_image_mask"])
            text = self.fusion["text"](text, captions, batch["support_caption_mask"])
        return precise(image), precise(text)
