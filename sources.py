"""Sources: where the images and labels of a data set come from.

A source reads and names labelled images by index. A new data set is a function that opens its splits, and a row of
`DATASETS`.
"""

import csv
import fcntl
import glob
import io
import itertools
import json
import os
import re
import socket
import tarfile
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo
from torchvision import datasets as tv
from torchvision.datasets.folder import IMG_EXTENSIONS

from models.errors import UserError

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
# the same for --recover: few updates at a small rate
RECOVERY: dict[str, Any] = {
    "distillation_type": "soft",
    "distillation_alpha": 1.0,
    "epochs": 4,
    "batch_size": 32,
    "lr": 1.6e-4,  # 1e-5 after scaling by batch / 512; six times as much takes the model away from its teacher
    "weight_decay": 0.0,
    "drop_path": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "smoothing": 0.0,
    "repeated_aug": False,
    "model_ema": False,
}
HELD_OUT = 10  # every so many-th image of unlabelled ones is for validation, unless --val_path names others
DIGITS_MEAN, DIGITS_STD = (0.3097,) * 3, (0.3490,) * 3  # of its training images at 32 pixels
MAX_CLASSES = 100_000  # that numbers may ask for: each is a name here and a row of the head
MAX_JSON = 1_000_000  # bytes of a json member beside an image of a shard; a larger one is not read
INDEX_KEYS = ("cls", "label", "class", "class_id")  # of such a member, in this order
NAME_KEYS = ("class_name", "label_name")
PATH_COLUMNS = ("path", "file", "filename", "file_name", "image")  # in the header of a csv list
LABEL_COLUMNS = ("label", "class", "class_name", "target")
DATASET_ALIASES = {"CIFAR": "CIFAR100"}  # DeiT's
MAX_ASPECT = 16  # longer images are cropped to this before resizing: 1 x 100000 would become gigabytes


class Source(Protocol):
    """Labelled images by index; `read` raises whatever the file system or a decoder raises."""

    labels: np.ndarray

    def read(self, index: int) -> Image.Image: ...
    def name(self, index: int) -> str: ...


class Splits(NamedTuple):
    """Sources of a data set and its class names; train is None where only an evaluation is asked for.

    Attributes:
        class_labels: the classes in words, where the names are codes; empty: as `readable_names` has them.
        notes: lines worth printing once.
    """

    train: Source | None
    val: Source
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    class_labels: tuple[str, ...] = ()


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

    def __init__(self, root: str | Path, files: list[str], labels: Iterable[int]) -> None:
        self.root = root
        self.files = np.array([os.fsencode(f) for f in files], dtype=np.bytes_)
        self.labels = np.asarray(labels, dtype=np.int64)

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
        rows = [(s, row) for s, shard in enumerate(shards) for row in index_shard(shard)]
        self.shards = shards
        self.keys = np.array([os.fsencode(row.key) for _, row in rows], dtype=np.bytes_)
        self.spans = np.array([(s, row.offset, row.size) for s, row in rows], dtype=np.int64).reshape(-1, 3)
        self.raw_labels: RawLabels | None = RawLabels([row.label for _, row in rows], self.name)
        self.labels = np.zeros(len(rows), dtype=np.int64)
        for i, (_, row) in enumerate(rows):
            self.raw_labels.name_class(i, row.class_name)

    def read(self, index: int) -> Image.Image:
        shard, offset, size = self.spans[index].tolist()
        with open(self.shards[shard], "rb") as stream:
            stream.seek(offset)
            return decode(io.BytesIO(stream.read(size)))

    def name(self, index: int) -> str:
        return f"{self.shards[self.spans[index, 0]]}:{os.fsdecode(self.keys[index])}"


class ShardSample(NamedTuple):
    """A sample of a shard: where its image lies, its class by index or name, and the name that comes with an index."""

    key: str
    offset: int  # in bytes
    size: int
    label: int | str
    class_name: str = ""


