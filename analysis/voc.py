"""Images with object boxes: Pascal VOC's own tree, and a folder of images beside a folder of VOC's XML files."""

import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from models.errors import UserError

TREES = (
    "VOCdevkit/VOC2007/{Annotations,ImageSets/Main,JPEGImages} (also VOC2007 itself), or a folder with "
    "data/database/images and data/database/gts/pascalvoc_format, or images/ and annotations/"
)
PAIRS = (("data/database/images", "data/database/gts/pascalvoc_format"), ("images", "annotations"))


@dataclass(frozen=True)
class Annotated:
    """An image file and its objects' boxes (n,4): x1,y1,x2,y2 in pixels, right and lower sides excluded."""

    name: str
    file: Path
    boxes: np.ndarray | None  # None: a folder of images without annotations
    classes: tuple[str, ...] = ()  # of the objects, in the order of the boxes

    def read(self) -> Image.Image | None:
        """Decode the image; None if it is unreadable."""
        from sources import decode

        try:
            with self.file.open("rb") as stream:
                return decode(stream)
        except Exception:  # decoders fed with arbitrary bytes raise anything
            return None


def open_files(places: Sequence[str]) -> list[Annotated]:
    """Images of files, folders and patterns, without boxes: for pictures only."""
    from sources import find_images

    return [Annotated(Path(file).name, Path(file), None) for file in find_images(places, "--data")]


def open_voc(root: Path, year: int | None, split: str, no_hard: bool) -> list[Annotated]:
    """Images of a VOC tree with their boxes.

    Args:
        year: of a VOCdevkit (2007 or 2012); None: the only one there is.
        split: a list of ImageSets/Main (train, val, trainval, test); ignored for a folder without such lists.
        no_hard: leave out truncated and difficult objects, and images that have only those.

    Raises:
        UserError: no such tree, or a damaged annotation.
    """
    entries = _entries(root, year, split)
    images = [Annotated(file.stem, file, *read_objects(annotation, no_hard)) for file, annotation in entries]
    kept = [image for image in images if image.boxes is not None and len(image.boxes)]
    if not kept:
        raise UserError(f"no image with an object in {root}; expected {TREES}")
    return kept


def _entries(root: Path, year: int | None, split: str) -> Iterator[tuple[Path, Path]]:
    if not root.is_dir():
        raise UserError(f"--voc {root} is not a folder; expected {TREES}")
    tree = _voc_tree(root, year)
    if tree is not None:
        yield from _listed(tree, split)
        return
    for images, annotations in PAIRS:
        if (root / images).is_dir() and (root / annotations).is_dir():
            yield from _paired(root / images, root / annotations)
            return
    raise UserError(f"--voc {root} holds no Pascal VOC data; expected {TREES}")


def _voc_tree(root: Path, year: int | None) -> Path | None:
    """The folder with Annotations and JPEGImages; None if this is another kind of tree."""
    folders = [root, *sorted(root.glob("VOC20*")), *sorted((root / "VOCdevkit").glob("VOC20*"))]
    trees = [folder for folder in folders if (folder / "Annotations").is_dir() and (folder / "JPEGImages").is_dir()]
    if year is not None:
        trees = [tree for tree in trees if tree.resolve().name == f"VOC{year}"]
        if not trees:
            raise UserError(f"--voc {root} has no VOC{year}; leave --year out or name another folder")
    if len(trees) > 1:
        raise UserError(f"--voc {root} has {', '.join(tree.name for tree in trees)}; choose one by --year")
    return trees[0] if trees else None


def _listed(tree: Path, split: str) -> Iterator[tuple[Path, Path]]:
    file = tree / "ImageSets" / "Main" / f"{split}.txt"
    if not file.is_file():
        there = sorted(path.stem for path in file.parent.glob("*.txt") if "_" not in path.stem)
        raise UserError(f"{file} does not exist; --set is one of {', '.join(there) or '(no list found)'}")
    for line in file.read_text().split("\n"):
        if line.strip():
            name = line.split()[0]
            yield tree / "JPEGImages" / f"{name}.jpg", tree / "Annotations" / f"{name}.xml"


def _paired(images: Path, annotations: Path) -> Iterator[tuple[Path, Path]]:
    for file in sorted(images.iterdir()):
        annotation = annotations / f"{file.stem}.xml"
        if file.suffix.lower() in IMG_EXTENSIONS and annotation.is_file():
            yield file, annotation


def read_objects(file: Path, no_hard: bool) -> tuple[np.ndarray, tuple[str, ...]]:
    """Boxes (n,4) and classes of a VOC annotation: its pixels count from 1 and include the last: x1, y1 lose one."""
    try:
        objects = ET.parse(file).getroot().findall("object")
        objects = [annotated for annotated in objects if not (no_hard and _is_hard(annotated))]
        boxes = [_corners(annotated) for annotated in objects]
    except (OSError, ET.ParseError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read the annotation {file}: {error}; fetch it again or remove its image") from error
    classes = tuple((annotated.findtext("name") or "object").strip() for annotated in objects)
    return np.array(boxes, dtype=np.float64).reshape(-1, 4), classes


def _corners(annotated: ET.Element) -> list[float]:
    x1, y1, x2, y2 = (float(annotated.findtext(f"bndbox/{side}") or "") for side in ("xmin", "ymin", "xmax", "ymax"))
    return [x1 - 1, y1 - 1, x2, y2]


def _is_hard(annotated: ET.Element) -> bool:
    return any((annotated.findtext(flag) or "0").strip() == "1" for flag in ("truncated", "difficult"))
