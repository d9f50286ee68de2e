"""Data sets, order of an epoch, loaders and transforms, on images made here."""

import io
import itertools
import multiprocessing
import os
import pickle
import random
import re
import signal
import tarfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torchvision import datasets as tv

import sources
from datasets import (
    Data,
    DataConfig,
    GlobalBatches,
    ImageSet,
    TrainLoader,
    bad_image_limit,
    build_data,
    build_eval_loader,
    build_train_loader,
    build_transform,
    fit_batch,
    number_of_workers,
    seeded,
    unnormalise,
    with_own_preprocessing,
)
from models.errors import UserError

SMALL = DataConfig(input_size=32, crop_pct=1.0)
DEFAULTS = {
    "dataset": "FOLDER",
    "data_path": None,
    "val_path": None,
    "loader_timeout": 0.0,
    "batch_size": 4,
    "num_workers": 0,
    "pin_mem": True,
    "max_bad_images": None,
    "limit": None,
    "color_jitter": 0.3,
    "aa": "rand-m9-mstd0.5-inc1",
    "train_interpolation": "bicubic",
    "three_augment": False,
    "src": False,
    "recover": False,
    "reprob": 0.25,
    "remode": "pixel",
    "recount": 1,
    "repeated_aug": False,
    "hflip": 0.5,
    "eval": False,
    "seed": 0,
    "device": "cpu",
    "accumulation_steps": 1,
}


def make_args(**changes: object) -> Namespace:
    return Namespace(**{**DEFAULTS, **changes})


