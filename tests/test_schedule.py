"""Schedules and MergeConfig: every form, every error, the tokens they come to."""

import dataclasses
import json
import math
import warnings
from typing import Any

import pytest

from models import MergeConfig, UserError
from models.schedule import Inflection, format_schedule, parse_schedule, token_plan, warn_if_clamped

DEIT_S_4_REGISTERS = (5,) * 12  # prefix tokens per block


def plan(patches: int, prefixes: tuple[int, ...], **config: Any) -> Any:
    return token_plan(MergeConfig(**config), patches, prefixes)


# Forms of r

FORMS = [
    (0, 0),
    (16, 16),
    (16.0, 16),
    ("16", 16),
    (" 16 ", 16),
    ("+16", 16),
    (1, 1),
    (1.0, 1),
    ("1.0", 1),
    (0.35, 0.35),
    ("0.35", 0.35),
    (".35", 0.35),
    ("1e-2", 0.01),
    ([16, 0, 8], (16, 0, 8)),
    ((16, 0, 8), (16, 0, 8)),
    ("16,0,8", (16, 0, 8)),
    ("16, 0, 8", (16, 0, 8)),
    ("[16,0,8]", (16, 0, 8)),
    ("(16,0,8)", (16, 0, 8)),
    ((16, 4), (16, 4)),
    ("16,4", (16, 4)),
    ([16], (16,)),
    ("[16]", (16,)),
    ("16,", (16,)),
    ((16, -1.0), Inflection(16, -1.0)),
    ((16, -1), Inflection(16, -1.0)),
    ([16, -1], Inflection(16, -1.0)),
    ("(16,-1)", Inflection(16, -1.0)),
    ("(16,-1.0)", Inflection(16, -1.0)),
    ("( 16 , -0.5 )", Inflection(16, -0.5)),
    ("(16,1)", Inflection(16, 1.0)),
    ("(16,0)", Inflection(16, 0.0)),
    ((16, 0.0), Inflection(16, 0.0)),
    (Inflection(16, -1), Inflection(16, -1.0)),
]


@pytest.mark.parametrize(("form", "value"), FORMS, ids=str)
def test_forms_have_one_canonical_value(form: Any, value: Any) -> None:
    parsed = parse_schedule(form)
    assert parsed == value
    assert type(parsed) is type(value)
    config, canonical = MergeConfig(r=form), MergeConfig(r=value)
    assert config == canonical
    assert hash(config) == hash(canonical)


@pytest.mark.parametrize(
    "value", [form[1] for form in FORMS] + [Inflection(9, 1 / 3), Inflection(9, -0.1234567)], ids=str
)
def test_written_schedules_read_back(value: Any) -> None:
    again = parse_schedule(format_schedule(value))
    assert again == value
    assert type(again) is type(value)


def test_equal_looking_schedules_of_other_meaning_differ() -> None:
    """[16,1] merges 16, then 1; (16, 1.0) goes from 0 to 32."""
    listed, inflected = MergeConfig(r=[16, 1]), MergeConfig(r="(16,1)")
    assert plan(196, (1,) * 4, r=listed.r).merges != plan(196, (1,) * 4, r=inflected.r).merges
    assert listed != inflected
    assert len({listed: 0, inflected: 1}) == 2


def test_empty_list_is_refused_or_reads_back() -> None:
    try:
        config = MergeConfig(r=[])
    except UserError:
        return
    assert MergeConfig.from_dict(config.as_dict()) == config


def test_different_schedules_differ() -> None:
    configs = {MergeConfig(r=r) for r in (16, 8, 0.35, "16,0,8", "16,8", "(16,-1)", "(16,-0.5)", 0)}
    assert len(configs) == 8


BAD_R = [
    -1, "-1", 1.5, "1.5", -0.3, math.nan, math.inf, "nan", "inf", "-inf", None, True, "", "x", "16;8", "16,x", "1_6x",
    "(16", "16)", "(16,-2)", "(16,1.5)", "(-16,0.5)", "(1.5,0.5)", "(0.5,0.5)", "(16,)", "(,1)", "(16,nan)", (16, -2),
    (16, math.nan), [0.5, 0.5, 0.5], [16, 0, -1], [16, 1.5, 2], ["16", 8], [True, 1], {"r": 1}, object, 1e400, "1e400",
    Inflection(-1, 0.0), Inflection(4, 7.0), [[1, 2], 3], "((16,-1))", "16 8",
    "16,,8", "[16,,8]", ",", "(16,0,8", "16,0,8)", "[16,8",
]  # fmt: skip


