"""Data sets, transforms, samplers and loaders.

Shapes: B batch, H and W image. A *source* knows files and labels, an `ImageSet` adds decoding and transforms, a loader
adds order. The order of an epoch is a function of (seed, epoch), the augmentation of a sample of (seed, epoch, position
in that order): worker count, prefetching, resuming and world size do not change what is trained on.
"""

import math
import os
import random
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms as T

from datasets_sources import SOURCES, Source, data_root, missing_data, open_splits
from models.errors import UserError
from utils import RunError, mix_seed

RECIPES: dict[str, dict[str, Any]] = {"DIGITS": {}}
DIGITS_MEAN, DIGITS_STD = (0.3097,) * 3, (0.3490,) * 3  # of its training images at 32 pixels
MAX_TRIES = 100  # unreadable images in a row before training stops
REPEATS = 3  # copies of an image under repeated augmentation, as in DeiT
WORKER_GRACE = 60  # seconds a worker outlives SIGTERM


class Batch(NamedTuple):
    """What a loader yields.

    images (B,3,H,W) float32 normalised; targets (B,) int64; valid (B,) bool, False where an image of an evaluation set
    was unreadable (zeros, to be counted as wrong); bad: names of the unreadable images met on the way.
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
    """One image (3,H,W), its class, whether it could be read, and the names of those that could not."""

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

    Indexed by an int or by (int, seed): the transform draws from the seed alone and leaves the global streams as they
    were. An unreadable image is replaced by the next readable one if `tries` > 1, else it is zeros with valid=False.
    """

    def __init__(self, source: Source, transform: T.Compose, size: int, keep: range, tries: int = 1) -> None:
        self.source, self.transform, self.size, self.keep = source, transform, size, keep
        self.tries = min(tries, len(keep))
        self.targets = source.labels[keep.start : keep.stop : keep.step]

    def __len__(self) -> int:
        return len(self.keep)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        index, seed = key if isinstance(key, tuple) else (key, 0)
        bad: list[str] = []
        for place in (i % len(self) for i in range(index, index + self.tries)):
            image = self.read(place)
            if image is not None:
                with seeded(seed):
                    return Sample(self.transform(image), int(self.targets[place]), True, tuple(bad))
            bad.append(self.name(place))
        return Sample(torch.zeros(3, self.size, self.size), int(self.targets[index]), False, tuple(bad))

    def read(self, index: int) -> Image.Image | None:
        """Decode an image to RGB without any transform; None if it is unreadable."""
        try:
            return self.source.read(self.keep[index])
        except Exception:  # decoders fed with arbitrary bytes raise anything: SyntaxError, struct.error, KeyError, ...
            return None

    def name(self, index: int) -> str:
        """File name of an image, fit for one line of a log."""
        return "".join(c if c.isprintable() else "?" for c in self.source.name(self.keep[index]))


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

    `whole` keeps the whole image in view (DIGITS), which inputs of 32 pixels and less always do, as in DeiT.
    """
    whole = whole or config.input_size <= 32
    if not train:
        return _eval_transform(config, whole)
    if args.src and not args.three_augment:
        raise UserError("--src does nothing without --three_augment; give both or neither")
    try:
        return _three_augment(args, config) if args.three_augment else _deit_transform(args, config, whole)
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        flags = f"--aa {args.aa} --train_interpolation {args.train_interpolation} --remode {args.remode}"
        raise UserError(f"timm refuses one of {flags} ({error}); --aa none --remode pixel are safe") from error


def _eval_transform(config: DataConfig, whole: bool) -> T.Compose:
    if not 0 < config.crop_pct <= 1:
        raise UserError(f"--eval_crop_ratio must lie in (0, 1], it is {config.crop_pct}")
    size = config.input_size if whole else math.floor(config.input_size / config.crop_pct)
    resize = T.Resize(size, T.InterpolationMode(config.interpolation))
    return T.Compose([resize, T.CenterCrop(config.input_size), T.ToTensor(), T.Normalize(config.mean, config.std)])


def _deit_transform(args: Namespace, config: DataConfig, whole: bool) -> T.Compose:
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
    if whole:
        crop = [T.Resize(size, T.InterpolationMode.BICUBIC), T.RandomCrop(size, padding=math.ceil(size / 8))]
        transform.transforms[:1] = crop
    return transform


def _three_augment(args: Namespace, config: DataConfig) -> T.Compose:
    """DeiT-III's 3-Augment (arXiv 2204.07118): crop, flip, one of gray / solarize / blur, colour jitter; no erasing."""
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
    """The two splits of a data set; `config` is the preprocessing in use, `notes` are lines worth printing once."""

    train: ImageSet | None
    val: ImageSet
    num_classes: int
    class_names: tuple[str, ...]
    name: str
    config: DataConfig
    notes: tuple[str, ...] = ()


def build_data(args: Namespace, config: DataConfig) -> Data:
    """Open the data set of the command line; `train` is None with --eval. A missing or odd one raises UserError."""
    if args.dataset not in SOURCES:
        raise UserError(f"unknown --dataset {args.dataset}; choose one of {', '.join(SOURCES)}")
    digits = args.dataset == "DIGITS"
    if digits:
        config = replace(config, mean=DIGITS_MEAN, std=DIGITS_STD)
    splits = open_splits(args, config.input_size)
    train = None
    if splits.train is not None:
        transform = build_transform(args, config, train=True, whole=digits)
        keep = _keep(splits.train, args.limit, "train", args)
        train = ImageSet(splits.train, transform, config.input_size, keep, MAX_TRIES)
    transform = build_transform(args, config, train=False, whole=digits)
    val = ImageSet(splits.val, transform, config.input_size, _keep(splits.val, args.limit, "val", args))
    names = splits.class_names
    return Data(train, val, len(names), names, args.dataset, config, splits.notes)


