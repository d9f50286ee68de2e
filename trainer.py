"""One training run: it trains and evaluates epoch by epoch, logs, saves, and goes on from what was saved."""

import math
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from build import build_teacher, prepare
from checkpoint import check_resumable, rng_state, save_checkpoint, set_rng_state
from datasets import bad_image_limit, build_eval_loader, build_train_loader, unnormalise
from distributed import Distributed, barrier
from engine import EpochLog, RunControl, Scores, UnreadableImages, build_learner, evaluate, train_one_epoch
from losses import build_mixup, build_objective
from models import UserError
from models.parameters import freeze, parameter_groups
from utils import (
    RunError,
    StopSignal,
    append_json_line,
    clear_stop_marker,
    log,
    tensorboard,
    to_jsonable,
    truncate_log,
    write_json,
    write_stop_marker,
)

# flags that a resumed run does not follow: its optimizer and schedule are the checkpoint's
IGNORED_ON_RESUME = (
    "lr",
    "lr_times",
    "min_lr",
    "min_lr_times",
    "warmup_lr",
    "warmup_epochs",
    "epochs",
    "decay_epochs",
    "decay_rate",
    "patience_epochs",
    "weight_decay",
)


class Trainer:
    """A training run and its position: `epoch` and, in micro-batches done of it, `step`.

    Everything that the next step depends on is in `state()`, so that a run that was stopped or killed and resumed is
    bit for bit the run that was never interrupted.
    """

    def __init__(self, args: Namespace, dist: Distributed, stop: StopSignal) -> None:
        self.args, self.dist, self.stop = args, dist, stop
        self.folder = Path(args.output_dir).expanduser() if args.output_dir else None
        self.data, weights, self.module, precision = prepare(args, dist)
        self.name = weights.name
        freeze(self.module, args.train_only)
        self.train_loader = build_train_loader(args, self.data, dist.rank, dist.world)
        self.val_loader = build_eval_loader(args, self.data.val, dist.rank, dist.world)
        teacher = build_teacher(args, self.data.num_classes, dist.device)
        objective = build_objective(args, teacher, self.module)
        groups = parameter_groups(self.module, args.weight_decay, args.register_lr_mult)
        mixup = build_mixup(args, self.data.num_classes)
        self.learner = build_learner(args, dist, self.module, groups, objective, precision, mixup)
        self.control = RunControl(
            stop, UnreadableImages(bad_image_limit(args, self.data)), args.max_nonfinite, args.log_every
        )
        self.epochs = args.epochs + args.cooldown_epochs
        self.epoch, self.step, self.best = 0, 0, -1.0
        self.epoch_log = EpochLog()
        self.saved = ""  # the last good checkpoint, for people
        if weights.resumed is not None:
            self._resume(*weights.resumed)
        self.writer = tensorboard(args.output_dir, dist.is_main, self.epoch or None)

    # What is saved, and resumed

    @property
    def checkpoint(self) -> Path | None:
        """Where the run saves to; None without --output_dir."""
        return self.folder / "checkpoint.pth" if self.folder else None

    def state(self) -> dict[str, Any]:
        """Return a checkpoint: tensors and plain values only."""
        return {
            **self.learner.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "rng": rng_state() | {"objective": self.learner.objective.state_dict()},
            "sampler": self.data_signature(),
            "epoch_log": asdict(self.epoch_log),
            "merge": self.module.merge.as_dict(),
            "args": to_jsonable(self.args) | {"model": self.name},
            "best": self.best,
        }

    def data_signature(self) -> dict[str, int]:
        """Return the settings under which `step` counts the same micro-batches."""
        return {
            "seed": self.args.seed,
            "batch_size": self.args.batch_size,
            "accumulation_steps": self.args.accumulation_steps,
            "world": self.dist.world,
            "micro_batches": len(self.train_loader),
        }

    def _resume(self, state: dict[str, Any], path: str) -> None:
        """Restore all but the model's weights, which `build_model` has loaded from the same state.

        Keys that DeiT's checkpoints lack keep their values of a fresh run.
        """
        check_resumable(state, path)
        try:
            self.learner.load_state_dict(state)
        except (ValueError, KeyError) as error:
            raise UserError(f"{path} does not fit these optimizer options ({error}); use --finetune {path}") from error
        self.epoch, self.step = int(state["epoch"]), int(state.get("step", 0))
        self.best = float(state.get("best", -1.0))
        self.epoch_log = EpochLog(**state.get("epoch_log", {}))
        if "rng" in state:
            set_rng_state(state["rng"])
            self.learner.objective.load_state_dict(state["rng"]["objective"])
        self._check_data_signature(state.get("sampler"), path)
        self.warn_ignored_flags(state.get("args"))
        self.saved = path
        log(f"resumed {path} at epoch {self.epoch}, micro-batch {self.step}")

    def _check_data_signature(self, saved: dict[str, int] | None, path: str) -> None:
        now = self.data_signature()
        if saved is None or saved == now:
            return
        changed = ", ".join(f"{key} {saved[key]} -> {value}" for key, value in now.items() if saved[key] != value)
        if self.step:
            raise UserError(
                f"{path} stopped inside an epoch, which cannot go on with {changed}; keep them as they were"
            )
        log(f"warning: resumed with {changed}: the run goes on, but not as the unbroken one would")

    def warn_ignored_flags(self, saved: Any) -> None:
        """Name the flags that differ from the saved arguments and are not followed."""
        now, before = to_jsonable(self.args), saved if isinstance(saved, dict) else {}
        changed = [f"--{name}" for name in IGNORED_ON_RESUME if name in before and before[name] != now[name]]
        if changed:
            log(f"warning: the checkpoint's optimizer and schedule go on, whatever {', '.join(changed)} says now")

    def save(self) -> None:
        """Write checkpoint.pth on rank 0; the others wait, so that none runs ahead of what is safe."""
        if self.checkpoint is not None and self.dist.is_main:
            save_checkpoint(self.checkpoint, self.state())
        barrier()
        if self.checkpoint is not None:
            self.saved = f"{self.checkpoint} (epoch {self.epoch}, micro-batch {self.step})"

    def _save_best(self) -> None:
        """Write best.pth, which holds the weights that were judged: the average where there is one."""
        if self.folder is None or not self.dist.is_main:
            return
        state = self.state()
        judged = state["model"] if state["model_ema"] is None else state["model_ema"]
        best = {"model": judged, "epoch": self.epoch, "best": self.best, "merge": state["merge"], "args": state["args"]}
        save_checkpoint(self.folder / "best.pth", best, keep_previous=False)

    # The run

    def fit(self) -> int:
        """Train to the end or to a stop; returns the exit status.

        Raises:
            RunError: the run cannot go on; names the checkpoint to go on from.
        """
        try:
            return self._fit()
        except RunError as error:
            raise RunError(f"{error}; last good checkpoint: {self.saved or 'none'}") from error

    def _fit(self) -> int:
        if self.folder is not None and self.dist.is_main:
            write_json(self.folder / "args.json", self.args)
            clear_stop_marker(self.folder)
            truncate_log(self.folder / "log.txt", self.epoch)
        while self.epoch < self.epochs:
            if not (self._train_epoch() and self._finish_epoch()):
                return self._stopped()
        log(f"done: {self.epochs} epochs, best accuracy {self.best:.3f} %")
        self.writer.close()
        return 0

    def _train_epoch(self) -> bool:
        """Train the rest of an epoch; False after a stop."""
        began, before = time.monotonic(), self.epoch_log.seconds
        self.learner.objective.start_epoch(self.epoch)

        def after_step(done: int) -> None:
            self.step, self.epoch_log.seconds = done, before + time.monotonic() - began
            every = self.args.save_every_steps * self.args.accumulation_steps
            if every and done % every == 0 and done < len(self.train_loader):
                self.save()

        return train_one_epoch(
            self.learner,
            self.train_loader,
            self.control,
            self.epoch,
            self.step,
            epoch_log=self.epoch_log,
            after_step=after_step,
        )

    def _finish_epoch(self) -> bool:
        """Evaluate, log, save; False after a stop, and then a resumed run evaluates first."""
        raw = self._evaluate(self.learner.model, "test")
        average = self.learner.ema
        ema = self._evaluate(average.module, "test EMA") if raw is not None and average is not None else None
        if raw is None or (average is not None and ema is None):
            return False
        if self.dist.is_main:
            self._log_epoch(raw, ema)
        self.learner.end_epoch(self.epoch, raw.acc1)
        accuracy = raw.acc1 if ema is None else ema.acc1
        better = accuracy > self.best
        self.best = max(self.best, accuracy)
        self.epoch += 1
        self.step = 0
        self.epoch_log = EpochLog(nonfinite=self.epoch_log.nonfinite)
        if better:
            self._save_best()
        if self.epoch % self.args.save_every == 0 or self.epoch == self.epochs:
            self.save()
        return True

    def _evaluate(self, model: nn.Module, title: str) -> Scores | None:
        module = getattr(model, "module", model)  # DDP would wait for ranks that have fewer batches
        precision = self.learner.precision
        scores = evaluate(module, self.val_loader, [None], precision, self.dist, title=title, control=self.control)
        return scores[0] if scores else None

    def _stopped(self) -> int:
        self.save()
        where = (
            f"{self.checkpoint}; go on with --resume auto" if self.checkpoint else "nothing: there is no --output_dir"
        )
        if self.dist.is_main:
            write_stop_marker(self.folder, str(self.stop.requested), self.epoch, self.step)
        log(f"stopped by {self.stop.requested} in epoch {self.epoch} after micro-batch {self.step}; saved {where}")
        self.writer.close()
        return self.stop.status

    # Logging

    def _log_epoch(self, raw: Scores, ema: Scores | None) -> None:
        """Print an epoch, and write it to log.txt and tensorboard."""
        line = {
            "epoch": self.epoch,
            **{f"train_{name}": value for name, value in self.epoch_log.means().items()},
            "lr": self.learner.lr,
            "test_loss": raw.loss,
            "test_acc1": raw.acc1,
            "test_acc5": raw.acc5,
            **({} if ema is None else {"ema_acc1": ema.acc1}),
            "images_per_s": self.epoch_log.samples / max(self.epoch_log.seconds, 1e-9),
            "seconds": self.epoch_log.seconds,
        }
        log("  ".join(f"{key} {value:.5g}" for key, value in line.items()))
        for key, value in line.items():
            if key != "epoch":
                self.writer.add_scalar(key.replace("_", "/", 1), value, self.epoch)
        self.writer.flush()
        if self.folder is not None:
            append_json_line(self.folder / "log.txt", line)
        if self.args.log_images and (self.epoch + 1) % self.args.log_images == 0:
            self._log_images()

    def _log_images(self) -> None:
        """Draw norms, attention and merged tokens of a few validation images."""
        from analysis.log_images import log_images  # matplotlib is needed here only

        val = self.data.val
        images = torch.stack([val[i].image for i in range(0, len(val), math.ceil(len(val) / 4))])
        pictures = unnormalise(images, self.data.config)
        folder = self.folder if self.dist.is_main else None
        log_images(self.module, images.to(self.dist.device), pictures, self.writer, self.epoch, folder)
        self.writer.flush()


def run_training(args: Namespace, dist: Distributed) -> int:
    """Train, evaluating the merged model after every epoch; returns the exit status."""
    with StopSignal() as stop:  # from here on, so that a signal during the start is not lost
        return Trainer(args, dist, stop).fit()
