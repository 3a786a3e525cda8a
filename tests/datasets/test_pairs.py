"""Training pairs: noise, augmented captions, several views and texts, substitutes for unreadable images."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.schema import DataConfig
from datasets.annotations import load_annotations
from datasets.images import read_image
from datasets.loaders import TrainLoader, build_eval_loaders, data_tokenizer
from datasets.noise import noise_permutation
from datasets.pairs import TrainPairs
from datasets.text.levels import clause_candidates, phrase_candidates
from datasets.text.tokenizers import WordPieceTokenizer
from datasets.transforms import build_transform
from tests.helpers.loaders import fields_of, level_loader, noisy_loader, train_loader
from utils.batch import FIELDS, to_device
from utils.errors import ConfigError, DataError


def test_loading_leaves_the_global_random_state_alone(root: Path) -> None:
    loader = train_loader(root)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    loader.pairs[3]
    assert torch.equal(torch.rand(1), expected)


# --- noise ------------------------------------------------------------------------------------------------------------


def test_only_captions_move(root: Path) -> None:
    clean, noisy = noisy_loader(root), noisy_loader(root, noise_rate=0.5)
    index = noise_permutation(len(clean.pairs), 0.5)
    assert noisy.pairs.noise is not None and np.array_equal(noisy.pairs.noise, index)
    for place, (before, after) in enumerate(zip(clean.pairs.pairs, noisy.pairs.pairs, strict=True)):
        assert after.record == before.record
        assert after.caption == clean.pairs.pairs[index[place]].caption
    assert Counter(pair.caption for pair in noisy.pairs.pairs) == Counter(pair.caption for pair in clean.pairs.pairs)
    flags = {}
    for batch in fields_of(noisy.epoch(1)):
        flags |= dict(zip(batch["index"].tolist(), batch["clean"].tolist(), strict=True))
    assert [flags[place] for place in range(len(index))] == (index == np.arange(len(index))).tolist()
    assert 0 < sum(flags.values()) < len(flags)
    assert all(batch["clean"].all() for batch in fields_of(clean.epoch(1)))


def test_batches_have_the_moved_captions_and_the_images_own_pids(root: Path) -> None:
    loader = noisy_loader(root, noise_rate=0.8)
    for batch in fields_of(loader.epoch(1)):
        for place, ids, pid in zip(batch["index"].tolist(), batch["caption_ids"], batch["pids"].tolist(), strict=True):
            pair = loader.pairs.pairs[place]
            assert torch.equal(ids, loader.pairs.tokenizer.encode(pair.caption))
            assert pid == loader.pairs.labels[pair.record.pid]


def test_every_text_of_a_pair_is_of_the_moved_caption(root: Path) -> None:
    loader = noisy_loader(root, noise_rate=0.8, views=2, text_levels=["sentence", "sentence", "sentence"])
    clean = [item for batch in fields_of(loader.epoch(1)) for item in batch["clean"].view(-1, 3).tolist()]
    assert all(len(set(flags)) == 1 for flags in clean) and len(clean) == len(loader.pairs)


def test_attributes_move_with_their_caption(root: Path) -> None:
    records = [
        replace(record, attributes=tuple({"of": caption} for caption in record.captions))
        for record in load_annotations("synthetic", root).train
    ]
    pairs = TrainPairs(records, {}, None, None, [], 1, DataConfig(noise_rate=0.9))  # type: ignore[arg-type]
    assert all(pair.attributes == {"of": pair.caption} for pair in pairs.pairs)


def test_noisy_pairs_can_be_left_out(root: Path) -> None:
    loader = noisy_loader(root, noise_rate=0.5, noise_drop=True)
    whole = noisy_loader(root)
    index = noise_permutation(len(whole.pairs), 0.5)
    assert loader.pairs.pairs == [whole.pairs.pairs[place] for place in np.flatnonzero(index == np.arange(len(index)))]
    batches = list(fields_of(loader.epoch(1)))
    assert sum(len(batch["index"]) for batch in batches) == len(loader.pairs) < len(whole.pairs)
    assert all(batch["clean"].all() for batch in batches)


# --- augmented captions -----------------------------------------------------------------------------------------------


def test_captions_are_augmented_anew_each_epoch_and_the_same_again(root: Path) -> None:
    plain, loader = noisy_loader(root), noisy_loader(root, text_aug=0.4)

    def captions(loader: TrainLoader, epoch: int) -> list[list[int]]:
        return [ids for batch in fields_of(loader.epoch(epoch)) for ids in batch["caption_ids"].tolist()]

    assert captions(loader, 1) == captions(loader, 1) != captions(loader, 2)
    changed = [a != b for a, b in zip(captions(plain, 1), captions(loader, 1), strict=True)]
    assert sum(changed) > 0.9 * len(changed)


def test_masks_are_drawn_on_the_augmented_caption(root: Path) -> None:
    loader = noisy_loader(root, text_aug=0.4, fields=("caption_ids", "mlm_ids", "mlm_labels"))
    for batch in fields_of(loader.epoch(1)):
        labels = batch["mlm_labels"]
        assert torch.equal(batch["caption_ids"][labels != 0], labels[labels != 0])


def test_only_clips_tokens_can_be_augmented(root: Path) -> None:
    message = r"data\.text_aug: needs a CLIP tokenizer, which has a mask token, got wordpiece"
    with pytest.raises(ConfigError, match=message):
        bert = WordPieceTokenizer(None, 77)  # type: ignore[arg-type]
        records = load_annotations("synthetic", root).train
        TrainPairs(records, {}, None, bert, [], 1, DataConfig(text_aug=0.2))  # type: ignore[arg-type]


# --- views and text levels --------------------------------------------------------------------------------------------


def test_three_views_and_three_levels_make_one_batch_of_three_times_the_pairs(root: Path) -> None:
    fields = [name for name in FIELDS if not name.startswith("support_")]
    loader = level_loader(root, views=3, text_levels=["word", "phrase", "sentence"], fields=fields)
    batch = next(iter(fields_of(loader.epoch(1))))
    rows = ("images", "caption_ids", "pids", "index", "mlm_ids", "mlm_labels")
    assert {batch[name].shape[0] for name in rows} == {12}
    for place, index in enumerate(batch["index"][::3].tolist()):
        assert batch["index"][3 * place : 3 * place + 3].tolist() == [index] * 3
        record, caption, _ = loader.pairs.pairs[index]
        own = slice(3 * place, 3 * place + 3)
        assert batch["pids"][own].tolist() == [loader.pairs.labels[record.pid]] * 3
        word, phrase, sentence = batch["caption_ids"][own]
        encode = loader.pairs.tokenizer.encode
        assert any(torch.equal(word, encode(text)) for text in clause_candidates(caption.lower()) or [caption])
        assert any(torch.equal(phrase, encode(text)) for text in phrase_candidates(caption.lower()) or [caption])
        assert torch.equal(sentence, encode(caption))
        views = batch["images"][own]
        assert not torch.equal(views[0], views[1]) or not torch.equal(views[0], views[2])


@pytest.mark.parametrize("views, levels", [(3, ["sentence"]), (1, ["word", "phrase", "sentence"]), (2, ["word"])])
def test_the_fewer_ones_come_again(views: int, levels: list[str], root: Path) -> None:
    batch = next(iter(fields_of(level_loader(root, views=views, text_levels=levels).epoch(1))))
    size = max(views, len(levels))
    assert batch["images"].shape[0] == batch["caption_ids"].shape[0] == 4 * size
    if views == 1:
        assert torch.equal(batch["images"][0], batch["images"][size - 1])


def test_levels_are_drawn_from_seed_epoch_and_index_alone(root: Path) -> None:
    loader = level_loader(root, views=2, text_levels=["word", "phrase"])
    first, second = ([batch["caption_ids"] for batch in fields_of(loader.epoch(epoch))] for epoch in (1, 2))
    again = [batch["caption_ids"] for batch in fields_of(loader.epoch(1))]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- unreadable images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_skipped_image_has_a_stand_in_and_is_remembered(workers: int, root: Path) -> None:
    loader = train_loader(root, workers=workers, on_bad_image="skip")
    gone = ["/nowhere/a.jpg", "/nowhere/b.jpg"]
    loader.pairs.images.paths[0], loader.pairs.images.paths[5] = gone
    before = [batch["index"].tolist() for batch in fields_of(train_loader(root, workers=workers).epoch(1))]
    after = [batch["index"].tolist() for batch in fields_of(loader.epoch(1))]
    changed = [(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True) if a != b]
    assert sorted(a for a, _ in changed) == [0, 5]
    assert not {b for _, b in changed} & {0, 5}
    assert [
        batch["index"].tolist() for batch in fields_of(loader.epoch(1))
    ] == after  # the substitutes are deterministic
    assert loader.pairs.images.unreadable() == gone


def test_a_substitute_brings_its_image_caption_and_label(root: Path) -> None:
    loader = train_loader(root, on_bad_image="skip")
    loader.pairs.images.paths[0] = "/nowhere/a.jpg"
    item = loader.pairs[0]
    record, caption, _ = loader.pairs.pairs[int(item["index"])]
    assert item["pids"] == loader.pairs.labels[record.pid]
    assert torch.equal(item["caption_ids"], loader.pairs.tokenizer.encode(caption)[None])


def test_skipping_gives_up_where_nothing_can_be_read(root: Path) -> None:
    loader = train_loader(root, on_bad_image="skip")
    loader.pairs.images.paths[:] = ["/nowhere/a.jpg"] * len(loader.pairs)
    message = r"/nowhere/a\.jpg: unreadable image, and the 20 substitutes drawn are unreadable"
    with pytest.raises(DataError, match=message):
        loader.pairs[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_skipped_gallery_images_leave_the_gallery(workers: int, root: Path) -> None:
    config = DataConfig(root=str(root), image_size=(64, 32), workers=workers, on_bad_image="skip")
    annotations = load_annotations("synthetic", root)
    tokenizer = data_tokenizer(config, annotations.folder, most=10**6)
    loaders = build_eval_loaders(config, annotations.test, tokenizer, batch_size=2, pin_memory=False)
    loaders.images.paths[2:5] = ["/nowhere/c.jpg", "/nowhere/d.jpg", "/nowhere/e.jpg"]
    batches = [to_device(batch, torch.device("cpu")) for batch in loaders.gallery]
    assert [len(batch.get("images", [])) for batch in batches] == [2, 0, 1, 2]
    images = torch.cat([batch["images"] for batch in batches if batch])
    expected = [read_image(record.image_path) for i, record in enumerate(annotations.test) if i not in (2, 3, 4)]
    assert torch.equal(images, torch.stack([build_transform(config, train=False)(image) for image in expected]))
    assert loaders.images.unreadable() == ["/nowhere/c.jpg", "/nowhere/d.jpg", "/nowhere/e.jpg"]