def write_image(path: Path, colour: int = 0, size: tuple[int, int] = (40, 36)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(colour).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def make_tree(root: Path, train: dict[str, int], val: dict[str, int]) -> str:
    count = itertools.count()
    for split, classes in (("train", train), ("val", val)):
        for name, n in classes.items():
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                write_image(root / split / name / f"{i:03d}.png", next(count))
    return str(root)


@pytest.fixture
def tree(tmp_path: Path) -> str:
    return make_tree(tmp_path / "data", {"a": 6, "b": 7, "c": 8}, {"a": 2, "c": 3})


def batches_of(loader_or_batches) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(loader_or_batches)
    return torch.cat([b.images for b in batches]), torch.cat([b.targets for b in batches])


def test_digits_is_a_fixed_stratified_split_with_unit_variance() -> None:
    args = make_args(dataset="DIGITS", aa="none", hflip=0.0, reprob=0.0, color_jitter=0.0)
    data = build_data(args, with_own_preprocessing(SMALL, "DIGITS"))
    assert (len(data.train), len(data.val), data.num_classes) == (1437, 360, 10)
    counts = np.bincount(data.val.targets)
    assert counts.min() >= 35 and counts.max() <= 37
    plain = ImageSet(data.train.source, data.val.transform, 32, range(0, 1437))
    pixels = torch.stack([plain[i].image for i in range(len(plain))])
    assert pixels.shape[1:] == (3, 32, 32)
    assert abs(pixels.mean()) < 1e-3 and abs(pixels.std() - 1) < 1e-3
    assert data.config.mean == sources.DIGITS_MEAN and SMALL.mean != sources.DIGITS_MEAN


def test_digits_at_other_sizes_keeps_the_whole_digit_in_view() -> None:
    args = make_args(dataset="DIGITS", eval=True)
    data = build_data(args, with_own_preprocessing(DataConfig(input_size=64, crop_pct=0.5), "DIGITS"))
    shown = unnormalise(data.val[0].image, data.config)
    whole = np.asarray(data.val.read(0), dtype=np.float32).transpose(2, 0, 1) / 255
    assert data.train is None and np.allclose(shown.numpy(), whole, atol=1e-4)


def test_folder_takes_classes_from_train_and_notes_those_absent_in_val(tree: str) -> None:
    data = build_data(make_args(data_path=tree), SMALL)
    assert data.class_names == ("a", "b", "c") and len(data.train) == 21
    assert data.val.targets.tolist() == [0, 0, 2, 2, 2]
    assert len(data.notes) == 1 and "b" in data.notes[0]


def test_eval_needs_val_only_and_numbers_classes_as_training_does(tree: str, tmp_path: Path) -> None:
    data = build_data(make_args(data_path=tree, eval=True), SMALL)
    assert data.train is None and data.val.targets.tolist() == [0, 0, 2, 2, 2]
    alone = make_tree(tmp_path / "alone", {}, {"x": 1, "y": 2})
    data = build_data(make_args(data_path=alone, eval=True), SMALL)
    assert data.class_names == ("x", "y") and data.val.targets.tolist() == [0, 1, 1]


def test_files_that_are_no_images_are_left_out(tmp_path: Path) -> None:
    root = Path(make_tree(tmp_path / "d", {"a": 2, "empty": 0}, {"a": 1}))
    for name in (".hidden.png", "notes.txt", "._0.png"):
        (root / "train" / "a" / name).write_bytes(b"x")
    (root / "train" / ".cache").mkdir()
    (root / "train" / "labels.csv").write_text("x")
    os.mkfifo(root / "train" / "a" / "pipe.png")  # opening it would block for ever
    (root / "train" / "a" / "loop").symlink_to(root / "train" / "a")
    write_image(root / "train" / "a" / "deeper" / "UPPER.JPEG")
    data = build_data(make_args(data_path=str(root)), SMALL)
    names = [Path(data.train.name(i)).name for i in range(len(data.train))]
    assert names == ["000.png", "001.png", "UPPER.JPEG"]
    assert data.num_classes == 2


def test_imnet_has_the_1000_classes_whatever_folders_there_are(tmp_path: Path) -> None:
    wnids = ImageNetInfo().label_names()
    assert wnids == sorted(wnids) and len(wnids) == 1000
    root = make_tree(tmp_path, {}, {wnids[7]: 1, wnids[999]: 2})
    data = build_data(make_args(dataset="IMNET", data_path=root, eval=True), SMALL)
    assert data.num_classes == 1000 and data.val.targets.tolist() == [7, 999, 999]
    assert "998 of 1000" in data.notes[0]


def test_limit_takes_every_so_manieth_image(tree: str) -> None:
    full = build_data(make_args(data_path=tree), SMALL)
    data = build_data(make_args(data_path=tree, limit=8), SMALL)  # 21 / 8 -> every third
    assert [data.train.name(i) for i in range(len(data.train))] == [full.train.name(i) for i in range(0, 21, 3)]
    assert data.train.targets.tolist() == full.train.targets[::3].tolist()
    assert len(data.val) == 5
    assert len(build_data(make_args(data_path=tree, limit=1), SMALL).train) == 1


REAL = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.mark.skipif(not REAL.is_dir(), reason="no real images here")
def test_real_imagenet_folders() -> None:
    args = make_args(dataset="IMNET", data_path=str(REAL / "imagenet_mini"), eval=True, limit=210)
    data = build_data(args, DataConfig())
    assert len(data.val) == 210 and not data.notes
    oracle = tv.ImageFolder(str(REAL / "imagenet_mini" / "val"))
    assert [data.val.name(i) for i in range(210)] == [path for path, _ in oracle.samples[::11]]
    assert data.val.targets.tolist() == oracle.targets[::11]
    assert data.val[3].image.shape == (3, 224, 224)


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for i, name in enumerate(names):
        pixels = np.full((4, 3072), i, dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [0, 1, 2, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{i}" for i in range(10)]}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: os.path.exists(path))


def test_cifar_is_read_in_torchvisions_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch)
    data = build_data(make_args(dataset="CIFAR10", data_path=str(tmp_path)), SMALL)
    assert (len(data.train), len(data.val), data.num_classes) == (20, 4, 10)
    assert data.class_names[9] == "class9" and data.val.targets.tolist() == [0, 1, 2, 9]
    assert torch.allclose(unnormalise(data.val[0].image, data.config), torch.tensor(5 / 255), atol=1e-6)
    assert data.train.name(3) == "CIFAR10 train image 3"


def test_flowers_trains_on_train_and_val(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    base = tmp_path / "flowers-102"
    for i in range(1, 7):
        write_image(base / "jpg" / f"image_{i:05d}.jpg", i)
    scipy_io.savemat(base / "setid.mat", {"trnid": [1, 2], "valid": [3, 4], "tstid": [5, 6]})
    scipy_io.savemat(base / "imagelabels.mat", {"labels": [1, 2, 3, 102, 1, 102]})
    monkeypatch.setattr(tv.Flowers102, "_check_integrity", lambda self: True)
    data = build_data(make_args(dataset="FLOWERS102", data_path=str(tmp_path)), SMALL)
    assert data.train.targets.tolist() == [0, 1, 2, 101] and data.val.targets.tolist() == [0, 101]
    assert data.num_classes == 102 and data.val.name(1).endswith("flowers-102/jpg/image_00006.jpg")
    assert data.val[0].valid


def write_shard(path: Path, samples: list[tuple[str, bytes, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, image, label in samples:
            for name, content in ((f"{key}.cls", label.encode()), (f"{key}.jpg", image), (f"{key}.json", b"{}")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def jpeg(colour: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), (colour, colour, colour)).save(stream, "JPEG", quality=95)
    return stream.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for s in range(3):
        write_shard(
            tmp_path / f"train-{s:03d}.tar", [(f"dir.x/{s}{i}", jpeg(10 * s + i), str(i % 4)) for i in range(5)]
        )
    write_shard(tmp_path / "val-000.tar", [(f"v{i}", jpeg(100 + i), f"{i}\n") for i in range(3)])
    return tmp_path


def test_wds_reads_every_sample_of_every_shard(shards: Path) -> None:
    data = build_data(make_args(dataset="WDS", data_path=str(shards)), SMALL)
    assert (len(data.train), len(data.val), data.num_classes) == (15, 3, 4)
    assert data.train.targets.tolist() == [i % 4 for _ in range(3) for i in range(5)]
    grey = [round(float(np.asarray(data.train.read(i)).mean())) for i in range(15)]
    assert grey == [10 * s + i for s in range(3) for i in range(5)]
    assert data.train.name(5) == f"{shards}/train-001.tar:dir.x/10"


def test_wds_patterns_and_class_lists(shards: Path) -> None:
    pattern = str(shards / "{split}-*.tar")
    assert len(build_data(make_args(dataset="WDS", data_path=pattern), SMALL).train) == 15
    evaluated = build_data(make_args(dataset="WDS", data_path=pattern, eval=True), SMALL)
    assert evaluated.num_classes == 4 and evaluated.train is None  # val alone has 3
    (shards / "num_classes").write_text("7\n")
    assert build_data(make_args(dataset="WDS", data_path=pattern, eval=True), SMALL).num_classes == 7
    (shards / "classes.txt").write_text("p\nq\nr\ns\nt\n")
    assert build_data(make_args(dataset="WDS", data_path=str(shards)), SMALL).class_names == tuple("pqrst")
    assert sources.expand_braces("x{08..10}{a,b}") == ["x08a", "x08b", "x09a", "x09b", "x10a", "x10b"]


def test_wds_in_split_folders(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_shard(tmp_path / split / "0.tar", [("k", jpeg(3), "1")])
    for where in (tmp_path, tmp_path / "{split}" / "{0..0}.tar"):
        assert len(build_data(make_args(dataset="WDS", data_path=str(where)), SMALL).train) == 1


LAYOUTS = [(1, 1, 1), (4, 1, 1), (3, 2, 2), (16, 1, 1), (7, 3, 2), (64, 1, 1), (8, 4, 4), (128, 8, 1)]


def order_seen(n: int, world: int, rank: int, batch_size: int, **changes: object) -> list[list[tuple[int, int]]]:
    batches = GlobalBatches(n, make_args(batch_size=batch_size, **changes), rank, world)
    batches.epoch = 3
    assert len(list(batches)) == len(batches)
    return list(batches)


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize(("world", "accumulation", "batch_size"), [(1, 3, 8), (2, 3, 4), (4, 1, 6), (3, 2, 4)])
def test_every_layout_sees_the_same_global_batches(
    repeated: bool, world: int, accumulation: int, batch_size: int
) -> None:
    changes = {"repeated_aug": repeated, "accumulation_steps": accumulation}
    ranks = [order_seen(600, world, rank, batch_size, **changes) for rank in range(world)]
    assert all(len(r) % accumulation == 0 for r in ranks)
    whole = order_seen(600, 1, 0, 24, repeated_aug=repeated)
    for g, expected in enumerate(whole):
        parts = [micro for r in ranks for micro in r[g * accumulation : (g + 1) * accumulation]]
        assert sorted(itertools.chain(*parts)) == sorted(expected)
    assert len(ranks[0]) == len(whole) * accumulation == 600 // 24 * accumulation


def test_an_epoch_is_a_permutation_and_epochs_and_seeds_differ() -> None:
    batches = GlobalBatches(24, make_args(), 0, 1)
    assert sorted(batches.order(0)) == list(range(24))
    assert batches.order(0).tolist() != batches.order(1).tolist()
    assert batches.order(0).tolist() != GlobalBatches(24, make_args(seed=1), 0, 1).order(0).tolist()
    assert GlobalBatches(26, make_args(), 0, 1).steps == 6  # the last two images are dropped


GRID = [(n, b, k, w) for n in (1, 2, 5, 26, 100, 160, 161, 500, 3001) for b, k, w in LAYOUTS]


@pytest.mark.parametrize("repeated", [False, True])
def test_every_image_is_seen_equally_often(repeated: bool) -> None:
    """In an epoch an image occurs k or k + 1 times (or as many groups of copies), and what it left out comes next."""
    checked = 0
    for n, batch_size, accumulation, world in GRID:
        asked = make_args(batch_size=batch_size, accumulation_steps=accumulation, repeated_aug=repeated)
        try:
            args, _ = fit_batch(asked, n, world)
        except UserError:  # more processes than images
            continue
        batches = GlobalBatches(n, args, 0, world)
        copies, total = batches.repeats, np.zeros(n, dtype=int)
        cut = batches.samples % copies != 0  # the last image of an epoch then has fewer copies than the others
        for epoch in range(9):
            counts = np.bincount(batches.order(epoch), minlength=n)
            groups = -(-counts // copies)
            assert counts.sum() == batches.samples and np.ptp(groups) <= 1, (n, batch_size, world, epoch)
            total += groups
            assert np.ptp(total) <= 2
            if (epoch + 1) % batches.turns == 0:
                assert np.ptp(total) <= 1, (n, batch_size, accumulation, world, epoch)
            assert (counts % copies != 0).sum() <= cut
        checked += 1
    assert checked > 50


@pytest.mark.parametrize(("n", "seen_after_three"), [(160, 160), (1200, 1200), (1000, 1000)])
def test_three_epochs_of_repeated_augmentation_see_all_images(n: int, seen_after_three: int) -> None:
    batches = GlobalBatches(n, make_args(repeated_aug=True, batch_size=8), 0, 1)
    orders = [batches.order(epoch) for epoch in range(6)]
    assert all(len(set(order.tolist())) == -(-n // 3) for order in orders)
    assert len(set(np.concatenate(orders[:3]).tolist())) == seen_after_three
    first, second = ({*orders[0].tolist()}, {*orders[3].tolist()})
    assert 0.1 < len(first & second) / len(first) < 0.6  # the thirds are drawn anew in each cycle


def test_an_epoch_of_imagenet_is_as_long_as_deits() -> None:
    args = make_args(repeated_aug=True, batch_size=128)
    assert GlobalBatches(1281167, args, 0, 8).updates == 1251


@pytest.mark.parametrize(
    ("n", "batch_size", "accumulation", "world", "becomes"),
    [
        (160, 128, 8, 1, (128, 1)),  # the finetuning scripts on a laptop
        (8, 16, 1000, 1, (8, 1)),
        (160, 16, 1, 1, (16, 1)),
        (160, 128, 1, 8, (20, 1)),
        (100, 64, 1, 2, (50, 1)),
        (100, 7, 20, 1, (7, 14)),
        (5, 7, 1, 1, (5, 1)),
        (5, 8, 1, 1, (4, 1)),  # even, for mixup
        (1, 8, 1, 1, (2, 1)),
    ],
)
def test_a_batch_fits_the_set(n: int, batch_size: int, accumulation: int, world: int, becomes: tuple[int, int]) -> None:
    args = make_args(batch_size=batch_size, accumulation_steps=accumulation)
    fitted, line = fit_batch(args, n, world)
    assert (fitted.batch_size, fitted.accumulation_steps) == becomes
    assert (args.batch_size, args.accumulation_steps) == (batch_size, accumulation)
    if becomes == (batch_size, accumulation):
        assert line is None and fitted is args
    else:
        for number in (batch_size * accumulation * world, n, becomes[0] * becomes[1] * world):
            assert re.search(rf"\b{number}\b", line)


def test_more_processes_than_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"8 processes .* 5 training images; start at most 2"):
        fit_batch(make_args(batch_size=16), 5, 8)


@pytest.mark.parametrize(
    ("asked", "images", "workers"), [(None, 64, 0), (None, 160, 1), (None, 1000, 7), (None, 10**6, 10), (3, 64, 3)]
)
def test_small_sets_get_few_workers(asked: int | None, images: int, workers: int, monkeypatch) -> None:
    monkeypatch.setattr("datasets._cores", lambda: 64)
    assert number_of_workers(asked, images) == workers
    monkeypatch.setattr("datasets._cores", lambda: 2)
    assert number_of_workers(asked, images) == min(2, workers)


def test_an_epoch_is_described() -> None:
    def words(n: int, **changes: object) -> str:
        return TrainLoader(GlobalBatches(n, make_args(**changes), 0, 1), None).describe()

    assert words(160, batch_size=16, repeated_aug=True) == (
        "an epoch is 10 updates of 16 images: 54 of 160, 3 augmented copies of each; 3 epochs see all of them"
    )
    assert words(160, batch_size=16) == "an epoch is 10 updates of 16 images"
    assert words(170, batch_size=16) == "an epoch is 10 updates of 16 images: 160 of 170; the others come in the next"


def test_small_sets_are_not_repeated_by_default() -> None:
    for n, repeats in ((160, 1), (9_999, 1), (10_000, 3), (1_281_167, 3)):
        assert GlobalBatches(n, make_args(repeated_aug=None), 0, 1).repeats == repeats
        assert GlobalBatches(n, make_args(repeated_aug=True), 0, 1).repeats == 3


def test_repeated_augmentation_is_deits_sampler() -> None:
    n, world = 600, 4
    batches = [GlobalBatches(n, make_args(repeated_aug=True, batch_size=8), r, world) for r in range(world)]
    mine = [[index for micro in b._batches(0, 0) for index, _ in micro] for b in batches]
    permutation = list(dict.fromkeys(batches[0].order(0).tolist()))  # oracle: DeiT's samplers.py, with this permutation
    repeated = [i for i in permutation for _ in range(3)]
    selected = 576 // world  # 18 updates of 32; DeiT would round 600 down to a multiple of 256 first
    assert mine == [repeated[r::world][:selected] for r in range(world)]
    seeds = [seed for b in batches for micro in b._batches(0, 0) for _, seed in micro]
    assert len(set(seeds)) == len(seeds) == 576  # copies differ


def test_a_set_smaller_than_a_global_batch_is_repeated_to_fill_it() -> None:
    seen = [pair for rank in range(2) for micro in order_seen(2, 2, rank, 3, accumulation_steps=2) for pair in micro]
    assert len(seen) == 12 and len({seed for _, seed in seen}) == 12
    assert sorted(index for index, _ in seen) == [0] * 6 + [1] * 6


def test_workers_resuming_and_layout_do_not_change_a_sample(tree: str) -> None:
    args = make_args(data_path=tree, repeated_aug=True)
    data = build_data(args, SMALL)
    loader = build_train_loader(args, data, 0, 1)
    assert len(loader) == 5
    images, targets = batches_of(loader.iterate(1))
    with_workers = build_train_loader(make_args(data_path=tree, repeated_aug=True, num_workers=2), data, 0, 1)
    again, labels = batches_of(with_workers.iterate(1))
    assert torch.equal(images, again) and torch.equal(targets, labels)
    tail, _ = batches_of(with_workers.iterate(1, start=3))  # after an epoch: the same workers
    assert torch.equal(tail, images[12:])
    next(with_workers.iterate(0))  # an epoch left half-way
    assert torch.equal(batches_of(with_workers.iterate(1, start=4))[0], images[16:])
    assert list(loader.iterate(1, start=5)) == []
    halves = [batches_of(build_train_loader(make_args(data_path=tree, repeated_aug=True, batch_size=2), data, r, 2)
                         .iterate(1))[0] for r in range(2)]  # fmt: skip
    assert torch.equal(torch.stack(halves, dim=1).flatten(0, 1), images)


def test_skipped_batches_are_not_decoded(tree: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = make_args(data_path=tree)
    data = build_data(args, SMALL)
    read = []
    original = ImageSet.read
    monkeypatch.setattr(ImageSet, "read", lambda self, index: read.append(index) or original(self, index))
    list(build_train_loader(args, data, 0, 1).iterate(0, start=4))
    assert len(read) == 4


def test_loaders_leave_the_global_random_streams_alone(tree: str) -> None:
    args = make_args(data_path=tree)
    data = build_data(args, SMALL)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    list(build_train_loader(args, data, 0, 1).iterate(0))
    list(build_eval_loader(args, data.val, 0, 1))
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_signal_to_the_whole_process_group_does_not_end_workers(tree: str) -> None:
    args = make_args(data_path=tree, num_workers=1)
    loader = build_train_loader(args, build_data(args, SMALL), 0, 1)
    expected, _ = batches_of(loader.iterate(0))
    batches = loader.iterate(0)
    first = next(batches)
    for worker in multiprocessing.active_children():
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(worker.pid, number)
    assert torch.equal(torch.cat([first.images, *(b.images for b in batches)]), expected)


def test_a_set_can_be_sent_to_spawned_workers(tree: str) -> None:
    data = build_data(make_args(data_path=tree, aa="none"), SMALL)
    copy = pickle.loads(pickle.dumps(data.train))
    assert torch.equal(copy[(3, 5)].image, data.train[(3, 5)].image)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_evaluation_counts_each_image_once(tree: str, world: int, workers: int) -> None:
    args = make_args(data_path=tree, batch_size=2, num_workers=workers)
    data = build_data(args, SMALL)
    loaders = [build_eval_loader(args, data.val, rank, world) for rank in range(world)]
    per_rank = [list(loader) for loader in loaders]
    assert [len(loader) for loader in loaders] == [len(batches) for batches in per_rank]
    images = torch.cat([b.images for batches in per_rank for b in batches])
    expected = torch.stack([data.val[i].image for r in range(world) for i in range(r, 5, world)])
    assert torch.equal(images, expected)
    assert all(b.valid.all() and b.bad == () for batches in per_rank for b in batches)


def test_two_images_of_one_class_train(tmp_path: Path) -> None:
    args = make_args(data_path=make_tree(tmp_path, {"only": 2}, {"only": 1}), batch_size=64, num_workers=2)
    data = build_data(args, SMALL)
    loader = build_train_loader(args, data, 0, 1)
    (batch,) = loader.iterate(0)
    assert len(loader) == 1 and batch.images.shape == (64, 3, 32, 32) and data.num_classes == 1
    assert not torch.equal(batch.images[0], batch.images[2])  # copies of one image are augmented apart


def test_bad_image_limit(tree: str) -> None:
    data = build_data(make_args(data_path=tree), SMALL)
    assert bad_image_limit(make_args(), data) == 10
    assert bad_image_limit(make_args(max_bad_images=0), data) == 0
    big = Data(ImageSet(data.train.source, data.train.transform, 32, range(0, 20000)), data.val, 3, (), "", SMALL)
    assert bad_image_limit(make_args(), big) == 20


def noise_image(size: tuple[int, int] = (300, 200)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


VARIANTS = [
    {},
    {"aa": "none", "recount": 2, "remode": "rand"},
    {"aa": "augmix-m5-w4", "reprob": 1.0},
    {"train_interpolation": "random", "color_jitter": 0.0},
    {"three_augment": True},
    {"three_augment": True, "src": True},
]


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("size", [32, 64])
def test_training_transforms_are_functions_of_the_seed(changes: dict[str, object], size: int) -> None:
    transform = build_transform(make_args(**changes), DataConfig(input_size=size), train=True)
    image = noise_image()
    results = []
    for seed in (1, 1, 2):
        with seeded(seed):
            results.append(transform(image))
    assert results[0].shape == (3, size, size) and results[0].isfinite().all()
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 2)])
def test_odd_shapes_pass_every_transform(tmp_path: Path, size: tuple[int, int]) -> None:
    path = write_image(tmp_path / "x.png", size=size)
    with open(path, "rb") as stream:
        image = sources.decode(stream)
    for changes in VARIANTS:
        args = make_args(**changes)
        for train in (True, False):
            result = build_transform(args, DataConfig(input_size=64), train)(image)
            assert result.shape == (3, 64, 64) and result.isfinite().all()


def test_three_augment_changes_each_image_in_one_of_three_ways() -> None:
    args = make_args(three_augment=True, src=True, color_jitter=0.0, hflip=0.0)
    transform = build_transform(args, DataConfig(input_size=32, mean=(0, 0, 0), std=(1, 1, 1)), train=True)
    image = Image.new("RGB", (32, 32), (250, 40, 130))
    colours = set()
    for seed in range(40):
        with seeded(seed):
            pixels = (transform(image) * 255).round()
        colours.add(tuple(int(v) for v in pixels[:, 16, 16]))
    assert colours == {(113, 113, 113), (5, 40, 125), (250, 40, 130)}  # gray, solarized, blurred flat colour


def test_evaluation_resizes_by_the_crop_ratio_and_cuts_the_centre() -> None:
    config = DataConfig(input_size=64, crop_pct=0.9)
    image = noise_image((300, 200))
    result = build_transform(make_args(), config, train=False)(image)
    resized = image.resize((int(71 * 300 / 200), 71), Image.Resampling.BICUBIC)  # floor(64 / 0.9) = 71
    left, top = round((resized.width - 64) / 2), round((71 - 64) / 2)
    expected = np.asarray(resized.crop((left, top, left + 64, top + 64)), dtype=np.float32) / 255
    assert np.allclose(unnormalise(result, config).permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_small_inputs_are_shifted_not_rescaled() -> None:
    args = make_args(aa="none", reprob=0.0, color_jitter=0.0, hflip=0.0)
    transform = build_transform(args, DataConfig(input_size=32, mean=(0, 0, 0), std=(1, 1, 1)), train=True)
    image = noise_image((32, 32))
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0))).transpose(2, 0, 1) / np.float32(255)
    with seeded(5):
        result = transform(image).numpy()
    windows = [padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    assert sum(np.array_equal(result, window) for window in windows) == 1


def test_recipes_name_arguments_that_exist() -> None:
    known = set(DEFAULTS) | {"input_size", "model", "epochs", "lr", "weight_decay", "warmup_epochs", "drop_path"}
    known |= {"smoothing", "mixup", "cutmix", "model_ema", "model_ema_decay", "min_lr", "warmup_lr", "clip_grad"}
    assert set(sources.RECIPES["DIGITS"]) <= known and set(sources.RECIPES) <= set(sources.DATASETS)


def test_bad_arguments_are_told_in_one_line(tree: str) -> None:
    cases = [
        ({"aa": "rand-zz9"}, "--aa rand-zz9"),
        ({"train_interpolation": "cubic"}, "--train_interpolation cubic"),
    ]
    for changes, word in cases:
        with pytest.raises(UserError, match=word) as error:
            build_data(make_args(data_path=tree, **changes), SMALL)
        assert "\n" not in str(error.value)


def test_strongest_augmentation_never_raises() -> None:
    """timm posterizes to 0 bits at full strength, which the default reaches in about one image of a thousand."""
    transform = build_transform(make_args(aa="rand-m10-n8-inc1"), DataConfig(input_size=48), train=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for seed in range(40):
        with seeded(seed):
            assert transform(image).isfinite().all()