def index_shard(path: str) -> list[ShardSample]:
    """List the samples of one webdataset shard.

    Members of one sample follow each other and share the name up to its first dot: an image (jpg, jpeg, png, ...), and
    `cls`, the class index in digits, or `json`, an object with an index or a name under one of `INDEX_KEYS`, or a name
    under one of `NAME_KEYS`. A torn or foreign shard raises UserError.
    """
    rows = []
    for key, group in itertools.groupby(_tar_members(path), key=lambda member: member.key):
        parts = {member.extension: member for member in group}
        image = next((part for extension, part in parts.items() if f".{extension}" in IMG_EXTENSIONS), None)
        try:
            label, name = _shard_label(parts)
        except ValueError as error:
            raise UserError(f"sample {key} of {path}: {error}") from None
        if image is None and label is None:
            continue  # nothing of ours, such as a lone json
        if image is None or label is None:
            lacking = "its image member" if image is None else "a label: a cls member, or a json member with one"
            raise UserError(f"sample {key} of {path} lacks {lacking}")
        rows.append(ShardSample(key, image.offset, image.size, label, name))
    return rows


def _shard_label(parts: dict[str, "Member"]) -> tuple[int | str | None, str]:
    """Return a sample's class, by index or name, and the name that comes with an index."""
    label: int | str | None = None
    if "cls" in parts:
        text = parts["cls"].text.decode(errors="replace").strip()
        if not _is_number(text):
            raise ValueError(f"cls must be a class index in digits, it is {text[:20]!r}")
        label = _class_index(text)
    if "json" not in parts:
        return label, ""
    try:
        content = json.loads(parts["json"].text or b"{}")
    except (ValueError, RecursionError):
        content = {}  # other people's json beside a cls; where it is the only label, its lack is told
    content = content if isinstance(content, dict) else {}
    values = [content[key] for key in INDEX_KEYS if isinstance(content.get(key), (int, str))]
    words = [content[key] for key in NAME_KEYS if isinstance(content.get(key), str) and content[key].strip()]
    name = words[0].strip() if words else ""
    if label is None and values and not isinstance(values[0], bool):
        label = _label(str(values[0])) or None
    return (name or None, "") if label is None else (label, name if isinstance(label, int) else "")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _label(text: str) -> int | str:
    """Read a label: digits are a class index, anything else is a class name."""
    text = text.strip()
    return _class_index(text) if _is_number(text) else text


def _class_index(digits: str) -> int:
    """Read a class index.

    Raises:
        ValueError: it is so large that it cannot be the index of a class.
    """
    if len(digits.lstrip("0")) > 9 or int(digits) >= MAX_CLASSES:
        shown = digits if len(digits) <= 20 else f"{digits[:10]}... ({len(digits)} digits)"
        raise ValueError(f"class index {shown} is above {MAX_CLASSES - 1}; indices count classes from 0")
    return int(digits)


class RawLabels:
    """Labels as files give them, each an index or a name, before the classes are numbered.

    Attributes:
        values: int or str of each image.
        names: of classes whose index and name come together.
    """

    def __init__(self, values: list[int | str], where: Callable[[int], str]) -> None:
        self.values, self.where = values, where
        self.names: dict[int, str] = {}

    def name_class(self, i: int, name: str) -> None:
        """Note the name that image i gives its class's index.

        Raises:
            UserError: an index has two names.
        """
        index = self.values[i]
        if name and isinstance(index, int) and self.names.setdefault(index, name) != name:
            raise UserError(f"class {index} is called {self.names[index]!r} and, in {self.where(i)}, {name!r}")

    def top(self) -> int:
        """Return the largest index; -1 if all labels are names."""
        return max((value for value in self.values if isinstance(value, int)), default=-1)

    def numbered(self, classes: Sequence[str], source: str) -> np.ndarray:
        """Return class indices (n,) into `classes`, a list that comes from `source`.

        Raises:
            UserError: a label that is not among them.
        """
        index = {name: i for i, name in enumerate(classes)}
        labels = np.zeros(len(self.values), dtype=np.int64)
        for i, value in enumerate(self.values):
            known = index.get(str(value)) if isinstance(value, str) else value if value < len(classes) else None
            if known is None:
                shown = f"class {value}" if isinstance(value, int) else f"class {value!r}"
                raise UserError(f"{self.where(i)} has {shown}, which is not among the {len(classes)} classes {source}")
            labels[i] = known
        return labels


