"""Samples, transforms, the order of an epoch, and loaders.

A source (`sources.py`) knows files and labels, an `ImageSet` adds decoding and transforms, a loader adds order. The
order of an epoch is a function of (seed, epoch), the augmentation of a sample one of (seed, epoch, position in that
order): worker count, prefetching, resuming and world size do not change what is trained on. Shapes: B batch, H and W
image.
"""

import math
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from PIL import Image, ImageFilter
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torchvision import transforms as T

from models.errors import UserError
from sources import DATASETS, FileSource, Source, data_root, find_images, missing_data, open_splits, readable_names
from utils import RunError, log, mix_seed

WHOLE_PIXELS = 32  # inputs up to this size show the whole image, without a crop
MAX_TRIES = 100  # unreadable images in a row before training stops
REPEATS = 3  # copies of an image under repeated augmentation, as in DeiT
MANY_IMAGES = 10_000  # from which on it is the default: an epoch of a smaller set shows every image once
ORDER = 2  # of the samples in an epoch: to be raised when the rule in `GlobalBatches` changes
MAX_WORKERS = 10  # by default, as in DeiT
IMAGES_PER_WORKER = 128  # a smaller set gets fewer workers by default: to start one takes as long as to read so many
WORKER_GRACE = 60  # seconds a worker outlives SIGTERM

# Samples and batches


class Batch(NamedTuple):
    """The batches that a loader yields.

    Attributes:
        images: (B,3,H,W) float32, normalised.
        targets: (B,) int64.
        valid: (B,) bool, False where an image of an evaluation set was unreadable (zeros, to be counted as wrong).
        bad: names of the unreadable images met on the way.
    """

    images: Tensor
    targets: Tensor
    valid: Tensor
    bad: tuple[str, ...]


@dataclass(frozen=True)
class DataConfig:
    """Preprocessing of a model: input size in pixels, mean and std per channel, how evaluation resizes and crops."""

    input_size: int = 224
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"
    crop_pct: float = 0.875


class Sample(NamedTuple):
    """An image (3,H,W), its class, whether it could be read, and the names of those that could not."""

    image: Tensor
    target: int
    valid: bool
    bad: tuple[str, ...]


def unnormalise(images: Tensor, config: DataConfig) -> Tensor:
    """Undo the normalisation of images (...,3,H,W) for pictures: values in [0, 1]."""
    mean, std = (torch.tensor(v, dtype=images.dtype, device=images.device) for v in (config.mean, config.std))
    return (images * std[:, None, None] + mean[:, None, None]).clamp(0, 1)


class ImageSet(Dataset[Sample]):
    """Decoded and transformed images of a source.

    It is indexed by an int or by (int, seed): the transform draws from the seed alone and leaves the global streams as
    they were. An unreadable image is replaced by the next readable one if `tries` > 1, else it is zeros, valid=False.

    Args:
        size: of the transformed images, in pixels.
        indices: images of the source that the set consists of.
        tries: images in a row that are tried.
    """

    def __init__(self, source: Source, transform: T.Compose, size: int, indices: range, tries: int = 1) -> None:
        self.source, self.transform, self.size, self.indices = source, transform, size, indices
        self.tries = min(tries, len(indices))
        self.targets = source.labels[indices.start : indices.stop : indices.step]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        index, seed = key if isinstance(key, tuple) else (key, 0)
        bad: list[str] = []
        for candidate in (i % len(self) for i in range(index, index + self.tries)):
            image = self.read(candidate)
            if image is not None:
                with seeded(seed):
                    return Sample(self.transform(image), int(self.targets[candidate]), True, tuple(bad))
            bad.append(self.name(candidate))
        return Sample(torch.zeros(3, self.size, self.size), int(self.targets[index]), False, tuple(bad))

    def read(self, index: int) -> Image.Image | None:
        """Decode an image to RGB without any transform; None if it is unreadable."""
        try:
            return self.source.read(self.indices[index])
        except Exception:  # decoders fed with arbitrary bytes raise anything: SyntaxError, struct.error, KeyError, ...
            return None

    def name(self, index: int) -> str:
        """Return the file name of an image, fit for one line of a log."""
        return "".join(c if c.isprintable() else "?" for c in self.source.name(self.indices[index]))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the random streams of Python, NumPy and torch's CPU inside a block and restore them after.

    torch.manual_seed is avoided: it would also reseed the accelerator that is training meanwhile.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def build_transform(args: Namespace, config: DataConfig, train: bool, whole: bool = False) -> T.Compose:
    """Build DeiT's or DeiT-III's training transform, or that of evaluation.

    Args:
        whole: keep the whole image in view, shifted by up to half a pixel of an 8x8 digit. Inputs of 32 pixels and less
            are whole too, shifted by up to 4 pixels as in DeiT.

    Raises:
        UserError: timm does not know an augmentation.
    """
    if not train:
        return _eval_transform(config)
    if args.recover:
        return _recovery_transform(args, config)
    shift = math.ceil(config.input_size / 16) if whole else 4 if config.input_size <= WHOLE_PIXELS else None
    try:
        return _three_augment(args, config) if args.three_augment else _deit_transform(args, config, shift)
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        flags = f"--aa {args.aa} --train_interpolation {args.train_interpolation} --remode {args.remode}"
        raise UserError(f"timm refuses one of {flags} ({error}); --aa none --remode pixel are safe") from error


