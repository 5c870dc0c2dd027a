"""Settings: checks, TOML, and which source of a setting beats which."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from rcpconv import config
from rcpconv.config import (
    DATA,
    DEFAULTS,
    FORM,
    METHODS,
    OPTIONS,
    RECIPES,
    TRAINING,
    QuantizeConfig,
    build_config,
    parse_count,
    read_recipe,
)
from rcpconv.errors import BadOption


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 32}, r"group_size: expected one of 64, 128; found 32"),
        ({"group_size_of": ("down=64",)}, r"group_size_of: expected a value such as down_proj=64 .* found 'down=64'"),
        ({"group_size_of": ("down_proj=32",)}, r"group_size_of: expected a value such as"),
        ({"rotation_steps": -1}, r"rotation_steps: expected at least 0"),
        (
            {"rotation_steps": 5, "method": "rtn"},
            r"rotation_steps: 5 need training text, which method rtn does",
        ),
        ({"rotation_lr": 1e30}, r"rotation_lr: expected at most 1"),
        ({"progressive_bits": 8}, r"progressive_bits: expected one of 2, 3, 4; found 8"),
        (
            {"progressive_bits": 4, "progressive_share": 0.5, "freeze": 0.6},
            r"progressive_share: 0.5, but weights stay as they are in the last 0.6 of the steps",
        ),
        ({"a_bits": True}, r"a_bits: expected an integer, found True"),
        ({"lr": 0}, r"lr: expected more than 0"),
        ({"lr": float("nan")}, r"lr: expected a finite number"),
        ({"lr": "fast"}, r"lr: expected a number, found 'fast'"),
        ({"warmup": 1.5}, r"warmup: expected at most 1"),
        ({"betas": (0.9,)}, r"betas: expected 2 values"),
        ({"betas": 0.9}, r"betas: expected 2 values"),
        ({"data": "text.txt"}, r"data: expected a list, found 'text.txt'"),
        ({"loss": "mse"}, r"loss: expected one of kl, cakld, mix; found 'mse'"),
        ({"device": "tpu"}, r"device: expected auto, cpu, cuda or cuda:N; found 'tpu'"),
        ({"tokens": "many"}, r"tokens: expected a count such as"),
        ({"tokens": 5, "steps": 5}, r"steps: 5, but tokens is given too"),
        ({"tables": "one", "head_bits": 16}, r"head_bits: 16, but one table serves head and embedding"),
        ({"eval_every": 5}, r"eval_every: 5, but there is no eval_data"),
        ({"model": ""}, r"model: expected a folder"),
        ({"seq_len": 1}, r"seq_len: expected at least 2"),
        ({"pull": 0.1, "master_weights": "bf16"}, r"pull: 0.1 needs master_weights fp32"),
        ({"seed": -1}, r"seed: expected at least 0"),
    ],
)
def test_a_wrong_configuration_cannot_be_built(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadOption, match=message):
        QuantizeConfig(**{"model": "m"} | settings)


def test_configuration_is_frozen_and_changed_by_copy() -> None:
    config = QuantizeConfig(model="m")
    with pytest.raises(AttributeError):
        config.lr = 1.0  # type: ignore[misc]
    assert config.changed(lr=1).lr == 1.0 and config.lr is None
    with pytest.raises(BadOption, match="lr"):
        config.changed(lr=-1.0)


def test_counts() -> None:
    assert [parse_count("n", text) for text in ("20M", "1.5k", "7", "1 B")] == [20_000_000, 1500, 7, 10**9]
    assert QuantizeConfig(model="m", tokens="2k").tokens == 2000


def test_methods_are_those_that_there_are() -> None:
    from rcpconv.quantizers import METHODS as IMPLEMENTED

    assert set(METHODS) == set(IMPLEMENTED)


def test_toml_round_trip() -> None:
    config = QuantizeConfig(
        model='C:\\odd "path"\t\x7f ü',
        data=("a.txt", "hf:x/y"),
        tokens=5,
        lr=1e-30,
        betas=(0.5, 0.75),
        r3=False,
        eval_data="demo",
        seed=2**63 - 1,
    )
    text = config.to_toml()
    assert QuantizeConfig.from_mapping(tomllib.loads(text), "x") == config
    assert config.to_toml() == text
    plain = QuantizeConfig(model="m")
    assert QuantizeConfig.from_mapping(tomllib.loads(plain.to_toml()), "x") == plain


def test_a_table_in_a_recipe_is_refused_for_what_it_is(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('model = "m"\n[train]\nlr = 1e-5\n')
    with pytest.raises(BadOption, match=r"r\.toml: \[train\] is a table, but settings stand at the top level; remove"):
        build_config(None, recipe, {})


def test_unknown_keys_are_refused_with_the_nearest_known_name(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('model = "m"\nlearning_rate = 1e-5\n')
    with pytest.raises(BadOption, match=r"r\.toml: unknown key 'learning_rate'; did you mean"):
        build_config(None, recipe, {})
    recipe.write_text('model = "m"\ngrup-size = 64\n')
    with pytest.raises(BadOption, match=r"unknown key 'grup-size'; did you mean 'group_size'"):
        build_config(None, recipe, {})
    recipe.write_text("group-size = 64\ngroup_size = 128\n")
    with pytest.raises(BadOption, match=r"'group_size' is given twice"):
        build_config("m", recipe, {})


@pytest.mark.parametrize("content", [b"model = ", b"\xff\xfe", None])
def test_a_recipe_that_is_no_toml(tmp_path: Path, content: bytes | None) -> None:
    recipe = tmp_path / "r.toml"
    if content is not None:
        recipe.write_bytes(content)
    with pytest.raises(BadOption, match=r"r\.toml: expected a TOML recipe"):
        build_config("m", recipe, {})


def test_command_line_beats_recipe_beats_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('model = "other"\ngroup-size = 64\nlr = 1e-3\nseed = 5\n')
    config = build_config("m", recipe, {"lr": 2e-3})
    assert (config.model, config.group_size, config.lr, config.seed, config.a_bits) == ("m", 64, 2e-3, 5, 4)
    assert build_config(None, recipe, {}).model == "other"


def test_a_model_is_needed() -> None:
    with pytest.raises(BadOption, match="model is missing"):
        build_config(None, None, {})


def test_the_demo_model_has_defaults_of_its_own(tmp_path: Path) -> None:
    """They are the weakest; --steps replaces their tokens."""
    known = read_recipe("demo")
    assert {"data", "tokens"} <= known.keys()
    config = build_config("demo", None, {"steps": 3})
    assert (config.steps, config.tokens, list(config.data)) == (3, None, known["data"])
    recipe = tmp_path / "r.toml"
    recipe.write_text("tokens = 1000\n")
    assert build_config("demo", recipe, {}).tokens == 1000
    assert build_config("demo", recipe, {"steps": 3}).tokens is None
    assert build_config("other", None, {}).tokens is None


def test_bundled_recipes_go_by_name_and_files_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("paper").write_text("a_bits = 8\n")
    assert read_recipe("paper")["a_bits"] == 4
    assert read_recipe(Path("paper"))["a_bits"] == read_recipe("./paper")["a_bits"] == 8
    assert [build_config("m", name, {}).method for name in RECIPES] == ["ldp"] * 3
    with pytest.raises(BadOption, match="papr: expected a TOML recipe, or default or demo or paper"):
        build_config("m", "papr", {})


def test_the_papers_recipe_is_independent_of_the_defaults() -> None:
    """It names every setting that has one default for all models but those of texts, machine and the run itself."""
    left_out = {"model", "method", "tables", "data", "self_tokens", "self_epochs", "self_share"}
    decided = {
        name
        for name, option in OPTIONS.items()
        if option.group in (FORM, DATA, TRAINING) and DEFAULTS[name] is not None and name not in left_out
    }
    assert decided <= read_recipe("paper").keys()
    config = build_config("m", "paper", {})
    assert (config.method, config.loss, config.a_bits, config.kv_bits) == ("ldp", "cakld", 4, 4)
    assert (config.r1, config.r2, config.r3, config.r4) == (True,) * 4
    assert (config.start, config.level_gradient, config.weight_range) == ("weights", "exact", "moving")


def test_the_default_recipe_is_one_file_and_leaves_the_papers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not read_recipe("default").keys() & {"model", "lr", "batch_size", "grad_accum", "seq_len", "tokens"}
    paper = build_config("m", "paper", {})
    for name in ("default", "demo", "paper"):
        (tmp_path / f"{name}.toml").write_text((config.BUNDLED / f"{name}.toml").read_text(encoding="utf-8"))
    (tmp_path / "default.toml").write_text(
        'loss = "kl"\nlr_factor = 2.0\nquantizer_factor = 3.0\nweight_reach = 0.5\nself_share = 0.3\n'
    )
    monkeypatch.setattr(config, "BUNDLED", tmp_path)
    mine = tmp_path / "mine.toml"
    mine.write_text("weight_reach = 0.25\n")
    assert build_config("m", "paper", {}) == paper
    default = build_config("m", None, {})
    assert (default.loss, default.lr_factor, default.weight_reach) == ("kl", 2.0, 0.5)
    assert build_config("m", "default", {}) == default
    for recipe in (mine, str(mine)):
        assert build_config("m", recipe, {}) == default.changed(weight_reach=0.25)
    assert build_config("m", None, {"loss": "mix"}) == default.changed(loss="mix")
    assert build_config("demo", None, {}).weight_reach == 0.5


def test_every_setting_is_described() -> None:
    for name, option in OPTIONS.items():
        assert option.help.endswith("."), name
