"""LOST: golden boxes, ties, the baseline, the measure, and Pascal VOC's trees."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from matplotlib.figure import Figure

from analysis import lost as lost_instrument
from analysis.lost import LostOptions, box_iou, component_box, corloc, dino_seg, lost
from analysis.voc import open_voc, read_objects
from analysis.walk import allow_any_size
from models import MergeConfig, UserError

VOC = Path(__file__).resolve().parents[2] / "shared" / "data" / "voc2012_100"
SIDE, PATCH = 6, 16
STUDY = LostOptions(center=True, normalize=True, bias=0.05)


def scene(*parts: tuple[range, range]) -> torch.Tensor:
    """Features of a grid: background (1,0), foreground (-0.1,1) in rows x columns of every part."""
    features = torch.tensor([1.0, 0.0]).repeat(SIDE, SIDE, 1)
    for rows, columns in parts:
        for row in rows:
            for column in columns:
                features[row, column] = torch.tensor([-0.1, 1.0])
    return features.view(-1, 2)


ONE = (range(2, 5), range(1, 3))
GOLDEN = {
    "A": ([ONE], (96, 96), None, [16, 32, 48, 80], 13, None),
    "B": ([(range(3, 6), range(4, 6))], (90, 95), None, [64, 48, 95, 90], 22, {5, 29}),
    "C": ([(range(2), range(2)), (range(4, 6), range(4, 6))], (96, 96), None, [0, 0, 32, 32], 0, {7, 27}),
    "D": ([(range(2), range(2)), (range(2, 4), range(2, 4))], (96, 96), None, [0, 0, 32, 32], 0, None),
    "E": ([ONE], (96, 96), STUDY, [16, 32, 48, 80], 13, None),
    "F": ([(range(1, 6), range(1, 6))], (96, 96), None, [0, 0, 96, 96], 0, {10, 24}),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_boxes(case: str) -> None:
    parts, size, options, box, seed, degrees = GOLDEN[case]
    found = lost(scene(*parts), (SIDE, SIDE), PATCH, size, options)
    assert list(found.box) == box
    assert found.seed == seed
    assert degrees is None or set(found.degrees.tolist()) == degrees
    assert seed in found.expansion
    assert found.mask.shape == (SIDE, SIDE)


def test_a_grid_with_more_columns_than_rows() -> None:
    features = torch.tensor([1.0, 0.0]).repeat(3, 8, 1)
    features[1, 5:7] = torch.tensor([-0.1, 1.0])
    found = lost(features.view(-1, 2), (3, 8), 4, (12, 32))
    assert found.box == (20, 4, 28, 8) and found.seed == 8 + 5


def test_k_limits_what_joins_the_seed() -> None:
    features = scene(*GOLDEN["C"][0])
    assert len(lost(features, (SIDE, SIDE), PATCH, (96, 96), LostOptions(k=3)).expansion) == 3
    assert len(lost(features, (SIDE, SIDE), PATCH, (96, 96)).expansion) == 8


def test_a_seed_outside_the_mask_gives_its_own_cell() -> None:
    mask = np.zeros((3, 4), dtype=bool)
    assert component_box(mask, 6, 10) == (20, 10, 30, 20)
    zeros = torch.zeros(9, 2)
    assert lost(zeros, (3, 3), 10, (25, 25)).box == (0, 0, 10, 10)


def test_dino_seg_boxes_the_biggest_part_whichever_comes_last() -> None:
    for big, small in (((0, 0), (3, 4)), ((3, 3), (0, 0))):  # the published code forgets the last part
        attention = torch.full((5, 5), 0.001)
        attention[big[0] : big[0] + 2, big[1] : big[1] + 2] = 1.0
        attention[small] = 1.2
        x, y = big[1] * 8, big[0] * 8
        assert dino_seg(attention.flatten(), (5, 5), 8, (40, 40), share=0.9) == (x, y, x + 16, y + 16)
    only = torch.zeros(4, 4)
    only[1, 2] = 1.0  # one part: the published code boxes the background
    assert dino_seg(only.flatten(), (4, 4), 8, (32, 32)) == (16, 8, 24, 16)


def test_dino_seg_keeps_the_stated_mass() -> None:
    attention = torch.tensor([0.5, 0.25, 0.125, 0.125])
    assert dino_seg(attention, (1, 4), 1, (1, 4), share=0.5) == (0, 0, 1, 1)
    assert dino_seg(attention, (1, 4), 1, (1, 4), share=0.6) == (0, 0, 2, 1)


def test_overlap_by_hand() -> None:
    others = np.array([[0, 0, 10, 10], [5, 5, 15, 15], [20, 20, 30, 30], [0, 0, 5, 10]])
    expected = [1.0, 25 / 175, 0.0, 0.5]
    np.testing.assert_allclose(box_iou((0, 0, 10, 10), others), expected, atol=1e-6)
    assert corloc([0.5, 0.49, 0.9, 0.0]) == 0.5
    assert np.isnan(corloc([]))


def write_annotation(file: Path, *objects: tuple[int, int, int, int, int, int]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    body = "".join(
        f"<object><truncated>{truncated}</truncated><difficult>{difficult}</difficult><bndbox><xmin>{a}</xmin>"
        f"<ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
        for a, b, c, d, truncated, difficult in objects
    )
    file.write_text(f"<annotation>{body}</annotation>")


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    for year, names in (("2007", ("000001", "000002", "000003")), ("2012", ("2008_000001",))):
        tree = tmp_path / "VOCdevkit" / f"VOC{year}"
        (tree / "ImageSets" / "Main").mkdir(parents=True)
        (tree / "JPEGImages").mkdir()
        (tree / "ImageSets" / "Main" / "trainval.txt").write_text("\n".join(names) + "\n")
        (tree / "ImageSets" / "Main" / "dog_trainval.txt").write_text("000001 -1\n")
        for name in names:
            write_annotation(tree / "Annotations" / f"{name}.xml", (11, 21, 30, 40, 0, 0), (1, 1, 5, 5, 1, 0))
    write_annotation(tmp_path / "VOCdevkit/VOC2007/Annotations/000002.xml", (1, 1, 5, 5, 0, 1))
    return tmp_path


@pytest.mark.parametrize("place", [".", "VOCdevkit", "VOCdevkit/VOC2007"])
def test_voc_devkit_trees(devkit: Path, place: str) -> None:
    year = None if place.endswith("2007") else 2007
    images = open_voc(devkit / place, year, "trainval", no_hard=False)
    assert [image.name for image in images] == ["000001", "000002", "000003"]
    assert images[0].boxes.tolist() == [[10, 20, 30, 40], [0, 0, 5, 5]]
    assert images[0].file == devkit / "VOCdevkit" / "VOC2007" / "JPEGImages" / "000001.jpg"


def test_no_hard_drops_objects_and_images_that_have_no_other(devkit: Path) -> None:
    images = open_voc(devkit, 2007, "trainval", no_hard=True)
    assert [image.name for image in images] == ["000001", "000003"]
    assert images[0].boxes.tolist() == [[10, 20, 30, 40]]


@pytest.mark.parametrize(
    ("place", "year", "split", "message"),
    [
        ("VOCdevkit", None, "trainval", "choose one by --year"),
        ("VOCdevkit/VOC2007", 2012, "trainval", "has no VOC2012"),
        ("VOCdevkit", 2007, "test", "--set is one of trainval"),
        ("VOCdevkit/VOC2007/JPEGImages", None, "trainval", "expected VOCdevkit"),
        ("nowhere", None, "trainval", "not a folder"),
    ],
)
def test_trees_that_are_not_there(devkit: Path, place: str, year: int | None, split: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_voc(devkit / place, year, split, no_hard=False)


def test_a_damaged_annotation_is_named(tmp_path: Path) -> None:
    file = tmp_path / "torn.xml"
    for text in ("<annotation><obj", "<annotation><object><bndbox><xmin>a</xmin></bndbox></object></annotation>"):
        file.write_text(text)
        with pytest.raises(UserError, match="torn.xml"):
            read_objects(file, no_hard=False)


@pytest.mark.skipif(not VOC.is_dir(), reason="no Pascal VOC images in ../shared/data")
def test_the_folder_of_a_hundred_images() -> None:
    images = open_voc(VOC, None, "trainval", no_hard=False)
    assert len(images) == 100
    picture = images[0].read()
    assert picture is not None
    for image in images:
        assert (image.boxes >= 0).all() and (image.boxes[:, 2:] > image.boxes[:, :2]).all()
    assert (images[0].boxes[:, 2] <= picture.width).all() and (images[0].boxes[:, 3] <= picture.height).all()


# From a notebook


def test_a_model_in_memory() -> None:
    model, images = tiny.ours(MergeConfig(r=2), num_registers=2), tiny.images(3)
    result = lost_instrument.measure(model, images, label="tiny", show=2)
    assert len(result.images) == 3 and len(result.shown) == 2 and lost_instrument.summarise(result)["corloc"] is None
    expected = lost_instrument.localise(model, images[1], lost_instrument.LostSetting())
    assert result.images[1]["box"] == expected.lost.box and result.images[1]["dino_seg"] == expected.dino_seg
    for view in ("pred", "fms", "seed"):
        assert isinstance(lost_instrument.draw([result, result], view), Figure)
    with pytest.raises(UserError, match="layer is 3"):
        lost_instrument.measure(model, images, setting=lost_instrument.LostSetting(layer=3))


def test_scenes_of_any_size_with_objects() -> None:
    model, lines = tiny.ours(num_registers=1), []
    allow_any_size(model)
    images = [tiny.images(1, size)[0] for size in ((40, 56), (32, 32))]
    boxes = np.array([[0, 0, 8, 8], [0, 0, 50, 40]])
    scenes = [lost_instrument.Scene(image, boxes, f"image {i}") for i, image in enumerate(images)]
    torn = lost_instrument.Scene(None, boxes, "torn.jpg")
    result = lost_instrument.measure(model, [*scenes, torn], sweep=True, report=lines.append)
    row = lost_instrument.summarise(result)
    assert row["n_images"] == 3 == len(result.overlaps) and result.overlaps[2] == 0.0
    assert result.whole_image_overlaps[0] == pytest.approx(2000 / (40 * 56), rel=1e-4)
    assert lines == ["unreadable, counted as missed: torn.jpg"]
    assert len(row["sweep"]) == 3 * 3 * 11 and row["sweep_best"]["corloc"] == max(s["corloc"] for s in row["sweep"])
