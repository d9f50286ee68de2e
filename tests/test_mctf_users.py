"""The two command lines of MCTF's README run, print their named form and mean the same; its checkpoints load."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import options
from losses import Objective
from models import create_model
from models.registry import OWN_SIZES
from tests.runs import TOY, digits, make_tree, refusal, succeeds, toy_model

BLOCKS = "[1,2,3,4,5,6,7,8,9,10,11]"
FINETUNE = f"""--data_path D --dataset IMNET --output_dir O --batch-size 128 --min_lr_times 0.1 --lr_times 0.03
    --epochs 30 --activate_layer {BLOCKS} --model deit_small --use_mctf True --mctf_type [16,8,0,1,1,1,20,40,1,1,0]
    --task_type [1,1,0.4] --task_weight [1.0,1.0,3.0]""".split()
EVALUATE = f"""--eval --data_path D --dataset IMNET --resume CKPT --use_mctf True
    --mctf_type [16,0,0,1,1,1,20,40,1,1,0] --task_type [1,0,0,0] --r_evals [16] --activate_layer {BLOCKS}
    --model deit_small""".split()


def test_finetuning_means_the_same() -> None:
    args = options.parse_args(FINETUNE)
    merge = options.merge_config(args)
    assert (merge.method, merge.r, merge.activate_layers) == ("mctf", 16, tuple(range(1, 12)))
    assert (merge.tau_sim, merge.tau_info, merge.tau_size) == (1, 20, 40)
    assert (merge.bidirectional, merge.prop_attn) == (True, True)
    assert (merge.one_step_ahead, merge.pooling) == ("on", "attention")
    assert (args.merged_weight, args.full_weight, args.consistency_weight) == (1, 1, 3)
    assert (args.full_r_max, args.consistency_threshold) == (8, 0.4)
    # its recipe: 30 epochs and 10 of cooldown, no mixing, no warm-up
    assert (args.epochs, args.cooldown_epochs, args.mixup, args.cutmix, args.warmup_epochs) == (30, 10, 0, 0, 0)
    assert (args.lr_times, args.min_lr_times, args.batch_size) == (0.03, 0.1, 128)


def test_evaluation_means_the_same() -> None:
    args = options.parse_args(EVALUATE)
    assert (args.eval, args.resume, args.r_evals, args.full_weight) == (True, "CKPT", ["16"], 0)
    assert options.merge_config(args).method == "mctf"


@pytest.mark.parametrize("argv", [FINETUNE, EVALUATE], ids=["finetune", "evaluate"])
def test_the_named_form_is_printed_and_is_equal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    old = options.parse_args(argv)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("as named flags: main.py "))
    named = line.removeprefix("as named flags: main.py ").split()
    assert "--mctf_type" not in named and "--task_type" not in named
    assert options.parse_args(named) == old
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("slot", "value", "field", "expected"),
    [
        (2, 1, "merge", "mctf"),  # trace: no effect
        (3, 0, "prop_attn", False),
        (4, 0, "one_step_ahead", "off"),
        (4, 2, "one_step_ahead", "precise"),
        (5, 0, "tau_sim", 0),
        (8, 0, "bidirectional", False),
        (9, 2, "pooling", "max"),
        (9, 3, "pooling", "mean"),
        (10, 7, "merge", "mctf"),  # unused
        (1, 3, "full_r_max", 3),
        (0, 0.35, "r", "0.35"),
    ],
)
def test_every_slot(slot: int, value: float, field: str, expected: object) -> None:
    values: list[float] = [16, 8, 0, 1, 1, 1, 20, 40, 1, 1, 0]
    values[slot] = value
    argv = ["--mctf_type" if token == "--mctf_type" else token for token in FINETUNE]
    argv[argv.index("--mctf_type") + 1] = str(values).replace(" ", "")
    assert getattr(options.parse_args(argv), field) == expected


@pytest.mark.parametrize("value", ["[16,8]", "16", "[a,b,c,d,e,f,g,h,i,j]", "[16,8,0,1,5,1,20,40,1,1,0]", ""])
def test_a_bad_list_is_one_line(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--mctf_type" in refusal(capsys, ["--use_mctf", "True", "--mctf_type", value])


def mctf_checkpoint(path: Path) -> None:
    weights = create_model("deit_digits").state_dict()
    kept = {"state_dict": weights, "state_dict_ema": (weights,), "args": argparse.Namespace(r=16, use_mctf=True)}
    torch.save(kept | {"epoch": 39, "arch": "deit_small"}, path)


def test_its_command_lines_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setitem(OWN_SIZES, "deit_digits", TOY)
    data = make_tree(tmp_path / "data", {"a": 8, "b": 8}, {"a": 3, "b": 3}, size=32)
    argv = f"""--data_path {data} --dataset FOLDER --output_dir {tmp_path}/out --batch-size 4 --min_lr_times 0.1
        --lr_times 0.03 --epochs 1 --activate_layer [1,2] --model deit_digits --use_mctf True
        --mctf_type [2,2,0,1,1,1,20,40,1,1,0] --task_type [1,1,0.4] --task_weight [1.0,1.0,3.0]
        --num_workers 0 --cooldown_epochs 0 --input_size 32""".split()
    succeeds(capsys, argv)
    line = json.loads((tmp_path / "out" / "log.txt").read_text().splitlines()[0])
    assert {"train_ce", "train_full_ce", "train_consistency"} <= set(line)
    classes = make_tree(tmp_path / "ten", {}, {str(i): 1 for i in range(10)}, size=32)
    mctf_checkpoint(tmp_path / "mctf.pth")
    argv = f"""--eval --data_path {classes} --dataset FOLDER --resume {tmp_path}/mctf.pth --use_mctf True
        --mctf_type [2,0,0,1,1,1,20,40,1,1,0] --task_type [1,0,0,0] --r_evals [2,1] --activate_layer [1,2]
        --model deit_digits --num_workers 0 --input_size 32 --output_dir {tmp_path}/eval""".split()
    succeeds(capsys, argv)
    rows = json.loads((tmp_path / "eval" / "result.json").read_text())["rows"]
    assert [(row["r"], row["schedule"]) for row in rows] == [("2", [0, 2, 2]), ("1", [0, 1, 1])]


def first_step(monkeypatch: Any, capsys: pytest.CaptureFixture[str], out: Path, *flags: str) -> dict[str, Any]:
    """What the objective saw and returned in the first step of a one-epoch run."""
    seen: dict[str, Any] = {}
    call = Objective.__call__

    def spy(self: Objective, model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        parts = call(self, model, images, targets)
        if not seen:
            seen.update(images=images.clone(), targets=targets.clone(), state=state, parts=parts)
            with torch.no_grad():
                model.train()
                seen.update(merged=model(images, trace=True), full=model(images, r=0, trace=True))
        return parts

    monkeypatch.setattr(Objective, "__call__", spy)
    flags = ("--full_weight", "0.5", "--full_r_max", "1", "--consistency_weight", "3", *flags)
    succeeds(capsys, digits("--consistency_threshold", "0", "--output_dir", out, *flags))
    monkeypatch.undo()
    return seen


def test_one_epoch_finetunes_differ_only_as_their_methods_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    with toy_model():
        tome = first_step(monkeypatch, capsys, tmp_path / "tome", "--merge", "tome", "--r", "2")
    with toy_model():
        mctf = first_step(monkeypatch, capsys, tmp_path / "mctf", "--merge", "mctf", "--r", "2", "--min_tokens", "0")
    assert torch.equal(tome["images"], mctf["images"]) and torch.equal(tome["targets"], mctf["targets"])
    assert all(torch.equal(value, mctf["state"][name]) for name, value in tome["state"].items())
    for seen in (tome, mctf):
        parts, merged, full = seen["parts"], seen["merged"], seen["full"]
        soft = torch.full((10, 10), 0.01).scatter(1, seen["targets"][:, None], 0.91)  # smoothing 0.1 of ten classes
        for name, out in (("ce", merged), ("full_ce", full)):
            by_hand = -(soft * out.logits.log_softmax(1)).sum(1).mean()
            assert parts[name].item() == pytest.approx(by_hand.item(), rel=1e-4)
        distance = (full.tokens[:, 0] - merged.tokens[:, 0]).square().mean(1).mean()
        assert parts["consistency"].item() == pytest.approx(distance.item(), rel=1e-3, abs=1e-7)
        total = parts["ce"] + 0.5 * parts["full_ce"] + 3 * parts["consistency"]
        assert parts["loss"].item() == pytest.approx(total.item(), rel=1e-5)
    assert tome["parts"]["full_ce"].item() == pytest.approx(mctf["parts"]["full_ce"].item(), rel=1e-6)
    assert tome["parts"]["ce"].item() != mctf["parts"]["ce"].item()
