"""Every method on real weights and images agrees with what the published code gave on them."""

import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
DATA = REPO.parent / "shared" / "data"
sys.path.insert(0, str(REPO / "run"))

import methods_table  # noqa: E402

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
    rows = methods_table.table(
        [
            *argv,
            "--limit",
            "210",
            "--rows",
            *list(PUBLISHED)[1:],
            "--num_workers",
            "0",
            "--out",
            str(tmp_path / "table"),
        ]
    )
    found = {row["method"]: row for row in rows}
    for name, (acc1, agree, kl) in PUBLISHED.items():
        row = found[name]
        assert row["n_images"] == 210
        assert abs(row["acc1"] - acc1) < THREE_IMAGES + 0.01
        assert abs(row["agree"] - agree) < THREE_IMAGES + 0.01
        assert row["kl"] == pytest.approx(kl, rel=0.02, abs=1e-6)
    assert "| MCTF r=16, blocks 1-11 | 0.704 |" in (tmp_path / "table.md").read_text()


def test_missing_weights_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "val" / "n01440764").mkdir(parents=True)
    assert methods_table.main(["--data_path", str(tmp_path), "--weights", "nowhere.pth"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
