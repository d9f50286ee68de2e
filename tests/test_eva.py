"""timm's Eva (DINOv3, EVA-02, RoPE-ViT, Perception Encoder, Sapiens2) with merging: exact without public weights."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from evas import FAMILIES, every_family, merging_eva, timm_eva
from tiny import every_method, images, randomise
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models import MergeConfig, MergingViT, UserError, apply_merging, create_model
from models.blocks import project_qk, project_qkv, project_v, rotate
from models.export import compare, export_onnx, load_onnx
from models.gmacs import gmacs
from models.tokens import Tokens
from models.weights import extract_state_dict, load_weights

pytestmark = pytest.mark.filterwarnings("ignore:r=.* is more than")
POST_NORM = "eva02_enormous_patch14_clip_224"


def example(model: MergingViT, batch: int = 2, seed: int = 1) -> Tensor:
    parameter = model.patch_embed.proj.weight
    return images(batch, tuple(model.patch_embed.img_size), seed).to(parameter.dtype)


def run(model: MergingViT, tokens: Tokens, merges: tuple[int, ...] = (0, 0, 0)) -> Tokens:
    """Given tokens through all blocks, with a number of merges in each."""
    for layer in model.layers(tokens, model.plan(merges, tokens.x.shape[1])):
        tokens = layer.after
    return tokens


# Nothing merges


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_without_merges_it_is_timms_own_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    vit = timm_eva(family).to(dtype)
    model = apply_merging(vit, MergeConfig(r=0)).eval()
    x = example(model)
    assert torch.equal(model(x), vit(x))
    assert torch.equal(model.forward_features(x), vit.forward_features(x))
    assert list(model.state_dict()) == list(vit.state_dict())
    for own, theirs in zip(model.parameters(), vit.parameters(), strict=True):
        assert own is theirs


@every_family
def test_in_training_too_with_timms_augmentation_of_positions(family: str) -> None:
    augmentation = {"rope_shift_coords": 0.3, "rope_jitter_coords": 1.5, "rope_rescale_coords": 2.0}
    vit = timm_eva(family, drop_path_rate=0.3, **(augmentation if FAMILIES[family].get("use_rot_pos_emb") else {}))
    model = apply_merging(vit, MergeConfig(r=0)).train()
    x, logits = example(model), []
    for run_by in (model, vit.train()):
        torch.manual_seed(3)
        logits.append(run_by(x))
    assert torch.equal(*logits)
    torch.manual_seed(4)
    other = model(x)
    model.grad_checkpointing = True
    torch.manual_seed(4)
    assert torch.equal(model(x), other) and not torch.equal(other, logits[0])


@every_family
def test_images_of_other_sizes_and_shapes(family: str) -> None:
    for how in ("dynamic", "set"):
        vit = timm_eva(family, img_size=32, dynamic_img_size=how == "dynamic")
        model = apply_merging(vit, MergeConfig(r=2)).eval()
        for size in ((48, 24), (32, 32), (40, 56)):
            if how == "set":
                model.set_input_size(size)
                vit.set_input_size(size)
            x = images(2, size)
            assert torch.equal(model(x, r=0), vit(x))
            out = model(x, trace=True)
            assert out.counts[-1] == size[0] * size[1] // 64 - 6 + model.num_prefix_tokens
            assert out.logits.isfinite().all()


def test_patches_of_another_shape_and_other_numbers_of_registers() -> None:
    for registers in (1, 7):
        options = {"patch_size": (8, 4), "num_reg_tokens": registers}
        vit = timm_eva("dinov3", **options)
        model = apply_merging(vit, MergeConfig(r=5)).eval()
        assert model.patch_embed.grid_size == (4, 8) and model.num_registers == registers
        assert torch.equal(model(images(), r=0), vit(images()))
        assert model(images(), trace=True).counts == tuple(32 - 5 * i + 1 + registers for i in (1, 2, 3))


# Merging


@every_family
@pytest.mark.parametrize("merge", every_method(choices=False))
def test_every_method_merges_every_family(family: str, merge: MergeConfig) -> None:
    model = merging_eva(family, merge)
    x = example(model)
    out = model(x, trace=True)
    assert out.counts == model.plan().counts and out.counts[-1] < out.size.shape[1] + 9
    assert out.logits.isfinite().all()
    assert torch.equal(out.size.sum(dim=1), torch.full((2,), model.num_prefix_tokens + model.patch_embed.num_patches))
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), out.logits)
    assert not torch.equal(out.logits, model(x, r=0))


@every_family
def test_the_order_of_patches_means_nothing_once_they_have_their_angles(family: str) -> None:
    model = merging_eva(family)
    tokens = model.embed(example(model))
    order = torch.randperm(tokens.x.shape[1], generator=torch.Generator().manual_seed(0))
    positions = None if tokens.positions is None else tokens.positions.take(order)
    permuted = run(model, tokens._replace(x=tokens.x[:, order], positions=positions)).x
    straight = run(model, tokens).x
    prefix = model.num_prefix_tokens
    torch.testing.assert_close(permuted[:, :prefix], straight[:, :prefix], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(permuted[:, prefix:], straight[:, prefix:][:, order], atol=1e-5, rtol=1e-5)
    if tokens.positions is not None:  # and it means something without
        lost = run(model, tokens._replace(x=tokens.x[:, order])).x
        assert (lost[:, prefix:] - straight[:, prefix:][:, order]).abs().max() > 1e-3


def twice(tokens: Tokens) -> Tokens:
    """The even patches, each of them two times: same features, same place."""
    index = torch.arange(0, tokens.x.shape[1] - 1, 2).repeat_interleave(2)
    positions = None if tokens.positions is None else tokens.positions.take(index)
    return tokens._replace(x=tokens.x[:, index], size=tokens.size[:, index], positions=positions)


@every_family
def test_merged_duplicates_are_what_they_are_apart(family: str) -> None:
    """Two equal tokens as one of size 2: by hand before the first block, and by every method in the first one."""
    model = merging_eva(family, dynamic_img_size=True)
    pairs = twice(model.embed(example(model)))
    apart = run(model, pairs)
    prefix, number = model.num_prefix_tokens, pairs.x.shape[1] // 2
    positions = None if pairs.positions is None else pairs.positions.take(slice(0, None, 2))
    merged = pairs._replace(x=pairs.x[:, ::2], size=2 * pairs.size[:, ::2], positions=positions, sizes_differ=True)
    by_hand = run(model, merged)
    torch.testing.assert_close(by_hand.x[:, :prefix], apart.x[:, :prefix], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(by_hand.x[:, prefix:], apart.x[:, prefix::2], atol=1e-5, rtol=1e-5)
    for method, settings in (("tome", {}), ("mctf", {"bidirectional": False}), ("mctf", {"one_step_ahead": "precise"})):
        model.merge = MergeConfig(method, 0, (0, 1, 2), **({"min_tokens": 0} | settings))
        merged = run(model, pairs, (number, 0, 0))
        assert merged.x.shape[1] == prefix + number
        torch.testing.assert_close(merged.x[:, :prefix], apart.x[:, :prefix], atol=1e-5, rtol=1e-5)
        assert torch.equal(merged.size[:, prefix:], torch.full_like(merged.size[:, prefix:], 2))


@every_family
def test_the_angle_of_a_merged_token_is_the_mean_over_its_patches(family: str) -> None:
    """Over three merges in a row: the key that patches of equal features share is the mean of their rotated keys."""
    model = merging_eva(family)
    x = example(model)
    tokens = model.embed(x, follow=True)
    first = model.enter(0, tokens).positions
    if first is None:
        return
    after = [layer.after for layer in model.layers(tokens, model.plan(3))]
    prefix = model.num_prefix_tokens
    for index, layer in enumerate(after):
        assert layer.positions is not None
        table, merged = first.angles(index), layer.positions.angles(index)
        assert merged.shape[2] == layer.x.shape[1]
        assert torch.equal(merged[:, :, :prefix], table[:, :, :prefix].expand_as(merged[:, :, :prefix]))
        for image in range(len(x)):
            for token in range(int(layer.group.max()) + 1):
                members = (layer.group[image] == token).nonzero().squeeze(1) + prefix
                mean = table[0, :, members].mean(dim=1)
                torch.testing.assert_close(merged[image, :, prefix + token], mean, atol=1e-5, rtol=1e-5)


@every_family
def test_late_prefix_tokens_and_new_registers(family: str) -> None:
    late = {"register_layer": 2, "num_registers": 3}
    if FAMILIES[family].get("class_token", True):
        late["class_layer"] = 1
    model = merging_eva(family, MergeConfig(r=2), **late)
    out = model(example(model), trace=True)
    patches = model.patch_embed.num_patches
    assert out.counts[-1] == patches - 6 + model.num_prefix_tokens == patches - 6 + model.num_class_tokens + 3
    early = merging_eva(family, MergeConfig(r=2), num_registers=3)
    early.load_state_dict(model.state_dict())
    assert not torch.equal(early(example(model)), out.logits)
    out.logits.sum().backward()
    assert model.reg_token.grad.abs().max() > 0


# The parts of attention that methods use one by one


@every_family
def test_attention_in_parts_is_timms_attention(family: str) -> None:
    model = merging_eva(family)
    tokens = model.enter(0, model.embed(example(model)))
    for index, block in enumerate(model.blocks):
        attn, x = block.attn, block.norm1(tokens.x)
        q, k, v = project_qkv(attn, x)
        assert q.shape == k.shape == v.shape == (2, attn.num_heads, x.shape[1], attn.head_dim)
        inputs: dict[str, Any] = {}
        if tokens.positions is not None:
            inputs["rope"] = tokens.positions.angles(index)
            q, k = (rotate(part, inputs["rope"], attn.rotate_half, v.dtype) for part in (q, k))
        for whole, part in zip((q, k), project_qk(attn, x, inputs.get("rope")), strict=True):
            torch.testing.assert_close(part, whole)
        torch.testing.assert_close(project_v(attn, x).unflatten(2, (attn.num_heads, -1)).transpose(1, 2), v)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(attn.proj(attn.norm(y)), attn(x, **inputs), atol=1e-5, rtol=1e-5)


class Doubled(nn.Module):
    """What an adapter looks like: a layer around a layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base_layer = linear
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base_layer(x)