@pytest.mark.parametrize("r", BAD_R, ids=str)
def test_bad_schedule_is_one_line(r: Any) -> None:
    with pytest.raises(UserError) as caught:
        MergeConfig(r=r)
    assert "\n" not in str(caught.value)
    assert "r" in str(caught.value)


# Every other field

BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"method": "tomes"}, "tome"),
    ({"method": None}, "method"),
    ({"method": "ToMe"}, "tome"),
    ({"method": "none", "r": 4}, "none"),
    ({"method": "none", "activate_layers": [1]}, "none"),
    ({"activate_layers": [-1]}, "activate_layers"),
    ({"activate_layers": [1, 1]}, "twice"),
    ({"activate_layers": 3}, "activate_layers"),
    ({"activate_layers": "1,2"}, "activate_layers"),
    ({"activate_layers": [1.0]}, "activate_layers"),
    ({"activate_layers": [True]}, "activate_layers"),
    ({"dense_layers": -1}, "dense_layers"),
    ({"dense_layers": 1.5}, "dense_layers"),
    ({"dense_layers": True}, "dense_layers"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": "10"}, "min_tokens"),
    ({"prop_attn": 1}, "prop_attn"),
    ({"prop_attn": "True"}, "prop_attn"),
    ({"bidirectional": 0}, "bidirectional"),
    ({"pooling": "sum"}, "pooling"),
    ({"pooling": 0}, "pooling"),
    ({"method": "mctf", "tau_sim": -1}, "tau_sim"),
    ({"method": "mctf", "tau_info": math.inf}, "tau_info"),
    ({"method": "mctf", "tau_info": math.nan}, "tau_info"),
    ({"method": "mctf", "tau_size": "40"}, "tau_size"),
    ({"method": "mctf", "tau_size": True}, "tau_size"),
    ({"method": "mctf", "one_step_ahead": 1}, "one_step_ahead"),
    ({"method": "mctf", "one_step_ahead": "yes"}, "one_step_ahead"),
    ({"method": "mctf", "pooling": "median"}, "pooling"),
    ({"method": "lgtm", "local_grid": 0}, "local_grid"),
    ({"method": "lgtm", "local_grid": 2.0}, "local_grid"),
    ({"method": "lgtm", "global_layer": -1}, "global_layer"),
]
IGNORED = {
    "none": ("tau_sim", "tau_info", "tau_size", "one_step_ahead", "local_grid", "global_layer"),
    "tome": ("tau_sim", "tau_info", "tau_size", "one_step_ahead", "local_grid", "global_layer"),
    "mctf": ("local_grid", "global_layer"),
    "lgtm": ("tau_sim", "tau_info", "tau_size", "one_step_ahead"),
}
VALID = {"tau_sim": 1.0, "tau_info": 0, "tau_size": 40.0, "one_step_ahead": "off", "local_grid": 2, "global_layer": 3}


