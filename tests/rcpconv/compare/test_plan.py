"""What a comparison is made of: variants, grid, cells; and what is refused, with a remedy."""

from pathlib import Path
from typing import Any

import pytest

from rcpconv import config
from rcpconv.compare import choice, plan, table
from rcpconv.compare.folder import Folder
from rcpconv.compare.plan import FINAL, Cell, Comparison, Rates, Variant
from rcpconv.config import METHODS
from rcpconv.errors import BadOption

SEQ = Variant(name="seq", settings={"method": "seq"})


def comparison(**changes: Any) -> Comparison:
    values: dict[str, Any] = {
        "model": "demo",
        "common": {},
        "variants": (Variant(name="ldp", settings={"method": "ldp"}),),
        "grid": (Rates(lr=1e-4), Rates(lr=1e-3)),
        "tokens": 1000,
        "sweep_tokens": 100,
        "seeds": 2,
        "best": 1,
        "validation_tokens": 50,
        "curve_points": 2,
        "window": 32,
        "generation_tokens": 8,
    }
    return Comparison(**values | changes)


def test_bundled_variants_have_every_method_and_can_all_be_built() -> None:
    common, variants = plan.read_variants(None)
    assert {variant.settings.get("method", "ldp") for variant in variants} == set(METHODS)
    names = {variant.name for variant in variants}
    assert {f"ldp-no-r{i}" for i in range(1, 5)} | {"ldp-no-rotations", "uniform-no-rotations"} <= names
    assert {"ldp-a8", "ldp-a16", "ldp-kv8", "ldp-kv16", "ldp-a16-kv16", "ldp-group64", "ldp-down64"} <= names
    whole = comparison(common=common, variants=variants)
    assert whole.config(Cell(kind=FINAL, variant="ldp-group64", rates=Rates(lr=1e-3))).group_size == 64
    assert whole.config(Cell(kind=FINAL, variant="ldp-untrained")).steps == 0


@pytest.mark.parametrize(
    ("data", "tokens"), [(("demo",), 20_000), (("self", "demo"), 20_000), ((), 60_000), (("demo", __file__), 60_000)]
)
def test_how_much_text_is_kept_back_by_itself(data: tuple[str, ...], tokens: int) -> None:
    assert comparison(data=data, validation_tokens=0).validation_tokens == tokens


def test_every_trained_variant_is_swept_over_the_same_grid() -> None:
    _, variants = plan.read_variants(None)
    whole = comparison(variants=variants)
    points: dict[str, list[Rates | None]] = {}
    for cell in whole.sweeps():
        points.setdefault(cell.variant, []).append(cell.rates)
        swept = whole.config(cell)
        assert (swept.tokens, swept.seed) == (100, 0)
        assert swept.lr == (cell.rates and cell.rates.lr)
    ablations = {variant.name for variant in variants if variant.rates_of == "ldp"}
    assert {name for name in points.keys() | ablations if name.startswith("ldp-no-")} <= ablations
    assert points.keys() == {variant.name for variant in variants} - {"rtn", "ldp-untrained"} - ablations
    assert set(map(tuple, points.values())) == {whole.grid}
    assert comparison(grid=(Rates(lr=1e-3),)).sweeps() == []


def test_ablations_take_the_rates_of_what_they_are_of(tmp_path: Path) -> None:
    variants = (SEQ, Variant(name="kl", settings={}, rates_of="seq"))
    whole = comparison(variants=variants)
    assert {cell.variant for cell in whole.sweeps()} == {"seq"}
    folder = Folder(tmp_path)
    (tmp_path / "results").mkdir()
    assert choice.final(whole, folder, "kl") is None
    for cell in whole.sweeps():
        assert cell.rates is not None
        folder.save(cell, {"failed": None, "validation": {"perplexity": 20 + 1000 * cell.rates.lr}})
    assert choice.final(whole, folder, "kl") == Cell(kind=FINAL, variant="kl", rates=Rates(lr=1e-4))
    assert choice.swept(whole, folder, "kl") == {}
    for name, found in (("seq", 21), ("kl", 20)):
        final = choice.final(whole, folder, name)
        assert final is not None
        folder.save(final, {"failed": None, "validation": {"perplexity": found}})
    assert choice.ranked(whole, folder) == [["seq"]], "what had no sweep is never the best"
    with pytest.raises(BadOption, match=r"kl: takes the rates of seq, which is not compared .*--only seq,kl"):
        comparison(variants=variants[1:])
    with pytest.raises(BadOption, match="takes the rates of kl, which is not compared or has none of its own"):
        comparison(variants=(*variants, Variant(name="mix", settings={}, rates_of="kl")))
    assert comparison(variants=variants[1:], grid=(Rates(lr=1e-3),)).sweeps() == []


