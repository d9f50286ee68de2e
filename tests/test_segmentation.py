"""The linear segmentation probe: features, heads, tables against slow computations; the command."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import runs
import tiny
import torch
from PIL import Image

import run.analyze as analyze
from analysis import segmentation
from models import MergeConfig, UserError
from models.gmacs import gmacs
from tests.test_lost import write_annotation


def scenes(count: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of made-up images on a grid of 4 x 4 patches."""
    images, labels = segmentation.synthetic(count, (32, 32), (8, 8))
    return [(images[:5], labels[:5]), (images[5:], labels[5:])]


@pytest.mark.parametrize("options", [{}, {"register_layer": 1, "class_layer": 1}], ids=["first", "late"])
def test_features_are_those_of_forward_intermediates(options: dict[str, int]) -> None:
    model = tiny.ours(MergeConfig(r=3), 2, **options)
    features, groups, labels = segmentation.read_features(model, scenes(), [0, 2], r=4)
    images = torch.cat([images for images, _ in scenes()])
    assert torch.equal(labels, torch.cat([labels for _, labels in scenes()]))
    with torch.no_grad():
        for start, stop in ((0, 5), (5, 12)):  # the batches that they were read in
            maps = model.forward_intermediates(
                images[start:stop], [0, 2], norm=True, output_fmt="NLC", intermediates_only=True, r=4
            )
            assert torch.equal(features[start:stop], torch.cat(maps, dim=-1))
            assert torch.equal(groups[start:stop], model(images[start:stop], r=4, trace=True).groups[0])
    with pytest.raises(UserError, match=r"on the grid of patches, \(4, 4\), not"):
        segmentation.read_features(model, [(images, torch.zeros(12, 3, 4).long())], [0], r=0)


def test_a_head_is_the_minimum_of_its_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    x = 5 + 3 * torch.randn(300, 6, generator=generator)
    y = x[:, :3].argmax(dim=1)
    head = segmentation.fit_head(x, y, 3, decay=0.01, iterations=300)
    scale = x.std(dim=0)
    weight = (head.weight * scale).requires_grad_()
    bias = (head.bias + head.weight @ x.mean(dim=0)).requires_grad_()
    logits = (x - x.mean(dim=0)) / scale @ weight.mT + bias
    torch.testing.assert_close(logits, head(x), atol=1e-4, rtol=1e-4)
    loss = torch.nn.functional.cross_entropy(logits, y) + 0.005 * weight.square().sum()
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        assert gradient.abs().max() < 2e-4
    assert (head(x).argmax(1) == y).double().mean() > 0.9
    assert segmentation.choose_decay(x[:60].view(10, 6, 6), y[:60].view(10, 6), 3, (1e-3, 1e3)) == 1e-3


def test_iou_and_ceiling_by_hand() -> None:
    labels = torch.tensor([[0, 0, 1, 1, 1, 0]])
    groups = torch.tensor([[0, 1, 1, 1, 2, 3]])
    best = segmentation.majority(labels, groups, 3)
    assert best.tolist() == [[0, 1, 1, 1, 1, 0]]
    sums = segmentation.count(labels, best, 3)[0]
    assert sums.reshape(3, 3).tolist() == [[2, 3, 0], [3, 3, 0], [2, 4, 0]]
    np.testing.assert_allclose(segmentation.class_ious(sums), [2 / 3, 3 / 4, np.nan])
    assert segmentation.mean_iou(sums) == pytest.approx((2 / 3 + 3 / 4) / 2)


def test_every_image_is_labelled_by_heads_that_saw_others() -> None:
    for division in range(3):
        fold = segmentation.fold_of(13, 5, division)
        assert sorted(torch.bincount(fold).tolist()) == [2, 2, 3, 3, 3]
    assert not torch.equal(segmentation.fold_of(13, 5, 0), segmentation.fold_of(13, 5, 1))


def test_measure_against_itself_and_figures() -> None:
    model, classes = tiny.ours(MergeConfig("mctf", r=2, min_tokens=4), 1), segmentation.TEXTURES
    lines: list[str] = []
    options = {"schedules": ("2", "5"), "folds": 3, "divisions": 2, "decays": (0.01,)}
    result = segmentation.measure(model, scenes(), classes=classes, label="mine", report=lines.append, **options)  # type: ignore[arg-type]
    assert result.schedules == ["0", "2", "5"] and result.method == "mctf" and len(lines) == 3
    assert result.gmacs == [gmacs(model, r) for r in (0, 2, 5)]
    counts = [np.bincount(labels.ravel(), minlength=5) for labels in result.labels]
    for table in result.tables.values():  # every patch is labelled once in each division
        hit, true, found = np.moveaxis(table.reshape(3, 2, 12, 3, 5), 3, 0)
        np.testing.assert_array_equal(true, np.broadcast_to(counts, true.shape))
        assert (found.sum(axis=-1) == 16).all() and (hit <= np.minimum(true, found)).all()
    np.testing.assert_array_equal(result.tables["kept"][0], result.tables["refitted"][0])
    assert not np.array_equal(result.tables["kept"][2], result.tables["refitted"][2])
    labels, predictions = (torch.from_numpy(x).flatten(1) for x in (result.labels, result.predictions[2]))
    np.testing.assert_array_equal(result.tables["refitted"][2, 0], segmentation.count(labels, predictions, 5))
    summary = segmentation.summarise(result)
    ceilings = [row["ceiling"] for row in summary["rows"]]
    assert ceilings[0] == 1 > ceilings[2] and summary["rows"][0]["kept_minus_unmerged"] == 0
    row, tables = summary["rows"][2], result.tables["kept"].mean(axis=1).sum(axis=1)
    gap = segmentation.mean_iou(tables[2]) - segmentation.mean_iou(tables[0])
    assert row["kept_minus_unmerged"] == pytest.approx(gap) and row["kept_std"] >= 0
    figure = segmentation.draw([result, result])
    assert [ax.get_xlabel() for ax in figure.axes] == 2 * ["GMACs per image"]
    assert len(segmentation.draw_maps(result, np.zeros((2, 32, 32, 3)), [3, 4]).axes) == 2 * 5


