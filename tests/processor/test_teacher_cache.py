"""Cached teachers: embeddings computed once, by all processes together."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.schema import Config
from datasets.annotations import load_annotations
from datasets.loaders import build_train_loader, data_tokenizer
from datasets.transforms import build_transform
from model.build import build_encoder, build_teacher
from model.teacher import CachedTeacher, Teacher
from processor import training
from processor.teacher_cache import fill_cache
from tests.helpers.configs import config_of, tiny_config
from tests.helpers.loaders import fields_of
from tests.helpers.processes import together
from tests.helpers.runs import lines_of
from tests.helpers.tasks import loader_of, student_config, student_of, task_of, with_teacher
from utils.errors import ConfigError

CPU = torch.device("cpu")


def test_the_cached_teacher_says_what_the_teacher_would(root: Path, teacher_run: Path) -> None:
    config = student_config(root, teacher_run)
    explicit, cached = student_of(config), with_teacher(task_of(config), CachedTeacher(build_teacher(config)))
    assert not {"support_images", "support_caption_ids"} & cached.inputs and "index" in cached.inputs
    loader, light = loader_of(config, explicit), loader_of(config, cached)
    loader.pairs.transform = build_transform(config.data, train=False)  # no augmentation, as in the cache
    assert isinstance(cached.teacher, CachedTeacher)
    fill_cache(cached.teacher, light.pairs, config, CPU)
    assert cached.teacher.source is None  # the towers are freed
    assert cached.teacher.images.shape == cached.teacher.captions.shape == (32, 64)
    for full, small in zip(fields_of(loader.epoch(2)), fields_of(light.epoch(2)), strict=True):
        expected, found = explicit.gathered_step(full).teacher, cached.gathered_step(small).teacher
        assert expected is not None and found is not None
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_cached_run(root: Path, teacher_run: Path, tmp_path: Path) -> None:
    config = student_config(root, teacher_run, "teacher.cache=true", "train.epochs=2")
    (line, last) = lines_of(training.train(config, tmp_path / "run"))
    assert 0 < last["distill_features_loss"] < 4
    noisy = student_config(root, teacher_run, "teacher.cache=true", "data.noise_rate=0.5")
    run = training.train(noisy, tmp_path / "noisy")
    assert lines_of(run)[0]["distill_features_loss"] != line["distill_features_loss"]


def test_a_plain_teacher_can_be_cached(root: Path, tmp_path: Path) -> None:
    run = training.train(tiny_config("baseline", root), tmp_path / "run")
    config = student_config(root, run, "teacher.cache=true")
    (line,) = lines_of(training.train(config, tmp_path / "student"))
    assert line["distill_features_loss"] > 0


def test_a_cache_needs_every_image(root: Path, teacher_run: Path, tmp_path: Path) -> None:
    config = student_config(root, teacher_run, "teacher.cache=true", "data.on_bad_image=skip")
    with pytest.raises(ConfigError, match=r"teacher\.cache: needs every training image"):
        training.train(config, tmp_path / "run")


@pytest.mark.parametrize("override", ["data.views=2", "data.text_levels=[sentence,word]"])
def test_a_cache_is_of_one_view_and_one_text(override: str, root: Path, tmp_path: Path) -> None:
    plain = training.train(tiny_config("baseline", root), tmp_path / "plain")
    config = student_config(root, plain, "teacher.cache=true", override)
    with pytest.raises(ConfigError, match=r"teacher\.cache: needs one view and one text per pair, got 2 rows"):
        training.train(config, tmp_path / "run")


# --- several processes ------------------------------------------------------------------------------------------------


def _cached(config: Config) -> tuple[list[int], Any, Any]:
    """Numbers of images and captions that this process encoded, and the cached embeddings."""
    torch.manual_seed(0)
    source, seen = Teacher(build_encoder(config)), [0, 0]
    for kind, name in enumerate(["encode_image", "encode_text"]):
        encode = getattr(source.encoder, name)

        def counted(inputs: Tensor, encode=encode, kind: int = kind) -> Any:
            seen[kind] += len(inputs)
            return encode(inputs)

        setattr(source.encoder, name, counted)
    loader = build_train_loader(
        *(config.data, annotations := load_annotations("synthetic", config.data.root)),
        data_tokenizer(config.data, annotations.folder, most=1024),
        **{"fields": frozenset(), "full_text": False, "seed": 1, "pin_memory": False},
    )
    fill_cache(teacher := CachedTeacher(source), loader.pairs, config, torch.device("cpu"))
    return seen, teacher.images.numpy(), teacher.captions.numpy()


def test_processes_share_the_work_of_a_cached_teacher(root: Path) -> None:
    config = config_of("lcr2s_teacher", root, "eval.batch_size=3")
    (_, *expected) = _cached(config)
    for seen, *found in together(3, _cached, config):
        assert seen in ([6, 11], [5, 11], [5, 10])  # of 16 images and 32 captions
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
