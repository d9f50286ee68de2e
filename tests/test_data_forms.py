"""The forms in which data may come, as docs/data.md has them: lists, shards, iNaturalist, images that a user names."""

import io
import json
import re
import shlex
import tarfile
from pathlib import Path

import pytest
import torch
from runs import make_tree as random_tree
from runs import refusal, succeeds, toy_model
from test_data_errors import error_of
from test_datasets import SMALL, jpeg, make_args, make_tree, write_cifar, write_image
from torchvision import datasets as tv

import sources
from datasets import build_data
from options import parse_args
from run import analyze, visualize
from sources import differing_classes, find_images, readable_names

ROOT = Path(__file__).resolve().parents[1]


def write_members(path: Path, samples: dict[str, dict[str, object]]) -> Path:
    """A shard: members by sample and extension; what is not bytes is written as json or text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for extension, content in {"jpg": jpeg(9), **members}.items():
                text = json.dumps(content) if isinstance(content, (dict, list)) else str(content)
                data = content if isinstance(content, bytes) else text.encode()
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def wds(folder: Path, **changes: object) -> dict[str, object]:
    return {"dataset": "WDS", "data_path": str(folder), **changes}


# Shards


def test_lists_of_shards(tmp_path: Path) -> None:
    for name in ("train-000", "train-001", "more/train-a", "more/train-b", "val-000"):
        write_members(tmp_path / f"{name}.tar", {name[-1]: {"cls": 1}})
    both = f"{tmp_path}/train-{{000..001}}.tar::{tmp_path}/more/train-{{a,b}}.tar"
    data = build_data(make_args(**wds(both, val_path=f"{tmp_path}/val-{{000..000}}.tar")), SMALL)
    assert [data.train.name(i)[-1] for i in range(4)] == ["0", "1", "a", "b"] and len(data.val) == 1
    alone = build_data(make_args(**wds(f"{tmp_path}/train-{{000..001}}.tar", eval=True)), SMALL)
    assert alone.train is None and len(alone.val) == 2 and alone.num_classes == 2
    other = build_data(make_args(**wds(tmp_path, val_path=f"{tmp_path}/train-*.tar")), SMALL)
    assert (len(other.train), len(other.val)) == (2, 2)
    assert "--val_path" in error_of(**wds(both))
    assert "train-002.tar does not exist" in error_of(**wds(f"{tmp_path}/train-{{000..002}}.tar", eval=True))
    assert "no val shard" in error_of(**wds(both, val_path=f"{tmp_path}/{{split}}-9.tar"))
    assert "that are there" in error_of(**wds(both, val_path=f"{tmp_path}/no.tar"))
    assert "local shards, not s3:" in error_of(**wds(f"{both}::s3://x/0.tar", eval=True))


def test_labels_in_json(tmp_path: Path) -> None:
    write_members(tmp_path / "train.tar", {"1": {"json": {"label": "cat"}}, "2": {"json": {"class_name": "ant"}}})
    write_members(tmp_path / "val.tar", {"1": {"json": {"cls": "cat"}}})
    data = build_data(make_args(**wds(tmp_path)), SMALL)
    assert data.class_names == ("ant", "cat") and data.train.targets.tolist() == [1, 0]
    assert data.val.targets.tolist() == [1]
    write_members(tmp_path / "val.tar", {"1": {"json": {"cls": "cow"}}})
    assert "val.tar:1 has class 'cow', which is not among the 2 classes of" in error_of(**wds(tmp_path))
    (tmp_path / "classes.txt").write_text("cow\ncat\nant\n")
    assert build_data(make_args(**wds(tmp_path)), SMALL).train.targets.tolist() == [1, 2]


def test_indices_with_names_in_json(tmp_path: Path) -> None:
    first = {
        "a": {"json": {"label": 2, "class_name": "fox"}},
        "b": {"cls": 0, "json": {"class_name": "owl", "label": 7}},
    }
    write_members(tmp_path / "train.tar", first)
    write_members(tmp_path / "val.tar", {"c": {"json": {"class_id": "1"}}, "d": {"cls": 2, "json": ["no object"]}})
    data = build_data(make_args(**wds(tmp_path)), SMALL)
    assert data.class_names == ("owl", "1", "fox")
    assert (data.train.targets.tolist(), data.val.targets.tolist()) == ([2, 0], [1, 2])
    write_members(tmp_path / "train.tar", {**first, "e": {"cls": 2, "json": {"class_name": "wolf"}}})
    assert "class 2 is called 'fox' and" in error_of(**wds(tmp_path))
    write_members(tmp_path / "train.tar", {**first, "e": {"json": {"label": "wolf"}}})
    assert "classes.txt" in error_of(**wds(tmp_path))
    for lone in (
        {"json": {"text": "a caption"}},
        {"json": b"torn"},
        {"json": {"label": True}},
        {"json": {"label": " "}},
    ):
        write_members(tmp_path / "train.tar", {"x": lone})
        assert "sample x of" in error_of(**wds(tmp_path)) and "lacks a label" in error_of(**wds(tmp_path))


@pytest.mark.parametrize("label", ["9" * 400, "999999999", "100000", "9" * 5000])
def test_a_label_beyond_all_classes_is_refused(tmp_path: Path, label: str) -> None:
    write_members(tmp_path / "val.tar", {"x": {"cls": label}})
    message = error_of(**wds(tmp_path, eval=True))
    assert "sample x of" in message and len(message) < 300
    if len(label) < 1000:
        assert "is above 99999" in message
    write_members(tmp_path / "val.tar", {"x": {"json": {"label": int(label[:400])}}})
    assert "sample x of" in error_of(**wds(tmp_path, eval=True))
    write_members(tmp_path / "val.tar", {"x": {"cls": "0"}})
    (tmp_path / "num_classes").write_text(label if label != "100000" else "²")
    assert "num_classes must hold" in error_of(**wds(tmp_path, eval=True))


# Lists


def write_lists(folder: Path, train: str, val: str) -> dict[str, object]:
    folder.mkdir(exist_ok=True)
    for i in range(4):
        write_image(folder / "im" / f"{i}.png", i)
    (folder / "train.csv").write_text(train)
    (folder / "val.csv").write_text(val)
    return {"dataset": "CSV", "data_path": str(folder)}


@pytest.mark.parametrize(
    "train",
    [
        "im/0.png,cat\nim/1.png,ant\n\nim/2.png,cat\n",
        "path,label\nim/0.png,cat\nim/1.png,ant\nim/2.png,cat",
        "\ufeffid;Label;File\r\n7;cat;im/0.png\r\n8;ant;im/1.png\r\n9;cat;im/2.png\r\n",
        'im/0.png\t"cat"\nim/1.png\tant\nim/2.png\t cat \n',
    ],
    ids=["plain", "header", "semicolons", "tabs"],
)
def test_a_csv_list(tmp_path: Path, train: str) -> None:
    flags = write_lists(tmp_path / "d", train, "im/3.png,cat\nim/gone.png,ant\n")
    data = build_data(make_args(**flags), SMALL)
    assert data.class_names == ("ant", "cat") and data.train.targets.tolist() == [1, 0, 1]
    assert data.train[(2, 0)].valid and data.val[0].valid and data.val.name(0) == f"{tmp_path}/d/im/3.png"
    assert data.val[1].bad == (f"{tmp_path}/d/im/gone.png",)
    evaluated = build_data(make_args(**flags, eval=True), SMALL)
    assert evaluated.class_names == ("ant", "cat") and evaluated.train is None
    named = {"data_path": f"{tmp_path}/d/train.csv", "val_path": f"{tmp_path}/d/val.csv"}
    assert build_data(make_args(**{**flags, **named}), SMALL).val.targets.tolist() == [1, 0]


def test_csv_labels_in_digits_are_indices(tmp_path: Path) -> None:
    flags = write_lists(tmp_path, "im/0.png,0\nim/1.png,3\n", "im/2.png,3\n")
    data = build_data(make_args(**flags), SMALL)
    assert data.class_names == ("0", "1", "2", "3") and data.train.targets.tolist() == [0, 3]
    alone = build_data(make_args(dataset="CSV", data_path=f"{tmp_path}/val.csv", eval=True), SMALL)
    assert alone.val.targets.tolist() == [3]  # not renumbered because others are absent
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\ne\n")
    assert build_data(make_args(**flags), SMALL).class_names == tuple("abcde")
    (tmp_path / "classes.txt").write_text("a\nb\na\n")
    assert "names the class 'a' twice" in error_of(**flags)


@pytest.mark.parametrize(
    ("train", "val", "words"),
    [
        ("im/0.png,cat\nim/1.png\n", "im/2.png,cat", "line 2 of"),
        ("im/0.png,cat\n,cat\n", "im/2.png,cat", "line 2 of"),
        ("what,ever\nim/0.png,cat\n", "im/2.png,cat", "columns path and label"),
        ("im/0.png,cat\n", "im/2.png,dog", "im/2.png of"),
        ("im/0.png,999999999\n", "im/2.png,1", "line 1 of"),
        ("im/0.png,cat\nim/1.png,1\n", "im/2.png,1", "some are names"),
        ("", "im/2.png,1", "train split"),
    ],
)
def test_wrong_lists_are_named(tmp_path: Path, train: str, val: str, words: str) -> None:
    assert words in error_of(**write_lists(tmp_path, train, val))


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path}/train.csv does not exist" in error_of(dataset="CSV", data_path=str(tmp_path))
    (tmp_path / "train.csv").write_bytes(b"\xff\xfe\x00")
    assert "is not a csv list" in error_of(dataset="CSV", data_path=str(tmp_path / "train.csv"), eval=True)
    assert "--val_path LIST" in error_of(dataset="CSV", data_path=str(tmp_path / "train.csv"))


# iNaturalist


def write_inaturalist(root: Path, year: int, folder: str, split_of: dict[str, list[tuple[int, str]]]) -> Path:
    """A small set of one of the years with lists: (category, super category) of the images of each split."""
    root.mkdir(parents=True, exist_ok=True)
    number = 0
    for split, images in split_of.items():
        content: dict[str, list] = {"images": [], "annotations": [], "categories": []}
        for category, kind in images:
            number += 1
            name = f"{kind}/{category}/{number}.jpg"
            write_image(root / folder / name, number)
            content["images"].insert(0, {"id": number, "file_name": f"train_val{year}/{name}"})
            content["annotations"].append({"id": number, "image_id": number, "category_id": category})
        content["categories"] = [{"id": c, "name": f"species {c}", "supercategory": "x"} for c in (10, 2, 7)]
        (root / f"{split}{year}.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(("dataset", "year", "torchvisions"), [("INAT", 2018, False), ("INAT19", 2019, True)])
def test_inaturalist_with_lists(tmp_path: Path, dataset: str, year: int, torchvisions: bool) -> None:
    folder = str(year) if torchvisions else f"train_val{year}"
    split_of = {"train": [(10, "Aves"), (2, "Plantae"), (10, "Aves")], "val": [(7, "Aves")]}
    root = write_inaturalist(tmp_path, year, folder, split_of)
    data = build_data(make_args(dataset=dataset, data_path=str(root)), SMALL)
    assert data.class_names == ("2", "7", "10") and data.train.targets.tolist() == [2, 0, 2]
    assert data.val.targets.tolist() == [1] and data.class_labels[1] == "species 7"
    assert all(data.train[(i, 0)].bad == () for i in range(3))
    assert data.train.name(1) == f"{root}/{folder}/Plantae/2/2.jpg" and data.val[0].valid
    (root / "categories.json").write_text(json.dumps([{"id": 2, "name": "moss"}, {"id": 7, "name": "owl"}]))
    (root / f"train{year}.json").unlink()
    evaluated = build_data(make_args(dataset=dataset, data_path=str(root), eval=True), SMALL)
    assert evaluated.class_labels == ("moss", "owl") and evaluated.val.targets.tolist() == [1]
    flags = {"dataset": dataset, "data_path": str(root)}
    assert f"train{year}.json does not exist; expected {root}/train{year}.json" in error_of(**flags)
    (root / f"train{year}.json").write_text('{"images": ')
    assert "torn or not json" in error_of(**flags)
    (root / f"train{year}.json").write_text('{"images": [], "annotations": [{"category_id": 5, "image_id": 1}]}')
    assert "does not fit together" in error_of(**flags)


def test_inaturalist_2021_has_torchvisions_classes(tmp_path: Path) -> None:
    species = ["Animalia_Annelida_Clitellata_Haplotaxida_Lumbricidae_Lumbricus_terrestris", "A_B_C_D_E_Apis_mellifera"]
    for split in ("train", "valid"):
        for i, name in enumerate(species):
            write_image(tmp_path / f"2021_{split}" / f"{i:05d}_{name}" / "x.jpg", i)
    data = build_data(make_args(dataset="INAT21", data_path=str(tmp_path)), SMALL)
    oracle = tv.INaturalist(str(tmp_path), version="2021_valid")
    assert list(data.class_names) == oracle.all_categories
    assert data.val.targets.tolist() == [category for category, _ in oracle.index]
    assert data.class_labels == ("Lumbricus terrestris", "Apis mellifera")
    for split, name in (("train", "train"), ("valid", "val")):
        (tmp_path / f"2021_{split}").rename(tmp_path / name)
    assert build_data(make_args(dataset="INAT21", data_path=str(tmp_path)), SMALL).class_names == data.class_names


# Names of classes and data sets


def test_imagenets_codes_have_readable_names(tmp_path: Path) -> None:
    assert readable_names(["n01440764", "7", "cat"]) == ("tench", "7", "cat")
    assert readable_names(["n02012849"]) == ("crane (n02012849)",)  # the bird
    assert len(set(readable_names(sources.ImageNetInfo().label_names()))) == 1000
    data = build_data(make_args(data_path=make_tree(tmp_path, {"n01440764": 1, "x": 1}, {"x": 1})), SMALL)
    assert data.class_names == ("n01440764", "x") and data.class_labels == ("tench", "x")


def test_differing_classes_in_one_line() -> None:
    assert differing_classes(("a", "b"), ["a", "b"]) is None
    assert differing_classes(("a", "b"), ("a", "c")) == "class 1 is 'b' in the weights and 'c' in the data"
    assert "in another order" in str(differing_classes(("a", "b"), ("b", "a")))
    text = str(differing_classes(tuple("abcdefg"), tuple("xyz")))
    assert text.startswith("7 and 3 classes: class 0 is 'a' in the weights and 'x'") and "4 more differ" in text
    assert "'b' in the weights and absent in the data" in str(differing_classes(("a", "b"), ("a",)))


def test_one_class_is_noted(tmp_path: Path) -> None:
    data = build_data(make_args(data_path=make_tree(tmp_path, {"cat": 2}, {"cat": 1})), SMALL)
    assert "only one class, cat" in data.notes[-1]


def test_deits_cifar_is_cifar100(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_args(["--data-set", "CIFAR"]).dataset == "CIFAR100"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataset", "DIGITS", "--data_path", "/nope"], "--data_path has no effect with --dataset DIGITS"),
        (["--dataset", "FOLDER", "--data_path", "x", "--val_path", "y"], "(IMAGES, WDS, CSV)"),
        (["--dataset", "CSV", "--val_path", "y"], "--val_path goes with --data_path"),
    ],
)
def test_data_options_without_effect_are_refused(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(capsys, flags)


# Images that a user names


def test_files_folders_and_patterns(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.jpg", "b/deeper/3.png", "a.png", ".hidden.png", "c[1].png"):
        write_image(tmp_path / name)
    (tmp_path / "b" / "notes.txt").write_text("x")
    places = [tmp_path / "c[1].png", f"{tmp_path}/b/*.png", tmp_path / "b", tmp_path / "a.png"]
    found = [str(Path(file).relative_to(tmp_path)) for file in find_images(places)]
    assert found == ["c[1].png", "b/2.png", "b/1.jpg", "b/deeper/3.png", "a.png"]
    for place, words in ((tmp_path / "no", "does not exist"), (f"{tmp_path}/*.bmp", "does not exist")):
        with pytest.raises(sources.UserError, match=words):
            find_images([tmp_path / "a.png", place])
    (tmp_path / "empty").mkdir()
    with pytest.raises(sources.UserError, match=r"--data .*empty holds no image"):
        find_images([tmp_path / "empty"], "--data")


# The documented commands

TEXT = (ROOT / "docs" / "data.md").read_text()
COMMANDS = re.findall(r"^ +python (\S+\.py .+)$", TEXT, re.M)


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small data in the places that docs/data.md names."""
    root = tmp_path_factory.mktemp("documented")
    random_tree(root / "photos", {"cat": 4, "dog": 4}, {"cat": 2, "dog": 2})
    random_tree(root / "data" / "IMNET", {}, {"n01440764": 2, "n01443537": 2})
    write_lists(
        root / "lists", "im/0.png,cat\nim/1.png,dog\nim/2.png,cat\nim/3.png,dog\n", "im/2.png,cat\nim/1.png,dog\n"
    )
    shard = {f"{i}": {"cls": i % 2} for i in range(4)}
    for name in ("train-000", "train-001", "val-000", "val-001"):
        write_members(root / "shards" / f"{name}.tar", shard)
    for name in ("train-a", "train-b"):
        write_members(root / "more" / f"{name}.tar", shard)
    split_of = {"train": [(10, "Aves"), (2, "Aves"), (7, "Aves"), (2, "Aves")], "val": [(2, "Aves"), (7, "Aves")]}
    write_inaturalist(root / "inat18", 2018, "train_val2018", split_of)
    write_inaturalist(root / "inat19", 2019, "train_val2019", split_of)
    random_tree(root / "inat21", {"00000_A_Apis_mellifera": 3, "00001_B_Bubo_bubo": 3}, {"00001_B_Bubo_bubo": 2})
    return root


