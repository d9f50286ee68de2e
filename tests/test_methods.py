"""The registry of methods: what follows from a method's module, PiToMe beside a slow oracle, and the guide's example.

Shapes: B batch, N tokens, P prefix tokens, n patch tokens, D key channels.
"""

import dataclasses
import importlib
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import candidates, every_method, images, ours, with_prefix
from torch import Tensor

from analysis.ideal import ideal_model
from models import MergeConfig, UserError, merge_by_map
from models.blocks import PLACES
from models.gmacs import gmacs
from models.merging import group_map
from models.methods import METHODS, Method, all_knobs, methods_with, variants
from models.methods.pitome import match_by_energy
from options import build_parser, parse_args

pytestmark = pytest.mark.filterwarnings("ignore:r=.* is more than")
PREFIXES = (0, 1, 2, 5)
GUIDE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"


@pytest.fixture
def nearby(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Method]]:
    """The method that docs/extending.md adds."""
    code = re.search(r"```python\n(.*?)```", GUIDE.read_text(), re.S)
    assert code is not None
    body = code[1][code[1].index("@register") :]
    assert len([line for line in body.splitlines() if line.strip()]) < 30
    file = tmp_path / "guide.py"
    file.write_text(code[1])
    before = dict(METHODS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("guide").NearbyToMe
    del sys.modules["guide"]
    METHODS.clear()
    METHODS.update(before)


# What follows from a module


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_what_it_is(name: str) -> None:
    method = METHODS[name]
    assert method.name == name and method.__doc__
    assert name == "none" or re.search(r"arXiv \d{4}\.\d{5}|docs/beyond.md", method.paper)
    assert method().place() in PLACES
    for knob in method.knobs().values():
        assert knob.help and not knob.help.endswith(".")
        knob.check(knob.default)
    assert (
        MergeConfig(method=name).as_dict() == {"method": name, "r": "0", "activate_layers": None} | method().settings()
    )


def test_published_variants_are_configurations() -> None:
    assert {"tome", "mctf", "mctf_fast", "lgtm", "pitome"} <= set(variants())
    for keywords in variants().values():
        assert max(ours(MergeConfig(**keywords), depth=12).plan().merges) > 0


def test_every_setting_is_a_flag_that_reaches_the_config() -> None:
    flags = {flag for action in build_parser()._actions for flag in action.option_strings}
    assert {f"--{name}" for name in all_knobs()} <= flags
    args = parse_args(["--merge", "pitome", "--r", "0.1", "--margin", "0.5", "--dataset", "DIGITS", "--eval"])
    assert args.margin == 0.5 and args.tau_sim is None


@pytest.mark.parametrize("value", ["-0.1", "1.5", "nan", "x"])
def test_a_flag_has_the_range_of_its_setting(value: str) -> None:
    with pytest.raises(UserError, match="--margin"):
        parse_args(["--merge", "pitome", "--r", "4", "--margin", value])


@pytest.mark.parametrize("name", METHODS)
def test_a_setting_of_another_method_is_refused(name: str) -> None:
    for setting in set(all_knobs()) - set(METHODS[name].knobs()):
        with pytest.raises(UserError, match=f"{setting} has no effect with method '{name}'"):
            MergeConfig(method=name, **{setting: all_knobs()[setting].default})
        assert getattr(MergeConfig(method=name), setting) is None
    with pytest.raises(TypeError, match="no setting 'tau'"):
        MergeConfig(tau=1)


def test_settings_survive_replace_and_change_with_the_method() -> None:
    config = MergeConfig(method="mctf", r=8, tau_size=7)
    changed = dataclasses.replace(config, tau_info=3)
    assert (changed.tau_size, changed.tau_info, changed.r) == (7, 3, 8)
    assert dataclasses.replace(config, method="tome").pooling == "size"  # the defaults of the new method
    assert config.with_r(4) == MergeConfig(method="mctf", r=4, tau_size=7) and len({config, config.with_r(8)}) == 1
    assert MergeConfig.from_dict(config.as_dict()) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 3  # type: ignore[misc]


# Every method, also one that a user adds


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("config", every_method())
def test_what_holds_for_every_merge(config: MergeConfig, prefix: int) -> None:
    check_every_merge(config, prefix)


def check_every_merge(config: MergeConfig, prefix: int) -> None:
    """Sizes add up, groups partition the patches, prefix tokens stay, ideal and GMACs count the same tokens."""
    model = with_prefix(prefix, config)
    with torch.no_grad():
        out = model(images(2), trace=True)
        assert ideal_model(model)(images(2), trace=True).counts == out.counts
    assert out.counts == model.plan().counts and out.counts[-1] < 16 + prefix
    assert torch.equal(out.size.sum(1), torch.full((2,), 16.0 + prefix))
    assert (out.size[:, :prefix] == 1).all()
    for b in range(2):
        counts = torch.bincount(out.group[b], minlength=out.counts[-1] - prefix)
        assert torch.equal(counts.float(), out.size[b, prefix:])
    assert gmacs(model) < gmacs(model, r=0)
    model(images(2)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_guide_adds_a_method(nearby: type[Method]) -> None:
    for prefix in PREFIXES:
        check_every_merge(MergeConfig("nearby", 3), prefix)
    assert methods_with("distance_weight") == ("nearby",)
    args = parse_args(["--merge", "nearby", "--r", "4", "--distance_weight", "2", "--dataset", "DIGITS", "--eval"])
    assert args.distance_weight == 2
    model = ours(MergeConfig("nearby", 4, distance_weight=1e6), num_registers=2)
    tome, weightless = (ours(MergeConfig(m, 4), num_registers=2) for m in ("tome", "nearby"))
    with torch.no_grad():
        far = model(images(), trace=True)
        zero = dataclasses.replace(weightless.merge, distance_weight=0)
        assert torch.equal(ours(zero, num_registers=2)(images()), tome(images()))
    # with a huge weight the first merges are of neighbours in the 4 x 4 grid
    group = far.groups[0]
    for b in range(2):
        for token in group[b].unique():
            members = (group[b] == token).nonzero().flatten()
            rows, columns = members // 4, members % 4
            if len(members) == 2:
                assert int((rows[0] - rows[1]).abs() + (columns[0] - columns[1]).abs()) == 1


def test_what_a_token_carries_is_the_mean_over_its_patches(nearby: type[Method]) -> None:
    """Carried state composes over blocks as the sizes do, and registers that enter late carry zeros."""
    model = ours(MergeConfig("nearby", (5, 3, 0)), num_registers=3, register_layer=1)
    x = images(2)
    with torch.no_grad():
        tokens = model.embed(x, follow=True)
        start = tokens.carried["centre"]
        for layer in model.layers(tokens, model.plan()):
            after = layer.after
    prefix = after.num_prefix_tokens
    assert prefix == 4 and (after.carried["centre"][:, :prefix] == 0).all()
    expected = merge_by_map(start, after.group, after.x.shape[1] - prefix)
    torch.testing.assert_close(after.carried["centre"][:, prefix:], expected, rtol=1e-5, atol=1e-6)


# PiToMe


def slow_pitome(keys: Tensor, r: int, margin: float) -> list[list[int]]:
    """Groups of the patch tokens of one image, keys (n,D), token by token from the equations of arXiv 2405.16148."""
    n = len(keys)
    cosine = [[float(F.cosine_similarity(keys[i], keys[j], dim=0)) for j in range(n)] for i in range(n)]
    soft = lambda value: value if value >= 0 else math.exp(value) - 1  # noqa: E731  (ELU)
    energy = [sum(soft(cosine[i][j] - margin) for j in range(n)) / n for i in range(n)]
    order = sorted(range(n), key=lambda i: -energy[i])
    sources, destinations = order[0 : 2 * r : 2], order[1 : 2 * r : 2]
    groups = {i: [i] for i in range(n) if i not in sources}
    for source in sources:
        groups[max(destinations, key=lambda j: cosine[source][j])].append(source)
    return [sorted(groups[i]) for i in sorted(groups)]


@pytest.mark.parametrize("margin", [0.0, 0.4, 0.75])
@pytest.mark.parametrize("n", [2, 5, 8, 13])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_pitome_equals_the_slow_oracle(prefix: int, n: int, margin: float) -> None:
    keys = torch.randn(3, n, 6, generator=torch.Generator().manual_seed(n)).double()
    for r in {1, n // 3, n // 2} - {0}:
        merge = match_by_energy(keys, r, prefix, margin)
        group = group_map(merge)
        assert torch.equal(group[:, :prefix], torch.arange(prefix).expand(3, -1))
        for b in range(3):
            members = [(group[b, prefix:] == m + prefix).nonzero().flatten().tolist() for m in range(n - r)]
            assert members == slow_pitome(keys[b], r, margin)


def test_pitome_protects_what_stands_apart_and_its_margin_falls_with_depth() -> None:
    """Ten copies of one token and four that resemble nothing: only copies merge."""
    keys = torch.cat((torch.eye(5)[:4], torch.eye(5)[4:].expand(10, -1)))[None, None]
    rule = MergeConfig("pitome", 4).rule
    asked = candidates(torch.zeros(1, 14, 5), 4, 0, keys=keys, layer=3, depth=12)
    merged = group_map(rule.match(asked))[0]
    assert len({int(merged[i]) for i in range(4)}) == 4 and len(set(merged.tolist())) == 10
    energy = rule.token_scores(asked)["energy"][0]
    margin = 0.75 * (1 - 3 / 12)
    alone = (1 - margin + 13 * (math.exp(-margin) - 1)) / 14
    copies = (10 * (1 - margin) + 4 * (math.exp(-margin) - 1)) / 14
    torch.testing.assert_close(energy, torch.tensor([alone] * 4 + [copies] * 10))


def test_pitome_in_the_model_uses_the_keys_of_its_block() -> None:
    model = ours(MergeConfig("pitome", (4, 3, 2), margin=0.6), num_registers=2)
    with torch.no_grad():
        for layer in model.layers(model.embed(images(2), follow=True), model.plan()):
            attn, prefix = layer.block.attn, layer.num_prefix_tokens
            keys = attn.qkv(layer.block.norm1(layer.before.x)).chunk(3, dim=-1)[1]
            keys = keys.unflatten(2, (attn.num_heads, -1)).mean(dim=2)[:, prefix:]
            assert layer.merge is not None
            group = group_map(layer.merge)
            for b in range(2):
                expected = slow_pitome(keys[b], layer.plan.r, 0.6 * (1 - layer.index / 3))
                members = [(group[b, prefix:] == m + prefix).nonzero().flatten().tolist() for m in range(len(expected))]
                assert members == expected