def number_classes(train: RawLabels | None, val: RawLabels, listed: tuple[str, ...], beside: str) -> tuple[str, ...]:
    """Return the class names: those listed, or 0, 1, ... up to the largest index, or all names of train in order.

    Args:
        train: None: there is none, and val tells.
        listed: in a file beside the data; empty without one.
        beside: where such a file would lie, for the error.
    """
    if listed:
        return listed
    parts = [part for part in (train, val) if part is not None]
    kinds = {type(value) for part in parts for value in part.values}
    if len(kinds) > 1:
        raise UserError(f"some labels are indices and some are names; list the class names in {beside}/classes.txt")
    if str in kinds:
        return tuple(sorted({str(value) for value in parts[0].values}))
    names = {index: name for part in reversed(parts) for index, name in part.names.items()}
    return tuple(names.get(i, str(i)) for i in range(max(part.top() for part in parts) + 1))


class Member(NamedTuple):
    """A file in a tar: its sample and extension, where its bytes lie, and its content if it may be a label."""

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
                most = {"cls": 1000, "json": MAX_JSON}.get(extension.lower(), 0)
                handle = tar.extractfile(member) if member.size <= most else None
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
    """Return the folder (or list) of the data: --data_path or data/<dataset>."""
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
    return _open_tree(args, root, {"train": root / "train", "val": root / "val"})


def _open_tree(args: Namespace, root: Path, places: dict[str, Path]) -> Splits:
    _refuse_file(args, root)
    if not root.exists():
        raise missing_data(args, f"{root} does not exist")
    needed = ("val",) if args.eval else ("train", "val")
    for split in needed:
        if not places[split].is_dir():
            raise missing_data(args, f"{places[split]} does not exist")
    folders = {s: _class_folders(place) for s, place in places.items() if place.is_dir()}
    imnet = args.dataset == "IMNET"
    names = ImageNetInfo().label_names() if imnet else folders.get("train") or folders["val"]
    index = {name: i for i, name in enumerate(names)}
    notes: list[str] = []
    for split in needed:
        if not folders[split]:
            raise missing_data(args, f"{places[split]} has no class folder")
        for name in folders[split]:
            if name not in index:
                raise UserError(_unknown_class(places, split, name, imnet))
        notes += _absent_classes(places[split], names, set(folders[split]))
    train, val = (_read_split(places[s], folders[s], index) if s in needed else None for s in ("train", "val"))
    assert val is not None
    return Splits(train, val, tuple(names), tuple(notes))


def _absent_classes(folder: Path, names: list[str], present: set[str]) -> list[str]:
    absent = [name for name in names if name not in present]
    some = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
    return [f"{len(absent)} of {len(names)} classes have no folder in {folder}: {some}"] if absent else []


def _unknown_class(places: dict[str, Path], split: str, name: str, imnet: bool) -> str:
    folder = places[split] / name
    if imnet:
        return f"{folder} is not one of the 1000 ImageNet classes (like n01440764); remove it or use --dataset FOLDER"
    return f"{folder} is a class that {places['train']} does not have; rename it, remove it, or add it to train"


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