def _eval_transform(config: DataConfig) -> T.Compose:
    size = math.floor(config.input_size / config.crop_pct)
    resize = T.Resize(size, T.InterpolationMode(config.interpolation))
    return T.Compose([resize, T.CenterCrop(config.input_size), T.ToTensor(), T.Normalize(config.mean, config.std)])


def _recovery_transform(args: Namespace, config: DataConfig) -> T.Compose:
    """Build the transform of --recover: images as in an evaluation, but for the place of the crop and a flip.

    What the merged model is to recover is what the unmerged one says of ordinary images.
    """
    resize, _, *rest = _eval_transform(config).transforms
    return T.Compose([resize, T.RandomCrop(config.input_size), T.RandomHorizontalFlip(args.hflip), *rest])


def _deit_transform(args: Namespace, config: DataConfig, shift: int | None) -> T.Compose:
    size = config.input_size
    transform = create_transform(
        input_size=size,
        is_training=True,
        hflip=args.hflip,
        color_jitter=args.color_jitter,
        auto_augment=None if args.aa in (None, "", "none") else args.aa,
        interpolation=args.train_interpolation,
        mean=config.mean,
        std=config.std,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
    )
    if shift is not None:
        crop = [T.Resize(size, T.InterpolationMode.BICUBIC), T.RandomCrop(size, padding=shift)]
        transform.transforms[:1] = crop
    return transform


def _three_augment(args: Namespace, config: DataConfig) -> T.Compose:
    """Build DeiT-III's 3-Augment (arXiv 2204.07118): crop, flip, one of gray / solarize / blur, jitter; no erasing."""
    size = config.input_size
    if args.src:
        crop = [
            T.Resize(size, T.InterpolationMode.BICUBIC),
            T.RandomCrop(size, padding=4, padding_mode="reflect"),
        ]
    else:
        crop = [RandomResizedCropAndInterpolation(size, scale=(0.08, 1.0), interpolation=args.train_interpolation)]
    jitter = [T.ColorJitter(*(args.color_jitter,) * 3)] if args.color_jitter else []
    one_of = T.RandomChoice([T.Grayscale(3), T.RandomSolarize(128, p=1.0), RandomBlur()])
    final = [T.ToTensor(), T.Normalize(config.mean, config.std)]
    return T.Compose([*crop, T.RandomHorizontalFlip(args.hflip), one_of, *jitter, *final])


class RandomBlur:
    """Gaussian blur of a PIL image with a radius drawn from [0.1, 2] pixels."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


@dataclass(frozen=True)
class Data:
    """The two splits of a data set.

    Attributes:
        class_names: as files give them: names of folders, digits, ...
        config: the preprocessing in use.
        notes: lines worth printing once.
        class_labels: the classes in words, where the names are codes.
    """

    train: ImageSet | None
    val: ImageSet
    num_classes: int
    class_names: tuple[str, ...]
    name: str
    config: DataConfig
    notes: tuple[str, ...] = ()
    class_labels: tuple[str, ...] = ()


def with_own_preprocessing(config: DataConfig, dataset: str) -> DataConfig:
    """Return a model's preprocessing as changed by a data set for which no weights are published: mean, std, crop."""
    info = DATASETS[dataset]
    if info.normalisation is not None:
        config = replace(config, mean=info.normalisation[0], std=info.normalisation[1])
    return replace(config, crop_pct=1.0) if info.whole else config