def test_ablations_are_not_another_method(tmp_path: Path) -> None:
    _, variants = plan.read_variants(None)
    whole = comparison(variants=variants)
    methods = {name: whole.method(name) for name in ("ldp", "ldp-udq", "lc", "ldp-kl", "uniform-no-rotations", "seq")}
    assert methods == dict.fromkeys(("ldp", "ldp-udq", "lc", "ldp-kl"), "ldp") | {
        "uniform-no-rotations": "uniform",
        "seq": "seq",
    }
    values = {"seq": 22.0, "ldp": 21.0, "lc": 20.5, "ldp-a16": 10.0, "r2q": 23.0, "rtn": 9.0}
    whole = comparison(variants=plan.choose(variants, values), grid=(Rates(lr=1e-3),), best=2)
    folder = Folder(tmp_path)
    (tmp_path / "results").mkdir()
    for name, value in values.items():
        cell = choice.final(whole, folder, name)
        assert cell is not None
        folder.save(cell, {"failed": None, "validation": {"perplexity": value}})
    assert choice.ranked(whole, folder) == [["lc", "ldp"], ["seq"], ["r2q"]]
    assert choice.best_variants(whole, folder) == ["lc", "seq"]


def test_what_nobody_says_is_as_quantize_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates, texts and length are the comparison's own."""
    (tmp_path / "default.toml").write_text(
        'loss = "kl"\nstep_sequences = 4\na_clip = 0.8\nquantizer_factor = 5.0\nlr_factor = 3.0\n'
        'rotation_steps = 7\nstart = "data"\ntokens = "9M"\nclip_lr = 0.5\n'
    )
    (tmp_path / "demo.toml").write_text((config.BUNDLED / "demo.toml").read_text())
    monkeypatch.setattr(config, "BUNDLED", tmp_path)
    _, variants = plan.read_variants(None)
    whole = comparison(model="m", variants=variants)
    rates = Rates(lr=1e-3)
    found = whole.config(Cell(kind=FINAL, variant="ldp", rates=rates))
    alone = config.build_config("m", None, {"lr": 1e-3, "tokens": 1000, "data": ("default",)})
    assert found.changed(clip_lr=None) == alone.changed(clip_lr=None)
    assert (found.rotation_steps, found.a_clip, found.clip_lr) == (7, 0.8, None)
    for name in ("rtn", "ldp-untrained"):
        untrained = whole.config(Cell(kind=FINAL, variant=name))
        assert (untrained.rotation_steps, untrained.start, untrained.a_clip) == (None, "weights", 0.8)
    assert whole.config(Cell(kind=FINAL, variant="uniform", rates=rates)).loss == "cakld"
    rotated = config.build_config("m", None, {"method": "rtn"})
    assert (rotated.rotation_steps, rotated.start) == (None, "weights")
    assert comparison(common={"loss": "mix"}).config(Cell(kind=FINAL, variant="ldp", rates=rates)).loss == "mix"
    assert comparison().config(Cell(kind=FINAL, variant="ldp", rates=rates)).seq_len == 256  # the demo's own


def test_rates_are_read_and_written_alike() -> None:
    assert Rates.parse("4.5e-4").settings == {"lr": 4.5e-4}
    assert Rates.parse("1e-3:1e-2:0").settings == {"lr": 1e-3, "quantizer_lr": 1e-2, "clip_lr": 0.0}
    for text in ("4.5e-4", "2e-5:0.002", "1e-3:1e-2:0"):
        assert Rates.parse(Rates.parse(text).label) == Rates.parse(text)


def test_own_settings_of_a_variant_beat_the_grid_and_what_is_common() -> None:
    frozen = Variant(name="frozen", settings={"clip_lr": 0.0, "loss": "kl"})
    whole = comparison(variants=(frozen,), common={"loss": "mix", "a_bits": 8}, grid=(Rates.parse("1e-3:2e-3:3e-3"),))
    found = whole.config(Cell(kind=FINAL, variant="frozen", rates=whole.grid[0], seed=3))
    assert (found.lr, found.quantizer_lr, found.clip_lr, found.loss, found.a_bits) == (1e-3, 2e-3, 0.0, "kl", 8)
    assert found.seed == 3


