"""Every method on real weights and images agrees with what the published code gave on them."""

import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from tiny import images, ours

from calibration import Calibration
from datasets import DataConfig, build_data
from models import MergeConfig, apply_merging
from models.gmacs import gmacs
from models.methods import METHODS
from options import parse_args
from run import methods_table

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

# recorded from the published implementations on every 11th image: top-1, agreement (%), KL (nats)
PUBLISHED = {
    "dense": (79.05, 100.00, 0.0000),
    "MCTF r=16, blocks 1-11": (77.62, 92.86, 0.0460),
    "MCTF-Fast, 0.35 at blocks 3,6,9": (77.62, 95.24, 0.0338),
}
THREE_IMAGES = 3 / 210 * 100


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data: real DeiT-Tiny weights and ImageNet images")
def test_published_rows_on_210_images(tmp_path: Path) -> None:
    argv = ["--data_path", str(DATA / "imagenet_mini"), "--weights", str(DATA / "deit_tiny_imagenet.safetensors")]
    argv += ["--limit", "210", "--num_workers", "0", "--rows", *list(PUBLISHED)[1:], "--out", str(tmp_path / "table")]
    assert methods_table.main(argv) == 0
    rows = {row["method"]: row for row in json.loads((tmp_path / "table.json").read_text())["rows"]}
    for name, (acc1, agree, kl) in PUBLISHED.items():
        row = rows[name]
        assert row["n_images"] == 210
        assert abs(row["acc1"] - acc1) < THREE_IMAGES + 0.01
        assert abs(row["agree"] - agree) < THREE_IMAGES + 0.01
        assert row["kl"] == pytest.approx(kl, rel=0.02, abs=1e-6)
    assert re.search(r"\| MCTF r=16, blocks 1-11 +\| 0.704 \|", (tmp_path / "table.md").read_text())


def test_every_method_has_a_row() -> None:
    assert {config.method for config in methods_table.ROWS.values()} | {"none"} == set(METHODS)
    configs = list(methods_table.ROWS.values())
    assert len(set(configs)) == len(configs)


def test_missing_weights_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "val" / "n01440764").mkdir(parents=True)
    assert methods_table.main(["--data_path", str(tmp_path), "--weights", "nowhere.pth"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_halves_share_no_image() -> None:
    args = parse_args(["--eval", "--dataset", "DIGITS", "--limit", "37"])
    whole = build_data(args, DataConfig(input_size=32)).val
    reported, calibrated = methods_table.halves(whole)
    assert not set(reported.indices) & set(calibrated.indices)
    assert sorted((*reported.indices, *calibrated.indices)) == list(whole.indices)
    for half in (reported, calibrated):
        assert [half[i].target for i in range(len(half))] == list(half.targets)
        assert torch.equal(half[1].image, whole[list(whole.indices).index(half.indices[1])].image)


def test_searched_rows_keep_their_budgets_and_are_drawn() -> None:
    model = ours(MergeConfig("none"))
    args = Namespace(methods=["tome", "pitome"], gmacs=["70%", "85%"], model="deit_digits")
    configs = methods_table.search_all(model, Calibration(images(18), 18, "noise"), args)
    assert [config.method for config in configs.values()] == ["tome", "tome", "pitome", "pitome"]
    rows = []
    for i, (name, config) in enumerate(configs.items()):
        merged = apply_merging(model, config)
        share = gmacs(merged) / gmacs(model)
        assert share <= float(args.gmacs[i % 2][:-1]) / 100
        rows.append({"method": name, "family": config.method, "searched": i > 0, "gmacs": share, "speedup": 1 + i / 9})
        rows[-1] |= {"kl": 0.1 + i % 2 / 9, "agree": 90 - i % 2, "acc1": 80.0, "acc5": 90.0, "r": "1,2"}
    axes = methods_table.draw(rows).axes
    assert len(axes) == 4 and {ax.get_yscale() for ax in axes} == {"log", "linear"}
    assert "| 1,2" in methods_table.markdown(rows) and "x native" in methods_table.markdown(rows)