TOY_FLAGS = "--model deit_digits --device cpu --input_size 32"
RUN_FLAGS = "--batch_size 2 --num_workers 0 --epochs 1 --warmup_epochs 0"


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_commands_run(
    command: str,
    documented: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(documented)
    program, *words = shlex.split(command)
    for flag in ("--output_dir", "--out"):
        if flag in words:
            words[words.index(flag) + 1] = str(tmp_path / words[words.index(flag) + 1])
    words += TOY_FLAGS.split()
    with toy_model():
        if program == "main.py":
            evaluation = RUN_FLAGS.replace("--epochs 1 --warmup_epochs 0", "")
            output = succeeds(capsys, [*words, *(evaluation if "--eval" in words else RUN_FLAGS).split()])
            assert "data: " in output
        else:
            assert {"run/visualize.py": visualize, "run/analyze.py": analyze}[program].main(words) == 0
            assert "wrote" in capsys.readouterr().out


def test_every_data_set_is_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(f"`{name}`" in TEXT for name in [*sources.DATASETS, *sources.DATASET_ALIASES])
    write_cifar(tmp_path, monkeypatch)  # as DIGITS, a set of its own format
    assert build_data(make_args(dataset="CIFAR10", data_path=str(tmp_path)), SMALL).class_labels[0] == "class0"


def test_a_damaged_image_is_named_and_left_out_of_a_picture(
    documented: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    argv = ["merged", "--model", "deit_digits", "--device", "cpu", "--r", "4", "--out", str(tmp_path / "o.png")]
    with toy_model():
        assert visualize.main([*argv, "--images", str(documented / "photos/val/cat"), str(bad)]) == 0
        assert f"unreadable, left out: {bad}" in capsys.readouterr().out
        assert len(json.loads((tmp_path / "o.json").read_text())["blocks"][0]["sizes"]) == 2
        assert visualize.main([*argv, "--images", str(bad)]) == 2
    assert "none of the 1 images can be read" in capsys.readouterr().err


# Small sets


def test_a_batch_larger_than_the_set_is_told_and_resumes(
    documented: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--dataset", "FOLDER", "--data_path", str(documented / "photos"), *TOY_FLAGS.split(), "--num_workers", "0"]
    argv += ["--batch_size", "128", "--accumulation_steps", "8", "--warmup_epochs", "0", "--output_dir", str(tmp_path)]
    with toy_model():
        repeated = succeeds(capsys, [*argv[:-2], "--epochs", "1", "--repeated_aug"])
        assert "an epoch is 1 update of 8 images: 3 of 8, 3 augmented copies of each; 3 epochs see all" in repeated
        output = succeeds(capsys, [*argv, "--epochs", "1"])
        assert "note: a global batch of 1024 (--batch_size 128 x --accumulation_steps 8 x 1 processes)" in output
        assert "larger than the 8 training images: it becomes 8 (8 x 1 x 1)" in output
        assert "copies" not in output
        assert "warning: resumed" not in succeeds(capsys, [*argv, "--epochs", "2", "--resume", "auto"])


def test_a_checkpoint_inside_an_epoch_of_another_order_says_why_it_stops(
    documented: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--dataset", "FOLDER", "--data_path", str(documented / "photos"), *TOY_FLAGS.split(), *RUN_FLAGS.split()]
    with toy_model():
        succeeds(capsys, [*argv, "--output_dir", str(tmp_path)])
        state = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
        for key in ("order", "images", "repeats"):  # as before there was another order
            del state["sampler"][key]
        torch.save({**state, "epoch": 0, "step": 1}, tmp_path / "inside.pth")
        torch.save({**state, "epoch": 0}, tmp_path / "end.pth")
        message = refusal(capsys, [*argv, "--resume", str(tmp_path / "inside.pth")])
        assert "stopped inside an epoch" in message and "order 1 -> 2" in message
        assert "warning: resumed with order 1 -> 2" in succeeds(capsys, [*argv, "--resume", str(tmp_path / "end.pth")])
