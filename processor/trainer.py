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
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from configs.schema import Config
from datasets.loaders import EvalLoaders, TrainLoader
from model.task import RetrievalTask
from processor.division import divide_pairs, pair_objectives
from processor.evaluator import METRICS, autocast, embed, metrics_table
from processor.meters import Meters, StepWatch
from solver.optimizer import set_lr
from solver.schedule import lr_at
from utils.batch import to_device
from utils.checkpoint import save_checkpoint
from utils.config import to_yaml
from utils.distributed import average_gradients, gather_objects, peak_memory, rank, world_size
from utils.logger import LOGGER, append_json_line, format_table
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
                    _write_board(board, record)
        LOGGER.info("results on test, protocol: t2i, whole gallery, no camera filter\n%s", self.result_table())
        split = self.config.eval.select_on
        if best := self._best(split):
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
        name = f"epoch {epoch}/{config.epochs}"
        quiet = True if rank() else None  # None: where the output is no terminal
        bar = tqdm(batches, desc=name, total=total_steps, initial=self.batches, leave=False, disable=quiet)
        for number, batch in enumerate(bar, start=first):
            self.step += 1
            index = batch["index"]
            batch = to_device(batch, self.device)
            # The last group of an epoch may hold fewer batches than the others.
            group = min(config.accumulate, total_steps - (number - 1) // config.accumulate * config.accumulate)
            with autocast(self.device, config.precision):
                total, terms = self.task(batch)
            self.scaler.scale(total / group).backward()
            if updates := number % config.accumulate == 0 or number == total_steps:
                self._update()
            terms = {"loss": total.detach(), **terms}
            size = int(batch["shards"].sum()) if "shards" in batch else len(index)  # pairs of all processes
            self.meters.update(terms, size)
            watch.note(self.step, terms, index)
            pairs += size
            if number % config.log_every == 0 or number == total_steps:
                watch.check()
                means = ", ".join(f"{name}: {value:.4f}" for name, value in self.meters.read().items())
                LOGGER.info("Epoch[%d] Iteration[%d/%d], %s, Base Lr: %.2e", epoch, number, total_steps, means, lr)
            every = config.save_every_steps
            if every is not None and updates and number < total_steps and number // every > self.batches // every:
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

    def _evaluate(self, epoch: int) -> dict[str, dict[str, float]]:
        start = time.perf_counter()
        results = {}
        for split, loaders in self.evaluation.items():
            ranking = embed(self.task.encoder, loaders, self.device, self.config.train.precision).rank_images()
            results[split] = ranking.summary()
            if ranking.num_unmatched:
                LOGGER.warning("%s: %d captions show nobody of the gallery; left out", split, ranking.num_unmatched)
        table = metrics_table({f"t2i {split}": values for split, values in results.items()})
        LOGGER.info("Validation Results - Epoch: %d (%.1f s)\n%s", epoch, time.perf_counter() - start, table)
        return results

    def _save(self) -> None:
        """Write `last.pt`, from which a run goes on, and before it `best.pt`, if the last record is the best one."""
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
        if self.batches == 0 and record is self._best(self.config.eval.select_on):
            save_checkpoint(self.run / "best.pt", content)
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
            "processes": gather_objects(own),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; the model's weights are loaded elsewhere."""
        self.epoch, self.batches, self.step = (state[name] for name in ("epoch", "batches", "step"))
        self.record, self.history = dict(state["record"]), list(state["history"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for name, module in pair_objectives(self.task).items():
            counted = state["counted"].get(name)
            module.counted = None if counted is None else counted.to(self.device)
        self.train.pairs.images.bad.copy_(state["unreadable"])
        processes = state["processes"]
        if len(processes) != world_size():
            LOGGER.warning(
                "the run had %d processes and has %d now: what the model draws at random will differ",
                *(len(processes), world_size()),
            )
        own = processes[rank() % len(processes)]
        self.meters.load_state_dict(own["meters"], self.device)
        set_random_state(own["random"], self.device)

    def _best(self, split: str) -> dict[str, Any] | None:
        """The first record with the highest R1 on `split`."""
        evaluated = [record for record in self.history if split in record]
        return max(evaluated, key=lambda record: record[split]["R1"], default=None)

    def result_table(self) -> str:
        """Test metrics of three epochs: selected on val, last, and best on test, which is the papers' convention."""
        rows = {
            "selected on val": self._best("val"),
            "last epoch": self.history[-1],
            "best on test": self._best("test"),
        }
        chosen = {"val": "selected on val", "test": "best on test"}[self.config.eval.select_on]
        lines = [
            [
                name + (" (best.pt)" if name == chosen else ""),
                record["epoch"],
                *(record["test"][key] for key in METRICS),
            ]
            for name, record in rows.items()
            if record is not None
        ]
        return format_table(["t2i on test", "epoch", *METRICS], lines)


def _write_board(board: SummaryWriter, record: Mapping[str, Any]) -> None:
    """Every number of the record, `val/R1` style where it is nested."""
    for name, value in record.items():
        for tag, number in value.items() if isinstance(value, Mapping) else [("", value)]:
            board.add_scalar(f"{name}/{tag}" if tag else name, number, record["epoch"])
