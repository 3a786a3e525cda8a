"""The training loop: epochs of steps, evaluation, logs and checkpoints."""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import Tensor

from datasets.loaders import EvalLoaders, TrainLoader
from processor.clean_pairs import before_epoch
from processor.engine import Engine
from processor.evaluator import metrics_table, warn
from processor.meters import Meters, NaNCheck
from processor.prediction import Prediction
from processor.profile import Profile
from processor.reporting import EMA, SELECTED_BY, best_record, result_table
from processor.saving import RunCheckpoints
from processor.timing import Timing
from processor.trackers import Tracker, build_trackers
from solver.optimizer import set_lr
from solver.schedule import lr_at
from utils.config import to_yaml
from utils.distributed import Announcement, gather_objects, rank, world_size
from utils.logger import LOGGER, append_json_line, progress
from utils.seed import random_state, set_random_state
from utils.signals import Interrupted, StopRequest
from utils.watchdog import Watchdog


class Trainer:
    """Trains a task and writes the run folder.

    Args:
        engine: the task and its optimizer.
        train: training batches.
        evaluation: split name -> loaders; `test`, and `val` if there is one.
        run: existing run folder.
        inputs: name -> hash of the files that the run is trained on, kept in its checkpoints.
    """

    def __init__(
        self,
        engine: Engine,
        train: TrainLoader,
        evaluation: Mapping[str, EvalLoaders],
        run: Path,
        inputs: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.engine, self.task, self.config, self.device = engine, engine.task, engine.config, engine.device
        self.train, self.evaluation, self.run = train, evaluation, run
        self.checkpoints = RunCheckpoints(run, self.config, inputs)
        self.history: list[dict[str, Any]] = []  # one record per epoch, as in metrics.jsonl
        self.epoch, self.batches, self.step = 1, 0, 0  # current epoch, its batches done, all batches done
        self.record: dict[str, Any] = {}  # of the current epoch
        self.trained = False  # True if the current epoch lacks its evaluation only
        self.meters = Meters()
        self.timing = Timing(self.config.train, self.device)
        self.profile = Profile(self.config.train.profile, run, self.device)
        self.prediction = Prediction(self.config, self.device, self.timing)

    def fit(self) -> list[dict[str, Any]]:
        """Train the remaining epochs; returns the records of metrics.jsonl.

        Raises:
            TrainingError: the loss is not finite; `last.pt` and `best.pt` are from earlier epochs.
            Interrupted: SIGTERM or SIGUSR1 came; `last.pt` is from the step in which it did, or the next one.
        """
        trackers = [] if rank() else build_trackers(self.config.train.trackers, self.run, self.epoch)
        try:
            with Watchdog():
                self._fit(trackers)
        finally:
            self.profile.close()
            for tracker in trackers:
                tracker.close()
        return self.history

    def _fit(self, trackers: list[Tracker]) -> None:
        epochs, split = self.config.train.epochs, self.config.eval.select_on
        for tracker in trackers:
            tracker.log_text("config", to_yaml(self.config))
        while self.epoch <= epochs:
            if self.batches == 0:
                self.record, self.meters = {"epoch": self.epoch, **self._before_epoch(self.epoch)}, Meters()
            evaluates = self.epoch % self.config.eval.every == 0 or self.epoch == epochs
            if self.trained:  # resumed before its evaluation
                self._set_lr(self.epoch)
            else:
                with StopRequest() as request:
                    self.record |= self._train_epoch(self.epoch, request)
                    self.trained, signal = True, max(gather_objects(request.number))
                    if signal:
                        self._save_and_end(signal)
                    if evaluates:  # a fault of the evaluation does not cost the epoch
                        self._save()
            record = dict(self.record)
            if evaluates:
                with self.timing.beside("evaluation"):
                    record |= self._evaluate(self.epoch)
            record |= self.timing.beside_steps()
            self.history.append(record)
            self.epoch, self.batches, self.trained = self.epoch + 1, 0, False
            self._save()
            if rank() == 0:
                append_json_line(self.run / "metrics.jsonl", record)
            for tracker in trackers:
                tracker.log(record)
        table = result_table(self.history, split)
        LOGGER.info("results on test, protocol: t2i, whole gallery, no camera filter\n%s", table)
        for tracker in trackers:
            tracker.log_text("results", table)
        if best := best_record(self.history, split):
            LOGGER.info("best R1: %.2f at epoch %d (on %s)", best[split][SELECTED_BY], best["epoch"], split)

    def _before_epoch(self, epoch: int) -> dict[str, float]:
        config = self.config.train
        return before_epoch(
            self.task,
            self.train,
            epoch,
            seed=config.seed,
            device=self.device,
            precision=config.precision,
            passes=self.engine.passes,
        )

    def _set_lr(self, epoch: int) -> float:
        """Set the learning rates of an epoch; returns the base rate."""
        epochs, schedule = self.config.train.epochs, self.config.solver.schedule

        def lr_of(base_lr: float) -> float:
            return lr_at(epoch, base_lr, epochs=epochs, **schedule)

        set_lr(self.engine.optimizer, lr_of)
        return lr_of(self.config.solver.lr)

    def _train_epoch(self, epoch: int, request: StopRequest) -> dict[str, Any]:
        config = self.config.train
        batches = self.train.epoch(epoch, start=self.batches)
        total_steps = len(self.train)  # of this epoch, after its batches are drawn
        lr = self._set_lr(epoch)
        self.task.train()
        nan_check, stop, first = NaNCheck(self.train.pairs), Announcement(), self.batches + 1
        self.timing.start(epoch, self.batches, total_steps)
        timed = self.timing.steps(batches)
        bar = progress(timed, f"epoch {epoch}/{config.epochs}", total=total_steps, initial=self.batches)
        for number, on_cpu in enumerate(bar, start=first):
            self.step += 1
            index = torch.cat([micro_batch.fields["index"] for micro_batch in on_cpu])
            size = sum(micro_batch.shard.num_pairs for micro_batch in on_cpu)
            total, metrics = self.engine.backward(on_cpu)
            self.timing.computed()
            self.engine.update()
            self.timing.updated(size)
            metrics = {"loss": total, **metrics}
            self.meters.update(metrics, size)
            nan_check.note(self.step, metrics, index)
            self.prediction.note(on_cpu, self.train.pairs)
            self.profile.step()
            if number % config.log_every == 0 or number == total_steps:
                nan_check.check()
                means = ", ".join(f"{name}: {value:.4f}" for name, value in self.meters.read().items())
                LOGGER.info("Epoch[%d] Iteration[%d/%d], %s, Base Lr: %.2e", epoch, number, total_steps, means, lr)
                LOGGER.info("%s", self.timing.line())
            signal = stop.exchange(request.number)
            due = config.save_every_steps and number % config.save_every_steps == 0
            if (signal or due) and number < total_steps:
                nan_check.check()
                self.batches = number
                if signal:
                    self._save_and_end(signal)
                self._save()
        self.batches = total_steps
        return {"lr": lr, **self.meters.read(), **self.timing.record(), **self._bad_images(epoch)}

    def _bad_images(self, epoch: int) -> dict[str, int]:
        """Number of unreadable training images so far, if they are skipped; new paths are logged."""
        if not self.train.pairs.images.skip_bad:
            return {}
        self._merge_unreadable()
        found = self.train.pairs.images.unreadable()
        known = self.history[-1].get("bad_images", 0) if self.history else 0
        if len(found) > known:
            LOGGER.warning(
                "after epoch %d: replaced %d unreadable training images: %s "
                "(python -m tools.check_dataset %s lists all of them with the reasons)",
                *(epoch, len(found), ", ".join(found[:10]), self.config.data.dataset),
            )
        return {"bad_images": len(found)}

    def _merge_unreadable(self) -> Tensor:
        """Merge the masks of unreadable training images over processes; returns the merged mask."""
        bad = self.train.pairs.images.bad
        bad.copy_(torch.stack(gather_objects(bad)).any(dim=0))
        return bad

    def _evaluate(self, epoch: int) -> dict[str, dict[str, float]]:
        start = time.perf_counter()
        results = {}
        average = self.engine.average
        ways: list[tuple[str, AbstractContextManager[None]]] = [("", nullcontext())]
        ways += [] if average is None else [(EMA, average.in_place())]
        for suffix, weights in ways:
            with weights:
                for split, loaders in self.evaluation.items():
                    embeddings = self.engine.embed(loaders)
                    ranking = embeddings.rank_images()
                    results[split + suffix] = ranking.summary()
                    if not suffix:
                        warn(embeddings, ranking, split)
        table = metrics_table({f"t2i {split}": values for split, values in results.items()})
        LOGGER.info("Validation Results - Epoch: %d (%.1f s)\n%s", epoch, time.perf_counter() - start, table)
        return results

    def _save(self) -> None:
        """Write `last.pt`, and the weights of an epoch that has ended."""
        with self.timing.beside("checkpoints"):
            record, weights = self.history[-1] if self.history else {}, self.engine.weights()
            training = self.state_dict()
            if self.batches == 0:
                self.checkpoints.save_weights(self.history, weights, self.engine.averaged_weights())
            self.checkpoints.save_last(record, weights, training)

    def _save_and_end(self, signal: int) -> NoReturn:
        self._save()
        gather_objects(None)  # a launcher ends all processes with the first one that ends
        raise Interrupted(signal)

    def state_dict(self) -> dict[str, Any]:
        """Training state apart from the model's weights, for an exact resume.

        A collective: every process has its own random numbers and running means.
        """
        local = {"meters": self.meters.state_dict(), "random": random_state(self.device)}
        return {
            "epoch": self.epoch,
            "batches": self.batches,
            "trained": self.trained,
            "step": self.step,
            "record": self.record,
            "history": self.history,
            **self.engine.state_dict(),
            "objectives": {name: module.training_state() for name, module in self.task.named_objectives()},
            "unreadable": self._merge_unreadable(),
            "processes": gather_objects(local),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict` that `check_training_state` accepts; the model's weights are loaded separately."""
        self.epoch, self.batches, self.step = (int(state[name]) for name in ("epoch", "batches", "step"))
        self.record, self.history = dict(state["record"]), list(state["history"])
        self.trained = bool(state.get("trained", False))  # version 0.1 saved no epoch before its evaluation
        self.engine.load_state_dict(state)
        states = state["objectives"] if "objectives" in state else _objectives_of_0_1(state["counted"])
        for name, module in self.task.named_objectives():
            module.load_training_state({key: value.to(self.device) for key, value in states.get(name, {}).items()})
        self.train.pairs.images.bad.copy_(state["unreadable"])
        processes = state["processes"]
        if len(processes) != world_size():
            LOGGER.warning(
                "resuming with %d processes instead of %d: random draws of the model will differ",
                *(world_size(), len(processes)),
            )
        local = processes[rank() % len(processes)]
        self.meters.load_state_dict(local["meters"], self.device)
        set_random_state(local["random"], self.device)


def _objectives_of_0_1(counted: Mapping[str, Tensor | None]) -> dict[str, dict[str, Tensor]]:
    """Training state of the objectives as version 0.1 saved it: the clean mask of each loss."""
    return {name: {"clean_mask": mask} for name, mask in counted.items() if mask is not None}
