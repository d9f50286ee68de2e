"""Prediction changes under merging, against slow computations; the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import runs
import tiny
import torch

import run.analyze as analyze
from analysis import prediction_changes as changes
from models import MergeConfig
from models.gmacs import gmacs


def test_changes_are_those_of_single_forwards() -> None:
    model, images = tiny.ours(MergeConfig(r=2), num_registers=1), 3 * tiny.images(24)
    labels = torch.arange(24) % 10
    loader = [(images[:10], labels[:10]), (images[10:], labels[10:])]
    result = changes.measure(model, loader, schedules=("2", "6"), labelled=True, label="mine")
    assert result.schedules == ["0", "2", "6"] and result.gmacs == [gmacs(model, r) for r in (0, 2, 6)]
    p = model(images, r=0).double().softmax(dim=1).detach()
    q = model(images, r=6).double().softmax(dim=1).detach()
    for i in range(24):
        assert result.tops[:, i].tolist() == [int(model(images[i : i + 1], r=r).argmax()) for r in (0, 2, 6)]
        assert result.kl[2, i] == pytest.approx(float((p[i] * (p[i] / q[i]).log()).sum()), abs=1e-6)
        assert result.kept[2, i] == pytest.approx(float(q[i, p[i].argmax()]), abs=1e-6)
    row = changes.summarise(result)["rows"][2]
    before, after = result.tops[0] == labels.numpy(), result.tops[2] == labels.numpy()
    assert row["acc1"] == after.mean() and row["acc1_minus_unmerged"] == pytest.approx(after.mean() - before.mean())
    assert (row["broken"], row["mended"]) == ((before & ~after).sum(), (~before & after).sum())
    changed = np.nonzero(result.tops[2] != result.tops[0])[0]
    shown = changes.most_changed(result, count=99)
    assert sorted(shown) == changed.tolist() and (np.diff(result.kl[2][shown]) <= 0).all()


def made_up(images: int = 30) -> changes.ChangesResult:
    """Class 0 (4 images) and class 1 (6) change whole, class 2 (20) half."""
    labels = np.array([0] * 4 + [1] * 6 + [2] * 20)
    merged = np.where(labels < 2, 2, np.where(np.arange(images) % 2, 2, 0))
    half = np.full((2, images), 0.5)
    return changes.ChangesResult(
        "m", "tome", ["0", "8"], [1.0, 0.5], np.stack((labels, merged)), half, half, half, labels
    )


def test_classes_come_by_how_much_they_change_and_small_ones_have_no_interval() -> None:
    rows = changes.class_rows(made_up())
    assert [(row.index, row.images) for row in rows] == [(1, 6), (0, 4), (2, 20)]
    assert [row.changed.value for row in rows] == [1, 1, 0.5] and rows[2].drop.value == -0.5
    assert rows[1].changed.ci95 is None and not rows[1].changed.shown and rows[2].changed.ci95 is not None
    figure = changes.draw_classes(made_up(), lambda index: f"name {index}")
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ["name 1 (6)", "name 2 (20)"]  # four images are too few to be drawn
    curves = changes.draw(made_up())
    assert [ax.get_xlim()[0] for ax in curves.axes] == [0, 0] and [ax.get_ylim()[0] for ax in curves.axes] == [0, 0]
    assert len(changes.draw_images(made_up(), np.zeros((2, 8, 8, 3)), [4, 0]).axes) == 2


def test_a_model_that_merges_nothing_merges_by_tome_and_needs_no_labels() -> None:
    result = changes.measure(tiny.timm_vit(), tiny.images(6), schedules=("3",))
    assert result.method == "tome" and result.labels is None and result.right[0].all()
    assert "acc1" not in changes.summarise(result)["rows"][0] and result.measure_name.startswith("same top-1")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with runs.toy_model():
        words = ["--model", "deit_digits", "--dataset", "DIGITS", "--limit", "60", "--device", "cpu"]
        flags = ["--r_values", "4", "9", "--show", "3", "--format", "png", "pdf"]
        assert analyze.main(["changes", *words, *flags, "--out", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "changes.json").read_text())["models"]
    assert [line["r"] for line in row["rows"]] == ["0", "4", "9"] and row["rows"][0]["agree"] == 1
    assert row["rows"][0]["gmacs"] > row["rows"][2]["gmacs"] and "acc1_ci95" in row["rows"][1]
    assert sum(line["n_images"] for line in row["classes"]) == 60
    assert (tmp_path / "changes_gmacs.pdf").read_bytes().startswith(b"%PDF")
    assert np.load(tmp_path / "changes.npz")["deit_digits/tops"].shape == (3, 60)
