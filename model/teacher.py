"""Frozen teachers for distillation."""

import torch
from torch import Tensor, nn

from model.encoders import Encoder
from model.encoders.fusion import FusionEncoder
from utils.batch import Batch
from utils.precision import precise


class Teacher(nn.Module):
    """A frozen encoder, always in evaluation mode.

    Args:
        encoder: trained encoder; its weights no longer get a gradient.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.inputs = encoder.inputs | {"images", "caption_ids"}  # batch fields that it reads
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Embeddings of images and captions, float32 (B, D) each; enriched by support sets if it is a fusion."""
        image, text = self.encoder.enrich(
            self.encoder.encode_image(batch["images"]), self.encoder.encode_text(batch["caption_ids"]), batch
        )
        return precise(image.embedding), precise(text.embedding)


class CachedTeacher(nn.Module):
    """A teacher that encodes each training image and caption once; a step costs a look-up and the fusion.

    The tables hold embeddings of images without augmentation.

    Args:
        teacher: teacher that fills the tables; it is released afterwards.
    """

    images: Tensor
    captions: Tensor

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.source: Teacher | None = teacher
        self.inputs = frozenset({"index"})  # batch fields that it reads
        self.fusion: nn.ModuleDict | None = None
        if isinstance(teacher.encoder, FusionEncoder):
            self.fusion = teacher.encoder.fusion
            names = ("image_pairs", "image_mask", "caption_pairs", "caption_mask")
            self.inputs |= {f"support_{name}" for name in names}
        self.eval()

    def fill(self, images: Tensor, captions: Tensor) -> None:
        """Store the teacher's embeddings of the image and the caption of every training pair, (N, D) each."""
        self.register_buffer("images", images)
        self.register_buffer("captions", captions)
        self.source = None

    def train(self, mode: bool = True) -> "CachedTeacher":
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Embeddings of images and captions, float32 (B, D) each."""
        image, text = self.images[batch["index"]], self.captions[batch["index"]]
        if self.fusion is not None:
            images, captions = self.images[batch["support_image_pairs"]], self.captions[batch["support_caption_pairs"]]
            image = self.fusion["image"](image, images, batch["support_image_mask"])
            text = self.fusion["text"](text, captions, batch["support_caption_mask"])
        return precise(image), precise(text)
