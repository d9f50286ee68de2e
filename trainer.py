"""One training run: what is saved, logged and resumed."""

import math
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from build import prepare
from checkpoint import check_resumable, rng_state, save_checkpoint, set_rng_state
from datasets import (
    bad_image_limit,
    build_eval_loader,
    build_train_loader,
    unnormalise,
)
from distributed import Distributed, barrier
from engine import (
    BadImages,
    EpochLog,
    Scores,
    build_scheduler,
    build_trainer,
    evaluate,
    load_scheduler_state,
    scheduler_state,
    train_one_epoch,
)
from losses import build_mixup, build_objective, build_teacher
from models import UserError
from models.parameters import freeze, parameter_groups
from utils import (
    RunError,
    StopSignal,
    append_json_line,
    clear_stop_marker,
    log,
    tensorboard,
    to_plain,
    truncate_log,
    write_json,
    write_stop_marker,
)

_OF_SCHEDULE: tuple[str, ...] = (
    "lr",
    "lr_times",
    "min_lr",
    "min_lr_times",
    "warmup_lr",
    "warmup_epochs",
    "epochs",
    "decay_epochs",
)


_OF_SCHEDULE += ("decay_rate", "patience_epochs", "weight_decay")


class Run:
    """A training run: what is saved, logged and resumed."""

    def __init__(self, args: Namespace, dist: Distributed) -> None:
        self.args, self.dist = args, dist
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
        self.trainer = build_trainer(args, dist, self.module, groups, objective, precision, mixup)
        self.scheduler, self.epochs = build_scheduler(args, self.trainer.optimizer)
        self.bad = BadImages(bad_image_limit(args, self.data))
        self.epoch, self.step, self.best = 0, 0, -1.0
        self.epoch_log, self.seconds, self.saved = EpochLog(), 0.0, ""
        if weights.resumed is not None:
            self._resume(*weights.resumed)
        self.writer = tensorboard(args.output_dir, dist.is_main, self.epoch or None)

    @property
    def checkpoint(self) -> Path | None:
        return self.folder / "checkpoint.pth" if self.folder else None

    def state(self) -> dict[str, Any]:
        """A checkpoint: tensors and plain values only."""
        trainer = self.trainer
        return {
            "model": self.module.state_dict(),
            "model_ema": trainer.ema.module.state_dict() if trainer.ema is not None else None,
            "optimizer": trainer.optimizer.state_dict(),
            "lr_scheduler": scheduler_state(self.scheduler),
            "scaler": trainer.precision.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "rng": rng_state() | {"objective": trainer.objective.state_dict()},
            "sampler": self._position(),
            "epoch_log": asdict(self.epoch_log) | {"seconds": self.seconds},
            "merge": self.module.merge.as_dict(),
            "args": to_plain(self.args) | {"model": self.name},
            "best": self.best,
        }

    def _position(self) -> dict[str, int]:
        """What the meaning of `step` depends on."""
        args = self.args
        shape = {"seed": args.seed, "batch_size": args.batch_size, "accumulation_steps": args.accumulation_steps}
        return shape | {"world": self.dist.world, "micro_batches": len(self.train_loader)}

    def _resume(self, state: dict[str, Any], path: str) -> None:
        check_resumable(state, path)
        trainer = self.trainer
        try:
            trainer.optimizer.load_state_dict(state["optimizer"])
            load_scheduler_state(self.scheduler, state["lr_scheduler"])
        except (ValueError, KeyError) as error:
            raise UserError(f"{path} does not fit these optimizer options ({error}); use --finetune {path}") from error
        if trainer.ema is not None:
            ema = state.get("model_ema")
            trainer.ema.module.load_state_dict(state["model"] if ema is None else ema)
        if state.get("scaler"):  # a run that used no fp16 has left none
            trainer.precision.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = int(state["epoch"]), int(state.get("step", 0))
        self.best = float(state.get("best", -1.0))
        if "epoch_log" in state:
            saved = dict(state["epoch_log"])
            self.seconds = saved.pop("seconds")
            self.epoch_log = EpochLog(**saved)
        if "rng" in state:
            set_rng_state(state["rng"])
            trainer.objective.load_state_dict(state["rng"]["objective"])
        self._check_position(state.get("sampler"), path)
        self._tell_ignored(state.get("args"))
        self.saved = path
        log(f"resumed {path} at epoch {self.epoch}, micro-batch {self.step}")

    def _check_position(self, saved: dict[str, int] | None, path: str) -> None:
        if saved is None or saved == self._position():
            return
        changed = ", ".join(
            f"{key} {saved[key]} -> {now}" for key, now in self._position().items() if saved[key] != now
        )
        if self.step:
            raise UserError(
                f"{path} stopped inside an epoch, which cannot go on with {changed}; keep them as they were"
            )
        log(f"warning: resumed with {changed}: the run goes on, but not as the unbroken one would")

    def _tell_ignored(self, saved: Any) -> None:
        """Flags of the schedule do nothing on a resumed run, whose schedule is the checkpoint's."""
        now, before = to_plain(self.args), saved if isinstance(saved, dict) else {}
        changed = [f"--{name}" for name in _OF_SCHEDULE if name in before and before[name] != now[name]]
        if changed:
            log(f"warning: the checkpoint's optimizer and schedule go on, whatever {', '.join(changed)} says now")

    def save(self) -> None:
        """Write checkpoint.pth on rank 0; the others wait, so that none runs ahead of what is safe."""
        if self.checkpoint is not None and self.dist.is_main:
            save_checkpoint(self.checkpoint, self.state())
        barrier()
        if self.checkpoint is not None:
            self.saved = f"{self.checkpoint} (epoch {self.epoch}, micro-batch {self.step})"

    def fit(self, stop: StopSignal) -> int:
        """Train to the end or to a stop; returns the exit status.

        Raises:
            RunError: the run cannot go on; names the checkpoint to go on from.
        """
        try:
            return self._fit(stop)
        except RunError as error:
            saved = self.saved or "none"
            raise RunError(f"{error}; last good checkpoint: {saved}") from error

    def _fit(self, stop: StopSignal) -> int:
        if self.folder is not None and self.dist.is_main:
            write_json(self.folder / "args.json", to_plain(self.args))
            clear_stop_marker(self.folder)
            truncate_log(self.folder / "log.txt", self.epoch)
        while self.epoch < self.epochs:
            if not (self._train_epoch(stop) and self._finish_epoch(stop)):
                return self._stopped(stop)
        log(f"done: {self.epochs} epochs, best accuracy {self.best:.3f} %")
        self.writer.close()
        return 0

    def _train_epoch(self, stop: StopSignal) -> bool:
        """Train the rest of an epoch; False after a stop."""
        began, before = time.monotonic(), self.seconds
        self.trainer.objective.start_epoch(self.epoch)

        def after_step(done: int) -> None:
            self.step, self.seconds = done, before + time.monotonic() - began
            every = self.args.save_every_steps * self.args.accumulation_steps
            if every and done % every == 0 and done < len(self.train_loader):
                self.save()

        return train_one_epoch(
            self.trainer,
            self.train_loader,
            self.epoch,
            self.step,
            epoch_log=self.epoch_log,
            set_lr=self._set_lr,
            stop=stop,
            bad=self.bad,
            max_nonfinite=self.args.max_nonfinite,
            log=log,
            log_every=self.args.log_every,
            after_step=after_step,
        )

    def _set_lr(self, epoch: float) -> float:
        if self.args.sched != "plateau":
            self.scheduler.step(epoch)  # type: ignore[arg-type]  # timm's schedules are smooth in the epoch
        return max(group["lr"] / group.get("lr_scale", 1.0) for group in self.trainer.optimizer.param_groups)

    def _stopped(self, stop: StopSignal) -> int:
        self.save()
        where = (
            f"{self.checkpoint}; go on with --resume auto" if self.checkpoint else "nothing: there is no --output_dir"
        )
        if self.dist.is_main:
            write_stop_marker(self.folder, str(stop.requested), self.epoch, self.step)
        log(f"stopped by {stop.requested} in epoch {self.epoch} after micro-batch {self.step}; saved {where}")
        self.writer.close()
        return stop.status

    def _finish_epoch(self, stop: StopSignal) -> bool:
        """Evaluate, log, save; False after a stop, and then a resumed run evaluates first."""
        raw = self._evaluate(self.trainer.model, "test", stop)
        average = self.trainer.ema
        ema = self._evaluate(average.module, "test EMA", stop) if raw is not None and average is not None else None
        if raw is None or (average is not None and ema is None):
            return False
        chosen = raw if ema is None else ema
        lr = max(group["lr"] / group.get("lr_scale", 1.0) for group in self.trainer.optimizer.param_groups)
        line = {"epoch": self.epoch, **{f"train_{name}": value for name, value in self.epoch_log.means().items()}}
        line |= {"lr": lr, "test_loss": raw.loss, "test_acc1": raw.acc1, "test_acc5": raw.acc5}
        line |= {} if ema is None else {"ema_acc1": ema.acc1}
        line |= {"images_per_s": self.epoch_log.samples / max(self.seconds, 1e-9), "seconds": self.seconds}
        if self.args.sched == "plateau":
            self.scheduler.step(self.epoch + 1, raw.acc1)
        if self.dist.is_main:
            self._log_epoch(line)
        if self.dist.is_main and self.args.log_images and (self.epoch + 1) % self.args.log_images == 0:
            self._log_images()
        better = chosen.acc1 > self.best
        self.best = max(self.best, chosen.acc1)
        self.epoch, self.step, self.epoch_log, self.seconds = (
            self.epoch + 1,
            0,
            EpochLog(nonfinite=self.epoch_log.nonfinite),
            0.0,
        )
        if better:
            self._save_best()
        if self.epoch % self.args.save_every == 0 or self.epoch == self.epochs:
            self.save()
        return True

    def _evaluate(self, model: nn.Module, title: str, stop: StopSignal) -> Scores | None:
        module = getattr(model, "module", model)  # DDP would wait for ranks that have fewer batches
        precision, every = self.trainer.precision, self.args.log_every
        options = {"bad": self.bad, "log": log, "title": title, "log_every": every, "stop": stop}
        scores = evaluate(module, self.val_loader, [None], precision, self.dist, **options)
        return scores[0] if scores else None

    def _log_epoch(self, line: dict[str, Any]) -> None:
        log("  ".join(f"{key} {value:.5g}" for key, value in line.items()))
        for key, value in line.items():
            if key != "epoch":
                self.writer.add_scalar(key.replace("_", "/", 1), value, self.epoch)
        self.writer.flush()
        if self.folder is not None:
            append_json_line(self.folder / "log.txt", line)

    def _log_images(self) -> None:
        """Norms, attention and merged tokens of a few validation images."""
        from analysis.log_images import log_images

        val = self.data.val
        images = torch.stack([val[i].image for i in range(0, len(val), math.ceil(len(val) / 4))])
        looks = unnormalise(images, self.data.config)
        log_images(self.module, images.to(self.dist.device), looks, self.writer, self.epoch)
        self.writer.flush()

    def _save_best(self) -> None:
        """best.pth holds the weights that were judged: the average where there is one."""
        if self.folder is None or not self.dist.is_main:
            return
        state = self.state()
        judged = state["model"] if state["model_ema"] is None else state["model_ema"]
        kept = {"model": judged, "epoch": self.epoch, "best": self.best, "merge": state["merge"], "args": state["args"]}
        save_checkpoint(self.folder / "best.pth", kept, keep_previous=False)


def run_training(args: Namespace, dist: Distributed) -> int:
    """Train, evaluating the merged model after every epoch."""
    with StopSignal() as stop:
        run = Run(args, dist)
        return run.fit(stop)
