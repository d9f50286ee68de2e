"""One training run: it trains and evaluates epoch by epoch, logs, saves, and goes on from what was saved."""

import math
import time
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from build import build_own_teacher, build_teacher, data_record, lora_settings, prepare, trained_parts
from calibration import write_result
from checkpoint import check_resumable, rng_state, save_checkpoint, set_rng_state
from datasets import (
    ORDER,
    LoaderFailure,
    bad_image_limit,
    build_eval_loader,
    build_train_loader,
    fit_batch,
    unnormalise,
)
from distributed import Distributed, barrier
from engine import EpochLog, RunControl, Scores, UnreadableImages, answers, build_learner, evaluate, train_one_epoch
from linear_probe import init_head
from losses import build_mixup, build_objective
from models import UserError
from models.adapters import merge_lora
from models.parameters import freeze, parameter_groups
from resume import Sampling, continuation
from runfolder import RunFolder, claimed
from sharding import shard
from sources import DATASETS
from utils import (
    RunError,
    StopSignal,
    first_line,
    log,
    tensorboard,
    to_jsonable,
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
    "layer_decay",
)


@dataclass(frozen=True)
class Best:
    """The score of the best weights so far: top-1 in %, and the loss, which decides between equal accuracies."""

    accuracy: float = -1.0
    loss: float = math.inf

    @property
    def rank(self) -> tuple[float, float]:
        """Return what is smaller for better weights."""
        return -self.accuracy, self.loss


