"""Protected, published and unprotected registers: the rules against slow oracles, and the command."""

import json
from pathlib import Path

import pytest
import tiny
import torch

import run.analyze as analyze
from analysis import register_dynamics as rd
from models import MergeConfig, UserError
from models.merging import group_map
from models.registry import OWN_SIZES

TOY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 10}
# registers.md 10.3, ViT-S/16 with 4 registers: tokens left by r=16 and by (16,-1)
MERGES = {"16": (16,) * 11 + (10,), "(16,-1)": (32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0)}


def groups_of(rule: str, metric: torch.Tensor, r: int, prefix: int) -> list[set[frozenset[int]]]:
    found = group_map(rd.match_rule(rule, metric, r, prefix))
    return [{frozenset((row == g).nonzero().flatten().tolist()) for g in row.unique()} for row in found]


def oracle(rule: str, metric: torch.Tensor, r: int) -> set[frozenset[int]]:
    """One image, straight from the description of the published code."""
    tokens = len(metric)
    unit = [row / row.norm() for row in metric]
    destinations = list(range(1, tokens, 2))
    allowed = destinations[:-4] if rule == "published" else destinations
    proposals = []
    for a in range(2, tokens, 2):  # 0 is the class token
        best = max(allowed, key=lambda b: float(unit[a] @ unit[b]))
        proposals.append((float(unit[a] @ unit[best]), a, best))
    members = {token: {token} for token in range(tokens)}
    for _, a, b in sorted(proposals, reverse=True)[:r]:
        members[b] |= members.pop(a)
    return {frozenset(group) for group in members.values()}


@pytest.mark.parametrize("rule", ["published", "unprotected"])
@pytest.mark.parametrize(("tokens", "r"), [(21, 5), (24, 8), (17, 1)])
def test_rules_match_a_slow_oracle(rule: str, tokens: int, r: int) -> None:
    metric = torch.randn(3, tokens, 8, generator=torch.Generator().manual_seed(tokens))
    assert groups_of(rule, metric, r, 5) == [oracle(rule, row, r) for row in metric]


def test_published_rule_protects_two_of_four_registers_and_two_patches_by_mistake() -> None:
    """registers.md 10.3: of registers 197..200 only 198 and 200 can merge; 193 and 195 are patches nobody may join."""
    metric = torch.randn(1, 201, 16, generator=torch.Generator().manual_seed(0))
    for register, patch in ((198, 7), (200, 11), (197, 20), (199, 40), (30, 193), (50, 195)):
        metric[:, register] = metric[:, patch]  # what every pair would like
    (found,) = groups_of("published", metric, 16, 5)
    assert {group for group in found if 198 in group} == {frozenset({198, 7})}
    assert {group for group in found if 200 in group} == {frozenset({200, 11})}
    for alone in (197, 199, 193, 195):
        assert frozenset({alone}) in found
    assert sum(map(len, found)) == 201 and len(found) == 185


def test_any_rule_merges_the_same_number_of_tokens() -> None:
    model = tiny.ours(MergeConfig(r=4), num_registers=4)
    images = tiny.images()
    counts = {rd.forward_under(model, images, rule).counts for rule in rd.RULES}
    assert counts == {tuple(model.plan().counts)}


@pytest.mark.parametrize("prop_attn", [True, False])
@pytest.mark.parametrize("registers", [0, 1, 4])
def test_protected_is_the_core(registers: int, prop_attn: bool) -> None:
    model = tiny.ours(MergeConfig(r="5,3,2", prop_attn=prop_attn), num_registers=registers)
    images = tiny.images(3)
    out = rd.forward_under(model, images, "protected")
    torch.testing.assert_close(out.logits, model(images, trace=True).logits, rtol=0, atol=0)
    torch.testing.assert_close(out.logits, model(images), rtol=0, atol=2e-6)  # its last block serves the class token
    assert (out.alone == registers).all() and out.alone.shape == (3, 3)


def test_without_merging_the_rules_agree() -> None:
    model = tiny.ours(MergeConfig(r=4), num_registers=3)
    images = tiny.images()
    for rule in rd.RULES:
        out = rd.forward_under(model, images, rule, r=0)
        torch.testing.assert_close(out.logits, model(images, r=0))  # attention does not care about order
        assert (out.alone == 3).all()


