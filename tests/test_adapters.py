"""Low-rank adapters, the parts that train and their rates: in the model, in training, and merged everywhere else."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from evas import every_family, merging_eva
from PIL import Image
from runs import digits, refusal, run, same_run, succeeds, toy_model
from test_resume import Watch, watch  # noqa: F401  # watch is a fixture
from timm.optim import param_groups_layer_decay
from tiny import every_method, images, ours
from torch import Tensor

import main
from engine import build_average
from models import MergeConfig, MergingViT, UserError
from models.adapters import LoraSettings, add_lora, is_lora, merge_lora
from models.export import load_folder
from models.gmacs import gmacs
from models.parameters import freeze, parameter_groups
from models.weights import read_weights
from options import parse_args
from run import export, finetuning, predict
from run.kill_test import checkpoint

pytest.importorskip("peft", reason="peft is not installed")
Capture = pytest.CaptureFixture[str]
ROOT = Path(main.__file__).parent
SETTINGS = LoraSettings(rank=2, alpha=3.0)
NONE = MergeConfig(method="none")


@pytest.fixture(scope="module", autouse=True)
def toy() -> Any:
    with toy_model():
        yield


def adapted(model: MergingViT, settings: LoraSettings = SETTINGS) -> MergingViT:
    """The model with adapters that change it: those of a fresh one have B = 0."""
    add_lora(model, settings)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_lora(name):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


# In the model


@pytest.mark.parametrize("merge", [NONE, *every_method(choices=False)])
def test_adapters_compute_what_their_merged_weights_do(merge: MergeConfig) -> None:
    plain = ours(merge, num_registers=2)
    before = plain(images())
    fresh = copy.deepcopy(plain)
    add_lora(fresh, SETTINGS)
    assert torch.equal(fresh(images()), before), "a fresh adapter changes nothing"
    model = adapted(copy.deepcopy(plain))
    outputs = model(images())
    model.train()(images()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == is_lora(name), name
        assert parameter.grad is None or parameter.grad.abs().sum() > 0, name
    weights = merge_lora(model.state_dict(), SETTINGS.as_dict())
    plain.load_state_dict(weights)
    torch.testing.assert_close(plain(images()), outputs, rtol=1e-4, atol=1e-5)
    assert (outputs - before).abs().max() > 0.1


@every_family
def test_adapters_of_eva_compute_what_their_merged_weights_do(family: str) -> None:
    """Also where q, k and v are apart, where their biases are, and in gated MLPs."""
    for merge in (MergeConfig(r=3), MergeConfig("mctf", r=3)):
        model = merging_eva(family, merge)
        plain, x = copy.deepcopy(model), images(size=model.patch_embed.img_size)
        outputs = adapted(model)(x)
        model.train()(x).square().sum().backward()
        assert all((p.grad is not None) == is_lora(name) for name, p in model.named_parameters())
        before = plain(x)
        plain.load_state_dict(merge_lora(model.state_dict(), SETTINGS.as_dict()))
        torch.testing.assert_close(plain(x), outputs, rtol=1e-3, atol=1e-4)
        assert (outputs - before).abs().max() > 1e-3


def test_merged_weights_are_w_plus_scaled_b_a() -> None:
    model = adapted(ours())
    weights, merged = model.state_dict(), merge_lora(model.state_dict(), SETTINGS.as_dict())
    assert merged.keys() == ours().state_dict().keys()
    layer = "blocks.1.mlp.fc1"
    a, b = (weights[f"{layer}.lora_{x}.default.weight"] for x in "AB")
    wanted = weights[f"{layer}.base_layer.weight"] + 1.5 * b @ a
    torch.testing.assert_close(merged[f"{layer}.weight"], wanted)
    assert torch.equal(merged[f"{layer}.bias"], weights[f"{layer}.base_layer.bias"])
    assert torch.equal(merged["patch_embed.proj.weight"], weights["patch_embed.proj.weight"])
    with pytest.raises(UserError, match="holds adapters and does not say how much they count"):
        merge_lora(model.state_dict(), None)


def test_targets_name_the_layers() -> None:
    model = ours()
    add_lora(model, LoraSettings(2, 2.0, ("qkv", "fc2")))
    layers = {name.split(".lora_")[0].split(".", 2)[2] for name, _ in model.named_parameters() if is_lora(name)}
    assert layers == {"attn.qkv", "mlp.fc2"}
    with pytest.raises(UserError, match="has adapters already"):
        add_lora(model, SETTINGS)
    bare = ours()
    for block in bare.blocks:
        block.mlp.fc2 = torch.nn.Identity()
    with pytest.raises(UserError, match=r"no fc2 layer to adapt; its blocks have attn.proj, attn.qkv, mlp.fc1"):
        add_lora(bare, SETTINGS)


def test_gmacs_count_the_adapters() -> None:
    plain, model = ours(MergeConfig(r=0)), ours(MergeConfig(r=0))
    add_lora(model, SETTINGS)
    width, tokens, depth = 24, 17, 3
    extra = 2 * ((1 + 3) + (1 + 1) + 2 * (1 + 4)) * width * tokens * depth
    assert round(1e9 * (gmacs(model) - gmacs(plain))) == extra


# What trains, and how fast


def test_parts_that_train() -> None:
    model = adapted(ours(num_registers=2))

    def trained(parts: str) -> set[str]:
        counts = freeze(model, parts)
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        sizes = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert sum(counts.values()) == sizes
        return names

    every = set(dict(model.named_parameters()))
    lora = {name for name in every if is_lora(name)}
    norms = {name for name in every if ".norm1." in name or ".norm2." in name or name.startswith("norm.")}
    assert len(norms) == 2 * (2 * 3 + 1)
    assert trained("all") == every
    assert trained("lora") == lora
    assert trained("head, norms") == norms | {"head.weight", "head.bias"}
    assert trained("registers_head") == trained("registers,head") == {"reg_token", "head.weight", "head.bias"}
    assert trained("lora,registers") == lora | {"reg_token"}


@pytest.mark.parametrize(
    ("parts", "why"),
    [("registers", "needs registers"), ("lora", "needs adapters"), ("x", "not 'x'"), ("head,head", "twice")],
)
def test_parts_that_are_not_there(parts: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        freeze(ours(), parts)


@pytest.mark.parametrize("lora", [False, True])
def test_layer_decay_is_timms(lora: bool) -> None:
    model = adapted(ours()) if lora else ours()
    freeze(model, "lora,head" if lora else "all")
    wanted: dict[int, tuple[float, float]] = {}
    for group in param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.7):
        wanted |= {id(p): (group["lr_scale"], group["weight_decay"]) for p in group["params"]}
    found: dict[int, tuple[float, float]] = {}
    for group in parameter_groups(model, 0.05, layer_decay=0.7):
        found |= {id(p): (group["lr_scale"], group["weight_decay"]) for p in group["params"]}
    assert found == wanted
    assert {round(scale, 6) for scale, _ in found.values()} == {
        round(0.7**k, 6) for k in ((0, 1, 2, 3) if lora else (0, 1, 2, 3, 4))
    }


def test_registers_have_the_rate_of_their_layer_times_their_own() -> None:
    model = ours(num_registers=2)
    groups = parameter_groups(model, 0.05, register_lr_mult=3.0, layer_decay=0.5)
    (group,) = [group for group in groups if any(p is model.reg_token for p in group["params"])]
    assert group == {"params": [model.reg_token], "weight_decay": 0.0, "lr_scale": 3 * 0.5**4}


def test_the_average_holds_frozen_weights_once() -> None:
    model = adapted(ours())
    freeze(model, "lora,head")
    average = build_average(parse_args(digits("--model_ema_decay", 0.5, "--no_model_ema_warmup")), model)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    with torch.no_grad():
        model.head.weight += 1
    average.update(model)
    for (name, own), other in zip(average.module.named_parameters(), model.parameters(), strict=True):
        assert (own.data_ptr() == other.data_ptr()) == (name in frozen)
        assert name not in frozen or torch.equal(own, frozen[name])
    torch.testing.assert_close(average.module.head.weight, model.head.weight - 0.5)


# In training


@pytest.fixture(scope="module")
def base(toy: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without adapters."""
    folder = tmp_path_factory.mktemp("base")
    assert main.main(digits("--r", 2, "--num_registers", 2, "--output_dir", folder)) == 0
    return folder