def _unlabelled(args: Namespace, root: Path, size: int) -> Splits:
    """Open any folder or tree of images, without classes; labels are all 0, until `Trainer` takes the teacher's."""
    if not root.exists():
        raise missing_data(args, f"{root} does not exist")
    files = find_images([root], "--data_path")
    held_out = find_images([args.val_path], "--val_path") if args.val_path else files[::HELD_OUT]
    others = set(held_out)
    train = [file for file in files if file not in others] or files
    return Splits(FileSource("", train, [0] * len(train)), FileSource("", held_out, [0] * len(held_out)), ())


def _inaturalist_tree(args: Namespace, root: Path, size: int) -> Splits:
    """Open iNaturalist 2021, a folder per species: its own names of the splits, or those of torchvision's download."""
    named = {"train": ("train", "2021_train", "train_mini", "2021_train_mini"), "val": ("val", "2021_valid")}
    found = {split: [root / name for name in names if (root / name).is_dir()] for split, names in named.items()}
    places = {split: found[split][0] if found[split] else root / names[0] for split, names in named.items()}
    splits = _open_tree(args, root, places)
    # 00000_Animalia_Annelida_Clitellata_Haplotaxida_Lumbricidae_Lumbricus_terrestris
    return splits._replace(class_labels=tuple(" ".join(name.split("_")[-2:]) for name in splits.class_names))


def _inaturalist_lists(args: Namespace, root: Path, size: int) -> Splits:
    """Open iNaturalist 2018 or 2019, whose splits are lists: train2018.json and val2018.json.

    The classes are the categories in order of their id. Images lie where the lists say, or, as torchvision unpacks
    them, below a folder that is named by the year alone.
    """
    _refuse_file(args, root)
    year = {"INAT": 2018, "INAT19": 2019}[args.dataset]
    lists = {split: _read_inaturalist(args, root / f"{split}{year}.json") for split in _needed(args)}
    first = lists["val"]
    categories = first["categories"]
    if (file := root / "categories.json").is_file():  # the lists of 2018 had no names at first
        categories = _read_json(file)
    ids = sorted({int(entry["id"]) for entry in categories} or {e["category_id"] for e in first["annotations"]})
    words = {int(entry["id"]): str(entry.get("name", entry["id"])) for entry in categories}
    index = {category: i for i, category in enumerate(ids)}
    sources = {split: _inaturalist_source(root, year, split, content, index) for split, content in lists.items()}
    names = tuple(str(category) for category in ids)
    labels = tuple(words.get(category, str(category)) for category in ids)
    return Splits(sources.get("train"), sources["val"], names, class_labels=labels)


def _needed(args: Namespace) -> tuple[str, ...]:
    return ("val",) if args.eval else ("train", "val")