def test_wrong_rules_lose_registers_and_change_logits() -> None:
    model = tiny.ours(MergeConfig(r=8), num_registers=4)
    images = tiny.images(8)
    right = rd.forward_under(model, images, "protected")
    for rule in ("published", "unprotected"):
        wrong = rd.forward_under(model, images, rule)
        assert wrong.alone[:, -1].float().mean() < 4
        assert not torch.allclose(wrong.logits, right.logits)
        assert (wrong.alone.diff(dim=1) <= 0).all()  # who merged stays merged


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"distilled": True}, "one class token"),
        ({"merge": MergeConfig(method="mctf", r=4)}, "mctf"),
        ({"num_registers": 2, "register_layer": 1}, "enter late"),
        ({"merge": MergeConfig(r=4, bidirectional=True)}, "both ways"),
    ],
)
def test_models_without_such_rules_are_refused(change: dict[str, object], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        rd.check_model(tiny.ours(**change))  # type: ignore[arg-type]


# Random keys, registers.md 10.3


def test_independent_keys_lose_registers_at_once() -> None:
    """Exchangeable keys fix the first block: sources 198 and 200 merge like any other of the 100 sources, so on average
    2 * r / 100 registers go. The page's recorded series starts at 4.00 and so is not one of independent keys."""
    keys = rd.Simulation(images=1500)
    for r in (16, 32):
        (alone,) = rd.simulate("published", (r,), keys=keys)
        expected, error = 4 - 2 * r / 100, (2 * r / 100 * (1 - r / 100) / keys.images) ** 0.5
        assert abs(alone - expected) < 4 * error
        (alone,) = rd.simulate("unprotected", (r,), keys=keys)
        assert alone < expected  # two are destinations, which patches join


RECORDED = {
    "16": (4, 4, 3.99, 3.98, 3.96, 3.88, 3.73, 3.40, 2.96, 2.14, 1.00, 0.44),
    "(16,-1)": (4, 3.98, 3.98, 3.91, 3.64, 3.22, 2.68, 2.02, 1.38, 0.85, 0.72, 0.72),
}


def test_recorded_series_decays_as_with_correlated_patches() -> None:
    """How the recorded keys were drawn is not said. Patches that correlate (here 0.5 with the one before) and registers
    that do not give a series of its shape: intact for blocks, then lost in the last ones."""
    keys = rd.Simulation(images=150, correlation=0.5)
    found = rd.simulate("published", MERGES["16"], keys=keys)
    worst = max(abs(a - b) for a, b in zip(found, RECORDED["16"], strict=True))
    assert worst < 0.6 and found[4] > 3.9 and found[-1] < 0.6
    other = rd.simulate("published", MERGES["(16,-1)"], keys=keys)
    assert max(abs(a - b) for a, b in zip(other, RECORDED["(16,-1)"], strict=True)) < 1.3
    assert rd.simulate("protected", MERGES["16"], keys=rd.Simulation(images=2)) == [4.0] * 12


def test_results_are_paired_by_image() -> None:
    logits = torch.eye(4)[torch.tensor([0, 1, 2, 3])] * 5
    dense = torch.eye(4)[torch.tensor([0, 1, 2, 0])] * 5
    alone = torch.tensor([[2, 1], [2, 2], [2, 0], [2, 1]])
    wrong, right = rd.RuleResult(), rd.RuleResult()
    wrong.add(rd.RuleOutput(logits, alone, (3, 2)), dense, torch.tensor([0, 1, 0, 3]))
    right.add(rd.RuleOutput(dense, alone, (3, 2)), dense, torch.tensor([0, 1, 0, 3]))
    row = wrong.summary(right)
    assert row["agree"] == 0.75 and row["acc1"] == 0.75 and row["agree_minus_protected"] == -0.25
    assert row["registers_alone"] == [2.0, 1.0] and row["kl"] > 0
    assert right.summary(right)["kl"] == pytest.approx(0, abs=1e-12)


# From a notebook


def test_a_model_in_memory() -> None:
    model, images = tiny.ours(num_registers=2), tiny.images(6)
    labelled = [(images, model(images).argmax(dim=1))]
    result = rd.measure(model, labelled, schedules=("2", "4"), labelled=True, label="tiny")
    rows = rd.summarise(result)
    assert [(row["r"], row["rule"]) for row in rows] == [(r, rule) for r in ("2", "4") for rule in rd.RULES]
    for row in rows:
        assert row["acc1_unmerged"] == 1 and row["acc1"] == row["agree"] and row["n_images"] == 6
        assert row["rule"] != "protected" or row["registers_alone"] == [2.0] * 3
    more = rd.measure(model, images, registers=4, schedules=("2",), label="more")
    assert more.registers == 4 and "acc1" not in rd.summarise(more)[0]
    assert len(rd.draw([result, more]).axes) == 4
    simulated = rd.simulate_all(model, ("2", "4"), rd.RULES, images=4)
    assert len(simulated) == 6 and len(rd.draw_simulation(simulated).axes) == 2


# The command


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setitem(OWN_SIZES, "deit_digits", TOY)
    words = ["dynamics", "--model", "deit_digits", "--dataset", "DIGITS", "--limit", "20", "--device", "cpu"]
    return [*words, "--keys", "4"]


def test_command_tabulates_rules_over_R_and_r(toy: list[str], tmp_path: Path) -> None:
    assert analyze.main([*toy, "--R", "0", "3", "--r_values", "2", "4,4", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "dynamics.json").read_text())
    cells = {(row["R"], row["r"], row["rule"]) for row in content["rows"]}
    assert len(cells) == len(content["rows"]) == 2 * 2 * 3
    for row in content["rows"]:
        assert row["n_images"] == 20 and "acc1" in row
        assert row["rule"] != "protected" or row["registers_alone_last"] == row["R"]
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".npz", ".png", ".md"}


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--rules", "published"], "protected"),
        (["--r_values", "x"], "r='x'"),
        (["--correlation", "1"], "--correlation"),
        (["--R", "-1"], "--R"),
        (["--merge", "mctf", "--r", "2"], "mctf"),
        (["--epochs", "3"], "--epochs"),
    ],
)
def test_mistakes_are_one_line(
    toy: list[str], flags: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert analyze.main([*toy, *flags, "--out", str(tmp_path / "o")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("analyze.py: error: ") and reason in err
