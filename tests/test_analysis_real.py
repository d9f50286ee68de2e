"""The instruments on a real DeiT-Tiny: numbers that independent implementations found on the same images."""

import json
from pathlib import Path

import pytest

import run.analyze as analyze

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
WEIGHTS = DATA / "deit_tiny_imagenet.safetensors"


@pytest.mark.skipif(not WEIGHTS.exists(), reason="needs ../shared/data: real DeiT-Tiny weights and images")
def test_merging_takes_outliers_away_under_one_cut_only(tmp_path: Path) -> None:
    """Under the shared cut ten times fewer patches are outliers, under the one scaled by the medians not fewer."""
    models = [f"deit_tiny:{WEIGHTS},label=dense", f"deit_tiny:{WEIGHTS},r=16,label=ToMe"]
    flags = ["--data", str(DATA / "imagenette" / "val"), "--limit", "30", "--show", "0", "--num_workers", "0"]
    assert analyze.main(["norms", "--models", *models, *flags, "--out", str(tmp_path)]) == 0
    dense, merged = json.loads((tmp_path / "norms.json").read_text())["models"]
    assert dense["outliers"]["shared"]["share"] == pytest.approx(0.01956, abs=2e-4)
    shared, scaled = merged["outliers"]["shared"], merged["outliers"]["shared_scaled"]
    assert shared["share"] == pytest.approx(0.00187, abs=2e-4) and shared["images_with"] == 1
    assert scaled["share"] == pytest.approx(0.0214, abs=5e-4)
    assert shared["share_minus_baseline_ci95"][1] < 0  # surely fewer, it seems,
    low, high = scaled["share_minus_baseline_ci95"]
    assert low < 0 < high  # but not by this cut
    assert dense["bimodality"]["otsu_between"] == pytest.approx(0.694, abs=0.01)