LORA = ["--lora", 2, "--lora_alpha", 8, "--lora_targets", "qkv,fc1", "--lr", 0.02]


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with adapters on the weights of `base`."""
    folder = tmp_path_factory.mktemp("lora")
    assert main.main(digits(*LORA, "--epochs", 2, "--finetune", base / "checkpoint.pth", "--output_dir", folder)) == 0
    return folder


def test_a_run_trains_the_adapters_registers_and_head(base: Path, trained: Path) -> None:
    before, state = checkpoint(base)["model"], checkpoint(trained)
    after: dict[str, Tensor] = state["model"]
    for name, tensor in before.items():
        layer, _, kind = name.rpartition(".")
        own = after[name] if name in after else after[f"{layer}.base_layer.{kind}"]
        trains = name in ("reg_token", "head.weight", "head.bias")
        assert torch.equal(own, tensor) != trains, name
    assert state["lora"] == {"rank": 2, "alpha": 8.0, "targets": ["qkv", "fc1"]}
    moved = [name for name, tensor in after.items() if name.endswith("lora_B.default.weight") and tensor.any()]
    assert len(moved) == 2 * 3
    assert sum(len(group["params"]) for group in state["optimizer"]["param_groups"]) == 2 * 6 + 3


def test_its_best_weights_are_plain_and_every_file_means_the_same_model(
    capsys: Capture, trained: Path, tmp_path: Path
) -> None:
    best = checkpoint(trained / "best.pth")
    assert "lora" not in best and best["model"].keys() == ours(num_registers=2).state_dict().keys()
    which = {"raw": False, "average": True}[best["weights"]]
    for name, tensor in read_weights(trained / "checkpoint.pth", ema=which).items():
        if checkpoint(trained)["epoch"] == best["epoch"]:
            assert torch.equal(tensor, best["model"][name])
    rows = []
    for number, weights in enumerate((["--resume"], ["--finetune"], ["--use_ema", "--resume"])):
        out = succeeds(capsys, digits("--eval", *weights, trained / "checkpoint.pth"))
        rows.append(next(line for line in out.splitlines() if line.startswith("r=2")).split("gmacs")[0])
        assert number == 2 or rows[-1] == rows[0]
    resume = ["--resume", str(trained / "checkpoint.pth")]
    assert export.main(["folder", *resume, "--out", str(tmp_path / "saved")]) == 0
    merged = read_weights(trained / "checkpoint.pth")["blocks.0.attn.qkv.weight"]
    assert torch.equal(load_folder(tmp_path / "saved").blocks[0].attn.qkv.weight, merged)
    Image.new("RGB", (32, 32)).save(tmp_path / "black.png")
    assert predict.main([str(tmp_path / "black.png"), *resume]) == 0


@pytest.mark.parametrize("flags", [[*LORA, "--lora_dropout", 0.2, "--layer_decay", 0.7, "--r", 2, "--merge", "mctf"]])
def test_a_stopped_run_goes_on_bit_for_bit(watch: Watch, tmp_path: Path, flags: list[object]) -> None:  # noqa: F811
    def argv(folder: str) -> list[str]:
        words = ["--num_registers", 1, "--epochs", 2, "--output_dir", tmp_path / folder, "--resume", "auto"]
        return digits(*flags, *words, limit=20)

    assert watch.run(argv("whole")) == 0
    assert watch.run(argv("broken"), 1) == 75
    assert watch.run(argv("broken"), 1) == 75
    assert watch.run(argv("broken")) == 0
    same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_run_goes_on_with_its_own_adapters_only(capsys: Capture, base: Path, trained: Path) -> None:
    resume = ["--epochs", 3, "--resume", trained / "checkpoint.pth"]
    wanted = "was trained with --lora 2 --lora_alpha 8 --lora_targets qkv,fc1, and goes on in no other way"
    for flags in ([], ["--lora", 4, *LORA[2:]], ["--lora", 2]):
        assert wanted in refusal(capsys, digits(*resume, *flags))
    line = refusal(capsys, digits("--resume", base / "checkpoint.pth", "--epochs", 2, *LORA))
    assert "was trained without --lora, and goes on in no other way" in line
    assert run(capsys, digits(*resume, *LORA)).status == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lora", "0"], ["--lora", ">= 1"]),
        (["--lora_alpha", "4"], ["--lora_alpha has no effect without --lora"]),
        (["--lora", "2", "--lora_targets", "qkv,x"], ["--lora_targets", "qkv, proj, fc1, fc2", "'x'"]),
        (["--lora", "2", "--lora_targets", "qkv,qkv"], ["twice"]),
        (["--lora", "2", "--train_only", "all"], ["the very weights that the adapters spare"]),
        (["--lora", "2", "--train_only", "head"], ["trains no adapters"]),
        (["--train_only", "lora"], ["--lora 8"]),
        (["--train_only", "registers,x"], ["not 'x'"]),
        (["--train_only", "norms,registers"], ["has no effect without registers", "--num_registers"]),
        (["--train_only", "norms", "--register_lr_mult", "2", "--num_registers", "1"], ["--register_lr_mult has no"]),
        (["--layer_decay", "0"], ["--layer_decay", "> 0"]),
        (["--layer_decay", "1.2"], ["--layer_decay", "<= 1"]),
        (["--layer_decay", "0.5", "--train_only", "head"], ["--layer_decay has no effect on a head alone"]),
        (["--eval", "--lora", "2"], ["--lora has no effect with --eval"]),
    ],
)
def test_a_mistake_is_one_line(capsys: Capture, flags: list[str], words: list[str]) -> None:
    line = refusal(capsys, digits(*flags))
    for word in words:
        assert word in line


def test_without_peft_lora_says_what_to_install(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.errors.find_spec", lambda name: None)
    assert "peft not installed; pip install" in refusal(capsys, digits("--lora", 2))


def test_the_recipe_for_few_images_is_taken() -> None:
    args = parse_args(["--config", str(ROOT / "run" / "few_images.yaml"), "--data_path", "x", "--model", "deit_small"])
    assert (args.head_init, args.layer_decay, args.repeated_aug, args.mixup) == ("probe", 0.75, False, 0)


def test_the_table_of_ways_to_finetune(capsys: Capture) -> None:
    argv = "--model deit_digits --num_registers 1 --r 2 --batch_size 2 --rounds 1 --device cpu".split()
    assert finetuning.main(argv) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows[2:]] == list(finetuning.WAYS)
    assert finetuning.main([*argv, "--lr", "1"]) == 2
    assert "--lr has no effect on this table" in capsys.readouterr().err
