"""Unreadable and odd images, and data that is missing or wrong."""

import io
import struct
import urllib.error
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_datasets import SMALL, jpeg, make_args, make_tree, write_image, write_shard

from datasets import build_data, build_eval_loader, build_train_loader
from engine import UnreadableImages
from models.errors import UserError
from sources import decode
from utils import RunError


def png_header(width: int, height: int) -> bytes:
    """Write a PNG that declares a size and holds almost nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def bad_files() -> dict[str, bytes]:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(stream, "JPEG")
    return {
        "torn.jpg": stream.getvalue()[:-200],
        "zero.jpg": b"",
        "text.jpg": b"<html>404</html>",
        "bomb.png": png_header(60000, 60000),
        "short.png": png_header(64, 64),
        "noise.png": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    }


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    root = Path(make_tree(tmp_path, {"a": 3, "b": 3}, {"a": 2, "b": 1}))
    for name, content in bad_files().items():
        for split in ("train", "val"):
            (root / split / "a" / name).write_bytes(content)
    (root / "val" / "b" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_names_unreadable_images_and_keeps_their_place(broken: Path, workers: int) -> None:
    args = make_args(data_path=str(broken), eval=True, num_workers=workers)
    data = build_data(args, SMALL)
    batches = list(build_eval_loader(args, data.val, 0, 1))
    valid = torch.cat([b.valid for b in batches])
    assert len(valid) == 10 and int(valid.sum()) == 3
    assert {Path(name).name for b in batches for name in b.bad} == {*bad_files(), "gone.jpg"}
    assert torch.cat([b.targets for b in batches]).tolist() == data.val.targets.tolist()
    assert torch.cat([b.images for b in batches])[~valid].abs().max() == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_training_takes_the_next_readable_image_instead(broken: Path, workers: int) -> None:
    args = make_args(data_path=str(broken), batch_size=12, num_workers=workers)
    data = build_data(args, SMALL)
    names = [Path(data.train.name(i)).name for i in range(len(data.train))]
    assert names[3:9] == sorted(bad_files())
    (batch,) = build_train_loader(args, data, 0, 1).iterate(0)
    assert batch.valid.all() and set(map(str, batch.bad)) == {data.train.name(i) for i in range(3, 9)}
    sample, replacement = data.train[(8, 77)], data.train[(9, 77)]
    assert torch.equal(sample.image, replacement.image) and sample.target == replacement.target == 1
    assert len(sample.bad) == 1 and len(data.train[(3, 77)].bad) == 6


def test_training_stops_when_nothing_is_readable(tmp_path: Path) -> None:
    root = Path(make_tree(tmp_path, {"a": 0}, {"a": 1}))
    for i in range(3):
        (root / "train" / "a" / f"{i}.jpg").write_bytes(b"x")
    args = make_args(data_path=str(root))
    with pytest.raises(RunError, match=r"no readable image.*jpg") as error:
        list(build_train_loader(args, build_data(args, SMALL), 0, 1).iterate(0))
    assert "\n" not in str(error.value)


def test_each_unreadable_image_has_its_number(capsys: pytest.CaptureFixture[str]) -> None:
    images = UnreadableImages(limit=9)
    images.report(["b", "a"])
    images.report(["a", "c"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("so far")[0] for line in lines] == [
        f"unreadable image: {n} " + f"({i} " for i, n in enumerate("abc", 1)
    ]


def decoded(image: Image.Image, kind: str, **options: object) -> np.ndarray:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    result = decode(stream)
    assert result.mode == "RGB"
    return np.asarray(result)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind: str) -> None:
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    pixels = decoded(Image.fromarray(ramp), kind)
    assert (pixels == (ramp >> 8)[..., None]).all()


def test_odd_modes_become_rgb() -> None:
    red = Image.new("RGB", (8, 8), (200, 10, 10))
    assert np.abs(decoded(red.convert("CMYK"), "JPEG", quality=100).astype(int) - (200, 10, 10)).max() <= 4
    assert (decoded(red.convert("P"), "PNG") == decoded(red.convert("P").convert("RGB"), "PNG")).all()
    assert (decoded(Image.new("1", (8, 8), 1), "PNG") == 255).all()
    half = Image.new("RGBA", (8, 8), (200, 0, 0, 128))
    assert np.abs(decoded(half, "PNG").astype(int) - (227, 127, 127)).max() <= 1  # on white
    assert (decoded(Image.new("LA", (8, 8), (0, 0)), "PNG") == 255).all()
    palette = red.convert("P", palette=Image.Palette.ADAPTIVE)
    assert (decoded(palette, "PNG", transparency=palette.getpixel((0, 0))) == 255).all()


def test_a_photo_beyond_the_warning_level_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", (40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.warns(Image.DecompressionBombWarning):
        assert decoded(image, "PNG").shape == (40, 40, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(Image.DecompressionBombError):
        decoded(image, "PNG")


def test_unreadable_names_fit_one_line(tmp_path: Path) -> None:
    root = Path(make_tree(tmp_path, {}, {"a": 1}))
    (root / "val" / "a" / "two\nlines.jpg").write_bytes(b"x")
    data = build_data(make_args(data_path=str(root), eval=True), SMALL)
    assert data.val[1].bad == (f"{root}/val/a/two?lines.jpg",)


def error_of(**changes: object) -> str:
    with pytest.raises(UserError) as error:
        build_data(make_args(**changes), SMALL)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_folders_show_the_tree(tmp_path: Path) -> None:
    message = error_of(data_path=str(tmp_path / "no"), dataset="IMNET")
    for word in ("does not exist", f"{tmp_path}/no/train/CLASS/*.JPEG", "no/val/CLASS", "image-net.org", "DIGITS"):
        assert word in message
    assert "data/IMAGENETTE" in error_of(dataset="IMAGENETTE")
    file = tmp_path / "file"
    file.write_text("x")
    for dataset in ("FOLDER", "CIFAR10", "FLOWERS102"):
        assert "not a folder" in error_of(data_path=str(file), dataset=dataset)
    assert "neither a folder" in error_of(data_path=str(file), dataset="WDS")


def test_wrong_trees_are_named(tmp_path: Path) -> None:
    only_train = make_tree(tmp_path / "1", {"a": 1}, {})
    assert "1/val does not exist" in error_of(data_path=only_train)
    only_val = make_tree(tmp_path / "2", {}, {"a": 1})
    assert "2/train does not exist" in error_of(data_path=only_val)
    (tmp_path / "2" / "train").mkdir()
    assert "no class folder" in error_of(data_path=only_val)
    extra = make_tree(tmp_path / "3", {"a": 1}, {"a": 1, "b": 1})
    assert "3/val/b is a class" in error_of(data_path=extra) == error_of(data_path=extra, eval=True)
    empty = make_tree(tmp_path / "4", {"a": 0}, {"a": 1})
    assert "train split" in error_of(data_path=empty)
    assert "no image" in error_of(data_path=make_tree(tmp_path / "5", {"a": 1}, {"a": 0}), eval=True)
    wnid = make_tree(tmp_path / "6", {}, {"n01440764": 1, "tench": 1})
    assert "6/val/tench is not one of the 1000" in error_of(data_path=wnid, dataset="IMNET", eval=True)


@pytest.mark.parametrize("dataset", ["CIFAR10", "CIFAR100", "FLOWERS102"])
def test_a_failed_download_says_what_to_fetch(tmp_path: Path, dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network\nhere")

    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", offline)
    message = error_of(dataset=dataset, data_path=str(tmp_path / "new"))
    expected = {"CIFAR10": "cifar-10-python.tar.gz", "CIFAR100": "cifar-100-python", "FLOWERS102": "flowers-102/jpg"}
    assert "download failed" in message and expected[dataset] in message


def test_wrong_shards_are_named(tmp_path: Path) -> None:
    good = [("k", jpeg(1), "1")]
    folder = tmp_path / "s"
    assert "neither a folder" in error_of(dataset="WDS", data_path=str(folder))
    train = write_shard(folder / "train-0.tar", good)
    assert "no val shard" in error_of(dataset="WDS", data_path=str(folder))
    write_shard(folder / "val-0.tar", good)
    assert "train-1.tar does not exist" in error_of(dataset="WDS", data_path=str(folder / "{split}-{0..1}.tar"))
    whole = train.read_bytes()
    for cut in (200, 700, 1536, 1600, 2048, 2300):  # in a header, in a member, between members
        train.write_bytes(whole[:cut])
        assert "train-0.tar is torn" in error_of(dataset="WDS", data_path=str(folder))
    write_shard(train, [("k", jpeg(1), "cat")])
    assert "cls must be" in error_of(dataset="WDS", data_path=str(folder))
    write_shard(train, good)
    (folder / "num_classes").write_text("1")
    assert "class 1" in error_of(dataset="WDS", data_path=str(folder))
    (folder / "num_classes").write_text("many")
    assert "num_classes must hold" in error_of(dataset="WDS", data_path=str(folder))
    assert "local shards" in error_of(dataset="WDS", data_path="https://x/{split}.tar")


def test_an_unreadable_image_in_a_shard_is_named(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_shard(tmp_path / f"{split}.tar", [("good", jpeg(1), "0"), ("bad", b"nothing", "0")])
    args = make_args(dataset="WDS", data_path=str(tmp_path))
    data = build_data(args, SMALL)
    (batch,) = build_eval_loader(args, data.val, 0, 1)
    assert batch.valid.tolist() == [True, False] and batch.bad == (f"{tmp_path}/val.tar:bad",)


def test_a_file_that_is_deleted_later_is_an_unreadable_image(tmp_path: Path) -> None:
    root = make_tree(tmp_path, {"a": 2}, {"a": 1})
    data = build_data(make_args(data_path=root), SMALL)
    (tmp_path / "val" / "a" / "000.png").unlink()
    assert not data.val[0].valid
    write_image(tmp_path / "val" / "a" / "000.png")
    assert data.val[0].valid