def test_what_may_be_its_method_s_best_has_the_common_form_and_rates_of_its_own() -> None:
    settings: dict[str, dict[str, Any]] = {
        "same": {"a_bits": 8},
        "lc": {"method": "lc"},
        "a4": {"a_bits": 4},
        "rtn": {"method": "rtn"},
    }
    variants = [Variant(name=name, settings=each) for name, each in settings.items()]
    ablation = Variant(name="kl", settings={"loss": "kl"}, rates_of="same")
    whole = comparison(common={"a_bits": 8}, variants=(*variants, ablation))
    assert [name for name in (*settings, "kl") if whole.may_be_best(name)] == ["same", "lc"]
    whole = comparison(common={"a_bits": 8}, variants=(*variants, ablation), grid=(Rates(lr=1e-3),))
    assert [name for name in (*settings, "kl") if whole.may_be_best(name)] == ["same", "lc", "kl"], "none had a sweep"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("seq-len=64", ("seq_len", 64)),
        ("r1=false", ("r1", False)),
        ("betas=0.9, 0.99", ("betas", (0.9, 0.99))),
        ("loss=kl", ("loss", "kl")),
    ],
)
def test_settings_from_the_command_line(text: str, value: tuple[str, Any]) -> None:
    assert plan.parse_setting(text) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seq-len", "expected NAME=VALUE"),
        ("seq-len=many", "expected an integer"),
        ("r1=maybe", "expected true or false"),
        ("grup-size=64", "did you mean 'group_size'"),
    ],
)
def test_bad_settings(text: str, message: str) -> None:
    with pytest.raises(BadOption, match=message):
        plan.parse_setting(text)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[variants.a]\nmethd = 'ldp'", r"variants.a: unknown key 'methd'; did you mean 'method'"),
        ("[variants.a]\nmethod = 'qat'", r"variants.a: method: expected one of ldp"),
        (
            "[variants.ldp]\n[variants.b]\nrates-of = 'lpd'",
            r"variants.b: rates-of: no variant 'lpd', did you mean 'ldp'",
        ),
        ("[variants.a]\nrates-of = 'a'\nrates_of = 'a'", r"variants.a: 'rates_of' is given twice"),
        ("[variants.a]\nrates-of = 3", r"variants.a: rates-of: no variant 3"),
        ("[variants.a]\nlr = 1e-3", r"variants.a: lr is the same for all rows; give it as --lr-grid"),
        ("[variants.a]\ntokens = '1M'", r"--tokens"),
        ("[variants.a]\nsteps = 5", r"all rows train equally long"),
        ("[variants.'a b']\nmethod = 'ldp'", r"'a b': expected a name"),
        ("[variants]\na = 'ldp'", r"variants.a: expected a table"),
        ("[common]\nquantizer-lr = 1e-3", r"common: quantizer_lr .* --lr-grid"),
        ("[variant.a]\nmethod = 'ldp'", r"unknown key 'variant'; expected \[common\] and \[variants.NAME\]"),
        ("[variants.a", r"expected a TOML file"),
    ],
)
def test_bad_files_of_variants(tmp_path: Path, toml: str, message: str) -> None:
    (tmp_path / "variants.toml").write_text(toml)
    with pytest.raises(BadOption, match=message) as error:
        plan.read_variants(tmp_path / "variants.toml")
    assert "variants.toml" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": ()}, "expected at least one"),
        ({"grid": ()}, "expected different rates, found none"),
        ({"grid": (Rates(lr=1e-3), Rates(lr=1e-3))}, "expected different rates"),
        ({"grid": (Rates(lr=1e-3), Rates(lr=1e-4, clip_lr=0.0))}, "points of one form"),
        ({"text": "nowhere.txt"}, "nowhere.txt: expected a text file"),
        ({"data": (__file__,), "text": __file__}, "is trained on"),
        (
            {"variants": (Variant(name="odd", settings={"tables": "one", "head_bits": 16}),)},
            "variants.odd: head_bits: 16, but one table",
        ),
    ],
)
def test_bad_comparisons(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadOption, match=message):
        comparison(**changes)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    _, variants = plan.read_variants(None)
    assert [variant.name for variant in plan.choose(variants, ["seq", "lc", "seq"])] == ["seq", "lc"]
    with pytest.raises(BadOption, match="no variant 'ldp-a6', did you mean 'ldp-a"):
        plan.choose(variants, ["ldp-a6"])