def with_classes(data: Data, names: Sequence[str]) -> Data:
    """Number the labels of the validation split as `names` does, which hold all classes of the data and more."""
    numbers = np.array([names.index(name) for name in data.class_names])
    val = copy(data.val)
    val.targets = numbers[data.val.targets]
    absent = len(names) - len(data.class_names)
    note = f"{absent} of the checkpoint's {len(names)} classes are not in the data"
    notes = (*data.notes, note) if absent else data.notes
    labels = readable_names(names)
    return replace(data, val=val, notes=notes, class_names=tuple(names), class_labels=labels, num_classes=len(names))


def build_data(args: Namespace, config: DataConfig) -> Data:
    """Open the data set of the command line; `train` is None with --eval.

    Raises:
        UserError: the data set is missing, odd or empty.
    """
    whole = DATASETS[args.dataset].whole
    splits = open_splits(args, config.input_size)
    train = None
    if splits.train is not None:
        transform = build_transform(args, config, train=True, whole=whole)
        indices = _limited(splits.train, "train", args)
        train = ImageSet(splits.train, transform, config.input_size, indices, MAX_TRIES)
    transform = build_transform(args, config, train=False)
    val = ImageSet(splits.val, transform, config.input_size, _limited(splits.val, "val", args))
    names, notes = splits.class_names, splits.notes
    if len(names) == 1:
        notes = (*notes, f"there is only one class, {names[0]}: every answer is right, and nothing can be learned")
    labels = splits.class_labels or readable_names(names)
    return Data(train, val, len(names), names, args.dataset, config, notes, labels)


def open_images(places: Sequence[str | Path], args: Namespace, config: DataConfig, flag: str = "--images") -> ImageSet:
    """Open the images that files, folders and patterns name, with evaluation's transform; their labels are all 0.

    Raises:
        UserError: a place that does not exist, or nothing that holds an image; names `flag`.
    """
    files = find_images(places, flag)
    source = FileSource("", files, [0] * len(files))
    return ImageSet(
        source, build_transform(args, config, train=False), config.input_size, _every(len(files), args.limit)
    )


def readable_samples(images: ImageSet, indices: Sequence[int]) -> list[tuple[int, Sample]]:
    """Read some images, with their indices; unreadable ones are named and left out.

    Raises:
        UserError: none of them can be read.
    """
    samples = [(index, images[index]) for index in indices]
    for _, sample in samples:
        for name in sample.bad:
            log(f"unreadable, left out: {name}")
    readable = [(index, sample) for index, sample in samples if sample.valid]
    if not readable:
        raise UserError(f"none of the {len(samples)} images can be read; the first is {images.name(samples[0][0])}")
    return readable


def _limited(source: Source, split: str, args: Namespace) -> range:
    """Return the indices of a split: with --limit N, every ceil(len/N)-th, so that all classes keep their share."""
    n = len(source.labels)
    if n == 0:
        raise missing_data(args, f"the {split} split of {data_root(args)} has no image")
    return _every(n, args.limit)


def _every(n: int, limit: int | None) -> range:
    return range(0, n, math.ceil(n / limit) if limit else 1)


