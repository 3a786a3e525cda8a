"""Collation of items whose captions are empty or too long."""

from pathlib import Path

from datasets.collate import Collate
from tests.helpers.loaders import train_loader


def test_an_empty_caption_and_one_that_is_too_long_can_be_trained_on(root: Path) -> None:
    loader = train_loader(root)
    pair = loader.pairs.pairs[0]
    loader.pairs.pairs[:2] = [pair._replace(caption=caption) for caption in ("", "red shirt and " * 60)]
    del loader.pairs.caption_ids  # encoded already
    batch = Collate(full_text=True)([loader.pairs[0], loader.pairs[1]])
    end = loader.pairs.tokenizer.mask_id + 2
    assert batch["caption_ids"][0].tolist()[:3] == [end - 1, end, 0]
    assert batch["caption_ids"][1, -1] == end and (batch["caption_ids"][1] != 0).all()
    assert (batch["mlm_labels"] != 0).any(dim=1).all()
