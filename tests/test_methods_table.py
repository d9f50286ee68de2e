"""Every method on real weights and images agrees with what the published code gave on them."""

import json
import re
from pathlib import Path

import pytest

from models.methods import METHODS
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