@pytest.mark.parametrize("family", ["dinov3", "eva02-apart", "rope-vit", "sapiens2"])
@pytest.mark.parametrize("method", ["tome", "mctf"])
def test_an_adapter_in_the_projections_acts_in_every_block(family: str, method: str) -> None:
    """A layer that doubles its output is the same model with doubled weights, merging or not."""
    model, adapted = (merging_eva(family, MergeConfig(method, 3)) for _ in range(2))
    names = ("qkv",) if model.blocks[0].attn.qkv is not None else ("q_proj", "k_proj", "v_proj")
    for block, other in zip(model.blocks, adapted.blocks, strict=True):
        for name in names:
            linear = getattr(block.attn, name)
            linear.weight.data *= 2
            if linear.bias is not None:
                linear.bias.data *= 2
            setattr(other.attn, name, Doubled(getattr(other.attn, name)))
    x = example(model)
    for r in (0, None):
        torch.testing.assert_close(adapted(x, r=r), model(x, r=r), atol=1e-5, rtol=1e-5)


# Gradients, costs, other forms of the model


@every_family
@pytest.mark.parametrize("method", ["tome", "mctf"])
def test_gradients_are_those_of_the_logits(family: str, method: str) -> None:
    """Along a random direction of all parameters, against a central difference in double precision."""
    model = merging_eva(family, MergeConfig(method, 3, pooling="size")).double().train()
    if model.rope_mixed:  # timm computes with them in single precision
        model(example(model)).sum().backward()
        assert model.rope.freqs.grad.abs().amax(dim=(0, 2, 3)).min() > 0  # in every block
        model.rope.freqs.requires_grad_(False)
    x, generator = example(model), torch.Generator().manual_seed(0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    directions = [torch.randn(p.shape, generator=generator, dtype=torch.double) for p in parameters]
    weight = torch.randn(2, 10, generator=generator, dtype=torch.double)
    gradients = torch.autograd.grad((model(x) * weight).sum(), parameters)
    expected = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    values = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += step * direction
            values.append(float((model(x) * weight).sum()))
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert all(g.isfinite().all() for g in gradients)


@every_family
@pytest.mark.parametrize("merge", [MergeConfig(r=8), MergeConfig("mctf", r=8)], ids=["tome", "mctf"])
def test_multiply_adds_are_what_torch_counts(family: str, merge: MergeConfig) -> None:
    size = (64, 48) if family == "sapiens2" else 64
    model = merging_eva(family, merge, img_size=size, embed_dim=96, num_heads=6).requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    x = example(model, 1)
    for r in (0, None):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, r=r)
        # the formula leaves matching out
        assert gmacs(model, r, inference=True) == pytest.approx(
            counter.get_total_flops() / 2e9, rel=1e-6 if r == 0 else 0.04
        )


