"""Evaluation: order and norm of the embeddings, separate rankings, the same metrics from any number of processes."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from configs.schema import Config
from datasets.annotations import Record, load_annotations
from datasets.loaders import build_eval_loaders, data_tokenizer
from datasets.pairs import pairs_of
from model.build import build_encoder, build_task
from model.load import load_weights
from processor import evaluator, training
from processor.evaluator import Embeddings, embed
from tests.helpers.configs import config_of, irra_config
from tests.helpers.processes import together
from tests.helpers.runs import FAST


def test_embeddings_are_unit_vectors_in_annotation_order_and_the_mode_is_put_back(root: Path, tiny: list[str]) -> None:
    config = irra_config(tiny)
    annotations = load_annotations("synthetic", root)
    tokenizer = data_tokenizer(config.data, annotations.folder, most=10**6)
    loaders = build_eval_loaders(config.data, annotations.test, tokenizer, batch_size=5, pin_memory=False)
    encoder = build_encoder(config).train()
    found = embed(encoder, loaders, torch.device("cpu"), "fp32")
    assert encoder.training
    for vectors, count in ((found.gallery, 8), (found.query, 16)):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(count))
    assert found.gallery_pids.tolist() == [record.pid for record in annotations.test]
    assert found.records == annotations.test and found.pairs == pairs_of(annotations.test)
    assert found.query_pids.tolist() == [record.pid for record in annotations.test for _ in record.captions]


def test_embeddings_know_the_records_that_were_skipped(tiny: list[str], root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "data")
    annotations = load_annotations("synthetic", tmp_path / "data")
    gone = annotations.test[2]
    Path(gone.image_path).unlink()
    config = irra_config(tiny, "data.on_bad_image=skip")
    tokenizer = data_tokenizer(config.data, annotations.folder, most=10**6)
    loaders = build_eval_loaders(config.data, annotations.test, tokenizer, batch_size=3, pin_memory=False)
    found = embed(build_encoder(config), loaders, torch.device("cpu"), "fp32")
    assert found.records == [record for record in annotations.test if record != gone]
    assert len(found.gallery) == len(found.records) == 7 and len(found.query) == len(found.pairs) == 16


def test_embeddings_can_be_ranked_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [[F.normalize(torch.randn(4, size, generator=generator)) for size in (3, 5)] for _ in range(2)]
    gallery, query = (F.normalize(torch.cat(side, dim=1)) for side in parts)
    records = [Record(f"{pid}.jpg", pid, pid, ("a person",), "test") for pid in range(4)]
    split = Embeddings(gallery, query, records, pairs_of(records)).split({"bge": 3, "tse": 5})
    assert list(split) == ["bge", "tse"]
    for place, part in enumerate(split.values()):
        torch.testing.assert_close(part.gallery, parts[0][place])
        torch.testing.assert_close(part.query, parts[1][place])


@pytest.mark.parametrize("kind", ["alike", "nearly alike", "zero", "fine"])
def test_collapsed_embeddings_are_said_with_their_numbers(kind: str, monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(evaluator.LOGGER, "warning", lambda message, *values: said.append(message % values))
    draw = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    rows = {"alike": torch.ones(40, 8), "nearly alike": 1 + 1e-3 * draw, "zero": 0 * draw, "fine": 1 + draw}[kind]
    records = [Record(f"{pid}.jpg", pid, pid, ("a person",), "test") for pid in range(40)]
    embeddings = Embeddings(F.normalize(rows), F.normalize(1 + draw), records, pairs_of(records))
    evaluator.warn(embeddings, embeddings.rank_images(), "test")
    expected = {"alike": "1.0000, and 0 of", "nearly alike": "1.0000, and 0 of", "zero": "0.0000, and 40 of"}
    assert [expected[kind] in line for line in said] == ([] if kind == "fine" else [True])


def test_the_mean_cosine_is_that_of_all_pairs() -> None:
    vectors = F.normalize(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
    pairs = [float(vectors[a] @ vectors[b]) for a in range(5) for b in range(5) if a != b]
    assert evaluator.mean_cosine(vectors) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert evaluator.mean_cosine(vectors[:1]) == 0


# --- several processes ------------------------------------------------------------------------------------------------


def _evaluate(config: Config, checkpoint: Path) -> dict[str, float]:
    task = build_task(config, None)
    load_weights(task, checkpoint)
    annotations = load_annotations("synthetic", config.data.root)
    tokenizer = data_tokenizer(config.data, annotations.folder, most=1024)
    loaders = build_eval_loaders(config.data, annotations.train, tokenizer, batch_size=5, pin_memory=False)
    return embed(task.encoder, loaders, torch.device("cpu"), "fp32").rank_images().summary()


@pytest.mark.parametrize("world", [2, 3])
def test_metrics_are_exactly_those_of_one_process(world: int, root: Path, tmp_path: Path) -> None:
    config = config_of("irra", root, *FAST, "train.epochs=2")
    run = training.train(config, tmp_path / "run")
    expected = _evaluate(config, run / "last.pt")
    assert together(world, _evaluate, config, run / "last.pt") == [expected] * world
