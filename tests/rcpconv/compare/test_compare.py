"""`rcpconv compare` from options to table: what it leaves, that it goes on where it stopped, and what it reads when."""

import dataclasses
import io
import json
import os
import shlex
import shutil
import signal
import tarfile
import threading
import tomllib
from collections.abc import Iterator
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from rcpconv.baking import baked_decoder
from rcpconv.checkpoint import load_source
from rcpconv.cli import main
from rcpconv.compare import workers, workshop
from rcpconv.compare.clock import Clock
from rcpconv.compare.folder import PLAN
from rcpconv.compare.plan import FINAL, Cell, Comparison, Rates, Variant
from rcpconv.compare.run import _require_room, compare
from rcpconv.compare.score import score
from rcpconv.errors import (
    BadOption,
    BadRun,
    BadTrainingData,
    ConversionError,
    NotEnoughMachine,
    TrainingDiverged,
)
from rcpconv.evaluate import cut, tokenize, torch_perplexity
from rcpconv.export import export
from rcpconv.plan import Machine, visible_gpus
from rcpconv.prepare import original_decoder
from rcpconv.rotations import LearnedRotations
from rcpconv.runs import ROTATIONS, Run, alone
from rcpconv.train.loop import Trainer
from rcpconv.train.rotations import learn_rotations
from rcpconv.train.stopping import Interrupted
from tiny_checkpoints import CORPUS, make_tiny_checkpoint