def test_files_are_known_by_their_content(tmp_path: Path) -> None:
    found = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "text.txt").write_text("some text")
        found.append(comparison(data=(str(tmp_path / place / "text.txt"),)))
    here, there = (each.to_json() for each in found)
    assert plan.differences(here, there) == []
    assert here["data"][0].startswith("text.txt, 9 bytes, ")
    (tmp_path / "there" / "text.txt").write_text("some more")
    assert plan.differences(here, found[1].to_json())[0].startswith("data was ['text.txt, 9 bytes, ")


def test_what_may_differ_when_a_folder_is_continued() -> None:
    before = comparison().to_json()
    more = (*comparison().variants, Variant(name="lc", settings={"method": "lc"}))
    assert plan.differences(before, comparison(variants=more, seeds=5, best=2).to_json()) == []
    wider = comparison(grid=(Rates(lr=3e-5), *comparison().grid)).to_json()
    assert plan.differences(before, wider) == []
    assert plan.differences(wider, before) == [
        "grid was ['3e-5', '0.0001', '0.001'], is without 3e-5; more rates may come to it"
    ]
    assert plan.differences(before, comparison(tokens=2000).to_json()) == ["tokens was 1000, is 2000"]
    followed = comparison(variants=(Variant(name="ldp", settings={"method": "ldp"}, rates_of="seq"), SEQ)).to_json()
    assert plan.differences(before, followed) == [], "it says which cells there are, not what is in one"
    other = comparison(variants=(Variant(name="ldp", settings={"method": "seq"}),)).to_json()
    assert plan.differences(before, other) == ["variant ldp was {'method': 'ldp'}, is {'method': 'seq'}"]


def test_tables_while_a_sweep_is_not_over_and_where_all_of_it_failed(tmp_path: Path) -> None:
    ablation = Variant(name="kl", settings={"loss": "kl"}, rates_of="ldp")
    plain = Variant(name="rtn", settings={"method": "rtn"}, rates_of="ldp")
    variants = (*comparison().variants, SEQ, ablation, plain)
    folder = Folder(tmp_path)
    (tmp_path / "results").mkdir()

    def result(perplexity: float) -> dict[str, Any]:
        score = {"perplexity": perplexity, "kl": 0.1, "top1": 0.9}
        about = {"bytes": 1, "bits_per_weight": 2.0, "training_only": False, "tokens": 1000, "tokens_per_second": 1.0}
        return {"failed": None, "seed": 0, "validation": score, "heldout": score, **about}

    def shown(whole: Comparison) -> tuple[dict[str, list[str]], str]:
        summary = table.summarise(whole, folder, {"machine": "", "torch": ""})
        return {row[0]: row[1:4] for row in table.rows(summary)}, table.markdown(summary)

    whole = comparison(variants=variants, seeds=1)
    for cell in whole.sweeps():
        assert cell.rates is not None
        folder.save(cell, result(1e4 * cell.rates.lr) if cell.variant == "seq" else {"failed": "diverged"})
    cell = choice.final(whole, folder, "seq")
    assert cell is not None
    folder.save(cell, result(20.0))
    rows, text = shown(whole)
    assert rows == {
        "ldp": ["", "", "failed"],
        "seq": ["0.0001^", "1", "20.000"],
        "kl": ["", "", "failed"],
        "rtn": ["", "", "to come"],
    }
    assert "kl: failed: every rate of ldp failed" in text and "= marks the rates of ldp" in text
    wider = comparison(variants=variants, seeds=1, grid=(Rates(lr=3e-5), *whole.grid))
    rows, text = shown(wider)
    assert rows["seq"] == ["0.0001?", "1", "20.000"] and "? marks the best ones so far" in text
    assert "| seq | to come | 1.000 | 10.000 |" in text and rows["ldp"] == ["", "", "to come"]
    assert choice.final(wider, folder, "seq") is None, "no final is begun before the sweep is over"
    alone = comparison(variants=(ablation,), seeds=1, grid=whole.grid[:1])
    folder.save(Cell(kind=FINAL, variant="kl", rates=whole.grid[0]), result(21.0))
    rows, text = shown(alone)
    assert rows == {"kl": ["0.0001", "1", "21.000"]} and "=" not in text.partition("##")[0]
