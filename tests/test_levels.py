"""What a batch of multi-level alignment is made of: texts of three levels, several views, a few people, their pairs."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.schema import DataConfig
from datasets.annotations import load_annotations
from datasets.loaders import build_train_loader, data_tokenizer
from datasets.samplers import IdentityBatches
from datasets.text.levels import LEVELS, attribute_words, clause_candidates, phrase_candidates, text_of_level
from datasets.transforms import build_transform
from tests.conftest import GOLDEN
from utils.batch import FIELDS
from utils.errors import ConfigError, DataError

CAPTIONS = json.loads((GOLDEN / "ivt_text.json").read_text())["captions"]


@pytest.mark.parametrize("entry", CAPTIONS, ids=lambda entry: entry["caption"][:24])
def test_candidates_are_the_authors(entry: dict) -> None:
    caption = entry["caption"].lower()
    assert phrase_candidates(caption) == entry["phrase_candidates"]
    assert phrase_candidates(caption, strip_brackets=False) == entry["cuhk_fallback_word_candidates"]
    assert clause_candidates(caption) == entry["icfg_word_candidates"] == entry["rstp_word_candidates"]


def test_commas_around_the_other_clauses_go() -> None:
    assert phrase_candidates(",the longest clause of all, short one,") == ["the longest clause of all", "short one"]


def draws(caption: str, level: str, attributes=None, number: int = 400) -> Counter[str]:
    rng = np.random.default_rng(0)
    return Counter(text_of_level(caption, level, rng, attributes) for _ in range(number))


def test_each_candidate_is_drawn_as_often_as_the_others() -> None:
    caption = "The man wears a grey suit, and a black hat. He holds a phone."
    assert draws(caption, "sentence") == {caption.lower(): 400}
    for level in ("word", "phrase"):
        drawn = draws(caption, level)
        assert set(drawn) == set(LEVELS[level](caption.lower())) and len(drawn) == 3
        assert min(drawn.values()) > 100


@pytest.mark.parametrize("caption", ["", "...", "[]", "a, b. c", "no"])
def test_a_caption_without_candidates_stands_for_itself(caption: str) -> None:
    for level in LEVELS:
        for attributes in (None, {}, {"colour": ""}):
            assert draws(caption, level, attributes, 5) == {caption.lower(): 5}


def test_words_of_attributes() -> None:
    attributes = {"top": "Red shirt", "bottom": "jeans", "bag": "black bag"}
    drawn = draws("A caption, that is not used.", "word", attributes)
    sizes = Counter(len(text.split(",")) for text in drawn.elements())
    assert set(sizes) == {1, 2, 3} and min(sizes.values()) > 90
    assert set(",".join(drawn).split(",")) == {"red shirt", "jeans", "black bag"}
    assert all(len(set(text.split(","))) == len(text.split(",")) for text in drawn)
    assert set(draws("[one clause here, and more of it]", "word", {})) == {"[one clause here", "and more of it]"}
    assert attribute_words({"top": "red"}, np.random.default_rng(0)) == "red"


def level_loader(root: Path, *, fields=("images", "caption_ids", "pids", "index"), **options):
    config = DataConfig(
        root=str(root), image_size=(64, 32), image_aug=["flip", "pad_crop"], batch_size=4, workers=0, **options
    )
    annotations = load_annotations(config.dataset, root)
    tokenizer = data_tokenizer(config, annotations.folder, most=10**6)
    return build_train_loader(
        config, annotations, tokenizer, fields=set(fields), full_text=True, seed=1, pin_memory=False
    )


def test_three_views_and_three_levels_make_one_batch_of_three_times_the_pairs(root: Path) -> None:
    fields = [name for name in FIELDS if not name.startswith("support_")]
    loader = level_loader(root, views=3, text_levels=["word", "phrase", "sentence"], fields=fields)
    batch = next(iter(loader.epoch(1)))
    assert batch["index"].shape == (4,)
    assert {batch[name].shape[0] for name in ("images", "caption_ids", "pids", "mlm_ids", "mlm_labels")} == {12}
    for place, index in enumerate(batch["index"].tolist()):
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
    batch = next(iter(level_loader(root, views=views, text_levels=levels).epoch(1)))
    size = max(views, len(levels))
    assert batch["images"].shape[0] == batch["caption_ids"].shape[0] == 4 * size
    if views == 1:
        assert torch.equal(batch["images"][0], batch["images"][size - 1])


def test_levels_are_drawn_from_seed_epoch_and_index_alone(root: Path) -> None:
    loader = level_loader(root, views=2, text_levels=["word", "phrase"])
    first, second = ([batch["caption_ids"] for batch in loader.epoch(epoch)] for epoch in (1, 2))
    again = [batch["caption_ids"] for batch in loader.epoch(1)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_attributes_are_read_and_used(root: Path, tmp_path: Path) -> None:
    source = json.loads((root / "SyntheticPEDES/reid_raw.json").read_text())
    folder = tmp_path / "CUHK-PEDES"
    folder.mkdir()
    for name in ("imgs", "tokenizer"):
        (folder / name).symlink_to(root / "SyntheticPEDES" / name)
    rows = [
        {**row, "captions": caption, "att": {"shirt": f"zebra {number}"}}
        for row in source
        for number, caption in enumerate(row["captions"])
    ]  # as the authors' file has it: one row for each caption
    (folder / "cuhk_pedes_att.json").write_text(json.dumps(rows))
    annotations = load_annotations("cuhk_pedes", tmp_path)
    plain = load_annotations("synthetic", root)
    assert [record.captions for record in annotations.test] == [record.captions for record in plain.test]
    assert [record.image_id for record in annotations.train] == [record.image_id for record in plain.train]
    assert annotations.train[0].attributes == ({"shirt": "zebra 0"}, {"shirt": "zebra 1"})
    rows.append({**rows[-1], "id": rows[-1]["id"] + 1})  # the same image, but somebody else's
    (folder / "cuhk_pedes_att.json").write_text(json.dumps(rows))
    assert len(load_annotations("cuhk_pedes", tmp_path).test) == len(plain.test) + 1
    rows.insert(0, {**source[0], "captions": ["a caption without attributes"]})
    (folder / "cuhk_pedes_att.json").write_text(json.dumps(rows))
    assert [record.attributes for record in load_annotations("cuhk_pedes", tmp_path).train[:2]] == [
        (),
        annotations.train[0].attributes,
    ]
    (folder / "cuhk_pedes_att.json").write_text(json.dumps(rows[1:]))
    options = {"text_levels": ["word"], "word_source": "attributes"}
    loader = level_loader(tmp_path, dataset="cuhk_pedes", **options)
    for place in (0, 1):
        expected = loader.pairs.tokenizer.encode(f"zebra {place}")
        assert torch.equal(loader.pairs[place]["caption_ids"][0], expected)
    with pytest.raises(ConfigError, match=r"data\.word_source: attributes, but no annotation of .* has any"):
        level_loader(root, **options)
    del rows[0]
    rows[3]["att"] = {"shirt": 3}
    (folder / "cuhk_pedes_att.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"annotation 3 .*: att must be a mapping of names to phrases"):
        load_annotations("cuhk_pedes", tmp_path)


# --- people and their pairs -----------------------------------------------------------------------------------------


def test_identity_batches_are_groups_of_a_few_people() -> None:
    pids = [0] * 9 + [1] * 4 + [2] * 2 + [3] * 8 + [4] * 5
    sampler = IdentityBatches(pids, batch_size=8, num_instances=4, seed=1)
    seen = set()
    for epoch in (1, 2, 3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) >= 3  # 7 groups: 2, 1, 1, 2, 1
        pairs: Counter[int] = Counter()
        for batch in batches:
            people = Counter(pids[pair] for pair in batch)
            assert set(people.values()) == {4} and len(people) == 2
            pairs.update(batch)
        assert all(count == 1 for pair, count in pairs.items() if pids[pair] != 2)  # with replacement only where needed
        assert sum(pids[pair] == 0 for pair in pairs) <= 8
        seen.add(str(batches))
    assert len(seen) == 3
    sampler.set_epoch(1)
    assert str(list(sampler)) in seen


def test_an_identity_with_few_pairs_is_drawn_with_replacement() -> None:
    sampler = IdentityBatches([0, 0, 1, 1, 1, 1], batch_size=8, num_instances=4, seed=1)
    counts = set()
    for epoch in range(1, 30):
        sampler.set_epoch(epoch)
        ((*batch,),) = sampler
        counts.add(sum(pair == 0 for pair in batch))
        assert sum(pair < 2 for pair in batch) == 4
    assert counts >= {1, 2, 3}


def test_all_groups_are_used_until_too_few_people_are_left() -> None:
    sampler = IdentityBatches([pid for pid in range(21) for _ in range(8)], batch_size=28, num_instances=4, seed=3)
    for epoch in range(1, 6):
        sampler.set_epoch(epoch)
        assert 4 <= len(sampler) <= 6 and all(len(batch) == 28 for batch in sampler)  # 42 groups in batches of 7


def test_the_loader_takes_its_length_from_the_epoch(root: Path) -> None:
    loader = level_loader(root, sampler="identity", num_instances=2)
    for epoch in (1, 2):
        batches = list(loader.epoch(epoch))
        assert len(batches) == len(loader)
        for batch in batches:
            assert Counter(Counter(batch["pids"].tolist()).values()) == {2: 2}


# --- transforms -----------------------------------------------------------------------------------------------------


def test_training_images_may_be_resized_bicubically_and_others_never() -> None:
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 10, 3), dtype=np.uint8))
    bilinear, bicubic = (DataConfig(image_size=(64, 32), train_resize=name) for name in ("bilinear", "bicubic"))  # type: ignore[arg-type]
    plain = build_transform(bilinear, train=True)(image)
    assert torch.equal(build_transform(bicubic, train=False)(image), plain)
    expected = torch.from_numpy(np.asarray(image.resize((32, 64), Image.Resampling.BICUBIC)) / 255).permute(2, 0, 1)
    mean, std = (torch.tensor(value)[:, None, None] for value in (bicubic.image_mean, bicubic.image_std))
    torch.testing.assert_close(build_transform(bicubic, train=True)(image), ((expected - mean) / std).float())


def test_erased_pixels_are_noise_each() -> None:
    from PIL import Image

    transform = build_transform(DataConfig(image_size=(64, 32), image_aug=["erase_noise"]), train=True)
    plain = build_transform(DataConfig(image_size=(64, 32)), train=False)
    image = Image.new("RGB", (32, 64), (90, 20, 200))
    torch.manual_seed(0)
    areas = [float((transform(image) != plain(image)).any(dim=0).float().mean()) for _ in range(300)]
    erased = [area for area in areas if area]
    assert len(erased) == pytest.approx(150, abs=30)
    assert min(erased) > 0.015 and max(erased) < 0.36 and np.mean(erased) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.03)
    torch.manual_seed(1)
    while not (changed := ((result := transform(image)) != plain(image)).any(dim=0)).float().mean() > 0.2:
        pass
    assert float(result[:, changed].std()) == pytest.approx(1, abs=0.1)
    assert float(result[:, changed].mean()) == pytest.approx(0, abs=0.1)
