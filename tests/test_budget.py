"""Schedules that are searched for a budget: exact where that can be checked, within the budget always."""

import itertools
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import digits, make_tree, refusal, succeeds, toy_model
from tiny import PATCHES, every_method, images, ours

import calibration
import latency
import options
from budget import Gmacs, Measured, Sensitivity, Space, cheapest, polish, read_schedule, solve, total
from calibration import Calibration, Divergence, gmacs_goal, search_schedules, speedup_goal
from distributed import Distributed
from engine import build_precision
from latency import Latency
from models import MergeConfig, MergingViT, UserError
from models.gmacs import gmacs
from run import predict
from run import search as search_command

Capture = pytest.CaptureFixture[str]


class Counted:
    """Costs in whole numbers, so that dynamic programming over them is exact."""

    unit = "units"

    def block(self, layer: int, tokens: int, left: int) -> float:
        return 2 * tokens + 3 * left + layer

    def rest(self, left: int) -> float:
        return left


def counts(space: Space) -> list[tuple[int, ...]]:
    """Every schedule of a space."""
    found: list[tuple[tuple[int, ...], int]] = [((), space.patches)]
    for layer in range(space.depth):
        found = [((*r, c), left - m) for r, left in found for m, c in space.choices(layer, left).items()]
    return [r for r, _ in found]


def schedule_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "schedule.json").read_text())


# Schedules and their costs


@pytest.mark.parametrize("config", every_method(choices=False))
def test_choices_are_what_the_model_merges(config: MergeConfig) -> None:
    model = ours(config, num_registers=2)
    space, seen = Space.of(model), set()
    for r in counts(space):
        left = space.patches
        for layer, merged in enumerate(model.plan(r).merges):
            assert space.choices(layer, left)[merged] == r[layer]
            left -= merged
        seen.add(model.plan(r).merges)
    assert model.plan((PATCHES,) * 3).merges in seen and len(seen) == len(counts(space))
    assert space.clip((PATCHES,) * 3) in counts(space) and space.clip((1, 0, 1)) == (1, 0, 1)