def test_smaller_boxes_lie_in_front() -> None:
    boxes = np.array([[10.0, 0.0, 30.0, 20.0], [0.0, 0.0, 40.0, 40.0], [0.0, 30.0, 9.0, 40.0]])
    labels = segmentation.box_labels(boxes, [1, 2, 3], size=(40, 80), grid=(4, 8))
    assert labels.tolist() == [
        [2, 1, 1, 2, 0, 0, 0, 0],
        [2, 1, 1, 2, 0, 0, 0, 0],
        [2, 2, 2, 2, 0, 0, 0, 0],
        [3, 2, 2, 2, 0, 0, 0, 0],
    ]


def test_synthetic_scenes_have_every_class_and_textures_on_their_patches() -> None:
    images, labels = segmentation.synthetic(20, (32, 48), (8, 8), seed=3)
    assert images.shape == (20, 3, 32, 48) and labels.shape == (20, 4, 6)
    assert set(labels.unique().tolist()) == set(range(5)) and images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, segmentation.synthetic(20, (32, 48), (8, 8), seed=3)[0])
    patches = images.mean(dim=1).unfold(1, 8, 8).unfold(2, 8, 8)  # (I,gh,gw,8,8)
    along, across = patches.mean(dim=4).var(dim=3), patches.mean(dim=3).var(dim=3)
    assert along[labels == 1].median() > 10 * across[labels == 1].median()  # rows
    assert across[labels == 2].median() > 10 * along[labels == 2].median()  # columns


def voc_tree(folder: Path, count: int = 11) -> Path:
    """Images with a bright box each, whose annotation names it; one file is torn."""
    (folder / "images").mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(count):
        pixels = random.integers(0, 90, (40, 60, 3), dtype=np.uint8)
        x, y = 10 * int(random.integers(0, 3)), 10 * int(random.integers(0, 2))
        pixels[y : y + 20, x : x + 30] += 150
        Image.fromarray(pixels).save(folder / "images" / f"{index:02}.png")
        write_annotation(folder / "annotations" / f"{index:02}.xml", (x + 1, y + 1, x + 30, y + 20, 0, 0))
        file = folder / "annotations" / f"{index:02}.xml"
        file.write_text(file.read_text().replace("<object>", f"<object><name>{'cat' if index % 2 else 'dog'}</name>"))
    (folder / "images" / "99.jpg").write_bytes(b"torn")
    write_annotation(folder / "annotations" / "99.xml", (1, 1, 5, 5, 0, 0))
    return folder


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with runs.toy_model():
        words = ["segmentation", "--model", "deit_digits", "--device", "cpu", "--r_values", "9", "--divisions", "1"]
        words += ["--folds", "2"]
        boxes = ["--voc", str(voc_tree(tmp_path / "voc")), "--labels", "classes", "--layers", "0", "-1"]
        assert analyze.main([*words, *boxes, "--out", str(tmp_path / "boxes")]) == 0
        assert "unreadable, left out: 99" in capsys.readouterr().out
        assert analyze.main([*words, "--synthetic", "10", "--show", "0", "--out", str(tmp_path / "made")]) == 0
        for wrong, message in (
            ([], "give --voc FOLDER"),
            (["--synthetic", "9"], "at least 10 images, there are 9"),
            (["--synthetic", "12", "--labels", "classes"], "leave them out with --synthetic"),
            (["--synthetic", "12", "--layers", "77"], "--layers is 77"),
            (["--synthetic", "12", "--dataset", "DIGITS"], "--dataset has no effect"),
            (["--synthetic", "12", "--folds", "1"], "--folds at least 2"),
        ):
            assert analyze.main([*words, *wrong, "--out", str(tmp_path / "wrong")]) == 2
            assert message in capsys.readouterr().err
    content = json.loads((tmp_path / "boxes" / "segmentation.json").read_text())
    (row,) = content["models"]
    assert row["n_images"] == 11 and set(row["patches"]) == {"background", "cat", "dog", "object"}
    assert [line["r"] for line in row["rows"]] == ["0", "9"] and row["rows"][1]["gmacs"] < row["rows"][0]["gmacs"]
    assert {file.name for file in (tmp_path / "boxes").iterdir()} == {
        f"segmentation{name}" for name in (".json", ".npz", ".png", "_deit_digits.png")
    }
    assert not (tmp_path / "made" / "segmentation_deit_digits.png").exists()


def test_the_documented_head_runs(repo: Path, tmp_path: Path) -> None:
    """docs/dense.md: its code is one script, which learns the made-up task."""
    blocks = re.findall(r"```python\n(.*?)```", (repo / "docs" / "dense.md").read_text(), re.S)
    assert blocks
    (tmp_path / "page.py").write_text("\n".join(blocks))
    names = runpy.run_path(str(tmp_path / "page.py"))
    assert names["logits"].shape == (4, 5, 32, 32) and names["c1"].shape == (4, 96, 8, 8)
    assert names["losses"][-1] < 0.5 * names["losses"][0]
