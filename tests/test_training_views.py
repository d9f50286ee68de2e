"""A model over its training: snapshots, their files, curves; the command on a run and on checkpoints."""

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import runs
import tiny
import torch
import torch.nn.functional as F

import run.analyze as analyze
from analysis import training
from models import MergeConfig, UserError


def test_a_snapshot_is_what_hooks_see(tmp_path: Path) -> None:
    model, images = tiny.ours(num_registers=2), tiny.images(6)
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        model.blocks[2].register_forward_hook(lambda _, __, out: seen.update(tokens=out)),
        model.blocks[2].attn.qkv.register_forward_hook(lambda _, __, out: seen.update(qkv=out)),
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    taken = training.snapshot(model, images, np.zeros((2, 32, 32, 3)), 7)
    q, k, _ = seen["qkv"].unflatten(2, (3, 3, -1)).permute(2, 0, 3, 1, 4)
    maps = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1).mean(dim=1).detach()
    np.testing.assert_allclose(taken.maps.reshape(2, 3, 16), maps[:2, :3, 3:], atol=1e-5)
    np.testing.assert_allclose(taken.mass[:, 1], maps[:, 0, 1:3].sum(-1), atol=1e-5)
    lengths = seen["tokens"].detach()[:, 3:].norm(dim=-1)
    np.testing.assert_allclose(taken.patch_norms[:, -1, 2], lengths.amax(dim=1), rtol=1e-5)
    np.testing.assert_allclose(taken.prefix_norms[:, -1], seen["tokens"].detach()[:, :3].norm(dim=-1), rtol=1e-5)
    pair = F.cosine_similarity(maps[:, 1, 3:], maps[:, 2, 3:], dim=-1)
    np.testing.assert_allclose(training.register_cosine(taken), pair, atol=1e-5)
    with_class = [F.cosine_similarity(maps[:, 0, 3:], maps[:, i, 3:], dim=-1) for i in (1, 2)]
    np.testing.assert_allclose(training.class_cosine(taken), torch.stack(with_class).mean(dim=0), atol=1e-5)
    training.save(tmp_path, taken)
    (read,) = training.load(tmp_path)
    for part in fields(taken):
        np.testing.assert_allclose(
            *(getattr(t, part.name) for t in (taken, read))
        ) if part.name != "token_types" else None
    assert read.token_types == taken.token_types and not list(tmp_path.glob("*.tmp"))


def test_strip_and_curves() -> None:
    model, images = tiny.ours(MergeConfig(r=3), num_registers=2), tiny.images(6)
    pictures = np.zeros((1, 32, 32, 3))
    taken = [training.snapshot(tiny.ours(MergeConfig(r=3), 2, seed=s), images, pictures, 5 * s) for s in range(3)]
    strip = training.draw(taken)
    titles = [ax.get_title() for ax in strip.axes if ax.get_title()]
    assert titles == ["input", "epoch 0", "epoch 5", "epoch 10"] and len(strip.axes) == 3 * 4 + 1
    assert len({ax.images[0].get_clim() for ax in strip.axes[1:4]}) == 1
    curves = training.draw_curves(taken)
    assert all(ax.get_ylim()[0] == 0 for ax in curves.axes) and len(curves.axes[0].collections) == 6  # bands
    few = training.draw_curves([training.snapshot(model, images[:4], pictures, 0)])
    assert not few.axes[0].collections and "too few for intervals" in few.texts[-1].get_text()
    row = training.summarise(taken)[1]
    assert row["epoch"] == 5 and row["n_images"] == 6 and 0 < row["register_map_cosine"] <= 1
    with pytest.raises(UserError, match="different models"):
        training.draw([*taken, training.snapshot(tiny.ours(), images, pictures, 1)])


def test_a_run_and_its_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    with runs.toy_model():
        words = runs.digits("--num_registers", 2, "--epochs", 3, "--device", "cpu", "--log_images", 1)
        runs.succeeds(capsys, [*words, "--output_dir", str(run)])
        assert analyze.main(["training", "--run", str(run), "--out", str(out)]) == 0
        rows = json.loads((out / "training.json").read_text())["epochs"]
        assert [row["epoch"] for row in rows] == [0, 1, 2] and rows[0]["entropy_ci95"] is None  # four images
        files = [str(run / name) for name in ("checkpoint.pth", "checkpoint_prev.pth")]
        flags = ["--model", "deit_digits", "--dataset", "DIGITS", "--limit", "8", "--device", "cpu"]
        assert analyze.main(["training", "--checkpoints", *files, *flags, "--out", str(out)]) == 0
    saved = json.loads((out / "training.json").read_text())["epochs"]
    assert [row["epoch"] for row in saved] == [1, 2] and saved[1]["n_images"] == 8
    assert {"training_strip.png", "training_curves.png", "training.npz"} <= {file.name for file in out.iterdir()}


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([], "--run DIR"),
        (["--run", "nowhere"], "holds no snapshot"),
        (["--run", "x", "--model", "deit_digits"], "needs no model"),
        (["--run", "torn"], "cannot read the snapshot"),
        (["--checkpoints", "nowhere.pth"], "nowhere.pth"),
    ],
)
def test_mistakes(
    flags: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "epoch_00001.npz").write_bytes(b"PK\x03\x04 no more")
    assert analyze.main(["training", *flags, "--out", str(tmp_path / "o")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and reason in err