@pytest.mark.parametrize("config", every_method(choices=False))
def test_costs_are_the_model_s(config: MergeConfig) -> None:
    model = ours(config, num_registers=2, register_layer=1)
    space, cost = Space.of(model), Gmacs(model)
    schedules = counts(space)
    for r in schedules[:: max(1, len(schedules) // 20)]:
        assert total(cost, space, r) == pytest.approx(gmacs(model, r), rel=1e-12)
    assert cheapest(cost, space) == pytest.approx(min(gmacs(model, r) for r in schedules), rel=1e-12)


def test_solve_equals_brute_force() -> None:
    """The least loss within a budget, among all schedules one by one, for many laws and budgets."""
    space, cost = Space(MergeConfig("tome"), 9, (1, 1, 1)), Counted()
    everything = counts(space)
    costs = {r: total(cost, space, r) for r in everything}
    generator = np.random.default_rng(0)
    for budget in (40, 60, 75, 90, 110):
        table = generator.random((3, 10, 10)) * np.arange(10)
        loss = lambda r: sum(table[b, 9 - sum(r[:b]), m] for b, m in enumerate(r))  # noqa: B023, E731
        found = solve(lambda b, left, m: table[b, left, m], space, cost, budget, levels=budget)  # noqa: B023
        allowed = [r for r in everything if costs[r] <= budget]
        if not allowed:
            assert found is None
            continue
        assert found is not None and costs[found] <= budget
        assert loss(found) == pytest.approx(min(map(loss, allowed)))
    assert cheapest(cost, space) == min(costs.values())


def test_solve_keeps_the_budget_of_real_models() -> None:
    model = ours(MergeConfig("mctf", min_tokens=4), img_size=64)
    space, cost = Space.of(model), Gmacs(model)
    law = Sensitivity(space.patches, np.linspace(-3, -6, 3))
    before = np.inf
    for budget in np.linspace(cheapest(cost, space) * 1.0001, gmacs(model, 0), 7):
        r = solve(law.block, space, cost, budget)
        if r is None:  # costs are rounded up: the very cheapest may be missed
            continue
        r = polish(lambda merges: law(merges), space, cost, budget, r)
        assert total(cost, space, r) <= budget and space.clip(r) == r
        assert law(r) <= before
        before = law(r)
    assert before == law((0, 0, 0)) == 0 < law((0, PATCHES, 0))


def test_the_law_is_recovered_from_what_it_gives() -> None:
    """Measurements made by a law give that law back: levels, and losses of schedules that were not measured."""
    truth = Sensitivity(64, np.array([-4.0, -5.0, -6.0, -7.0, -np.inf]), thinning=2.0, haste=7.0)
    singles = [tuple(m if b == layer else 0 for b in range(5)) for layer in range(5) for m in (5, 13, 26)]
    centre = Measured((6, 8, 10, 8, 4), (6, 8, 10, 8, 4), 1.0, truth((6, 8, 10, 8, 4)), True)
    others = [Measured(r, r, 1.0, truth(r), True, centre) for r in ((3, 8, 10, 8, 4), (6, 8, 14, 8, 4))]
    law = Sensitivity(64, np.full(5, -np.inf))
    law.fit([*(Measured(r, r, 1.0, truth(r), False) for r in singles), centre, *others])
    assert np.isinf(law.level[4]) and np.abs(law.level[:4] - truth.level[:4]).max() < 0.3
    for r in ((6, 8, 10, 8, 4), (0, 10, 20, 5, 0), (12, 0, 12, 0, 12)):
        assert law(r) == pytest.approx(truth(r), rel=0.15)


# What schedules lose


@pytest.mark.parametrize("registers", [0, 2])
def test_losses_equal_whole_forwards(registers: int) -> None:
    """Schedules that share blocks lose what each of them loses alone."""
    model = ours(MergeConfig("tome"), num_registers=registers, register_layer=min(registers, 1))
    batch = images(20)
    schedules = [(0, 0, 0), (4, 0, 0), (4, 3, 0), (4, 3, 2), (0, 3, 2)]
    divergence = Divergence(model, Calibration(batch, 20, "noise"))
    found = divergence(schedules, True)
    with torch.no_grad():
        dense = model(batch, r=0).double().log_softmax(1)
        for r, loss in zip(schedules, found, strict=True):
            merged = model(batch, r=r).double().log_softmax(1)
            assert loss == pytest.approx(float((dense.exp() * (dense - merged)).sum(1).mean()), abs=1e-6)
            assert divergence.agreement[r] == pytest.approx(
                100 * float((dense.argmax(1) == merged.argmax(1)).double().mean())
            )
    assert found[0] == pytest.approx(0, abs=1e-9) and np.all(found[1:] > 0)
    third = divergence(schedules[1:2], False)[0]
    assert third == pytest.approx(Divergence(model, Calibration(batch[:7], 7, "noise"))(schedules[1:2], True)[0])
    assert Divergence(model, Calibration(batch, 20, "noise"), by_features=True)([(4, 3, 2)], True) > 0


def found_on_noise(model: MergingViT, text: str, seed: int = 0) -> Measured:
    noise = Calibration(images(24, seed=seed), 24, "noise")
    return search_schedules([gmacs_goal(text, model)], model, noise, "toy", seed).found[0].best


@pytest.mark.parametrize("config", every_method(choices=False))
def test_a_search_keeps_its_budget(config: MergeConfig) -> None:
    """Every method; on a model of one kind of blocks, whose last block is not free because it pools all tokens."""
    model = ours(config, class_token=False, global_pool="avg", num_registers=1)
    least, dense = cheapest(Gmacs(model), Space.of(model)), gmacs(model, 0)
    for share in (0.3, 0.7):
        budget = least + share * (dense - least)
        text = f"{budget:.9f}"
        best = found_on_noise(model, text)
        assert budget - 0.3 * (dense - least) < gmacs(model, best.r) <= budget
        assert best.loss > 0
        assert found_on_noise(model, text).r == best.r


def test_a_search_is_no_worse_than_constants() -> None:
    """On a model whose blocks differ: the first one's merges are ruinous, the second one's lose almost nothing."""
    model = ours(MergeConfig("tome"))
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.mul_(3)
        for part in (model.blocks[1].attn.proj, model.blocks[1].mlp.fc2):
            part.weight.mul_(0.01)
            part.bias.mul_(0.01)
    divergence = Divergence(model, Calibration(images(24), 24, "noise"))
    constant = (3, 3, 3)
    best = found_on_noise(model, f"{gmacs(model, constant) * 1.0001:.6f}")
    assert best.loss < float(divergence([constant], True)[0])


def test_unreachable_budgets_name_the_range() -> None:
    model = ours(MergeConfig("tome"))
    for text in ("0.0000001", "99.9999", "0.1%"):
        with pytest.raises(UserError, match=r"cannot be reached: schedules of tome cost from 0\.\d+ \(\d+%\)"):
            gmacs_goal(text, model)


# Times


def table_of(model: MergingViT, native: float) -> Latency:
    """Times that are proportional to tokens: a block takes as many seconds as tokens enter and leave, / 100."""
    coefficients = tuple(1.0 if term in (1, 3) else 0.0 for term in range(len(latency.terms(2, 1))))
    return Latency(native, 1.0, (0,) * len(model.blocks), (coefficients,), {})


def test_speedup_from_an_injected_table() -> None:
    model = ours(MergeConfig("tome"))
    space = Space.of(model)
    table = table_of(model, native=2.5)
    assert total(table, space, (0, 0, 0)) == pytest.approx(1 + 3 * 2 * 17 / 100)
    assert total(table, space, (8, 0, 0)) == pytest.approx(1 + (17 + 5 * 9) / 100)
    goal = speedup_goal(1.5, model, table)
    noise = Calibration(images(24), 24, "noise")
    best = search_schedules([goal], model, noise, "toy", 0).found[0].best
    assert 1.5 <= table.native / total(table, space, best.r) < 1.6
    with pytest.raises(
        UserError, match=r"--speedup 9 cannot be reached: schedules of tome have from more than 1\.24 to 1\.69"
    ):
        speedup_goal(9, model, table)


def test_times_are_fitted_by_sums_over_blocks() -> None:
    model = ours(MergeConfig("tome"))
    kinds = latency.block_kinds(model)
    assert kinds == (0, 0, 0)
    truth = Latency(9.0, 2.0, kinds, ((0.5, 3.0, 1.0, 2.0, 0.3, 0.0, 4.0),), {})
    schedules = [0, *latency.probes(3), (2, 2, 2), (0, 4, 1)]
    seconds = np.array([total(truth, Space.of(model), model.plan(r).merges) for r in schedules])
    rows = np.array([latency.forward_terms(model, r, kinds) for r in schedules])
    outside, coefficients = latency.fit(rows, seconds)
    fitted = Latency(9.0, outside, kinds, coefficients, {})
    for r in ((1, 2, 3), (5, 0, 1), (0, 0, 7)):
        assert total(fitted, Space.of(model), r) == pytest.approx(total(truth, Space.of(model), r), rel=0.02)


def test_times_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(latency, "SECONDS", 0.1)
    model, precision = ours(MergeConfig("tome")), build_precision(Namespace(amp=None), torch.device("cpu"))
    monkeypatch.setattr(latency, "native_of", lambda model, name: model)
    first = Latency.of(model, "toy", 2, precision)
    files = list(tmp_path.rglob("*.json"))
    assert len(files) == 1 and first.native > 0 and "wrote" in capsys.readouterr().out
    monkeypatch.setattr(latency, "measure", None)  # it is not called again
    assert Latency.of(model, "toy", 2, precision) == first
    assert latency.cache_file(latency.cache_key(model, "toy", 4, precision)) != files[0]  # another batch size
    files[0].write_text(files[0].read_text()[:50])
    assert Latency.read(files[0], first.key) is None


# The command line


def test_evaluation_with_a_budget(tmp_path: Path, capsys: Capture) -> None:
    """A schedule is searched, kept, drawn, and read again by --r of main.py and of the scripts."""
    with toy_model():
        out = succeeds(
            capsys, digits("--eval", "--gmacs", "80%", "--merge", "mctf", "--min_tokens", 2, "--output_dir", tmp_path)
        )
        assert "searching schedules of mctf on 40 images of the training split of DIGITS" in out
        record = schedule_of(tmp_path)
        assert record["gmacs"] <= 0.8 * record["dense_gmacs"] and record["asked"] == "--gmacs 80%"
        assert (tmp_path / "schedule.png").read_bytes()[:4] == b"\x89PNG"
        row = json.loads((tmp_path / "result.json").read_text())["rows"][0]
        assert row["schedule"] == record["r"] and row["tokens"] == record["tokens"]
        again = tmp_path / "again"
        out = succeeds(capsys, digits("--eval", "--r", tmp_path / "schedule.json", "--output_dir", again))
        assert "search" not in out
        result = json.loads((again / "result.json").read_text())
        assert result["merge"] == record["merge"] and result["rows"] == [row]
        same = ["--gmacs", "80%", "--merge", "mctf", "--min_tokens", 2, "--output_dir", again]
        succeeds(capsys, digits("--eval", *same))
        assert schedule_of(again)["r"] == record["r"]  # the same seed, the same images
        schedule = ["--dataset", "DIGITS", "--model", "deit_digits", "--r", str(tmp_path / "schedule.json")]
        classifier, _ = predict.load(schedule)
        assert classifier.model is not None and list(classifier.model.merge.r) == record["r"]


def test_training_with_a_budget_resumes_without_a_search(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = make_tree(tmp_path / "photos", {"a": 3, "b": 4}, {"a": 2}, size=32)
    flags = ["--gmacs", "70%", "--num_registers", 1, "--calibration_path", photos, "--calibration_images", 5]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with toy_model():
        out = succeeds(capsys, digits(*flags, "--output_dir", whole, "--epochs", 2))
        assert f"on 5 images of {photos}" in out
        merges = read_schedule(str(whole / "schedule.json"))["r"]
        assert f"r={','.join(map(str, merges))}" in out and sum(merges) > 0
        succeeds(capsys, digits(*flags, "--output_dir", broken))
        resumed = [*flags, "--output_dir", broken, "--resume", "auto", "--epochs", 2]
        monkeypatch.setattr(calibration, "search_schedules", None)  # it is not called again
        out = succeeds(capsys, digits(*resumed))
        assert "the schedule is that of" in out and "searching" not in out
        found = json.loads((broken / "args.json").read_text())
        assert found["gmacs"] == "70%"
        line = refusal(capsys, digits(*flags[2:4], "--gmacs", "50%", "--output_dir", broken, "--resume", "auto"))
        assert "was not trained with this --gmacs" in line
        out = succeeds(capsys, digits("--eval", "--resume", broken / "best.pth"))
        assert f"r={','.join(map(str, merges))}" in out


def test_contradictions_are_one_line(tmp_path: Path, capsys: Capture) -> None:
    with toy_model():
        succeeds(capsys, digits("--eval", "--gmacs", "60%", "--output_dir", tmp_path, "--calibration_images", 8))
        file = tmp_path / "schedule.json"
        record = json.loads(file.read_text())
        torn, shallower, finer = (tmp_path / f"{name}.json" for name in ("torn", "shallower", "finer"))
        torn.write_text(file.read_text()[:100])
        shorter = {"depth": 2, "r": record["r"][:2], "merge": record["merge"] | {"r": record["r"][:2]}}
        shallower.write_text(json.dumps(record | shorter))
        finer.write_text(json.dumps(record | {"patches": 64}))
        for flags, words in (
            (("--gmacs", "0.5", "--r", "3"), "leave one of them out"),
            (("--gmacs", "50%", "--r_evals", "3"), "leave one of them out"),
            (("--gmacs", "50%", "--speedup", "2"), "two budgets"),
            (("--gmacs", "50%", "--merge", "none"), "leave --merge none out"),
            (["--gmacs", "120%"], "below 100%"),
            (["--speedup", "0.9"], "give more than 1"),
            (["--gmacs", "much"], "invalid number"),
            (("--gmacs", "99"), "cannot be reached: schedules of tome cost from"),
            (("--gmacs", "60%", "--calibration_path", tmp_path / "nowhere"), "--calibration_path"),
            (("--r", "3", "--calibration_images", "9"), "add --gmacs or --speedup"),
            (("--r", tmp_path / "absent.json"), "cannot read the schedule"),
            (("--r", torn), "is not a schedule of --gmacs"),
            (("--r", tmp_path / "result.json"), "is not a schedule of --gmacs"),
            (("--r", shallower), "2 blocks and 16 patches (deit_digits), but this model has 3 and 16"),
            (("--r", finer), "3 blocks and 64 patches"),
            (("--r", file, "--merge", "mctf"), "was searched for tome, not for --merge mctf"),
        ):
            assert words in refusal(capsys, digits("--eval", *flags)), flags
    with pytest.raises(UserError, match="has no effect on a prediction"):
        predict.load(["--dataset", "DIGITS", "--model", "deit_digits", "--gmacs", "50%"])


def test_several_budgets_in_one_command(tmp_path: Path, capsys: Capture) -> None:
    argv = "--dataset DIGITS --model deit_digits --merge tome --limit 32 --gmacs 60% 80% --out".split()
    with toy_model():
        assert search_command.main([*argv, str(tmp_path)]) == 0
        out = capsys.readouterr().out
        records = [read_schedule(str(tmp_path / f"schedule-tome-gmacs-{share}%.json")) for share in (60, 80)]
        assert records[0]["gmacs"] < records[1]["gmacs"] and (tmp_path / "schedules.png").is_file()
        assert out.count("| --gmacs ") == 2
        assert search_command.main(argv[:4]) == 2
        assert "name a budget" in capsys.readouterr().err


def test_calibration_images_follow_from_the_seed(tmp_path: Path) -> None:
    photos = make_tree(tmp_path, {"a": 6}, {"b": 6}, size=32)
    base = ["--eval", "--dataset", "DIGITS", "--gmacs", "50%", "--calibration_path", str(photos)]
    config = calibration.DataConfig(input_size=32)

    def load(*flags: str, rank: int = 0, world: int = 1) -> Calibration:
        args = options.parse_args([*base, *flags])
        return calibration.load_calibration(args, None, config, Distributed(torch.device("cpu"), rank, world))

    whole = load()
    assert len(whole.images) == whole.total == 12
    assert torch.equal(load().images, whole.images) and not torch.equal(load("--seed", "1").images, whole.images)
    assert torch.equal(load("--calibration_images", "5").images, whole.images[:5])
    parts = [load(rank=rank, world=2).images for rank in (0, 1)]
    assert torch.equal(torch.stack(list(itertools.chain(*zip(*parts, strict=True)))), whole.images)
    (photos / "train" / "a" / "0.png").write_bytes(b"no image")
    assert load().total == 11