def fit_batch(args: Namespace, images: int, world: int) -> tuple[Namespace, str | None]:
    """Make an update no larger than the training set, for it would only see the same images several times.

    Micro-steps go first, which changes nothing but the size of the global batch, then the batch of each process. It
    stays even where it was: mixup pairs the images of a batch.

    Returns:
        The arguments, with other accumulation_steps and batch_size where they had to change, and a line that says so.

    Raises:
        UserError: there are not even as many images as processes.
    """
    asked = args.batch_size * args.accumulation_steps * world
    if asked <= images:
        return args, None
    micro_steps = max(1, images // (args.batch_size * world))
    even = 1 if args.batch_size % 2 else 2
    batch_size = min(args.batch_size, max(even, images // world // even * even))
    if world > 1 and batch_size * world > images:
        raise UserError(
            f"{world} processes with at least {batch_size} images each are too many for {images} training images; "
            f"start at most {max(1, images // even)}"
        )
    total = batch_size * micro_steps * world
    changed = f"--batch_size {args.batch_size} x --accumulation_steps {args.accumulation_steps}"
    line = (
        f"a global batch of {asked} ({changed} x {world} processes) is larger than the {images} training images: it "
        f"becomes {total} ({batch_size} x {micro_steps} x {world}), and so does what lr is scaled with"
    )
    return Namespace(**{**vars(args), "batch_size": batch_size, "accumulation_steps": micro_steps}), line


class GlobalBatches(Sampler[list[tuple[int, int]]]):
    """Micro-batches of (index, seed) of one rank, from one order of the whole epoch.

    A global batch is `batch_size * accumulation * world` consecutive positions of the order, its micro-step k is
    `batch_size * world` consecutive ones of it, dealt to the ranks in turn. With 2 ranks, batches of 2, 2 micro-steps:

        position   0 1 2 3 | 4 5 6 7 || 8 9 ...
        rank       0 1 0 1 | 0 1 0 1 || 0 1 ...
        micro-step    0    |    1    ||  next update

    So n ranks x batch b x accumulation k see what one process with a batch of n * b * k sees.

    An epoch of n images is n // global batch updates, as in DeiT. Its samples are as many images as fit, each once, or
    3 times under repeated augmentation (by default that of sets of 10,000 images and more): the copies follow each
    other in the order, so that they meet in one batch, on different ranks, as in DeiT's RASampler. No epoch holds all
    images then: without repeats the rest of n / global batch stays out, with repeats two thirds. The epochs take turns:

        turns = n / (images of an epoch), rounded      3 with repeats; else 1, or 2 where half of the images fit
        cycle = epoch // turns                         in a cycle every image occurs once, but for the rounding

    The images of cycle c are positions [c * s, (c + 1) * s) of one endless repetition of a fixed random order, where
    s = turns * images of an epoch. What one cycle leaves out comes in the next one, and after any number of cycles no
    image is ahead of another by more than one occurrence. Inside a cycle the images are shuffled anew and dealt to its
    epochs. All this follows from (seed, epoch): a run can go on at any position without knowing the epochs before.
    DeiT draws a third anew in each epoch: that is as fair on average, but after 9 epochs 2.6 % of the images have not
    been seen.
    """

    def __init__(self, n: int, args: Namespace, rank: int, world: int) -> None:
        repeated = n >= MANY_IMAGES if args.repeated_aug is None else args.repeated_aug
        self.n, self.seed, self.repeats = n, args.seed, REPEATS if repeated else 1
        self.batch_size, self.rank, self.world = args.batch_size, rank, world
        self.updates = max(1, n // (args.batch_size * args.accumulation_steps * world))
        self.steps = self.updates * args.accumulation_steps
        self.samples = self.steps * args.batch_size * world
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self._batches(self.epoch, self.start)

    @property
    def turns(self) -> int:
        """How many epochs see all images; 1 where each does."""
        part = -(-self.samples // self.repeats) % self.n
        return round(self.n / part) if part and -(-self.samples // self.repeats) < self.n else 1

    def order(self, epoch: int) -> np.ndarray:
        """Return the indices of an epoch in global order, as many as its steps need over all ranks."""
        passes, part = divmod(-(-self.samples // self.repeats), self.n)
        whole = [self._shuffled(np.arange(self.n), epoch, i) for i in range(passes)]  # of a set smaller than a batch
        images = np.concatenate([*whole, self._share(epoch, part)])
        return images.repeat(self.repeats)[: self.samples]

    def _share(self, epoch: int, size: int) -> np.ndarray:
        """Return the turn of an epoch: `size` different images, fewer than there are."""
        if size == 0:
            return np.arange(0)
        turns = round(self.n / size)
        cycle, turn = divmod(epoch, turns)
        span = turns * size
        fixed = self._shuffled(np.arange(self.n))
        images = fixed[(cycle * span + np.arange(span)) % self.n]
        # rounded up, the last few are the first few again: these stay in the last epoch and the first
        twice = max(0, span - self.n)
        images[twice : span - twice] = self._shuffled(images[twice : span - twice], cycle, -1)
        return self._shuffled(images[turn * size : (turn + 1) * size], epoch, -2)

    def _shuffled(self, values: np.ndarray, *key: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, *key))
        return values[torch.randperm(len(values), generator=generator).numpy()]

    def _batches(self, epoch: int, start: int) -> Iterator[list[tuple[int, int]]]:
        order, width = self.order(epoch), self.batch_size * self.world
        for step in range(start, self.steps):
            positions = range(step * width + self.rank, (step + 1) * width, self.world)
            yield [(int(order[i]), mix_seed(self.seed, epoch, i)) for i in positions]


class LoaderFailure(RunError):
    """The loading of data failed: a worker died, no batch came in time, or the shared memory is full.

    It is raised between two batches, so that a run may save what it has.
    """


class WorkerFeed:
    """The batches of a DataLoader, whose failures become a `LoaderFailure` of one line.

    torch raises an error for a dead worker out of a signal handler, wherever the program happens to be, also in the
    middle of an update. Here that handler is active only while a batch is waited for.
    """

    def __init__(self, loader: DataLoader[Sample]) -> None:
        self.loader = loader
        self.workers: list[BaseProcess] = []

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        before = set(multiprocessing.active_children())
        with self._guarded():
            batches = iter(self.loader)
        started = [child for child in multiprocessing.active_children() if child not in before]
        self.workers = started or self.workers  # persistent ones were started by an earlier epoch
        while True:
            with self._guarded():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch._replace(bad=tuple(batch.bad))  # pinning makes lists of tuples

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Watch over the workers while a batch is waited for, and word what goes wrong."""
        if not self.loader.num_workers:
            yield
            return
        in_main = threading.current_thread() is threading.main_thread()  # signals are heard nowhere else
        previous = signal.getsignal(signal.SIGCHLD)
        if in_main:
            signal.signal(signal.SIGCHLD, lambda *_: self._check_workers())
        try:
            self._check_workers()  # one may have died since the last batch
            yield
        except (RuntimeError, OSError, EOFError, MemoryError) as error:
            self._fail(error)
        finally:
            if in_main:
                signal.signal(signal.SIGCHLD, previous or signal.SIG_DFL)

    def _check_workers(self) -> None:
        for worker in self.workers:
            if worker.exitcode:
                raise LoaderFailure(death_of_a_worker(worker.pid, worker.exitcode))

    def _fail(self, error: Exception) -> NoReturn:
        """Raise a LoaderFailure for an error whose cause is known, else the error; the workers are not waited for."""
        if isinstance(error, (ConnectionError, EOFError, FileNotFoundError)):  # its images are fetched from a worker
            for worker in self.workers:
                worker.join(0.1)  # which may still be about to end
        codes = [(worker.pid, worker.exitcode) for worker in self.workers if worker.exitcode]
        for worker in self.workers:
            worker.kill()  # a stuck one would not hear any other signal
        if isinstance(error, LoaderFailure):
            raise error
        text = str(error)
        if codes and "Caught" not in text:  # an error inside a worker comes with this word, and tells more
            raise LoaderFailure(death_of_a_worker(*codes[0])) from error
        for pattern, words in _LOADER_FAILURES:
            if re.search(pattern, f"{type(error).__name__}: {text}"):
                raise LoaderFailure(words.format(timeout=self.loader.timeout)) from error
        raise error


_FULL = (
    "the shared memory (/dev/shm) through which data loader workers hand over images is full; --num_workers 0 does "
    "without it, a smaller --batch_size or --num_workers needs less, and a container gets more by --shm-size=8g"
)
_LOADER_FAILURES = (  # of torch's and the system's words
    (r"No space left on device|unable to (write|open|mmap|allocate).*(shm|torch_)|Bus error", _FULL),
    (
        r"timed out after",
        "no batch of images came for {timeout:g} s (--loader_timeout): the file system hangs or is too slow; see that "
        "the data can be read, or give a larger --loader_timeout (0: wait for ever)",
    ),
    (
        r"Too many open files|ancdata",
        "the data loader ran out of file handles; raise the limit (ulimit -n 65536) or lower --num_workers",
    ),
    (
        r"MemoryError|Cannot allocate memory|Resource temporarily unavailable",
        "there is not enough memory for the data loader workers; lower --num_workers or --batch_size",
    ),
)


def death_of_a_worker(pid: int | None, code: int) -> str:
    """Word how a worker ended, from its exit code (negative: a signal), with the likely cause and what to do."""
    if code == -signal.SIGBUS:
        return _FULL
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    if code == -signal.SIGKILL:
        why = "the machine or the job is probably out of memory; lower --num_workers or --batch_size"
    elif code < 0 and -code not in (signal.SIGTERM, signal.SIGALRM):
        why = "a decoder of images may have crashed; --num_workers 0 reads in the main process, where it can be seen"
    else:
        why = "somebody ended it; start again"
    return f"data loader worker {pid} {how}: {why}"


class TrainLoader:
    """Micro-batches of one rank; the same workers serve every epoch."""

    def __init__(self, batches: GlobalBatches, loader: DataLoader[Sample]) -> None:
        self.batches, self.feed = batches, WorkerFeed(loader)

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def updates(self) -> int:
        """Updates of an epoch."""
        return self.batches.updates

    def describe(self) -> str:
        """Say in one line what an epoch is."""
        b = self.batches
        text = f"an epoch is {b.updates} update{'s' * (b.updates > 1)} of {b.samples // b.updates} images"
        images = min(b.n, -(-b.samples // b.repeats))
        if images < b.n:
            text += f": {images} of {b.n}" + (f", {b.repeats} augmented copies of each" if b.repeats > 1 else "")
            text += f"; {b.turns} epochs see all of them" if b.turns > 1 else "; the others come in the next"
        return text

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from micro-batch `start` on; those before it are not decoded.

        Raises:
            LoaderFailure: a worker died or hangs, or its memory is full.
            RunError: nothing can be read.
        """
        self.batches.epoch, self.batches.start = epoch, start
        for batch in self.feed:
            if not batch.valid.all():
                raise RunError(f"no readable image in the row that ends at {batch.bad[-1]}; repair or remove them")
            yield batch


class EvalLoader:
    """Every `world`-th image from `rank` on, each once, none padded."""

    def __init__(self, loader: DataLoader[Sample]) -> None:
        self.feed = WorkerFeed(loader)

    def __len__(self) -> int:
        return len(self.feed)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches; raises LoaderFailure where a worker died or hangs, or its memory is full."""
        return iter(self.feed)


def build_train_loader(args: Namespace, data: Data, rank: int, world: int) -> TrainLoader:
    """Build the training loader; its length is a multiple of args.accumulation_steps."""
    assert data.train is not None, "a training loader needs a training set"
    batches = GlobalBatches(len(data.train), args, rank, world)
    return TrainLoader(batches, _loader(args, data.train, batches, persistent=True))


def build_eval_loader(args: Namespace, dataset: ImageSet, rank: int, world: int) -> EvalLoader:
    """Build an evaluation loader, possibly of no batch at all for a rank of a tiny set."""
    indices = range(rank, len(dataset), world)
    batches = [list(indices[i : i + args.batch_size]) for i in range(0, len(indices), args.batch_size)]
    return EvalLoader(_loader(args, dataset, batches, persistent=False))


def bad_image_limit(args: Namespace, data: Data) -> int:
    """Return how many images may be unreadable: --max_bad_images, or 0.1 % of the set in use and at least 10."""
    if args.max_bad_images is not None:
        return args.max_bad_images
    return max(10, len(data.val if data.train is None else data.train) // 1000)


def _loader(args: Namespace, dataset: ImageSet, batches: Any, persistent: bool) -> DataLoader[Sample]:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    workers = min(number_of_workers(args.num_workers, len(dataset)), len(batches))
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=args.pin_mem and torch.device(device).type == "cuda",
        worker_init_fn=_init_worker,
        persistent_workers=persistent and workers > 0,
        timeout=args.loader_timeout if workers else 0,
        generator=torch.Generator().manual_seed(0),  # else the loader draws from the global stream
    )


def number_of_workers(asked: int | None, images: int) -> int:
    """Return the number of loader processes: as asked for, else one for every 128 images up to DeiT's 10.

    There are never more than cores.
    """
    return min(_cores(), min(MAX_WORKERS, images // IMAGES_PER_WORKER) if asked is None else asked)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def collate(samples: list[Sample]) -> Batch:
    """Stack samples into a Batch."""
    images = torch.utils.data.default_collate([s.image for s in samples])  # in a worker: straight into shared memory
    targets = torch.tensor([s.target for s in samples])
    valid = torch.tensor([s.valid for s in samples])
    if get_worker_info() is not None:  # else they are moved by a thread of torch's, which loses the batch if that fails
        targets, valid = targets.share_memory_(), valid.share_memory_()
    return Batch(images, targets, valid, tuple(name for s in samples for name in s.bad))


def _init_worker(_: int) -> None:
    """Give a worker one thread, and let it outlive signals to its process group while the trainer still saves."""
    torch.set_num_threads(1)
    # a batch's own errors go to the main process; this is for threads that hand over images to one that is gone
    sys.excepthook = lambda *_: None
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE))