@pytest.mark.parametrize("family", ["dinov3", "rope-vit-mixed"])
def test_compiled_it_is_one_graph(family: str) -> None:
    torch._dynamo.reset()
    model = merging_eva(family, MergeConfig(r=3), depth=2)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(example(model)), model(example(model)), rtol=1e-5, atol=1e-5)


# Names and weights


def test_every_eva_of_timm_is_served_but_the_post_norm_one() -> None:
    names = timm.list_models(module="eva")
    assert len(names) >= 65 and POST_NORM in names
    for name in names:
        with torch.device("meta"):
            vit = timm.create_model(name, depth=2, **({"num_kv_heads": 4} if name.endswith("sapiens2") else {}))
            if name == POST_NORM:
                with pytest.raises(UserError, match=r"its blocks are EvaBlockPostNorm.* needs a place to merge"):
                    apply_merging(vit, MergeConfig())
                continue
            model = apply_merging(vit, MergeConfig(r=64), num_registers=4)
        assert model.num_registers == 4 and model.prefixes() == (4 + model.num_class_tokens,) * 2
        assert 0.4 < gmacs(model) / gmacs(model, 0) < 1
        assert set(model.state_dict()) == set(vit.state_dict()) | {"reg_token"}
    with pytest.raises(UserError, match="its blocks are EvaBlockPostNorm"):
        create_model(POST_NORM)  # without 4.4 billion parameters in between