SETTINGS = {"seq_len": 16, "batch_size": 2, "grad_accum": 1, "log_every": 2}
VARIANTS = {
    "ldp": {"method": "ldp"},
    "seq": {"method": "seq", "r1": False},
    "rtn": {"method": "rtn"},
    "ldp-a16": {"a_bits": 16, "group_size": 64, "rotation_steps": 2},
}
TOKENS_PER_STEP = 32


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and two texts."""
    folder = tmp_path_factory.mktemp("compare")
    make_tiny_checkpoint("llama32", folder / "model")
    (folder / "train.txt").write_text("\n\n\n".join(f"{line} {i}" for i in range(40) for line in CORPUS))
    (folder / "heldout.txt").write_text("\n\n\n".join(CORPUS[::-1] * 3))
    return folder


def tiny(place: Path, **changes: Any) -> Comparison:
    values: dict[str, Any] = {
        "model": str(place / "model"),
        "data": (str(place / "train.txt"),),
        "text": str(place / "heldout.txt"),
        "common": SETTINGS,
        "variants": tuple(Variant(name=name, settings=settings) for name, settings in VARIANTS.items()),
        "grid": (Rates(lr=1e-4), Rates(lr=1e-3)),
        "tokens": 8 * TOKENS_PER_STEP,
        "sweep_tokens": 4 * TOKENS_PER_STEP,
        "seeds": 2,
        "best": 1,
        "validation_tokens": 200,
        "curve_points": 2,
        "window": 32,
        "max_eval_tokens": 320,
        "generation_tokens": 8,
    }
    return Comparison(**values | changes)


def work(place: Path, out: Path, **options: Any) -> dict[str, Any]:
    changes = {name: options.pop(name) for name in list(options) if name in tiny(place).__dataclass_fields__}
    summary = compare(tiny(place, **changes), out, device="cpu", console=Console(file=io.StringIO()), **options)
    assert summary is not None
    return summary


def without_times(folder: Path) -> dict[str, Any]:
    """All results, but for what differs from run to run."""
    found = {}
    for path in sorted((folder / "results").iterdir()):
        result = json.loads(path.read_text())
        found[path.name] = {
            key: result[key] for key in result if key not in ("seconds", "rotation_seconds", "tokens_per_second")
        }
    return found


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    """A comparison that was never stopped, with its run folders and generations."""
    work(place, place / "finished", keep_runs=True, generations=3)
    return place / "finished"


def test_what_is_left(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        *(".lock", PLAN, "results", "rotations", "runs", "tokens.npy", "validation.txt"),
        *("compare.md", "compare.json", "compare.png"),
    }
    summary = json.loads((finished / "compare.json").read_text())
    rows = {row["variant"]: row for row in summary["rows"]}
    assert list(rows) == list(VARIANTS)
    for row in rows.values():
        assert row["perplexity"]["mean"] > summary["original"]["heldout"]["perplexity"] * 0.5
        assert 0 < row["kl"]["mean"] < 20
        assert 0 <= row["top1"]["mean"] <= 1
        assert row["bytes"] > 0
        assert row["bits_per_weight"] > 2
        assert [result["decoding"] for result in row["generations"]] == ["greedy", "sampled"]
    assert "collapse" in summary["verdict"] and "percentage points above that of original" in summary["verdict"]
    assert rows["ldp-a16"]["training_only"]
    assert not rows["ldp"]["training_only"]
    assert rows["ldp-a16"]["bits_per_weight"] > rows["ldp"]["bits_per_weight"], "smaller groups have more levels"
    assert rows["rtn"]["tokens"] == 0
    for name in ("ldp", "ldp-a16"):  # the rotations' tokens, too
        assert rows[name]["tokens"] == rows[name]["curve"][-1][0] == 8 * TOKENS_PER_STEP
    assert len(rows["ldp-a16"]["curve"]) == 2 and rows["ldp-a16"]["curve"][0][0] > 2 * TOKENS_PER_STEP
    # Of the variants of equal form the better one has both seeds.
    assert sorted(len(rows[name]["seeds"]) for name in ("ldp", "seq")) == [1, 2]
    assert len(rows["ldp-a16"]["seeds"]) == len(rows["rtn"]["seeds"]) == 1
    twice = max(rows.values(), key=lambda row: len(row["seeds"]))
    assert twice["perplexity"]["sd"] > 0
    assert [tokens for tokens, _ in twice["curve"]] == [4 * TOKENS_PER_STEP, 8 * TOKENS_PER_STEP]
    text = (finished / "compare.md").read_text()
    best, other = (next(row for row in rows.values() if len(row["seeds"]) == count) for count in (2, 1))
    mean, sd = best["perplexity"]["mean"], best["perplexity"]["sd"]
    assert f"Best method: {best['variant']} {mean:.3f} ± {sd:.3f} (2 seeds; rates " in text
    assert f"Best other method, each at the best of the same grid of rates: {other['variant']} " in text
    assert [found["variants"] for found in summary["methods"]] == [[best["variant"]], [other["variant"]]]
    assert "follows from the weights': 2.5 times for quantizers and 2.5 times for clips" in text
    assert summary["verdict"] in text
    for part in (
        "0.0001, 0.001",
        "| ldp-a16* |",
        "not trained",
        "±",
        "Training only",
        "teacher",
        "128 tokens, one seed",
    ):
        assert part in text, part


def test_rotations_are_learned_once_for_all_that_learn_the_same(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[int] = []

    def counting(*arguments: Any, **more: Any) -> LearnedRotations:
        learned.append(more["steps"])
        return learn_rotations(*arguments, **more)

    monkeypatch.setattr("rcpconv.train.beginning.learn_rotations", counting)
    settings: dict[str, dict[str, Any]] = {
        "ldp": {},
        "seq": {"method": "seq"},
        "kl": {"loss": "kl"},
        "a8": {"a_bits": 8},
        "none": {"r1": False, "r2": False},
    }
    variants = tuple(Variant(name=name, settings=each) for name, each in settings.items())
    common, out = SETTINGS | {"rotation_steps": 2}, tmp_path / "out"
    work(place, out, variants=variants, common=common, seeds=1, keep_runs=True)
    assert learned == [2, 2], "for ldp and a8"
    runs = {path.name.partition(".")[0]: path for path in (out / "runs").iterdir()}
    assert not (runs.pop("none") / ROTATIONS).exists()
    contents = {name: (path / ROTATIONS).read_bytes() for name, path in runs.items()}
    assert contents["ldp"] == contents["seq"] == contents["kl"] != contents["a8"]
    assert export(Run.open(runs["seq"]), tmp_path / "seq.rcp").nbytes > 0


def test_rotations_that_were_stopped_go_on_in_whichever_training_comes_next(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def stopping(*arguments: Any, tell: Any, **more: Any) -> LearnedRotations:
        def hear(line: str) -> None:
            told.append(line)
            if len(told) == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        return learn_rotations(*arguments, tell=hear, **more)

    monkeypatch.setattr("rcpconv.train.beginning.learn_rotations", stopping)
    ldp, seq = (Variant(name=name, settings={"method": name}) for name in ("ldp", "seq"))
    common, grid = SETTINGS | {"rotation_steps": 6}, (Rates(lr=1e-3),)
    with pytest.raises(Interrupted):
        work(place, tmp_path / "out", variants=(ldp, seq), common=common, grid=grid, seeds=1)
    work(place, tmp_path / "out", variants=(seq, ldp), common=common, grid=grid, seeds=1)
    assert told[3:5] == ["rotations: going on after step 3 of 6", told[4]] and told[4].startswith("rotations: step 4 ")
    assert len(told) == 7, "learned once"
    assert [path.suffix for path in (tmp_path / "out" / "rotations").glob("[!.]*")] == [".safetensors"]


def test_an_ablation_is_trained_beside_more_seeds_and_has_one_itself(place: Path, tmp_path: Path) -> None:
    ldp = Variant(name="ldp", settings={})
    said = io.StringIO()
    comparison = tiny(place, variants=(ldp, Variant(name="ldp-kl", settings={"loss": "kl"}, rates_of="ldp")))
    summary = compare(comparison, tmp_path / "out", device="cpu", console=Console(file=said, width=200))
    assert summary is not None
    assert {row["variant"]: len(row["seeds"]) for row in summary["rows"]} == {"ldp": 2, "ldp-kl": 1}
    assert summary["rows"][0]["rates"] == summary["rows"][1]["rates"]
    assert [found["variants"] for found in summary["methods"]] == [["ldp"]]
    lines = [line for line in said.getvalue().splitlines() if " final " in line and "/" in line]
    assert [line.split()[:2] for line in lines[-3:]] == [["1/1", "ldp"], ["1/2", "ldp"], ["2/2", "ldp-kl"]]


def test_rotations_that_diverge_are_learned_once_and_fail_every_row(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def diverging(*_: Any, **more: Any) -> LearnedRotations:
        tried.append(more["steps"])
        raise TrainingDiverged("rotations: step 1: KL is not finite. Try --rotation-lr 1e-3")

    monkeypatch.setattr("rcpconv.train.beginning.learn_rotations", diverging)
    variants = tuple(Variant(name=name, settings={"method": name}) for name in ("ldp", "seq"))
    common, grid = SETTINGS | {"rotation_steps": 2}, (Rates(lr=1e-3),)
    summary = work(place, tmp_path / "out", variants=variants, common=common, grid=grid, seeds=1)
    assert tried == [2]
    assert {row["failed"] for row in summary["rows"]} == {"rotations: step 1: KL is not finite. Try --rotation-lr 1e-3"}


def test_who_is_killed_lets_the_next_one_in(tmp_path: Path) -> None:
    path, (ours, theirs) = tmp_path / "file", Pipe()
    holder = get_context("fork").Process(target=_hold, args=(path, theirs))
    holder.start()
    assert ours.recv() == "in"
    waiting = threading.Thread(target=_hold, args=(path, theirs, True))
    waiting.start()
    assert not ours.poll(0.3), "one at a time"
    holder.kill()
    holder.join()
    assert ours.poll(10) and ours.recv() == "in"
    waiting.join()


def _hold(path: Path, pipe: Connection, leave: bool = False) -> None:
    with alone(path):
        pipe.send("in")
        if not leave:
            threading.Event().wait()


def test_every_trained_variant_had_the_same_grid_and_the_best_of_it_was_taken(finished: Path) -> None:
    names = set(os.listdir(finished / "results"))
    for name in ("ldp", "seq", "ldp-a16"):
        swept = {lr: f"{name}.sweep.lr{lr}.seed0.json" for lr in ("0.0001", "0.001")}
        assert set(swept.values()) == {each for each in names if each.startswith(f"{name}.sweep")}
        found = {
            lr: json.loads((finished / "results" / file).read_text())["validation"]["perplexity"]
            for lr, file in swept.items()
        }
        assert f"{name}.final.lr{min(found, key=lambda lr: found[lr])}.seed0.json" in names
    assert {each for each in names if each.startswith("rtn")} == {"rtn.final.seed0.json"}


def test_figures_are_those_of_a_kept_run(finished: Path, place: Path, tmp_path: Path) -> None:
    """What is measured in training is what the file holds, and eval says the same."""
    (name,) = (name for name in os.listdir(finished / "runs") if name.startswith("ldp.final") and "seed0" in name)
    run = Run.open(finished / "runs" / name)
    result = json.loads((finished / "results" / f"{name}.json").read_text())
    baked = baked_decoder(run.architecture, run.quantization, run.tensor)
    windows = cut(tokenize(run.tokenizer_json, (place / "heldout.txt").read_text()), 32, 320)
    assert result["heldout"]["perplexity"] == pytest.approx(torch_perplexity(baked, windows, ""), rel=1e-5)
    assert result["heldout"]["tokens"] == 310
    assert abs(result["bytes"] - export(run, tmp_path / "model.rcp").nbytes) < 2000, "provenance is not counted"
    assert tomllib.loads(run.recipe)["lr"] == result["rates"]["lr"]
    assert run.evaluation["perplexity"]["fake-quant"] == result["validation"]["perplexity"]


def test_score_of_the_original_is_perplexity_and_no_difference(place: Path) -> None:
    source = load_source(str(place / "model"))
    windows = cut(tokenize(source.tokenizer.json, (place / "heldout.txt").read_text()), 32)
    original = original_decoder(source)
    found = score(original, windows, original)
    assert found.perplexity == pytest.approx(torch_perplexity(original, windows, ""), rel=1e-5)
    assert (found.top1, found.tokens) == (1.0, 31 * len(windows))
    assert found.kl == pytest.approx(0, abs=1e-6)


def test_the_heldout_text_is_read_when_all_rates_are_chosen(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []
    read = workshop.evaluation_text

    def watched(name: str) -> Any:
        seen.append(set(os.listdir(tmp_path / "out" / "results")))
        return read(name)

    monkeypatch.setattr(workshop, "evaluation_text", watched)
    variants = tuple(Variant(name=name, settings=VARIANTS[name]) for name in ("ldp", "rtn"))
    work(place, tmp_path / "out", variants=variants, seeds=1)
    assert seen == [{"ldp.sweep.lr0.0001.seed0.json", "ldp.sweep.lr0.001.seed0.json"}]


def test_training_never_sees_the_validation_part(
    finished: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Any] = []
    made = workshop.Sequences
    monkeypatch.setattr(workshop, "Sequences", lambda *a: trained.append(a[0]) or made(*a))  # type: ignore[func-returns-value]
    variants = (Variant(name="ldp", settings={}),)
    work(place, tmp_path / "out", variants=variants, grid=(Rates(lr=1e-3),), seeds=1)
    shop_tokens = workshop.np.load(tmp_path / "out" / "tokens.npy")
    (rest,) = trained
    assert len(shop_tokens) - len(rest) >= 200
    assert (shop_tokens[len(shop_tokens) - len(rest) :] == rest).all()
    validation = (tmp_path / "out" / "validation.txt").read_text()
    assert validation.startswith(CORPUS[0][:20])


def test_sampled_text_beside_the_other(place: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"variants": (Variant(name="ldp", settings={}),), "grid": (Rates(lr=1e-3),), "seeds": 1}
    data = (str(place / "train.txt"), "self")
    work(place, tmp_path / "out", **changes, data=data, common=SETTINGS | {"self_tokens": 100, "self_share": 0.25})
    assert (tmp_path / "out" / "validation.txt").read_text().startswith(CORPUS[0][:20])
    assert 100 <= len(workshop.np.load(tmp_path / "out" / "self.npy")) < 100 + 16


def killed(place: Path, out: Path, after: int) -> None:
    """A comparison in a process that is killed when so many cells are done."""
    child = os.fork()
    if not child:
        try:
            do, done = workshop.Workshop.do, []

            def dying(self: workshop.Workshop, cell: Cell) -> Any:
                if len(done) == after:
                    os.kill(os.getpid(), signal.SIGKILL)
                done.append(cell)
                return do(self, cell)

            workshop.Workshop.do = dying  # type: ignore[method-assign]
            work(place, out, keep_runs=True, generations=3)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_killed_comparison_goes_on_and_does_nothing_twice(finished: Path, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed(place, out, after=3)
    before = {path.name: path.stat().st_mtime_ns for path in (out / "results").iterdir()}
    assert len(before) == 3
    assert json.loads((out / "compare.json").read_text())["original"] is None
    killed(place, out, after=5)
    assert len(os.listdir(out / "results")) == 8
    work(place, out, keep_runs=True, generations=3)
    assert {name: (out / "results" / name).stat().st_mtime_ns for name in before} == before
    assert without_times(out) == without_times(finished)
    # Once more: nothing is left to do.
    after = {path.name: path.stat().st_mtime_ns for path in (out / "results").iterdir()}
    work(place, out, generations=3)
    assert {path.name: path.stat().st_mtime_ns for path in (out / "results").iterdir()} == after


def test_a_stopped_training_goes_on_from_its_checkpoint(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"variants": (Variant(name="ldp", settings={}),), "grid": (Rates(lr=1e-3),), "seeds": 1}
    work(place, tmp_path / "whole", **changes)
    update, steps = Trainer._update, []

    def stopping(self: Trainer, loss: Any) -> None:
        update(self, loss)
        steps.append(self.counters.step)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_update", stopping)
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        work(place, out, **changes)
    (run,) = (out / "runs").iterdir()
    assert len(list((run / "checkpoints").iterdir())) == 1
    work(place, out, **changes)
    assert steps == [*range(1, 9)], "no step is made twice"
    assert without_times(out) == without_times(tmp_path / "whole")
    assert list((out / "runs").iterdir()) == [], "no run folders are kept unless asked for"


def test_a_comparison_out_of_time_goes_on_elsewhere(
    finished: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock rings in the third training; then the folder is moved, model and texts too."""
    update, began = Trainer._update, []

    def ringing(self: Trainer, loss: Any) -> None:
        update(self, loss)
        if self.counters.step == 2:
            began.append(self.run.folder.name)
            if len(began) == 3:
                clocks[0]._ring()

    clocks: list[Clock] = []
    monkeypatch.setattr(Trainer, "_update", ringing)
    monkeypatch.setattr("rcpconv.compare.run.Clock", lambda *a: clocks.append(Clock(*a)) or clocks[-1])  # type: ignore[func-returns-value]
    said = io.StringIO()
    assert compare(tiny(place), tmp_path / "out", device="cpu", minutes=60, console=Console(file=said)) is None
    assert "60 minutes are over; what is finished is kept. Give the same command again" in said.getvalue()
    assert len(os.listdir(tmp_path / "out" / "results")) == 2
    (left,) = (tmp_path / "out" / "runs").iterdir()
    assert left.name == began[2] and len(list((left / "checkpoints").iterdir())) == 1
    monkeypatch.setattr(Trainer, "_update", update)
    shutil.copytree(place, tmp_path / "place", ignore=lambda folder, names: {"finished"} & set(names))
    with tarfile.open(tmp_path / "out.tar", "w") as archive:
        archive.add(tmp_path / "out", "moved", filter=lambda each: None if each.name.endswith(".npy") else each)
    shutil.rmtree(tmp_path / "out")
    with tarfile.open(tmp_path / "out.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    steps: list[int] = []
    monkeypatch.setattr(Trainer, "_update", lambda self, loss: steps.append(self.counters.step) or update(self, loss))  # type: ignore[func-returns-value]
    work(tmp_path / "place", tmp_path / "moved", keep_runs=True)
    assert steps[0] == 2, "the third training goes on"
    assert _without_generations(tmp_path / "moved") == _without_generations(finished)


def _without_generations(folder: Path) -> dict[str, Any]:
    return {
        name: {key: result[key] for key in result if key not in ("generations", "itself", "greedy")}
        for name, result in without_times(folder).items()
    }


def test_nothing_is_begun_that_would_end_too_late(place: Path, tmp_path: Path) -> None:
    clock = Clock(1, tiny(place))
    sweep, final = (Cell(kind=kind, variant="ldp", rates=Rates(lr=1e-3)) for kind in ("sweep", FINAL))
    assert clock.may(sweep) and clock.may(final) and not clock.short, "nothing is known of either"
    clock.took(sweep, 50)
    clock.took(sweep, 30)
    assert clock.estimate(final) == 80, "twice as many tokens, and 20 seconds of something else"
    assert clock.may(sweep) and not clock.may(final)
    assert clock.short
    clock.took(final, 50)
    assert clock.may(final)
    clock.took(sweep, 70)
    assert not clock.may(sweep)
    again = Clock(1, tiny(place))
    again.took(sweep, 70)
    assert again.may(sweep) and not again.may(sweep), "something is begun in every call"
    assert Clock(None, tiny(place)).may(sweep)
    rotating = Clock(1, tiny(place))
    for seconds, rotations in ((70, 10), (50, 0), (40, 0)):
        rotating.took(sweep, seconds, rotations)
    assert rotating.estimate(final) == 2 * (40 + 10) + 20, "rotations are learned on twice as many tokens, too"
    rotating.took(final, 90, 15)
    rotating.took(final, 85)
    assert rotating.estimate(final) == 100
    said = io.StringIO()
    assert compare(tiny(place), tmp_path / "out", device="cpu", minutes=1e-9, console=Console(file=said)) is None
    assert "1e-09 minutes are over" in said.getvalue()


def test_a_rate_at_which_training_diverges_is_not_chosen(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Trainer._update

    def failing(self: Trainer, loss: Any) -> None:
        if self.config.lr == 1e-3 or self.config.method == "seq":
            self._diverged("the loss is not finite")
        update(self, loss)

    monkeypatch.setattr(Trainer, "_update", failing)
    variants = tuple(Variant(name=name, settings=VARIANTS[name]) for name in ("ldp", "seq"))
    summary = work(place, tmp_path / "out", variants=variants)
    ldp, seq = summary["rows"]
    assert (ldp["rates"], ldp["sweep"]["0.001"]) == ("0.0001", None)
    assert len(ldp["seeds"]) == 2
    assert seq["failed"] == "every rate of the grid failed"
    assert "| seq |  |  | failed |" in (tmp_path / "out" / "compare.md").read_text()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokens": 999}, BadRun, "another comparison: tokens was 256, is 999. Choose another --out"),
        ({"variants": (Variant(name="ldp", settings={"r2": False}),)}, BadRun, "give a changed variant another name"),
        ({"grid": (Rates(lr=1e-4),)}, BadRun, "grid was"),
        ({"validation_tokens": 10**6}, BadTrainingData, "keep back at most [0-9]+"),
        ({"generations": 2, "generation_tokens": 500}, BadOption, "do not fit the model's context"),
        ({"data": ("nowhere.txt",)}, BadTrainingData, "nowhere.txt: no such file"),
    ],
)
def test_refusals(
    finished: Path,
    place: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[ConversionError],
    message: str,
) -> None:
    out = finished if error is BadRun else tmp_path / "out"
    with pytest.raises(error, match=message):
        work(place, out, **{"generations": 3} | changes)