@pytest.mark.parametrize(("fields", "named"), BAD_FIELDS, ids=str)
def test_bad_field_is_one_line_that_names_it(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        MergeConfig(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", IGNORED)
def test_a_field_that_a_method_ignores_is_refused_and_no_other(method: str) -> None:
    for name, value in VALID.items():
        if name in IGNORED[method]:
            with pytest.raises(UserError, match=f"{name} has no effect with method '{method}'"):
                MergeConfig(method=method, **{name: value})
        else:
            assert getattr(MergeConfig(method=method, **{name: value}), name) == value


def test_zero_switches_a_criterion_off_and_is_not_a_default() -> None:
    config = MergeConfig(method="mctf", tau_sim=0, tau_info=0, tau_size=0)
    assert (config.tau_sim, config.tau_info, config.tau_size) == (0, 0, 0)


def test_false_and_zero_are_kept_over_defaults() -> None:
    config = MergeConfig(method="mctf", prop_attn=False, bidirectional=False, min_tokens=0)
    assert (config.prop_attn, config.bidirectional, config.min_tokens) == (False, False, 0)
    assert MergeConfig(method="lgtm", dense_layers=0, global_layer=0).active(4) == (0, 1, 2, 3)


COLUMNS = ("dense_layers", "prop_attn", "tau_sim", "tau_info", "tau_size", "bidirectional", "one_step_ahead", "pooling")
COLUMNS += ("min_tokens", "local_grid", "global_layer")
DEFAULTS = {
    "tome": (0, True, None, None, None, False, None, "size", 0, None, None),
    "mctf": (0, True, 1, 20, 40, True, "on", "attention", 10, None, None),
    "lgtm": (2, True, None, None, None, False, None, "size", 0, 2, 7),
}


@pytest.mark.parametrize("method", DEFAULTS)
def test_published_defaults(method: str) -> None:
    config = MergeConfig(method=method)
    assert tuple(getattr(config, name) for name in COLUMNS) == DEFAULTS[method]
    assert config.r == 0


def test_default_layers_of_the_methods() -> None:
    assert MergeConfig().active(4) == (0, 1, 2, 3)
    assert MergeConfig(method="mctf").active(4) == (1, 2, 3)
    assert MergeConfig(method="lgtm").active(4) == (2, 3)
    assert MergeConfig(dense_layers=3).active(4) == (3,)
    assert MergeConfig(activate_layers=[3, 0, 2], dense_layers=1).active(4) == (2, 3)
    assert MergeConfig(activate_layers=[]).active(4) == ()


def test_frozen_and_hashable() -> None:
    config = MergeConfig(r=[4, 4], activate_layers=[2, 1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 3  # type: ignore[misc]
    assert config.activate_layers == (1, 2)
    assert hash(config) == hash(MergeConfig(r=(4, 4), activate_layers=(1, 2)))


def test_with_r_changes_nothing_else() -> None:
    config = MergeConfig(method="mctf", r=4, tau_sim=2.0, activate_layers=[1])
    assert config.with_r("(8,-1)") == MergeConfig(
        method="mctf", r=Inflection(8, -1.0), tau_sim=2.0, activate_layers=[1]
    )
    assert config.r == 4


CONFIGS = [
    MergeConfig(method="none"),
    MergeConfig(r=16),
    MergeConfig(r=0.35, prop_attn=False, dense_layers=2, min_tokens=7),
    MergeConfig(r="(16,-0.3)", activate_layers=[1, 3]),
    MergeConfig(r=Inflection(16, 1 / 3)),
    MergeConfig(r=[3, 0, 4], activate_layers=[]),
    MergeConfig(r=[3]),
    MergeConfig(method="mctf", r=0.35, activate_layers=[3, 6, 9], tau_sim=0, one_step_ahead="precise", pooling="max"),
    MergeConfig(method="lgtm", r=8, local_grid=3, global_layer=0),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_dict_round_trip_through_json(config: MergeConfig) -> None:
    assert MergeConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config


# Tokens per block


def test_published_token_counts_of_registers_merging() -> None:
    constant = plan(196, DEIT_S_4_REGISTERS, r=16)
    assert constant.counts == (185, 169, 153, 137, 121, 105, 89, 73, 57, 41, 25, 15)
    assert constant.merges == (16,) * 11 + (10,)
    assert constant.clamped
    decreasing = plan(196, DEIT_S_4_REGISTERS, r="(16,-1)")
    assert decreasing.merges == (32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0)
    assert decreasing.counts == (169, 140, 114, 91, 71, 54, 40, 29, 21, 16, 14, 14)
    assert not decreasing.clamped


def test_increasing_schedule_mirrors_the_decreasing_one() -> None:
    assert plan(196, (1,) * 12, r=(8, 1.0)).merges == (0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 16)
    assert plan(196, (1,) * 12, r=(8, 0.0)).merges == (8,) * 12


def test_inflection_truncates_at_both_ends_and_between() -> None:
    """first = int(5 * 1.5) = 7, last = 10 - 7 = 3, in between 5.66 and 4.33."""
    assert plan(196, (1,) * 4, r=(5, -0.5)).merges == (7, 5, 4, 3)


def test_inflection_in_one_block_has_no_slope() -> None:
    assert plan(196, (1,), r=(8, -1.0)).merges == (16,)


def test_short_list_is_padded_and_a_long_one_refused() -> None:
    assert plan(64, (1,) * 4, r=[3, 2]).merges == (3, 2, 0, 0)
    assert plan(64, (1,) * 4, r=[3]).merges == (3, 0, 0, 0)
    with pytest.raises(UserError, match="lists 5 blocks, but the model has 4"):
        plan(64, (1,) * 4, r=[1] * 5)


def test_list_is_indexed_by_all_blocks_also_inactive_ones() -> None:
    assert plan(64, (1,) * 4, r=[1, 2, 3, 4], activate_layers=[1, 3]).merges == (0, 2, 0, 4)
    assert plan(64, (1,) * 4, r="(4,-1)", dense_layers=2).merges == (0, 0, 2, 0)


def test_ratio_is_of_the_patches_left_and_truncates() -> None:
    # 64 -> int(22.4) = 22 -> 42: 14 -> 28: 9 -> 19
    assert plan(64, (5,) * 3, r=0.35).counts == (47, 33, 24)
    assert plan(196, (1,) * 12, method="mctf", r=0.35, activate_layers=[3, 6, 9]).merges == (
        0, 0, 0, 68, 0, 0, 44, 0, 0, 29, 0, 0,
    )  # fmt: skip
    assert plan(64, (5,), r=0.99).counts == (5 + 32,)
    assert plan(64, (5,), r=0.001).merges == (0,)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("patches", [0, 1, 2, 3, 7, 8])
def test_at_most_half_of_the_patches_merge(patches: int, prefix: int) -> None:
    result = plan(patches, (prefix,), r=1000)
    assert result.merges == (patches // 2,)
    assert result.counts == (prefix + patches - patches // 2,)


def test_min_tokens_counts_the_prefix() -> None:
    assert plan(16, (5,), r=8, min_tokens=15).counts == (15,)
    assert plan(16, (5,), r=8, min_tokens=21).counts == (21,)
    assert plan(16, (5,), r=8, min_tokens=100).counts == (21,)
    assert plan(16, (1,) * 3, method="mctf", r=8, activate_layers=[0, 1, 2]).counts == (10, 10, 10)


def test_late_prefix_tokens_are_counted_from_their_layer_on() -> None:
    assert plan(16, (0, 1, 1, 5), r=2).counts == (14, 13, 11, 13)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"activate_layers": [0, 12]}, "block 12, but the model has blocks 0..11"),
        ({"dense_layers": 13}, "dense_layers is 13"),
        ({"method": "lgtm", "global_layer": 40}, "global_layer is 40"),
    ],
)
def test_layers_out_of_range(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        MergeConfig(**fields).active(12)


def test_default_of_a_method_is_no_error_in_a_shallow_model() -> None:
    assert MergeConfig(method="lgtm").active(1) == ()
    assert MergeConfig(method="mctf").active(1) == ()


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (
            MergeConfig(r=[16] * 12),
            r"r=16,.* is more than can merge: 10 of 16 in block 11 \(at most half of a block's ",
        ),
        (MergeConfig(r=200), "r=200 is more than can merge: 98 of 200 in block 0 "),
        (MergeConfig(r=0.9, activate_layers=[3, 6]), "r=0.9 is more than can merge: 98 of 176 in block 3 "),
        (MergeConfig("mctf", [99, 99], min_tokens=150), "51 of 99 in block 1 .*, and min_tokens=150 stay"),
    ],
    ids=str,
)
def test_what_a_user_did_not_ask_for_is_one_warning_with_the_tokens_of_every_block(
    config: MergeConfig, named: str
) -> None:
    plan = token_plan(config, 196, DEIT_S_4_REGISTERS)
    with pytest.warns(UserWarning, match=named) as caught:
        warn_if_clamped(config, plan)
    assert len(caught) == 1
    assert str(caught[0].message).endswith(f"tokens per block: {list(plan.counts)}")
    assert caught[0].filename == __file__


STANDARD = [MergeConfig(r=r) for r in (13, 16, 20, "(16,-1)", "(16,1)", 0.35)]
STANDARD += [MergeConfig("mctf", 20), MergeConfig("lgtm", 16), MergeConfig("pitome", 16), MergeConfig("none")]


@pytest.mark.parametrize("config", STANDARD, ids=str)
def test_tokens_that_run_out_at_the_end_are_no_reason_to_warn(config: MergeConfig) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_clamped(config, token_plan(config, 196, DEIT_S_4_REGISTERS))
