"""Where images and labels come from: decoding, and one opener per data set of --dataset.

A *source* reads an image by index; `open_splits` returns the two of a data set. datasets.py turns them into batches.
"""

import fcntl
import glob
import io
import itertools
import os
import re
import socket
import tarfile
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo
from torchvision import datasets as tv
from torchvision.datasets.folder import IMG_EXTENSIONS

from models.errors import UserError

MAX_ASPECT = 16  # longer images are cropped to this before resizing: 1 x 100000 would become gigabytes

TREE = "{0}/train/CLASS/*.JPEG and {0}/val/CLASS/*.JPEG (--eval needs val only)"
SOURCES = {
    "IMNET": (TREE, "get ILSVRC2012 from image-net.org and sort val into its class folders"),
    "IMAGENETTE": (TREE, "unpack imagenette2.tgz of github.com/fastai/imagenette"),
    "FOLDER": (TREE, "one folder of images per class"),
    "CIFAR10": ("{0}/cifar-10-batches-py/ (unpacked cifar-10-python.tar.gz)", "get it from cs.toronto.edu/~kriz"),
    "CIFAR100": ("{0}/cifar-100-python/ (unpacked cifar-100-python.tar.gz)", "get it from cs.toronto.edu/~kriz"),
    "FLOWERS102": (
        "{0}/flowers-102/jpg/*.jpg, imagelabels.mat and setid.mat",
        "get 102flowers.tgz and both files from robots.ox.ac.uk/~vgg/data/flowers/102",
    ),
    "WDS": (
        "{0}/train*.tar and {0}/val*.tar, or a pattern like shards/{{split}}-*.tar",
        "write them with webdataset's TarWriter (jpg and cls members)",
    ),
    "DIGITS": ("", ""),
}


class Source(Protocol):
    """Labelled images by index; `read` raises whatever the file system or a decoder raises."""

    labels: np.ndarray

    def read(self, index: int) -> Image.Image: ...
    def name(self, index: int) -> str: ...


class Splits(NamedTuple):
    """Sources of a data set and its class names."""

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
    """Image files below a folder; names are kept in one array, for a list of a million strings is copied by workers."""

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
        self.places = np.array([(s, offset, size) for s, _, offset, size, _ in rows], dtype=np.int64).reshape(-1, 3)
        self.labels = np.array([row[4] for row in rows], dtype=np.int64)

    def read(self, index: int) -> Image.Image:
        shard, offset, size = self.places[index].tolist()
        with open(self.shards[shard], "rb") as stream:
            stream.seek(offset)
            return decode(io.BytesIO(stream.read(size)))

    def name(self, index: int) -> str:
        return f"{self.shards[self.places[index, 0]]}:{os.fsdecode(self.keys[index])}"