def test_folders_of_something_else_and_damaged_results(finished: Path, place: Path, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("mine")
    with pytest.raises(BadRun, match="not of a comparison"):
        work(place, tmp_path)
    result = finished / "results" / "original.json"
    content = result.read_bytes()
    try:
        result.write_bytes(content[:100])
        with pytest.raises(BadRun, match=r"original\.json: cannot be read .* delete it"):
            work(place, finished, generations=3)
    finally:
        result.write_bytes(content)


class Sees:
    """Says which GPUs its process sees."""

    def do(self, cell: Cell) -> dict[str, Any]:
        return {"gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}


@pytest.mark.parametrize(
    ("set_to", "there", "found"),
    [(None, 2, ["0", "1"]), ("3, 5,-1", 2, ["3", "5"]), ("", 0, []), (None, 0, [])],
)
def test_gpus_that_are_seen(set_to: str | None, there: int, found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if set_to is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", set_to)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    assert visible_gpus() == found


def test_side_by_side_processes_take_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as if it were started, but in this process."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(os, "setsid", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *a: None)
    seen: list[str] = []

    class Context:
        Pipe = staticmethod(Pipe)

        class Process:
            exitcode = 0

            def __init__(self, target: Any, args: Any) -> None:
                self.target, (_, *self.args) = target, args

            def start(self) -> None:
                ours, theirs = Pipe()
                ours.send(Cell(kind=FINAL, variant="ldp"))
                thread = threading.Thread(target=self.target, args=(theirs, *self.args))
                thread.start()
                seen.append(ours.recv()["gpus"])
                ours.close()
                thread.join()
                os.environ["CUDA_VISIBLE_DEVICES"] = "3,5"

            def join(self, seconds: float) -> None:
                pass

    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda how: Context)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with workers.side_by_side(3, Sees, {}, visible_gpus()):
        assert seen == ["3", "5", "3"]
    with workers.side_by_side(1, Sees, {}):
        assert seen[3:] == ["3,5"]


def test_room_is_needed_on_each_gpu() -> None:
    machine = Machine(device="cuda:0", name="a GPU", memory_bytes=100 << 30, flops=1.0)
    _require_room(20 << 30, machine, 8, ["0", "1"])
    with pytest.raises(NotEnoughMachine, match=r"jobs: 5 trainings side by side take about 107\.4 GB, a GPU has"):
        _require_room(20 << 30, machine, 9, ["0", "1"])


def test_side_by_side_every_cell_is_done_once_and_variants_stay_where_they_were_compiled() -> None:
    done: dict[int, list[str]] = {0: [], 1: []}

    def serve(number: int, pipe: Any) -> None:
        while True:
            try:
                cell = pipe.recv()
            except EOFError:
                return
            done[number].append(cell.name)
            pipe.send(BadOption("no") if cell.variant == "bad" else {"variant": cell.variant})

    crew = []
    for number in range(2):
        ours, theirs = Pipe()
        threading.Thread(target=serve, args=(number, theirs), daemon=True).start()
        crew.append(workers._Worker(process=None, pipe=ours))  # type: ignore[arg-type]
    cells = [Cell(kind=FINAL, variant=name, seed=seed) for name in "abcd" for seed in range(3)]
    side_by_side = workers.SideBySide(crew)
    found = list(side_by_side.each(cells))
    assert {cell.name for cell, result in found if result["variant"] == cell.variant} == {cell.name for cell in cells}
    assert sorted(done[0] + done[1]) == sorted(cell.name for cell in cells)
    assert done[0][0] != done[1][0]
    with pytest.raises(BadOption):
        list(side_by_side.each([dataclasses.replace(cells[0], variant="bad")]))


@pytest.mark.slow
def test_side_by_side_gives_the_same_figures(finished: Path, place: Path, tmp_path: Path) -> None:
    work(place, tmp_path / "out", keep_runs=True, generations=3, jobs=2)
    assert without_times(tmp_path / "out") == without_times(finished)


def test_the_demos_text_is_enough_to_keep_some_back(tmp_path: Path) -> None:
    options = ["--data", "demo", "--only", "rtn", "--max-eval-tokens", "0.2k", "--device", "cpu"]
    shown = CliRunner().invoke(main, ["compare", "demo", "--out", str(tmp_path / "out"), *options])
    assert shown.exit_code == 0, shown.output
    assert "20,000 tokens kept back" in shown.output


@pytest.mark.slow
def test_the_readmes_comparison_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    (line,) = [line for line in readme.splitlines() if line.startswith("rcpconv compare demo ")]
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(main, shlex.split(line, comments=True)[1:])
    assert shown.exit_code == 0, shown.output
    assert "| seq |" in (tmp_path / "cmp" / "compare.md").read_text(encoding="utf-8")


def test_the_command_with_the_demo(tmp_path: Path) -> None:
    (tmp_path / "variants.toml").write_text(
        '[common]\nseq-len = 32\nbatch-size = 2\n[variants.kv8]\nkv-bits = 8\n[variants.r]\nmethod = "rtn"\n'
    )
    options = ["--variants", str(tmp_path / "variants.toml"), "--data", "demo", "--device", "cpu", "--lr-grid", "1e-4"]
    options += ["--tokens", "0.1k", "--validation-tokens", "0.2k", "--max-eval-tokens", "0.2k", "--seeds", "1"]
    out = str(tmp_path / "out")

    def command(*more: str) -> Any:
        return CliRunner().invoke(main, ["compare", "demo", "--out", out, *options, *more], prog_name="rcpconv")

    shown = command("--dry-run")
    assert shown.exit_code == 0, shown.output
    assert "kv_bits 8" in shown.output
    assert not Path(out).exists()
    first = command()
    assert first.exit_code == 0, first.output
    assert "kv8 final lr 0.0001 seed 0: validation" in first.output
    assert "compare.md, compare.json, compare.png" in first.output
    again = command("--set", "loss=mix")
    assert again.exit_code == 1
    assert again.output.splitlines()[-1].startswith(f"Error: {out}: holds another comparison: common was")
    assert "Traceback" not in again.output
    assert command("--only", "kv9").output.startswith("Error: only: no variant 'kv9', did you mean 'kv8'")
