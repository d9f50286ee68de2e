"""--recover: a merged model learns from its own unmerged weights, with or without labels."""

import json
from pathlib import Path

import pytest
import torch
from runs import digits, make_tree, refusal, same_run, succeeds, toy_model
from tiny import images, ours, randomise
from torch.nn import functional as F

import main
from build import Weights, build_own_teacher, prepare
from distributed import Distributed
from losses import build_objective
from models import MergeConfig, create_model
from options import parse_args
from utils import RESUMABLE_STATUS as STOPPED_STATUS

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file of weights of the toy model, without registers."""
    with toy_model():
        torch.save(randomise(create_model("deit_digits")).state_dict(), tmp_path / "toy.pth")
    return tmp_path / "toy.pth"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "photos", {"a": 20, "b": 13}, {"c": 7}, size=32)


def recovery(data: Path, weights: Path, *flags: object) -> list[str]:
    words = ["--recover", "--dataset", "IMAGES", "--data_path", data, "--model", "deit_digits", "--finetune", weights]
    return [str(word) for word in [*words, "--input_size", 32, "--num_workers", 0, "--r", 4, *flags]]


def test_the_loss_is_the_distance_from_the_unmerged_model() -> None:
    """The mean KL of the images, also of a distilled model, whose mean of both heads is compared; it can be learned."""
    args = parse_args(["--recover", "--r", "5", "--model", "deit_tiny"])
    batch = images(12)
    for distilled in (False, True):
        dense, merged = (ours(MergeConfig("tome", r), distilled=distilled) for r in (0, 5))
        objective = build_objective(args, dense.requires_grad_(False), merged)
        merged.train()
        parts = objective(merged, batch, torch.zeros(12, dtype=torch.long))
        target, answer = dense(batch).log_softmax(1), merged.eval()(batch).log_softmax(1)
        wanted = F.kl_div(answer, target, reduction="batchmean", log_target=True)
        assert parts["loss"].item() == pytest.approx(wanted.item(), rel=1e-5) and wanted > 0
        optimizer = torch.optim.AdamW(merged.parameters(), lr=1e-3)
        for _ in range(15):
            optimizer.zero_grad()
            loss = objective(merged, batch, torch.zeros(12, dtype=torch.long))["loss"]
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.6 * parts["loss"].item()


def test_the_teacher_is_where_the_run_began(photos: Path, weights: Path) -> None:
    """Without registers, adapters and merging that the run adds, and frozen."""
    with toy_model():
        args = parse_args(recovery(photos, weights, "--num_registers", 2))
        dist = Distributed(torch.device("cpu"))
        data, _, model, *_ = prepare(args, dist)
        teacher = build_own_teacher(args, data, dist.device)
        start = create_model("deit_digits")
        start.load_state_dict(Weights(args, args.model).tensors() or {})
        batch = images(3)
        assert torch.allclose(teacher(batch), start.eval()(batch), atol=1e-6)
        assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training
        assert model.num_registers == 2 and not torch.allclose(model.eval()(batch), teacher(batch), atol=1e-3)
        shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in teacher.parameters()}
        assert not shared


def test_recovery_on_unlabelled_images(photos: Path, weights: Path, tmp_path: Path, capsys: Capture) -> None:
    """Every tenth image is held out, its label is the teacher's answer; a stopped run goes on bit for bit."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = ["--num_registers", 1, "--train_only", "registers,norms", "--batch_size", 6, "--register_lr_mult", 20]
    with toy_model():
        out = succeeds(capsys, recovery(photos, weights, *flags, "--epochs", 2, "--output_dir", whole))
        assert "data: IMAGES, 36 train, 4 val images" in out and "accuracy is the agreement" in out
        first = recovery(photos, weights, *flags, "--epochs", 2, "--output_dir", broken, "--save_every_steps", 2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("trainer.Trainer._finish_epoch", lambda trainer: False)  # as after a signal
            assert main.main(first) == STOPPED_STATUS
        assert not (broken / "log.txt").exists()
        succeeds(capsys, [*first, "--resume", "auto"])
        same_run(whole, broken)
        lines = [json.loads(line) for line in (whole / "log.txt").read_text().splitlines()]
        assert len(lines) == 2 and lines[0]["train_loss"] == pytest.approx(lines[0]["train_distillation"])
        saved = torch.load(whole / "best.pth", weights_only=True)
        start = torch.load(weights, weights_only=True)
        changed = {name for name, value in saved["model"].items() if name in start and not value.equal(start[name])}
        assert changed and all("norm" in name for name in changed) and saved["merge"]["r"] == "4"


def test_dense_weights_agree_with_themselves(photos: Path, weights: Path, tmp_path: Path, capsys: Capture) -> None:
    """With next to no merging and no rate, the held-out images are answered as the teacher answers them."""
    flags = [
        "--r",
        "0,0,1",
        "--lr",
        0,
        "--warmup_lr",
        0,
        "--min_lr",
        0,
        "--epochs",
        1,
        "--output_dir",
        tmp_path / "out",
    ]
    with toy_model():
        succeeds(capsys, recovery(photos, weights, *flags, "--val_path", photos / "train"))
    line = json.loads((tmp_path / "out" / "log.txt").read_text())
    assert line["test_acc1"] >= 90


def test_refusals_are_one_line(photos: Path, weights: Path, tmp_path: Path, capsys: Capture) -> None:
    unlabelled = ["--dataset", "IMAGES", "--data_path", str(photos), "--model", "deit_digits", "--r", "4"]
    with toy_model():
        for argv, words in (
            (unlabelled, "it goes with --recover"),
            ([*unlabelled, "--eval"], "no labels to score"),
            (recovery(photos, weights, "--distillation_type", "soft"), "leave --distillation_type out"),
            (recovery(photos, weights, "--teacher_model", "deit_tiny"), "leave --teacher_model out"),
            (recovery(photos, weights, "--reprob", 0.1), "--reprob has no effect with --recover"),
            (recovery(photos, weights)[:-2], "--recover has no effect without merging"),
            (recovery(tmp_path / "nowhere", weights), "nowhere does not exist"),
            (digits("--recover", "--eval", "--r", 4), "--recover has no effect with --eval"),
        ):
            assert words in refusal(capsys, argv), argv
        folder = make_tree(tmp_path / "classes", {"a": 4, "b": 4}, {"a": 2})
        argv = recovery(folder, weights)
        argv[argv.index("IMAGES")] = "FOLDER"
        assert "--recover keeps the classes of the weights" in refusal(capsys, argv)
