"""docs/python.md: its code runs, as one script, and says what is true."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from models import create_model

PAGE = Path(__file__).resolve().parents[1] / "docs" / "python.md"


def test_the_page_runs_and_its_comments_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == PAGE.read_text().count("```") // 2 == 7
    monkeypatch.chdir(tmp_path)
    torch.save(create_model("deit_tiny").state_dict(), "deit_tiny.pth")
    Path("page.py").write_text("\n".join(blocks))
    with torch.no_grad():
        names = runpy.run_path("page.py")
    model, out = names["model"], names["out"]
    assert names["logits"].shape == out.logits.shape == (2, 1000)
    assert (model.plan(13).counts[:2], model.plan(13).counts[-1]) == ((188, 175), 45)
    assert model.plan(16).merges == (16,) * 11 + (10,)
    assert names["P"] == 5 == len(model.token_types())
    assert names["dense_map"].shape == (2, 192, 14, 14)
    assert names["embedding"].shape == (2, 192)
    torch.testing.assert_close(names["same"], out.logits)
    assert names["pixels"].shape == (2, 21, 224, 224)
    assert [part.shape for part in (names["c2"], names["c5"], names["c8"])] == 3 * [(2, 192, 14, 14)]
    assert tuple(tokens.shape[1] for tokens in names["seen"]) == model.plan().counts
    assert "loaded 152 tensors; fresh: reg_token" in capsys.readouterr().out


def test_the_table_names_calls_that_there_are() -> None:
    model, table = create_model("deit_digits"), PAGE.read_text().partition("| call | gives |")[2]
    called = set(re.findall(r"`(\w+)\(", table)) - {"model", "create_model"}
    assert called and all(callable(getattr(model, name)) for name in called)
