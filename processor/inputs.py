"""Inputs of a run: the batches that its task reads."""

import torch

from configs.schema import Config
from datasets.annotations import Annotations
from datasets.loaders import EvalLoaders, TrainLoader, build_eval_loaders, build_train_loader, data_tokenizer
from model.task import RetrievalTask


def build_loaders(
    config: Config, annotations: Annotations, task: RetrievalTask, device: torch.device
) -> tuple[TrainLoader, dict[str, EvalLoaders]]:
    """Training batches with the fields of `task.inputs`, and loaders of each evaluation split."""
    encoder, pin_memory = task.encoder, device.type != "cpu"
    tokenizer = data_tokenizer(
        config.data,
        annotations.folder,
        most=encoder.vocab_size,
        kinds=encoder.tokenizers,
        learn_from=annotations,
    )
    train_loader = build_train_loader(
        config.data,
        annotations,
        tokenizer,
        fields=task.inputs | {"index"} | ({"clean"} if config.data.noise_rate else set()),
        full_text=task.full_text,
        seed=config.train.seed,
        pin_memory=pin_memory,
        micro_batches=config.train.accumulate,
    )
    evaluation = {
        split: build_eval_loaders(
            config.data, annotations.split(split), tokenizer, batch_size=config.eval.batch_size, pin_memory=pin_memory
        )
        for split in ("val", "test")
        if annotations.split(split)
    }
    return train_loader, evaluation