def _read_inaturalist(args: Namespace, file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise missing_data(args, f"{file} does not exist")
    content = _read_json(file)
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        raise UserError(f"{file} is not a list of iNaturalist's: it lacks images or annotations; fetch it again")
    return {"categories": [], **content}


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is torn or not json ({error}); fetch it again") from error


def _inaturalist_source(
    root: Path, year: int, split: str, content: dict[str, Any], index: dict[int, int]
) -> FileSource:
    try:
        names = {image["id"]: str(image["file_name"]) for image in content["images"]}
        labels = [index[int(entry["category_id"])] for entry in content["annotations"]]
        files = [names[entry["image_id"]] for entry in content["annotations"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{split}{year}.json of {root} does not fit together: {error!r} is missing or odd") from error
    folder = files[0].split("/")[0] if files else ""
    if folder and not (root / folder).is_dir() and (root / str(year)).is_dir():
        files = ["/".join([str(year), *name.split("/")[1:]]) for name in files]
    return FileSource(root, files, labels)


def _csv_lists(args: Namespace, root: Path, size: int) -> Splits:
    """Open lists of images, one for each split: DATA/train.csv and DATA/val.csv, or files named by the flags.

    Classes are the words in the label column of train in alphabetical order; digits are class indices. Beside the
    list classes.txt may name all classes, a line each; labels are then such names, or indices of lines.
    """
    if not root.is_dir():
        files = list_places(args)
    else:
        val_file = Path(args.val_path).expanduser() if args.val_path else root / "val.csv"
        files = {"train": root / "train.csv", "val": val_file}
    read = {split: _read_csv(args, file) for split, file in files.items() if split in _needed(args) or file.is_file()}
    train, val = read.get("train"), read["val"]
    folder = files["train" if train else "val"].parent
    names = number_classes(train and train[1], val[1], _listed_classes(folder), str(folder))
    where = f"of {folder / 'classes.txt'}" if _listed_classes(folder) else f"of {files['train' if train else 'val']}"
    sources = {
        split: FileSource(files[split].parent, paths, raw.numbered(names, where))
        for split, (paths, raw) in read.items()
    }
    return Splits(None if args.eval else sources["train"], sources["val"], names)


def list_places(args: Namespace) -> dict[str, Path]:
    """Return what --data_path and --val_path say for each split; one list alone is what --eval evaluates.

    Raises:
        UserError: a list for training without one for validation.
    """
    root = data_root(args)
    if args.val_path:
        return {"train": root, "val": Path(args.val_path).expanduser()}
    if args.eval:
        return {"val": root}
    raise UserError(f"{root} is the list to train on; name the one to evaluate on, too: --val_path LIST")


def _read_csv(args: Namespace, file: Path) -> tuple[list[str], RawLabels]:
    """Read paths, which are relative to the folder of the list, and labels."""
    if not file.is_file():
        raise missing_data(args, f"{file} does not exist")
    try:
        text = file.read_text(encoding="utf-8-sig")
        first = text.partition("\n")[0]
        delimiter = next((mark for mark in ",\t;" if mark in first), ",")
        rows = [
            (number, row)
            for number, row in enumerate(csv.reader(text.splitlines(), delimiter=delimiter), 1)
            if any(row)
        ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} is not a csv list ({error}); write lines such as photos/cat.jpg,cat") from error
    columns = _csv_columns(file, rows[0][1]) if rows else None
    path, label = columns or (0, 1)
    paths, values = [], []
    for number, row in rows[1:] if columns else rows:
        if len(row) <= max(path, label) or not row[path].strip() or not row[label].strip():
            raise UserError(
                f"line {number} of {file} lacks its path or its label; write lines such as photos/cat.jpg,cat"
            )
        try:
            values.append(_label(row[label]))
        except ValueError as error:
            raise UserError(f"line {number} of {file}: {error}") from None
        paths.append(row[path].strip())
    return paths, RawLabels(values, lambda i: f"{paths[i]} of {file}")


def _csv_columns(file: Path, first: list[str]) -> tuple[int, int] | None:
    """Return the columns of path and label by the names in the header; None: there is no header."""
    names = [name.strip().lower() for name in first]
    path = next((names.index(name) for name in PATH_COLUMNS if name in names), None)
    label = next((names.index(name) for name in LABEL_COLUMNS if name in names), None)
    if path is not None and label is not None:
        return path, label
    if not names[0].endswith(IMG_EXTENSIONS):
        raise UserError(
            f"the first line of {file} is neither a header with the columns path and label nor an image and its label"
        )
    return None


def _shards(args: Namespace, root: Path, size: int) -> Splits:
    """Open webdataset shards; the classes are the lines of classes.txt, the number in num_classes, or counted."""
    whole = str(root)
    if "{split}" in whole or root.is_dir():
        places = {"train": whole, "val": str(args.val_path or whole)}
    elif not re.search(r"[{*?[]|::|\.tar$", whole):
        raise missing_data(args, f"{whole} is neither a folder nor a list of shards")
    else:
        places = {split: str(place) for split, place in list_places(args).items()}
    shards = {split: _find_shards(place, split, args) for split, place in places.items()}
    for split in _needed(args):
        if not shards[split]:
            raise missing_data(args, f"no {split} shard in {places[split]}")
    folder = Path(whole) if root.is_dir() else Path(whole.split("::")[0].split("{")[0] + "x").parent
    listed = _listed_classes(folder)
    val = TarSource(shards["val"])
    # without a list of classes an evaluation counts them as training would
    train = TarSource(shards["train"]) if shards.get("train") and not (args.eval and listed) else None
    assert val.raw_labels is not None
    names = number_classes(train.raw_labels if train else None, val.raw_labels, listed, str(folder))
    for source in (train, val):
        if source is not None and source.raw_labels is not None:
            source.labels = source.raw_labels.numbered(
                names, f"listed in {folder}" if listed else "of the train shards"
            )
            source.raw_labels = None  # a list of a million numbers would be copied into every worker
    return Splits(None if args.eval else train, val, names)


def _find_shards(pattern: str, split: str, args: Namespace) -> list[str]:
    """Expand a folder, or patterns joined by ::, each with {split}, {000..146}, {a,b}, * and ~."""
    if os.path.isdir(pattern):
        folder = glob.escape(pattern)
        return sorted(glob.glob(f"{folder}/{split}*.tar") + glob.glob(f"{folder}/{split}/*.tar"))
    parts = [os.path.expanduser(part) for part in pattern.split("::") if part]
    for part in parts:
        if re.match(r"\w+:", part):
            raise UserError(f"WDS reads local shards, not {part}; copy them to a disk first")
    names = [name for part in parts for name in expand_braces(part.replace("{split}", split))]
    matches = [sorted(glob.glob(name)) for name in names]
    if not any(matches) and "{split}" not in pattern:
        raise missing_data(args, f"{pattern} is neither a folder nor a list of shards that are there")
    if not all(matches) and any(matches):
        missing = names[matches.index([])]
        raise UserError(f"shard {missing} does not exist; fetch it, or write * for the number if the splits differ")
    return [path for paths in matches for path in paths]


def expand_braces(pattern: str) -> list[str]:
    """Expand {000..146} and {a,b} as a shell does."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    limits = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", match[1])
    choices = match[1].split(",")
    if limits:
        width = len(limits[1])
        choices = [f"{i:0{width}d}" for i in range(int(limits[1]), int(limits[2]) + 1)]
    return [name for c in choices for name in expand_braces(pattern[: match.start()] + c + pattern[match.end() :])]


def _listed_classes(folder: Path) -> tuple[str, ...]:
    """Return the lines of classes.txt, or as many numbers as num_classes says; empty without both."""
    if (file := folder / "classes.txt").is_file():
        names = tuple(file.read_text(encoding="utf-8-sig").rstrip().splitlines())
        if len(set(names)) < len(names):
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            raise UserError(f"{file} names the class {twice!r} twice; each line is one class")
        return names
    if (file := folder / "num_classes").is_file():
        text = file.read_text().strip()
        if not _is_number(text) or not 1 <= len(text.lstrip("0")) <= 9 or int(text) > MAX_CLASSES:
            raise UserError(f"{file} must hold the number of classes, 1 to {MAX_CLASSES}, it holds {text[:20]!r}")
        return tuple(str(i) for i in range(int(text)))
    return ()


def readable_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return class names in words: an ImageNet code by its first synonym, any other name as it is.

    Two classes share a first synonym: a maillot is told by all its synonyms, a crane with its code.
    """
    info = ImageNetInfo()
    texts = {code: info.label_name_to_description(code) for code in info.label_names()}
    first = {code: text.split(",")[0] for code, text in texts.items()}
    words: dict[str, str] = {}
    for form in ({code: f"{text} ({code})" for code, text in texts.items()}, texts, first):
        count = Counter(form.values())
        words |= {code: text for code, text in form.items() if count[text] == 1}
    return tuple(words.get(name, name) for name in names)


def differing_classes(expected: Sequence[str], found: Sequence[str], shown: int = 3) -> str | None:
    """Word how two lists of class names differ, in one line: their lengths and first differences; None: they do not.

    Args:
        expected: of the weights.
        found: of the data.
    """
    if list(expected) == list(found):
        return None
    pairs = list(itertools.zip_longest(expected, found))
    first = [(i, a, b) for i, (a, b) in enumerate(pairs) if a != b]
    words = [f"class {i} is {_quoted(a)} in the weights and {_quoted(b)} in the data" for i, a, b in first[:shown]]
    more = f", and {len(first) - shown} more differ" if len(first) > shown else ""
    same = "; the names are the same in another order" if sorted(expected) == sorted(found) else ""
    count = f"{len(expected)} and {len(found)} classes: " if len(expected) != len(found) else ""
    return f"{count}{', '.join(words)}{more}{same}"


def _quoted(name: str | None) -> str:
    return "absent" if name is None else repr(name)


# Images that a user names


def find_images(places: Sequence[str | Path], flag: str = "--images") -> list[str]:
    """List the images that files, folders and glob patterns name, each once, those of a folder or pattern in order.

    Hidden files in folders are left out; a file that is named is taken whatever its ending.

    Raises:
        UserError: a place that does not exist, or nothing that holds an image; names `flag`.
    """
    files: list[str] = []
    for place in map(str, places):
        path = os.path.expanduser(place)
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not matches:
            raise UserError(
                f"{flag} {place} does not exist; name an image, a folder of images, or a pattern such as 'photos/*.jpg'"
            )
        found = [file for match in matches for file in (_image_files(match) if os.path.isdir(match) else [match])]
        if not found:
            raise UserError(f"{flag} {place} holds no image ({', '.join(IMG_EXTENSIONS)})")
        files += found
    return list(dict.fromkeys(files))


class DatasetInfo(NamedTuple):
    """The function that opens a data set, and what a user who does not have it needs to know."""

    open: Callable[[Namespace, Path, int], Splits]  # of the arguments, the folder of the data and the input size
    tree: str = ""  # files that are expected; {0} is the folder
    get: str = ""
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # mean and std, in place of the model's
    whole: bool = False  # whether a crop would cut off what an image shows
    lists: bool = False  # whether --data_path may be a list of one split, and --val_path that of the other
    files: bool = True  # whether it has any
    labels: bool = True


_TREE = "{0}/train/CLASS/*.JPEG and {0}/val/CLASS/*.JPEG (--eval needs val only)"
_INAT = "{{0}}/train{0}.json, {{0}}/val{0}.json and {{0}}/train_val{0}/*/*/*.jpg"
_GET_INAT = "get it from github.com/visipedia/inat_comp"
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
    "IMAGES": DatasetInfo(
        _unlabelled,
        "{0}, a folder or tree of images, of which --val_path may name others to evaluate on",
        "any images will do",
        lists=True,
        labels=False,
    ),
    "WDS": DatasetInfo(
        _shards,
        "{0}/train*.tar and {0}/val*.tar, or a pattern like shards/{{split}}-{{000..146}}.tar, or two lists, "
        "--data_path and --val_path",
        "write them with webdataset's TarWriter (jpg and cls or json members)",
        lists=True,
    ),
    "CSV": DatasetInfo(
        _csv_lists,
        "{0}/train.csv and {0}/val.csv with lines such as photos/cat.jpg,cat, or --data_path and --val_path",
        "write the lists",
        lists=True,
    ),
    "INAT": DatasetInfo(_inaturalist_lists, _INAT.format(2018), _GET_INAT),
    "INAT19": DatasetInfo(_inaturalist_lists, _INAT.format(2019), _GET_INAT),
    "INAT21": DatasetInfo(
        _inaturalist_tree,
        "{0}/train/00000_*/*.jpg ... and {0}/val/00000_*/*.jpg ... (--eval needs val only)",
        _GET_INAT,
    ),
    "DIGITS": DatasetInfo(_digits, normalisation=(DIGITS_MEAN, DIGITS_STD), whole=True, files=False),
}