def index_shard(path: str) -> list[tuple[str, int, int, int]]:
    """List (key, offset in bytes, size in bytes, label) of the samples of one webdataset shard.

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
    """A file in a tar: sample and extension it belongs to, place in bytes, content if it is a label."""

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
    """Open the sources of --dataset for images of `size` pixels; train is None with --eval."""
    root = data_root(args)
    try:
        if args.dataset == "DIGITS":
            return _digits(size, args.eval)
        if args.dataset == "WDS":
            return _shards(str(root), args)
        if not root.is_dir() and (root.exists() or args.dataset in ("IMNET", "IMAGENETTE", "FOLDER")):
            raise missing_data(args, f"{root} is not a folder" if root.exists() else f"{root} does not exist")
        if args.dataset in ("CIFAR10", "CIFAR100"):
            return _cifar(args, root)
        return _flowers(args, root) if args.dataset == "FLOWERS102" else _tree(args, root)
    except OSError as error:
        raise missing_data(args, f"{error.filename or root} cannot be read ({error.strerror or error})") from error


def data_root(args: Namespace) -> Path:
    """Return the folder (or shard pattern) of the data: --data_path or data/<dataset>."""
    return Path(args.data_path).expanduser() if args.data_path else Path("data") / args.dataset


def missing_data(args: Namespace, what: str) -> UserError:
    """Word what is wrong with the data, the tree that is expected and where to get it, in one line."""
    tree, how = SOURCES[args.dataset]
    expected = tree.format(data_root(args))
    return UserError(f"data not found: {what}; expected {expected}; {how}, or --dataset DIGITS needs no files")


def _digits(size: int, eval_only: bool) -> Splits:
    """Split load_digits in a fixed, stratified way: every fifth image in order of class is for validation."""
    from sklearn.datasets import load_digits  # only this set needs scikit-learn

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    order = np.argsort(digits.target, kind="stable")
    chosen = np.zeros(len(order), dtype=bool)
    chosen[order[::5]] = True
    train, val = (ArraySource(images[m], digits.target[m], "DIGITS", size) for m in (~chosen, chosen))
    return Splits(None if eval_only else train, val, tuple(str(i) for i in range(10)))


def _cifar(args: Namespace, root: Path) -> Splits:
    cls = tv.CIFAR10 if args.dataset == "CIFAR10" else tv.CIFAR100
    val = _fetch(args, cls, root, train=False)
    train = None if args.eval else _fetch(args, cls, root, train=True)
    train_source = train and ArraySource(train.data, train.targets, f"{args.dataset} train")
    return Splits(train_source, ArraySource(val.data, val.targets, f"{args.dataset} val"), tuple(val.classes))


def _flowers(args: Namespace, root: Path) -> Splits:
    """Oxford flowers by the usual transfer protocol: trained on train + val (2040), evaluated on test (6149)."""

    def source(*names: str) -> FileSource:  # reads files itself: torchvision would not say which one is bad
        parts = [_fetch(args, tv.Flowers102, root, split=name) for name in names]
        files = [os.path.relpath(file, root) for part in parts for file in part._image_files]
        return FileSource(root, files, [label for part in parts for label in part._labels])

    return Splits(None if args.eval else source("train", "val"), source("test"), tuple(str(i + 1) for i in range(102)))


def _fetch(args: Namespace, cls: type, root: Path, **split: Any) -> Any:
    """Open a torchvision set, downloading it if it is absent: one process at a time, giving up on a dead wire."""
    try:
        return cls(root, **split)
    except RuntimeError:  # torchvision's word for absent or damaged
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


def _tree(args: Namespace, root: Path) -> Splits:
    """Read DATA/{train,val}/CLASS/*; the classes are ImageNet's 1000, or the folders of train, or else of val."""
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
        found = [path[len(os.path.join(folder, "")) :] for path in _image_files(os.path.join(folder, name))]
        files += found
        labels += [index[name]] * len(found)
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


def _shards(pattern: str, args: Namespace) -> Splits:
    """Open webdataset shards; the classes are the lines of classes.txt, the number in num_classes, or counted."""
    if re.match(r"\w+:", pattern):
        raise UserError(f"WDS reads local shards, not {pattern}; copy them to a disk first")
    found = {split: _find_shards(pattern, split, args) for split in ("train", "val")}
    for split in ("val",) if args.eval else ("train", "val"):
        if not found[split]:
            raise missing_data(args, f"no {split} shard in {pattern}")
    names = _wds_classes(Path(pattern.split("{")[0] + "x").parent if "{split}" in pattern else Path(pattern))
    val = TarSource(found["val"])
    # without a list of classes an evaluation counts them as training would
    train = TarSource(found["train"]) if found["train"] and not (args.eval and names) else None
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
    found = [sorted(glob.glob(name)) for name in names]
    if any(found) and not all(found):
        missing = names[found.index([])]
        raise UserError(f"shard {missing} does not exist; fetch it, or write * for the number if the splits differ")
    return [path for paths in found for path in paths]


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
