"""The files of a release agree with the program."""

from pathlib import Path

import yaml

from models import __version__

ROOT = Path(__file__).resolve().parents[1]


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert all(reference["url"].startswith("https://arxiv.org/abs/") for reference in citation["references"])