class Trainer:
    """A training run and its position: `epoch` and, in micro-batches done of it, `step`.

    Everything that the next step depends on is in `state()`, so that a run that was stopped or killed and resumed is
    bit for bit the run that was never interrupted.
    """

    def __init__(self, args: Namespace, dist: Distributed, stop: StopSignal, place: RunFolder) -> None:
        self.args, self.dist, self.stop, self.place = args, dist, stop, place
        self.folder = place.path
        self.data, weights, self.module, fresh, precision, self.searched = prepare(args, dist)
        self.name, self.lora = weights.name, lora_settings(args)
        self._freeze()
        averaged = shard(self.module, dist, precision.dtype) if args.fsdp else None
        if weights.resumed is None:
            init_head(self.module, fresh, self.data, args, precision, dist)
        self.val_loader = build_eval_loader(args, self.data.val, dist.rank, dist.world)
        assert self.data.train is not None
        args, smaller_batch = fit_batch(args, len(self.data.train), dist.world)
        self.args = args
        self.train_loader = build_train_loader(args, self.data, dist.rank, dist.world)
        for line in (smaller_batch and f"note: {smaller_batch}", self.train_loader.describe()):
            if line:
                log(line)
        teacher = self._build_teacher()
        objective = build_objective(args, teacher, self.module)
        groups = parameter_groups(self.module, args.weight_decay, args.register_lr_mult, args.layer_decay)
        mixup = build_mixup(args, self.data.num_classes)
        self.learner = build_learner(args, dist, self.module, groups, objective, precision, mixup, averaged)
        self.control = RunControl(
            stop, UnreadableImages(bad_image_limit(args, self.data)), args.max_nonfinite, args.log_every
        )
        self.epochs = args.epochs + args.cooldown_epochs
        self.epoch, self.step = 0, 0
        self.best = Best()
        self.epoch_log = EpochLog()
        self.saved = ""  # the last good checkpoint, for people
        if weights.resumed is not None:
            self._resume(*weights.resumed)
        self.first_epoch = self.epoch
        self.writer = tensorboard(args.output_dir, dist.is_main, self.epoch if self.epoch or place.pending else None)

    def _build_teacher(self) -> nn.Module | None:
        """Build the teacher; unlabelled images get its answers as labels to be evaluated against."""
        args, device = self.args, self.dist.device
        if not args.recover:
            return build_teacher(args, self.data.num_classes, device)
        teacher = build_own_teacher(args, self.data, device)
        if DATASETS[args.dataset].labels:
            return teacher
        log("no labels: accuracy is the agreement with the unmerged model")
        self.data.val.targets[:] = answers(teacher, build_eval_loader(args, self.data.val, 0, 1), device)
        return teacher

    def _freeze(self) -> None:
        """Leave only trainable what --train_only names, and say how much that is."""
        named = trained_parts(self.args, self.module)
        trainable = freeze(self.module, named)
        if named != "all":
            parts = ", ".join(f"{part} {count:,}" for part, count in trainable.items())
            share = sum(trainable.values()) / sum(p.numel() for p in self.module.parameters())
            log(f"trainable parameters: {parts} ({100 * share:.2g} % of all)")

    # What is saved, and resumed

    @property
    def checkpoint(self) -> Path | None:
        """Where the run saves to; None without --output_dir."""
        return self.folder / "checkpoint.pth" if self.folder else None

    def state(self) -> dict[str, Any]:
        """Return a checkpoint: tensors and plain values only. Its tensors are rank 0's, if the model is spread."""
        return {
            **self.learner.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "rng": rng_state() | {"objective": self.learner.objective.state_dict()},
            "sampler": asdict(self.sampling()),
            "epoch_log": asdict(self.epoch_log),
            "merge": self.module.merge.as_dict(),
            "lora": self.lora and self.lora.as_dict(),
            "data": data_record(self.data),
            "args": to_jsonable(self.args) | {"model": self.name},
            "best": self.best.accuracy,
            "best_loss": self.best.loss,
        }

    def sampling(self) -> Sampling:
        """Return what the meaning of `step` follows from."""
        batches = self.train_loader.batches
        return Sampling(
            seed=self.args.seed,
            batch_size=self.args.batch_size,
            accumulation_steps=self.args.accumulation_steps,
            world=self.dist.world,
            micro_batches=len(batches),
            images=batches.n,
            repeats=batches.repeats,
            order=ORDER,
        )

    def _resume(self, state: dict[str, Any], path: str) -> None:
        """Restore all but the model's weights, which `build_model` has loaded from the same state.

        Keys that DeiT's checkpoints lack keep their values of a fresh run.
        """
        check_resumable(state, path)
        before = (state.get("args") or {}).get("opt") if isinstance(state.get("args"), dict) else None
        if before not in (None, self.args.opt):
            raise UserError(f"{path} was trained with --opt {before}, which cannot go on as {self.args.opt}; keep it")
        self.epoch, self.step = state["epoch"], state.get("step", 0)
        if self.epoch > self.epochs:
            raise UserError(f"{path} is at epoch {self.epoch}, past the {self.epochs} of this run; give more --epochs")
        try:
            self.learner.load_state_dict(state)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            reason = first_line(error)
            raise UserError(f"{path} does not fit these optimizer options ({reason}); use --finetune {path}") from error
        # an older checkpoint, which tells no loss, keeps its best.pth until the accuracy is higher
        self.best = Best(float(state.get("best", -1.0)), float(state.get("best_loss", -math.inf)))
        self.epoch_log = EpochLog(**state.get("epoch_log", {}))
        if "rng" in state:
            self._resume_streams(state["rng"], path)
        if "sampler" in state:
            self._carry_over(Sampling.from_dict(state["sampler"], path), path)
        self.warn_ignored_flags(state.get("args"))
        self.saved = path
        log(f"resumed {path} at epoch {self.epoch}, micro-batch {self.step}")

    def _resume_streams(self, state: dict[str, Any], path: str) -> None:
        try:
            set_rng_state(state)
            self.learner.objective.load_state_dict(state["objective"])
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            reason = first_line(error)
            raise UserError(f"{path} was altered: its rng is none ({reason}); take another checkpoint") from error

    def _carry_over(self, before: Sampling, path: str) -> None:
        """Go on with other numbers of processes or batch sizes than those that a checkpoint was saved with."""
        found = continuation(before, self.sampling(), self.step, self.args.resume_anyway, path)
        self.step = found.step
        for note in found.notes:
            log(note)
        if found.lr_factor != 1 and not self.args.unscale_lr:
            old = self.learner.scale_lr(found.lr_factor)
            log(f"the learning rate follows the global batch: {old:.5g} -> {old * found.lr_factor:.5g} at its highest")

    def warn_ignored_flags(self, saved: Any) -> None:
        """Name the flags that differ from the saved arguments and are not followed."""
        now, before = to_jsonable(self.args), saved if isinstance(saved, dict) else {}
        changed = [f"--{name}" for name in IGNORED_ON_RESUME if name in before and before[name] != now[name]]
        if changed:
            log(f"warning: the checkpoint's optimizer and schedule go on, whatever {', '.join(changed)} says now")

    @property
    def _takes_part(self) -> bool:
        """Whether this rank is needed for a checkpoint: rank 0 writes it, and all have parts of what is spread."""
        return self.dist.is_main or self.learner.sharded

    def save(self) -> None:
        """Write checkpoint.pth on rank 0; the others wait, so that none runs ahead of what is safe."""
        self._write()
        barrier()

    def _write(self) -> None:
        if self.checkpoint is not None:
            if self.dist.is_main:
                self.place.check(now=True)
            state = self.state() if self._takes_part else {}
            if self.dist.is_main:
                save_checkpoint(self.checkpoint, state)
                if self.searched is not None:
                    write_result(self.searched, self.checkpoint.parent)
            del state
            self.searched = None  # it holds the images
        self.place.saved(self.args, self.first_epoch)
        if self.checkpoint is not None:
            self.saved = f"{self.checkpoint} (epoch {self.epoch}, micro-batch {self.step})"

    def _save_best(self, weights: str) -> None:
        """Write best.pth: the weights that won, raw or average, and what it takes to use them."""
        if self.folder is None or not self._takes_part:
            return
        state = self.state()
        if not self.dist.is_main:
            return
        kept = {name: state[name] for name in ("epoch", "best", "best_loss", "merge", "data", "args")}
        won = merge_lora(state["model_ema"] if weights == "average" else state["model"], state["lora"])
        save_checkpoint(self.folder / "best.pth", {"model": won, "weights": weights, **kept}, keep_previous=False)

    # The run

    def fit(self) -> int:
        """Train to the end or to a stop; returns the exit status.

        Raises:
            RunError: the run cannot go on; names the checkpoint to go on from.
        """
        try:
            return self._fit()
        except RunError as error:
            if isinstance(error, LoaderFailure) and self.dist.is_main and not self.learner.sharded:
                self._write()  # all updates are whole; without a barrier, for the other ranks wait for gradients
            saved = self.saved if Path(self.saved.partition(" (epoch ")[0]).is_file() else ""
            go_on = "; go on with the same command and --resume auto" if saved else ""
            raise RunError(f"{error}; last good checkpoint: {saved or 'none'}{go_on}") from error

    def _fit(self) -> int:
        self.place.begin(self.args, self.epoch)
        while self.epoch < self.epochs:
            if not (self._train_epoch() and self._finish_epoch()):
                return self._stopped()
        log(f"done: {self.epochs} epochs, best accuracy {self.best.accuracy:.3f} %{self._best_file()}")
        self.writer.close()
        return 0

    def _best_file(self) -> str:
        return f", in {self.folder / 'best.pth'}" if self.folder else ""

    def _train_epoch(self) -> bool:
        """Train the rest of an epoch; False after a stop."""
        began, before = time.monotonic(), self.epoch_log.seconds
        self.learner.objective.start_epoch(self.epoch)

        def after_step(done: int) -> None:
            self.step, self.epoch_log.seconds = done, before + time.monotonic() - began
            self.place.check()
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
        if self.place.pending:  # what an earlier run left goes only when this one has saved
            self.save()
        raw = self._evaluate(self.learner.model, "test")
        average = self.learner.ema
        ema = self._evaluate(average.module, "test EMA") if raw is not None and average is not None else None
        if raw is None or (average is not None and ema is None):
            return False
        candidates = {"raw": Best(raw.acc1, raw.loss)}
        if ema is not None:
            candidates["average"] = Best(ema.acc1, ema.loss)
        weights = min(candidates, key=lambda name: candidates[name].rank)
        better = candidates[weights].rank < self.best.rank
        if better:
            self.best = candidates[weights]
        if self.dist.is_main:
            self._log_epoch(raw, ema, weights if better else None)
        self.learner.end_epoch(self.epoch, raw.acc1)
        self.epoch += 1
        self.step = 0
        self.epoch_log = EpochLog(nonfinite=self.epoch_log.nonfinite)
        if better:
            self._save_best(weights)
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

    def _log_epoch(self, raw: Scores, ema: Scores | None, best: str | None) -> None:
        """Print an epoch, and write it to log.txt and tensorboard.

        Args:
            best: which weights of this epoch are the best so far, raw or average; None: neither.
        """
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
        text = "  ".join(f"{key} {value:.5g}" for key, value in line.items())
        log(text + (f"  best so far: the {best} weights" if best else ""))
        for key, value in line.items():
            if key != "epoch":
                self.writer.add_scalar(key.replace("_", "/", 1), value, self.epoch)
        self.writer.flush()
        self.place.append_log({**line, "best": best})
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
    with StopSignal() as stop, claimed(args, dist) as place:  # a signal during the start is not lost
        status = Trainer(Namespace(**{**vars(args), "resume": place.resume}), dist, stop, place).fit()
        stop.finished = status == 0
        return status
