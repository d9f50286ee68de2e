"""Where a resumed run goes on: the position in an epoch, carried over to other numbers of processes and batch sizes.

The order of an epoch's images is one for all processes, and an update takes `batch_size * accumulation_steps * world`
of them, the *global batch*, from consecutive positions. So a position counted in updates means the same images for
every split of the same global batch; with another global batch only a position counted in images does.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What the order of an epoch's images follows from, and into what batches it is cut.

    Attributes:
        images, repeats: size of the training set, and copies of an image in the order; 0 in checkpoints that do not
            tell.
        order: version of the rule that orders them; 1 in checkpoints that do not tell.
        micro_batches: of an epoch, on each process.
    """

    seed: int
    batch_size: int
    accumulation_steps: int
    world: int
    micro_batches: int
    images: int = 0
    repeats: int = 0
    order: int = 1

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], path: str) -> "Sampling":
        """Read a checkpoint's; UserError if it is not what `dataclasses.asdict` makes of one."""
        try:
            sampling = cls(**saved)
            whole = all(type(value) is int and value >= 0 for value in dataclasses.astuple(sampling))
        except TypeError:
            whole = False
        if not whole or not min(sampling.batch_size, sampling.accumulation_steps, sampling.world):
            raise UserError(f"{path} was altered: its sampler is {dict(saved)!r:.80}; take another checkpoint")
        return sampling

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.accumulation_steps * self.world

    def changes(self, before: "Sampling") -> str:
        """List what differs, as `world 2 -> 1`."""
        old = dataclasses.asdict(before)
        new = dataclasses.asdict(self)
        return ", ".join(
            f"{name} {old[name]} -> {value}"
            for name, value in new.items()
            if old[name] != value and not (name in ("images", "repeats") and not old[name])
        )

    def same_order(self, before: "Sampling") -> bool:
        """Tell whether an epoch has the same images at the same positions."""
        known = not before.images or (self.images, self.repeats) == (before.images, before.repeats)
        if self.global_batch == before.global_batch:  # then an epoch has as many updates
            known &= self.micro_batches // self.accumulation_steps == before.micro_batches // before.accumulation_steps
        return known and (self.seed, self.order) == (before.seed, before.order)


@dataclasses.dataclass(frozen=True)
class Continuation:
    """How a run goes on.

    Attributes:
        step: micro-batches of the epoch that count as done.
        lr_factor: of the learning rate, which is proportional to the global batch.
        notes: what is not as in the unbroken run, one line each.
    """

    step: int
    lr_factor: float = 1.0
    notes: tuple[str, ...] = ()


def continuation(before: Sampling, now: Sampling, step: int, anyway: bool, path: str) -> Continuation:
    """Carry a position over.

    Args:
        step: micro-batches of the epoch that were done, in those of `before`; at most all of them.
        anyway: go on inside the epoch also with another global batch.

    Raises:
        UserError: the position means nothing here, or no such position exists.
    """
    if step > before.micro_batches or step % before.accumulation_steps:
        total = before.micro_batches
        raise UserError(f"{path} was altered: its step is {step} of {total} micro-batches; take another checkpoint")
    changes, updates = now.changes(before), step // before.accumulation_steps
    if not changes:
        return Continuation(step)
    factor = now.global_batch / before.global_batch
    if step in (0, before.micro_batches):
        note = f"warning: resumed with {changes}: the run goes on, but not as the unbroken one would"
        return Continuation(now.micro_batches if step else 0, factor, (note,))
    if not now.same_order(before):
        if not anyway:
            raise UserError(
                f"{path} stopped inside an epoch, which cannot go on with {changes}: keep them as they were, or give "
                "--resume_anyway, which ends that epoch there"
            )
        note = f"warning: resumed with {changes}: the epoch ends here, after {updates * before.global_batch} images"
        return Continuation(now.micro_batches, factor, (note,))
    if now.global_batch == before.global_batch:
        note = f"note: resumed with {changes}: the same images in the same order, {now.global_batch} in an update; sums"
        note += " differ in their last digits, and what each process draws for itself (drop-path, mixup) is drawn anew"
        return Continuation(updates * now.accumulation_steps, factor, (note,))
    return _other_global_batch(before, now, updates, anyway, changes)


def _other_global_batch(before: Sampling, now: Sampling, updates: int, anyway: bool, changes: str) -> Continuation:
    images, length = updates * before.global_batch, now.micro_batches // now.accumulation_steps
    place = f"warning: resumed with {changes}: {images} images of the epoch were done"
    factor = now.global_batch / before.global_batch
    if not anyway:
        note = f"{place}; it ends here, and the next one goes on with {now.global_batch} images in an update"
        note += " (--resume_anyway goes on inside the epoch)"
        return Continuation(now.micro_batches, factor, (note,))
    done = min(images // now.global_batch, length)
    again = images - done * now.global_batch
    note = f"{place}; goes on after image {done * now.global_batch}, update {done} of {length}"
    note += f": {again} images are seen again" if again and done < length else ""
    return Continuation(done * now.accumulation_steps, factor, (note,))
