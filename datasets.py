"""Data sets, transforms, samplers and loaders.

A *source* knows files and labels, an `ImageSet` adds decoding and transforms, a loader adds order. The order of an
epoch is a function of (seed, epoch), the augmentation of a sample one of (seed, epoch, position in that order): worker
count, prefetching, resuming and world size do not change what is trained on. Shapes: B batch, H and W image.

A new data set is a function that opens its splits, and a row of `DATASETS`.
"""

import fcntl
import glob
import io
import itertools
import math
import os
import random
import re
import signal
import socket
import sys
import tarfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageFilter
from timm.data import ImageNetInfo, create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import datasets as tv
from torchvision import transforms as T
from torchvision.datasets.folder import IMG_EXTENSIONS

from models.errors import UserError
from utils import RunError, mix_seed

# defaults of main.py's arguments that a data set replaces
RECIPES: dict[str, dict[str, Any]] = {
    "DIGITS": {
        "model": "deit_digits",
        "input_size": 32,
        "num_workers": 0,
        "epochs": 15,
        "batch_size": 8,  # many small steps: its tiny position embedding starts far below the patches and has to grow
        "lr": 0.032,  # 5e-4 after scaling by batch / 512
        "warmup_epochs": 3,
        "drop_path": 0.0,
        "clip_grad": 1.0,
        "model_ema_decay": 0.995,
        "mixup": 0.0,
        "cutmix": 0.0,
        "hflip": 0.0,
        "color_jitter": 0.0,
        "aa": "none",
        "reprob": 0.0,
        "repeated_aug": False,
    }
}
DIGITS_MEAN, DIGITS_STD = (0.3097,) * 3, (0.3490,) * 3  # of its training images at 32 pixels
WHOLE_PIXELS = 32  # inputs up to this size show the whole image, without a crop
MAX_TRIES = 100  # unreadable images in a row before training stops
REPEATS = 3  # copies of an image under repeated augmentation, as in DeiT
WORKER_GRACE = 60  # seconds a worker outlives SIGTERM

# Sources: where images and labels come from

MAX_ASPECT = 16  # longer images are cropped to this before resizing: 1 x 100000 would become gigabytes


class Source(Protocol):
    """Labelled images by index; `read` raises whatever the file system or a decoder raises."""

    labels: np.ndarray

    def read(self, index: int) -> Image.Image: ...
    def name(self, index: int) -> str: ...


