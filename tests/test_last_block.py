"""The last block, which serves the pooled tokens alone: logits stay, and whoever may see the other tokens gets them."""

from typing import Any

import pytest
import torch
from tiny import images, ours, with_prefix
from torch import nn

from analysis.ideal import ideal_model
from models import MergeConfig
from models.gmacs import gmacs

CONFIGS = {
    "tome": MergeConfig("tome", r=4),
    "regtome": MergeConfig("regtome", r=(5, 4, 3)),
    "mctf-until-the-last": MergeConfig("mctf", r=(0, 5, 0)),
    "mctf-after-the-mlp": MergeConfig("mctf", r=(3, 3, 3), one_step_ahead="off"),
}


def rows_of_the_last_mlp(model: Any, **call: Any) -> int:
    """Tokens that the last block's MLP computes, seen without a hook on it."""
    seen: list[int] = []
    mlp = model.blocks[-1].mlp
    original = type(mlp).forward

    class Watched(type(mlp)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.shape[1])
            return original(self, x)

    mlp.__class__ = Watched
    with torch.no_grad():
        model(images(), **call)
    mlp.__class__ = Watched.__bases__[0]
    return seen[0]


@pytest.mark.parametrize("prefix", [1, 2, 5])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_are_those_of_all_tokens(config: MergeConfig, prefix: int) -> None:
    model = with_prefix(prefix, config)
    with torch.no_grad():
        pooled, traced = model(images()), model(images(), trace=True)
        torch.testing.assert_close(pooled, traced.logits, rtol=0, atol=2e-6)
    assert rows_of_the_last_mlp(model) == (2 if prefix == 2 else 1)
    assert rows_of_the_last_mlp(ideal_model(model)) == (2 if prefix == 2 else 1)
    assert rows_of_the_last_mlp(model, trace=True) == traced.counts[-1] + (config.one_step_ahead == "off") * 3
    assert gmacs(model, inference=True) < gmacs(model)


def test_a_forward_that_merges_nothing_computes_all_tokens() -> None:
    model = ours(MergeConfig("tome", r=4))
    with torch.no_grad():
        assert torch.equal(model(images(), r=0), model(images(), r=0, trace=True).logits)
    assert rows_of_the_last_mlp(model, r=0) == 17 and rows_of_the_last_mlp(ours(MergeConfig("none"))) == 17


def test_late_class_token_and_layer_scale() -> None:
    model = ours(MergeConfig("regtome", r=(4, 4, 0)), num_registers=2, register_layer=1, class_layer=2, init_values=0.3)
    with torch.no_grad():
        torch.testing.assert_close(model(images()), model(images(), trace=True).logits, rtol=0, atol=2e-6)
    assert rows_of_the_last_mlp(model) == 1


def test_who_may_look_at_patches_gets_them() -> None:
    config = MergeConfig("tome", r=4)
    model = ours(config)
    tokens = model.plan().counts[-1]
    assert rows_of_the_last_mlp(model.train()) == tokens
    assert rows_of_the_last_mlp(model.eval()) == 1
    places: list[nn.Module] = [model.blocks[-1], model.blocks[-1].attn.proj, model.norm]
    for module in places:
        handle = module.register_forward_hook(lambda *_: None)
        assert rows_of_the_last_mlp(model) == tokens and gmacs(model, inference=True) == gmacs(model)
        handle.remove()
        assert rows_of_the_last_mlp(model) == 1
    assert rows_of_the_last_mlp(ours(MergeConfig("none")), r=0, attn_mask=torch.zeros(17, 17)) == 17
    assert rows_of_the_last_mlp(with_prefix(0, config)) == 4  # pools all of them
    assert rows_of_the_last_mlp(ours(MergeConfig("mctf", r=4))) == ours(MergeConfig("mctf", r=4)).plan().counts[-1]
    assert model.forward_features(images()).shape[1] == tokens


def test_gradients_are_those_of_all_tokens() -> None:
    model = ours(MergeConfig("regtome", r=(5, 4, 0)))
    found = []
    for trace in (False, True):
        x = images().requires_grad_()
        out = model(x, trace=trace)
        (out.logits if trace else out).square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