@pytest.mark.parametrize(
    ("name", "why"),
    [("naflexvit_base_patch16_gap", "images of all sizes share"), ("swin_tiny_patch4_window7_224", "regular grid")],
)
def test_other_modules_are_refused_by_what_they_would_need(name: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        create_model(name)


def test_our_names_and_timms_give_the_same_model() -> None:
    small = {"embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 32}
    for name in ("dinov3_small", "vit_small_patch16_dinov3", "regtome"):
        options: dict[str, Any] = {"base": "dinov3_small"} if name == "regtome" else {}
        make = timm.create_model if name == "regtome" else create_model
        model = make(name, merge=MergeConfig(r=1), num_classes=5, **options, **small)
        assert isinstance(model, MergingViT) and model.num_registers == 4
        assert model.rope.temperature == 100 and model(images()).shape == (2, 5)
    with pytest.raises(UserError, match="did you mean rope_temperature"):
        create_model("dinov3_small", rope_temprature=3)
    with pytest.raises(UserError, match="write num_registers"):
        create_model("dinov3_small", num_reg_tokens=2)
    with pytest.raises(UserError, match="drops patches"):
        create_model("dinov3_small", patch_drop_rate=0.5, **small)


@every_family
def test_weights_load_from_timm_and_back(family: str) -> None:
    vit, model = timm_eva(family), randomise(merging_eva(family), seed=5)
    weights, _ = extract_state_dict({"model": vit.state_dict()})
    report = load_weights(model, weights)
    assert not (report.missing or report.unexpected or report.fresh)
    assert torch.equal(model(example(model), r=0), vit(example(model)))
    vit.load_state_dict(randomise(model, seed=6).state_dict())
    assert torch.equal(model(example(model), r=0), vit(example(model)))


def test_more_registers_than_the_weights_have() -> None:
    model = merging_eva("dinov3", num_registers=6)
    report = load_weights(model, timm_eva("dinov3").state_dict())
    assert report.fresh == ("reg_token",) and any("4 from the checkpoint, 2 fresh" in note for note in report.notes)


@pytest.mark.parametrize("family", ["dinov3", "dinov3-swiglu"])
def test_weights_in_the_names_of_dinov3(family: str) -> None:
    model = randomise(merging_eva(family), seed=3)
    original = {}
    swaps = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma", "reg_token": "storage_tokens", "mlp.fc1_g": "mlp.w1"}
    swaps |= {"mlp.fc1_x": "mlp.w2"} | ({"mlp.fc2": "mlp.w3"} if "swiglu" in family else {})
    for name, tensor in model.state_dict().items():
        for new, old in swaps.items():
            name = name.replace(new, old)
        original[name] = tensor
    for index, block in enumerate(model.blocks):
        attn = f"blocks.{index}.attn."
        bias = torch.zeros(72) if block.attn.q_bias is None else None
        if bias is None:
            bias = torch.cat((block.attn.q_bias, torch.full((24,), torch.pi), block.attn.v_bias)).detach()
            del original[attn + "q_bias"], original[attn + "v_bias"]
        original |= {attn + "qkv.bias": bias, attn + "qkv.bias_mask": torch.ones(72)}
    original |= {"mask_token": torch.zeros(1, 24), "rope_embed.periods": torch.ones(2)}
    weights, origin = extract_state_dict(original)
    assert origin == "dinov3"
    loaded = merging_eva(family)
    assert not load_weights(loaded, weights).fresh
    assert torch.equal(loaded(example(loaded), r=0), model(example(model), r=0))


def test_it_can_be_given_another_head_and_other_pooling() -> None:
    model = merging_eva("pe", MergeConfig(r=3))
    model.reset_classifier(4, "avg")
    assert model(example(model)).shape == (2, 4) and model.attn_pool is None
    with pytest.raises(UserError, match="does not fit this model"):
        model.reset_classifier(4, "map")
    vit = timm_eva("pe")
    vit.reset_classifier(0, "avg")
    model.reset_classifier(0)
    assert torch.equal(model(example(model), r=0), vit(example(model)))
    assert "rope.freqs" in merging_eva("rope-vit-mixed").no_weight_decay()


@pytest.mark.parametrize(("family", "method"), [("dinov3", "mctf"), ("rope-vit-mixed", "tome")])
def test_exported_it_takes_any_batch_without_scatters(family: str, method: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    import onnx

    model = merging_eva(family, MergeConfig(method, 3, (0, 1), min_tokens=4), depth=2)
    file = tmp_path / "model.onnx"
    program = export_onnx(model, example(model, 2), file)
    proto = onnx.load(str(file))
    nodes = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    assert not [node.op_type for node in nodes if "Scatter" in node.op_type]
    for run_by in (load_onnx(file), program.module()):
        for row in compare(model, run_by, [example(model, batch) for batch in (1, 3)]):
            assert row.difference < 2e-5 and row.top1 == 1, row