class Splits(NamedTuple):
    """Sources of a data set and its class names; train is None where only an evaluation is asked for."""

    train: Source | None
    val: Source
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def decode(stream: BinaryIO) -> Image.Image:
    """Decode an image file completely to 8-bit RGB."""
    with Image.open(stream) as image:
        return _limit_aspect(to_rgb(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL mode to RGB: 16 bits are scaled to 8, transparency is laid on white."""
    if image.mode.startswith("I"):  # 16-bit grey, which PIL's own conversion would clip at 255
        grey = np.clip(np.asarray(image), 0, 65535).astype(np.uint16) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _limit_aspect(image: Image.Image) -> Image.Image:
    width, height = image.size
    w, h = min(width, MAX_ASPECT * height), min(height, MAX_ASPECT * width)
    if (w, h) == (width, height):
        return image
    left, top = (width - w) // 2, (height - h) // 2
    return image.crop((left, top, left + w, top + h))


class FileSource:
    """Image files below a folder.

    Their names are kept in one array: a list of a million strings would be copied into every worker, because counting
    references to its items writes to the memory that forked processes share.
    """

    def __init__(self, root: Path, files: list[str], labels: list[int]) -> None:
        self.root = root
        self.files = np.array([os.fsencode(f) for f in files], dtype=np.bytes_)
        self.labels = np.array(labels, dtype=np.int64)

    def read(self, index: int) -> Image.Image:
        with open(self._path(index), "rb") as stream:
            return decode(stream)

    def name(self, index: int) -> str:
        return self._path(index)

    def _path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.files[index]))


class ArraySource:
    """Images in memory (n,H,W) or (n,H,W,3) uint8, upscaled to `size` if given."""

    def __init__(self, images: np.ndarray, labels: Iterable[int], label: str, size: int | None = None) -> None:
        self.images, self.label, self.size = images, label, size
        self.labels = np.asarray(labels, dtype=np.int64)

    def read(self, index: int) -> Image.Image:
        image = Image.fromarray(self.images[index]).convert("RGB")
        return image.resize((self.size, self.size), Image.Resampling.BICUBIC) if self.size else image

    def name(self, index: int) -> str:
        return f"{self.label} image {index}"


class TarSource:
    """Images in webdataset shards, read at random through an index of the tar members.

    The index makes shards a map-style set, so order, exact resume and exact evaluation are those of every other set,
    and the webdataset package is not needed. Building it reads every tar header once: minutes for a million images.
    """

    def __init__(self, shards: list[str]) -> None:
        rows = [(s, *row) for s, shard in enumerate(shards) for row in index_shard(shard)]
        self.shards = shards
        self.keys = np.array([os.fsencode(row[1]) for row in rows], dtype=np.bytes_)
        self.spans = np.array([(s, offset, size) for s, _, offset, size, _ in rows], dtype=np.int64).reshape(-1, 3)
        self.labels = np.array([row[4] for row in rows], dtype=np.int64)

    def read(self, index: int) -> Image.Image:
        shard, offset, size = self.spans[index].tolist()
        with open(self.shards[shard], "rb") as stream:
            stream.seek(offset)
            return decode(io.BytesIO(stream.read(size)))

    def name(self, index: int) -> str:
        return f"{self.shards[self.spans[index, 0]]}:{os.fsdecode(self.keys[index])}"


def index_shard(path: str) -> list[tuple[str, int, int, int]]:
    """List (key, offset in bytes, size in bytes, label) for the samples of one webdataset shard.

    Members of one sample follow each other and share the name up to its first dot: an image (jpg, jpeg, png, ...) and
    `cls`, the label in digits. A torn or foreign shard raises UserError.
    """
    rows = []
    for key, group in itertools.groupby(_tar_members(path), key=lambda member: member.key):
        parts = {member.extension: member for member in group}
        image = next((part for extension, part in parts.items() if f".{extension}" in IMG_EXTENSIONS), None)
        label = parts.get("cls")
        if image is None and label is None:
            continue  # nothing of ours, such as a lone json
        if image is None or label is None:
            raise UserError(f"sample {key} of {path} lacks its {'image' if image is None else 'cls'} member")
        if not label.text.strip().isdigit():
            raise UserError(f"sample {key} of {path}: cls must be a class index in digits, it is {label.text[:20]!r}")
        rows.append((key, image.offset, image.size, int(label.text)))
    return rows


class Member(NamedTuple):
    """A file in a tar: its sample and extension, where its bytes lie, and its content if it is a label."""

    key: str
    extension: str
    offset: int
    size: int
    text: bytes


def _tar_members(path: str) -> Iterator[Member]:
    try:
        with open(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                handle = tar.extractfile(member) if extension.lower() == "cls" else None
                key = f"{folder}/{stem}" if folder else stem
                text = handle.read() if handle else b""
                yield Member(key, extension.lower(), member.offset_data, member.size, text)
            stream.seek(tar.offset)
            if stream.read(512) != bytes(512):  # tarfile takes a torn header for the end
                raise tarfile.ReadError("no end mark")
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"shard {path} is torn or not an uncompressed tar ({error}); fetch or write it again"
        ) from error


def open_splits(args: Namespace, size: int) -> Splits:
    """Open the sources of --dataset for images of `size` pixels.

    Raises:
        UserError: data that is missing, with the tree that is expected, or odd.
    """
    root = data_root(args)
    try:
        return DATASETS[args.dataset].open(args, root, size)
    except OSError as error:
        raise missing_data(args, f"{error.filename or root} cannot be read ({error.strerror or error})") from error


def data_root(args: Namespace) -> Path:
    """Return the folder (or shard pattern) of the data: --data_path or data/<dataset>."""
    return Path(args.data_path).expanduser() if args.data_path else Path("data") / args.dataset


def missing_data(args: Namespace, what: str) -> UserError:
    """Word what is wrong with the data, the tree that is expected and where to get it, in one line."""
    dataset = DATASETS[args.dataset]
    expected = dataset.tree.format(data_root(args))
    return UserError(f"data not found: {what}; expected {expected}; {dataset.get}, or --dataset DIGITS needs no files")


def _refuse_file(args: Namespace, root: Path) -> None:
    if root.exists() and not root.is_dir():
        raise missing_data(args, f"{root} is not a folder")


def _digits(args: Namespace, root: Path, size: int) -> Splits:
    """Split load_digits in a fixed, stratified way: every fifth image in order of class is for validation."""
    from sklearn.datasets import load_digits  # only this set needs scikit-learn

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    order = np.argsort(digits.target, kind="stable")
    chosen = np.zeros(len(order), dtype=bool)
    chosen[order[::5]] = True
    train, val = (ArraySource(images[m], digits.target[m], "DIGITS", size) for m in (~chosen, chosen))
    return Splits(None if args.eval else train, val, tuple(str(i) for i in range(10)))


def _cifar(args: Namespace, root: Path, size: int) -> Splits:
    _refuse_file(args, root)
    cls = tv.CIFAR10 if args.dataset == "CIFAR10" else tv.CIFAR100
    val = _fetch(args, cls, root, train=False)
    train = None if args.eval else _fetch(args, cls, root, train=True)
    train_source = train and ArraySource(train.data, train.targets, f"{args.dataset} train")
    return Splits(train_source, ArraySource(val.data, val.targets, f"{args.dataset} val"), tuple(val.classes))


def _flowers(args: Namespace, root: Path, size: int) -> Splits:
    """Open Oxford's flowers by the usual transfer protocol: trained on train + val (2040), evaluated on test (6149)."""
    _refuse_file(args, root)

    def source(*names: str) -> FileSource:  # reads files itself: torchvision would not say which one is bad
        parts = [_fetch(args, tv.Flowers102, root, split=name) for name in names]
        files = [os.path.relpath(file, root) for part in parts for file in part._image_files]
        return FileSource(root, files, [label for part in parts for label in part._labels])

    return Splits(None if args.eval else source("train", "val"), source("test"), tuple(str(i + 1) for i in range(102)))


def _fetch(args: Namespace, cls: type, root: Path, **split: Any) -> Any:
    """Open a torchvision set, downloading it if it is absent: one process at a time, giving up on a dead wire."""
    try:
        return cls(root, **split)
    except RuntimeError:  # how torchvision says absent or damaged
        pass
    timeout = socket.getdefaulttimeout()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with open(root / ".download.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            socket.setdefaulttimeout(20)
            return cls(root, download=True, **split)
    except (RuntimeError, OSError, EOFError, tarfile.TarError) as error:
        reason = " ".join(str(error).split())
        raise missing_data(args, f"absent or damaged in {root}, and the download failed ({reason})") from error
    finally:
        socket.setdefaulttimeout(timeout)


def _tree(args: Namespace, root: Path, size: int) -> Splits:
    """Read DATA/{train,val}/CLASS/*; the classes are ImageNet's 1000, or the folders of train, or else of val."""
    _refuse_file(args, root)
    if not root.exists():
        raise missing_data(args, f"{root} does not exist")
    needed = ("val",) if args.eval else ("train", "val")
    for split in needed:
        if not (root / split).is_dir():
            raise missing_data(args, f"{root / split} does not exist")
    folders = {s: _class_folders(root / s) for s in ("train", "val") if (root / s).is_dir()}
    imnet = args.dataset == "IMNET"
    names = ImageNetInfo().label_names() if imnet else folders.get("train") or folders["val"]
    index = {name: i for i, name in enumerate(names)}
    notes: list[str] = []
    for split in needed:
        if not folders[split]:
            raise missing_data(args, f"{root / split} has no class folder")
        for name in folders[split]:
            if name not in index:
                raise UserError(_unknown_class(root, split, name, imnet))
        notes += _absent_classes(root / split, names, set(folders[split]))
    train, val = (_read_split(root / s, folders[s], index) if s in needed else None for s in ("train", "val"))
    assert val is not None
    return Splits(train, val, tuple(names), tuple(notes))


def _absent_classes(folder: Path, names: list[str], present: set[str]) -> list[str]:
    absent = [name for name in names if name not in present]
    some = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
    return [f"{len(absent)} of {len(names)} classes have no folder in {folder}: {some}"] if absent else []


def _unknown_class(root: Path, split: str, name: str, imnet: bool) -> str:
    folder = root / split / name
    if imnet:
        return f"{folder} is not one of the 1000 ImageNet classes (like n01440764); remove it or use --dataset FOLDER"
    return f"{folder} is a class that {root / 'train'} does not have; rename it, remove it, or add it to train"


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _read_split(folder: Path, names: list[str], index: dict[str, int]) -> FileSource:
    files, labels = [], []
    for name in names:
        paths = [path[len(os.path.join(folder, "")) :] for path in _image_files(os.path.join(folder, name))]
        files += paths
        labels += [index[name]] * len(paths)
    return FileSource(folder, files, labels)


def _image_files(folder: str) -> Iterator[str]:
    """Walk a class folder in order: no hidden files, no pipes or sockets (reading would hang), no link to a parent."""
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            loop = entry.is_symlink() and f"{os.path.realpath(folder)}/".startswith(f"{os.path.realpath(entry.path)}/")
            yield from () if loop else _image_files(entry.path)
        elif entry.name.lower().endswith(IMG_EXTENSIONS):
            broken_link = entry.is_symlink() and not os.path.exists(entry.path)  # to be named when it is read
            if entry.is_file() or broken_link:
                yield entry.path


def _shards(args: Namespace, root: Path, size: int) -> Splits:
    """Open webdataset shards; the classes are the lines of classes.txt, the number in num_classes, or counted."""
    pattern = str(root)
    if re.match(r"\w+:", pattern):
        raise UserError(f"WDS reads local shards, not {pattern}; copy them to a disk first")
    shards = {split: _find_shards(pattern, split, args) for split in ("train", "val")}
    for split in ("val",) if args.eval else ("train", "val"):
        if not shards[split]:
            raise missing_data(args, f"no {split} shard in {pattern}")
    names = _wds_classes(Path(pattern.split("{")[0] + "x").parent if "{split}" in pattern else Path(pattern))
    val = TarSource(shards["val"])
    # without a list of classes an evaluation counts them as training would
    train = TarSource(shards["train"]) if shards["train"] and not (args.eval and names) else None
    labels = np.concatenate([source.labels for source in (train, val) if source is not None])
    names = names or tuple(str(i) for i in range(int(labels.max(initial=-1)) + 1))
    if (top := int(labels.max(initial=-1))) >= len(names):
        raise UserError(f"a sample of {pattern} has class {top}, but only {len(names)} classes are listed beside it")
    return Splits(None if args.eval else train, val, names)


def _find_shards(pattern: str, split: str, args: Namespace) -> list[str]:
    if "{split}" not in pattern:
        if not os.path.isdir(pattern):
            raise missing_data(args, f"{pattern} is neither a folder nor a pattern with {{split}}")
        folder = glob.escape(pattern)
        return sorted(glob.glob(f"{folder}/{split}*.tar") + glob.glob(f"{folder}/{split}/*.tar"))
    names = expand_braces(pattern.replace("{split}", split))
    matches = [sorted(glob.glob(name)) for name in names]
    if any(matches) and not all(matches):
        missing = names[matches.index([])]
        raise UserError(f"shard {missing} does not exist; fetch it, or write * for the number if the splits differ")
    return [path for paths in matches for path in paths]


def expand_braces(pattern: str) -> list[str]:
    """Expand {000..146} and {a,b} as a shell does."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    limits = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    choices = match[1].split(",")
    if limits:
        width = len(limits[1])
        choices = [f"{i:0{width}d}" for i in range(int(limits[1]), int(limits[2]) + 1)]
    return [name for c in choices for name in expand_braces(pattern[: match.start()] + c + pattern[match.end() :])]


def _wds_classes(folder: Path) -> tuple[str, ...]:
    if (file := folder / "classes.txt").is_file():
        return tuple(file.read_text().rstrip().splitlines())
    if (file := folder / "num_classes").is_file():
        text = file.read_text().strip()
        if not text.isdigit() or int(text) < 1:
            raise UserError(f"{file} must hold the number of classes, it holds {text[:20]!r}")
        return tuple(str(i) for i in range(int(text)))
    return ()


class DatasetInfo(NamedTuple):
    """The function that opens a data set, and what a user who does not have it needs to know."""

    open: Callable[[Namespace, Path, int], Splits]  # of the arguments, the folder of the data and the input size
    tree: str = ""  # files that are expected; {0} is the folder
    get: str = ""
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # mean and std, in place of the model's
    whole: bool = False  # whether a crop would cut off what an image shows


_TREE = "{0}/train/CLASS/*.JPEG and {0}/val/CLASS/*.JPEG (--eval needs val only)"
DATASETS = {
    "IMNET": DatasetInfo(_tree, _TREE, "get ILSVRC2012 from image-net.org and sort val into its class folders"),
    "IMAGENETTE": DatasetInfo(_tree, _TREE, "unpack imagenette2.tgz of github.com/fastai/imagenette"),
    "CIFAR10": DatasetInfo(
        _cifar, "{0}/cifar-10-batches-py/ (unpacked cifar-10-python.tar.gz)", "get it from cs.toronto.edu/~kriz"
    ),
    "CIFAR100": DatasetInfo(
        _cifar, "{0}/cifar-100-python/ (unpacked cifar-100-python.tar.gz)", "get it from cs.toronto.edu/~kriz"
    ),
    "FLOWERS102": DatasetInfo(
        _flowers,
        "{0}/flowers-102/jpg/*.jpg, imagelabels.mat and setid.mat",
        "get 102flowers.tgz and both files from robots.ox.ac.uk/~vgg/data/flowers/102",
    ),
    "FOLDER": DatasetInfo(_tree, _TREE, "one folder of images per class"),
    "WDS": DatasetInfo(
        _shards,
        "{0}/train*.tar and {0}/val*.tar, or a pattern like shards/{{split}}-*.tar",
        "write them with webdataset's TarWriter (jpg and cls members)",
    ),
    "DIGITS": DatasetInfo(_digits, normalisation=(DIGITS_MEAN, DIGITS_STD), whole=True),
}


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
    """The two splits of a data set; `config` is the preprocessing in use, `notes` are lines worth printing once."""

    train: ImageSet | None
    val: ImageSet
    num_classes: int
    class_names: tuple[str, ...]
    name: str
    config: DataConfig
    notes: tuple[str, ...] = ()


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
    return replace(data, val=val, notes=notes, class_names=tuple(names), num_classes=len(names))


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
    names = splits.class_names
    return Data(train, val, len(names), names, args.dataset, config, splits.notes)


def _limited(source: Source, split: str, args: Namespace) -> range:
    """Return the indices of a split: with --limit N, every ceil(len/N)-th, so that all classes keep their share."""
    n = len(source.labels)
    if n == 0:
        raise missing_data(args, f"the {split} split of {data_root(args)} has no image")
    return range(0, n, math.ceil(n / args.limit) if args.limit else 1)


class GlobalBatches(Sampler[list[tuple[int, int]]]):
    """Micro-batches of (index, seed) of one rank, from one order of the whole epoch.

    A global batch is `batch_size * accumulation * world` consecutive positions of the order, its micro-step k is
    `batch_size * world` consecutive ones of it, dealt to the ranks in turn. With 2 ranks, batches of 2, 2 micro-steps:

        position   0 1 2 3 | 4 5 6 7 || 8 9 ...
        rank       0 1 0 1 | 0 1 0 1 || 0 1 ...
        micro-step    0    |    1    ||  next update

    So n ranks x batch b x accumulation k see what one process with a batch of n * b * k sees, and repeated copies,
    which follow each other in the order, go to different ranks as in DeiT's RASampler. An incomplete last global batch
    is dropped; a set smaller than one is repeated to fill it.
    """

    def __init__(self, n: int, args: Namespace, rank: int, world: int) -> None:
        self.n, self.seed, self.repeats = n, args.seed, REPEATS if args.repeated_aug else 1
        self.batch_size, self.rank, self.world = args.batch_size, rank, world
        self.length = n // 256 * 256 if args.repeated_aug and n >= 256 else n  # DeiT's RASampler rounds so
        micro_steps = args.accumulation_steps
        self.steps = max(1, self.length // (args.batch_size * micro_steps * world)) * micro_steps
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self._batches(self.epoch, self.start)

    def order(self, epoch: int) -> np.ndarray:
        """Return the indices of an epoch in global order, as many as its steps need over all ranks."""
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
        order = torch.randperm(self.n, generator=generator).numpy().repeat(self.repeats)[: self.length]
        return np.resize(order, self.steps * self.batch_size * self.world)  # cuts, or repeats a short one

    def _batches(self, epoch: int, start: int) -> Iterator[list[tuple[int, int]]]:
        order, width = self.order(epoch), self.batch_size * self.world
        for step in range(start, self.steps):
            positions = range(step * width + self.rank, (step + 1) * width, self.world)
            yield [(int(order[i]), mix_seed(self.seed, epoch, i)) for i in positions]


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
    """Give a worker one thread, and let it outlive signals to its process group while the trainer still saves."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE))
