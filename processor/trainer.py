"""The training loop: epochs of steps, evaluation, logs and checkpoints, read from top to bottom."""

import contextlib
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter

from configs.schema import Config
from datasets.loaders import EvalLoaders, TrainLoader
from model.encoders import Encoder
from model.task import RetrievalTask
from processor.clean_pairs import divide_pairs, pair_objectives
from processor.evaluator import embed, metrics_table
from processor.gradient_cache import backward
from processor.meters import Meters, StepWatch
from processor.reporting import EMA, best_record, result_table, write_board
from solver.optimizer import set_lr
from solver.schedule import lr_at
from utils.batch import num_pairs, to_device
from utils.checkpoint import save_checkpoint
from utils.config import to_yaml
from utils.distributed import average_gradients, gather_objects, peak_memory, rank, world_size
from utils.logger import LOGGER, append_json_line, progress
from utils.seed import random_state, set_random_state


class Trainer:
    """Trains a task and writes the run folder.

    Args:
        task: on `device` already.
        optimizer: over the task's parameters; groups carry `base_lr`.
        train: training batches.
        evaluation: split name -> loaders; `test`, and `val` where the data set has one.
        config: of the run.
        run: its folder, which exists.
        device: where the steps run.
    """

    def __init__(
        self,
        task: RetrievalTask,
        optimizer: Optimizer,
        train: TrainLoader,
        evaluation: Mapping[str, EvalLoaders],
        config: Config,
        run: Path,
        device: torch.device,
    ) -> None:
        self.task, self.optimizer, self.train, self.evaluation = task, optimizer, train, evaluation
        self.config, self.run, self.device = config, run, device
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
        self.history: list[dict[str, Any]] = []  # one record an epoch, as in metrics.jsonl
        self.epoch, self.batches, self.step = 1, 0, 0  # the epoch under way, its batches and all batches that are done
        self.record: dict[str, Any] = {}  # of the epoch under way
        self.meters = Meters()
        self.average: AveragedModel | None = None  # of the encoder's weights
        if config.train.ema is not None:
            self.average = AveragedModel(task.encoder, multi_avg_fn=get_ema_multi_avg_fn(config.train.ema))

    def fit(self) -> list[dict[str, Any]]:
        """Train the epochs that are left; returns the records of metrics.jsonl.

        Raises:
            TrainingError: the loss is not finite; `last.pt` and `best.pt` are those of the epochs before.
        """
        epochs = self.config.train.epochs
        with self._board() as board:
            while self.epoch <= epochs:
                if self.batches == 0:
                    self.record, self.meters = {"epoch": self.epoch, **self._divide(self.epoch)}, Meters()
                record = self.record | self._train_epoch(self.epoch)
                if self.epoch % self.config.eval.every == 0 or self.epoch == epochs:
                    record |= self._evaluate(self.epoch)
                self.history.append(record)
                self.epoch, self.batches = self.epoch + 1, 0
                self._save()
                if board is not None:
                    append_json_line(self.run / "metrics.jsonl", record)
                    write_board(board, record)
        split = self.config.eval.select_on
        table = result_table(self.history, split)
        LOGGER.info("results on test, protocol: t2i, whole gallery, no camera filter\n%s", table)
        if best := best_record(self.history, split):
            LOGGER.info("best R1: %.2f at epoch %d (on %s)", best[split]["R1"], best["epoch"], split)
        return self.history

    def _board(self) -> contextlib.AbstractContextManager[SummaryWriter | None]:
        """TensorBoard's file, of the process that writes the run folder."""
        return contextlib.nullcontext() if rank() else SummaryWriter(str(self.run), purge_step=self.epoch)

    def _divide(self, epoch: int) -> dict[str, float]:
        config = self.config.train
        return divide_pairs(
            self.task, self.train, epoch, seed=config.seed, device=self.device, precision=config.precision
        )

    def _train_epoch(self, epoch: int) -> dict[str, Any]:
        config, batches = self.config.train, self.train.epoch(epoch, start=self.batches)
        total_steps = len(self.train)
        schedule = asdict(self.config.solver.schedule)

        def rate(base_lr: float) -> float:
            return lr_at(epoch, base_lr, epochs=config.epochs, **schedule)

        set_lr(self.optimizer, rate)
        lr = rate(self.config.solver.lr)
        self.task.train()
        watch, first, pairs, start = StepWatch(self.train.pairs), self.batches + 1, 0, time.perf_counter()
        steps = zip(*[batches] * config.accumulate, strict=True)  # of each, all parts
        bar = progress(steps, f"epoch {epoch}/{config.epochs}", total=total_steps, initial=self.batches)
        for number, on_cpu in enumerate(bar, start=first):
            self.step += 1
            index, size = torch.cat([part["index"] for part in on_cpu]), sum(map(num_pairs, on_cpu))
            parts = [to_device(part, self.device) for part in on_cpu]
            total, terms = backward(
                self.task, parts, device=self.device, precision=config.precision, scale=self.scaler.scale
            )
            self._update()
            terms = {"loss": total, **terms}
            self.meters.update(terms, size)
            watch.note(self.step, terms, index)
            pairs += size
            if number % config.log_every == 0 or number == total_steps:
                watch.check()
                means = ", ".join(f"{name}: {value:.4f}" for name, value in self.meters.read().items())
                LOGGER.info("Epoch[%d] Iteration[%d/%d], %s, Base Lr: %.2e", epoch, number, total_steps, means, lr)
            if config.save_every_steps and number % config.save_every_steps == 0 and number < total_steps:
                watch.check()
                self.batches = number
                self._save()
        seconds = time.perf_counter() - start
        speed = {"seconds": seconds, "samples_per_second": pairs / seconds, "peak_memory_gib": peak_memory(self.device)}
        LOGGER.info(
            "Epoch %d done. Time per batch: %.3f[s] Speed: %.1f[samples/s] Peak memory: %.2f[GiB]",
            *(epoch, seconds / (total_steps - first + 1), speed["samples_per_second"], speed["peak_memory_gib"]),
        )
        return {"lr": lr, **self.meters.read(), **speed, **self._bad_images(epoch)}

    def _bad_images(self, epoch: int) -> dict[str, int]:
        """How many training images could not be read so far, where they are skipped; the log gets their paths once."""
        if not self.train.pairs.images.skip_bad:
            return {}
        self._share_unreadable()
        found = self.train.pairs.images.unreadable()
        known = self.history[-1]["bad_images"] if self.history else 0
        if len(found) > known:
            LOGGER.warning(
                "after epoch %d: %d training images cannot be read, other pairs take their place: %s "
                "(python -m tools.check_dataset %s lists all of them, and why)",
                *(epoch, len(found), ", ".join(found[:10]), self.config.data.dataset),
            )
        return {"bad_images": len(found)}

    def _share_unreadable(self) -> Tensor:
        """Which training images any process could not read, as all of them know then."""
        bad = self.train.pairs.images.bad
        return bad.copy_(torch.stack(gather_objects(bad)).any(dim=0))

    def _update(self) -> None:
        average_gradients(self.task.parameters())
        if self.config.train.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            clip_grad_norm_(self.task.parameters(), self.config.train.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.task.encoder)

    def _evaluate(self, epoch: int) -> dict[str, dict[str, float]]:
        start = time.perf_counter()
        results = {}
        encoders = [("", self.task.encoder), *([] if self.average is None else [(EMA, self.average.module)])]
        for kind, encoder in encoders:
            assert isinstance(encoder, Encoder)
            for split, loaders in self.evaluation.items():
                ranking = embed(encoder, loaders, self.device, self.config.train.precision).rank_images()
                results[split + kind] = ranking.summary()
                if ranking.num_unmatched and not kind:
                    LOGGER.warning("%s: %d captions show nobody of the gallery; left out", split, ranking.num_unmatched)
        table = metrics_table({f"t2i {split}": values for split, values in results.items()})
        LOGGER.info("Validation Results - Epoch: %d (%.1f s)\n%s", epoch, time.perf_counter() - start, table)
        return results

    def _save(self) -> None:
        """Write `last.pt`, from which a run goes on, and before it `best.pt`, if the last record is the best one.

        `best_ema.pt` is to the mean of the weights what `best.pt` is to the weights.
        """
        record = self.history[-1] if self.history else {}
        content = {
            "epoch": self.epoch - 1,  # whole ones
            "config": to_yaml(self.config),
            "metrics": dict(record),
            "model": self.task.state_dict(),
        }
        content_of_last = content | {"training": self.state_dict()}
        if rank():
            return
        split = self.config.eval.select_on
        if self.batches == 0 and record is best_record(self.history, split):
            save_checkpoint(self.run / "best.pt", content)
        if self.batches == 0 and self.average is not None and record is best_record(self.history, split + EMA):
            mean = {f"encoder.{name}": value for name, value in self.average.module.state_dict().items()}
            save_checkpoint(self.run / "best_ema.pt", content | {"model": mean})
        save_checkpoint(self.run / "last.pt", content_of_last)

    def state_dict(self) -> dict[str, Any]:
        """All that training needs to go on as if it had not been interrupted, but for the model's weights.

        All processes have to call it together: each has its own random numbers and running means.
        """
        own = {"meters": self.meters.state_dict(), "random": random_state(self.device)}
        return {
            "epoch": self.epoch,
            "batches": self.batches,
            "step": self.step,
            "record": self.record,
            "history": self.history,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "counted": {name: module.counted for name, module in pair_objectives(self.task).items()},
            "unreadable": self._share_unreadable(),
            "average": None if self.average is None else self.average.state_dict(),
            "processes": gather_objects(own),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; the model's weights are loaded elsewhere."""
        self.epoch, self.batches, self.step = (int(state[name]) for name in ("epoch", "batches", "step"))
        self.record, self.history = dict(state["record"]), list(state["history"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for name, module in pair_objectives(self.task).items():
            counted = state["counted"].get(name)
            module.counted = None if counted is None else counted.to(self.device)
        self.train.pairs.images.bad.copy_(state["unreadable"])
        if self.average is not None and state["average"] is not None:  # else --force has begun one
            self.average.load_state_dict(state["average"])
        processes = state["processes"]
        if len(processes) != world_size():
            LOGGER.warning(
                "the run had %d processes and has %d now: what the model draws at random will differ",
                *(len(processes), world_size()),
            )
        own = processes[rank() % len(processes)]
        self.meters.load_state_dict(own["meters"], self.device)
        set_random_state(own["random"], self.device)