def _keep(source: Source, limit: int | None, split: str, args: Namespace) -> range:
    n = len(source.labels)
    if n == 0:
        raise missing_data(args, f"the {split} split of {data_root(args)} has no image")
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, it is {limit}")
    return range(0, n, math.ceil(n / limit) if limit else 1)


class GlobalBatches(Sampler[list[tuple[int, int]]]):
    """Micro-batches of (index, seed) of one rank, from one order of the whole epoch.

    A global batch is `batch_size * accumulation * world` consecutive places of the order, its micro-step k is
    `batch_size * world` consecutive ones of it, dealt to the ranks in turn. So n ranks x batch b x accumulation k see
    what one process with a batch of n * b * k sees, and repeated copies go to different ranks as in DeiT's RASampler.
    An incomplete last global batch is dropped; a set smaller than one is repeated to fill it.
    """

    def __init__(self, n: int, args: Namespace, rank: int, world: int) -> None:
        self.n, self.seed, self.repeats = n, args.seed, REPEATS if args.repeated_aug else 1
        self.batch_size, self.rank, self.world = args.batch_size, rank, world
        self.length = n // 256 * 256 if args.repeated_aug and n >= 256 else n
        micro_steps = args.accumulation_steps
        self.steps = max(1, self.length // (args.batch_size * micro_steps * world)) * micro_steps
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self._batches(self.epoch, self.start)

    def order(self, epoch: int) -> np.ndarray:
        """Indices of an epoch in global order, as many as its steps need over all ranks."""
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
        order = torch.randperm(self.n, generator=generator).numpy().repeat(self.repeats)[: self.length]
        return np.resize(order, self.steps * self.batch_size * self.world)  # cuts, or repeats a short one

    def _batches(self, epoch: int, start: int) -> Iterator[list[tuple[int, int]]]:
        order, width = self.order(epoch), self.batch_size * self.world
        for step in range(start, self.steps):
            places = range(step * width + self.rank, (step + 1) * width, self.world)
            yield [(int(order[place]), mix_seed(self.seed, epoch, place)) for place in places]


class TrainLoader:
    """Micro-batches of one rank; the same workers serve every epoch."""

    def __init__(self, batches: GlobalBatches, loader: DataLoader[Sample]) -> None:
        self.batches, self.loader = batches, loader

    def __len__(self) -> int:
        return len(self.batches)

    def iterate(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from micro-batch `start` on; those before it are not decoded."""
        self.batches.epoch, self.batches.start = epoch, start
        for batch in self.loader:
            if not batch.valid.all():
                raise RunError(f"no readable image in the row that ends at {batch.bad[-1]}; repair or remove them")
            yield batch._replace(bad=tuple(batch.bad))  # pinning makes lists of tuples


class EvalLoader:
    """Every `world`-th image from `rank` on, each once, none padded."""

    def __init__(self, loader: DataLoader[Sample]) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            yield batch._replace(bad=tuple(batch.bad))


def build_train_loader(args: Namespace, data: Data, rank: int, world: int) -> TrainLoader:
    """Build the training loader; its length is a multiple of args.accumulation_steps."""
    assert data.train is not None, "a training loader needs a training set"
    _check_sizes(args)
    batches = GlobalBatches(len(data.train), args, rank, world)
    return TrainLoader(batches, _loader(args, data.train, batches, persistent=True))


def build_eval_loader(args: Namespace, dataset: ImageSet, rank: int, world: int) -> EvalLoader:
    """Build an evaluation loader, possibly of no batch at all for a rank of a tiny set."""
    _check_sizes(args)
    places = range(rank, len(dataset), world)
    batches = [list(places[i : i + args.batch_size]) for i in range(0, len(places), args.batch_size)]
    return EvalLoader(_loader(args, dataset, batches, persistent=False))


def bad_image_limit(args: Namespace, data: Data) -> int:
    """How many images may be unreadable: --max_bad_images, or 0.1 % of the set in use and at least 10."""
    if args.max_bad_images is not None:
        return args.max_bad_images
    return max(10, len(data.val if data.train is None else data.train) // 1000)


def _check_sizes(args: Namespace) -> None:
    for name, least in (("batch_size", 1), ("accumulation_steps", 1), ("num_workers", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} must be at least {least}, it is {getattr(args, name)}")


def _loader(args: Namespace, dataset: ImageSet, batches: Any, persistent: bool) -> DataLoader[Sample]:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    workers = min(args.num_workers, _cores(), len(batches))
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=args.pin_mem and torch.device(device).type == "cuda",
        worker_init_fn=_init_worker,
        persistent_workers=persistent and workers > 0,
        generator=torch.Generator().manual_seed(0),  # else the loader draws from the global stream
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def collate(samples: list[Sample]) -> Batch:
    """Stack samples into a Batch."""
    images = torch.utils.data.default_collate([s.image for s in samples])  # in a worker: straight into shared memory
    targets = torch.tensor([s.target for s in samples])
    valid = torch.tensor([s.valid for s in samples])
    return Batch(images, targets, valid, tuple(name for s in samples for name in s.bad))


def _init_worker(_: int) -> None:
    """One thread per worker, and signals for the whole process group do not end it while the trainer still saves."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE))
