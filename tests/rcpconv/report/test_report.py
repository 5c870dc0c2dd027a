"""`rcpconv report`: the numbers against hand-computed ones, the page, and what a user can do wrong."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from rcpconv.baking import baked_decoder
from rcpconv.cli import main
from rcpconv.heldout import read_text
from rcpconv.layers import FloatLinear
from rcpconv.prepare import Rotations, prepare, rotated_decoder
from rcpconv.report import figures
from rcpconv.report.activations import SITES, SiteRange, output_errors, ranges
from rcpconv.report.measure import measure
from rcpconv.report.page import escape, page, paragraph
from rcpconv.report.weights import GAP_EDGES, WeightStatistics, clips, weight_statistics
from rcpconv.runs import METRICS, RUNNING, Run
from rcpformat import spec
from rcpformat.codec import PackedLinear, pack_codes
from tiny_checkpoints import CORPUS, make_tiny_checkpoint
from tiny_runs import make_tiny_run
from tiny_trainings import train

WINDOWS = [list(range(5, 25)), list(range(40, 60))]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = make_tiny_run("llama32", tmp_path_factory.mktemp("run"))
    lines: Iterator[dict[str, float]] = (
        {"step": i, "tokens": 64 * i, "loss": 1 / i, "kl": 0.5 / i} for i in range(1, 9)
    )
    text = "".join(json.dumps(line | {"perplexity": 9 + line["loss"]}) + "\n" for line in lines)
    (made.folder / METRICS).write_text(text)
    return made


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "some <text>.txt"
    path.write_text(" ".join(CORPUS * 3))
    return path


def report(run: Run, *options: str) -> Result:
    result = CliRunner().invoke(main, ["report", str(run.folder), *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_the_page_is_well_formed_and_needs_nothing_else(run: Run, text: Path) -> None:
    options = ["--generations", "2", "--generation-tokens", "8", "--text", str(text)]
    result = report(run, *options)
    assert result.exit_code == 0, result.output
    out = run.folder / "report.html"
    content = out.read_text(encoding="utf-8")
    assert content.startswith("<!DOCTYPE html>\n")
    root = ElementTree.fromstring(content.partition("\n")[2])
    images = list(root.iter("img"))
    assert len(images) == 6
    for image in images:
        assert image.attrib["alt"]
        kind, _, data = image.attrib["src"].partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert ElementTree.fromstring(base64.b64decode(data)).tag.endswith("svg")
    assert not list(root.iter("script")) and not list(root.iter("link"))
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|@import""", content)
    titles = [heading.text for heading in root.iter("h2")]
    assert titles == [
        "Run",
        "Training",
        "Error by layer",
        "Levels",
        "Clipping and partition",
        "Activations and KV cache",
        "Memory",
        "Generations",
    ]
    words = "".join(root.itertext())
    for expected in (
        "some <text>.txt",
        "fake-quant, before training",
        "codes",
        "original in FP16",
        "fake-quant greedy",
    ):
        assert expected in words

    result = report(run, *options)
    assert result.exit_code == 1 and "--force" in result.output
    assert out.read_text(encoding="utf-8") == content
    assert report(run, "--generations", "0", "--text", str(text), "--force").exit_code == 0
    assert "Generations" not in out.read_text(encoding="utf-8")


def test_what_the_page_says_of_rotations_groups_and_bits(text: Path, tmp_path: Path) -> None:
    make_tiny_checkpoint("llama32", tmp_path / "model")
    settings: dict[str, Any] = {"rotation_steps": 1, "progressive_bits": 4, "progressive_share": 0.5, "steps": 2}
    made = train(tmp_path / "model", text, tmp_path / "run", group_size_of=("down_proj=64",), a_clip=0.7, **settings)
    result = report(made, "--text", str(text), "--generations", "0", "--out", str(tmp_path / "page.html"))
    assert result.exit_code == 0, result.output
    shown = (tmp_path / "page.html").read_text()
    for part in (
        "R1, R2, R3, R4; R1 and R2 learned in 1 steps before training",
        "4 bits in the first 50% of the steps, 2 after that",
        "groups of 128, but down_proj=64",
    ):
        assert part in shown, part
    found = measure(
        made,
        made.source(),
        read_text(text),
        max_tokens=50,
        generations=0,
        generation_tokens=1,
        device=torch.device("cpu"),
        tell=lambda what: None,
    )
    clips_before = {round(clip, 5) for site in spec.ACTIVATION_SITES for clip in found.clips_before[site]}
    assert clips_before == {0.7}, "as the run began"


def test_plots_are_the_same_every_time_and_need_no_perplexity() -> None:
    lines = [{"tokens": 10 * i, "loss": 4.0**-i, "kl": 3.0**-i} for i in range(1, 5)]
    once, again = (figures.svg(figures.curves(lines, {})) for _ in range(2))
    assert once == again


def test_one_line_for_what_a_user_can_do_wrong(run: Run, text: Path, tmp_path: Path) -> None:
    def refused(result: Result, *expected: str) -> None:
        assert result.exit_code == 1
        assert result.output.startswith("Error: ") and len(result.output.splitlines()) == 1
        assert all(part in result.output for part in expected), result.output

    shutil.copytree(run.folder, tmp_path / "unfinished", ignore=shutil.ignore_patterns("report.html"))
    unfinished = Run.open(tmp_path / "unfinished")
    unfinished.update(status=RUNNING)
    refused(report(unfinished), "not finished", "--resume")

    shutil.copytree(run.folder, tmp_path / "orphan", ignore=shutil.ignore_patterns("report.html"))
    orphan = Run.open(tmp_path / "orphan")
    orphan.update(model=str(tmp_path / "gone"))
    refused(report(orphan), str(tmp_path / "gone"))
    assert not (orphan.folder / "report.html").exists()

    refused(CliRunner().invoke(main, ["report", str(tmp_path)]), "run.json")
    refused(report(run, "--out", str(tmp_path / "none" / "page.html")), "no folder", "--out")
    out = str(tmp_path / "page.html")
    refused(report(run, "--out", out, "--text", str(text), "--generation-tokens", "128"), "context of 128")
    refused(report(run, "--out", out, "--text", str(tmp_path / "nothing")), "readable text file")


def test_weight_statistics_of_a_layer_by_hand() -> None:
    linear = PackedLinear(
        name="layers.0.attn.q",
        shape=(1, 4),
        group_size=4,
        codes=pack_codes(np.array([[0, 1, 3, 3]], np.uint8)),
        levels=np.array([[[-100, -20, 20, 100]]], np.int8),
        scale=np.array([0.01], np.float32),
    )
    found = WeightStatistics()
    found.add(linear, np.array([[-2.0, -0.2, 1.0, 1.25]], np.float32))
    # 1 and 0.25 off, of a vector with squares 4 + 0.04 + 1 + 1.5625
    assert found.errors["layers.0.attn.q"] == pytest.approx(((1 + 0.0625) / 6.6025) ** 0.5)
    assert found.codes_4.tolist() == [1, 1, 0, 2]
    assert [int(row.argmax()) - spec.LEVEL_LIMIT for row in found.levels_4L] == [-100, -20, 20, 100]
    # lowest level -1 of -2, highest 1 of 1.25, in bins of 0.02
    assert [int(row.argmax()) for row in found.clips_2] == [25, 40]
    assert [round(float(GAP_EDGES[row.argmax()]), 2) for row in found.gaps_3] == [0.4, 0.2, 0.4]


def test_statistics_cover_every_layer_and_every_group(run: Run) -> None:
    q = run.quantization
    prepared = prepare(run.source(), one_table=run.architecture.tied_table)
    found = weight_statistics(prepared, q, {"trained": run.tensor})["trained"]
    assert list(found.errors) == spec.linear_names(run.architecture)
    assert all(0.1 < error < 0.7 for error in found.errors.values())
    shapes = {name: spec.linear_shape(run.architecture, spec.linear_kind(name)) for name in found.errors}
    groups = sum(n * spec.ceil_div(k, q.group_of(name)) for name, (n, k) in shapes.items())
    assert found.codes_4.sum() == sum(n * k for n, k in shapes.values())
    assert found.levels_4L.sum(axis=1).tolist() == [groups] * 4
    assert found.clips_2.sum(axis=1).tolist() == [groups] * 2
    assert {site: len(values) for site, values in clips(run.tensor, 2).items()} == dict.fromkeys(SITES, 2)


def test_ranges_by_hand() -> None:
    found = SiteRange()
    found.hook(torch.nn.Identity(), (torch.tensor([[[3.0, -4.0]], [[0.0, 0.0]]]),), None)
    found.hook(torch.nn.Identity(), (torch.tensor([[1.0, 1.0]]),), None)
    assert (found.largest, found.typical) == (4, 1)
    assert found.crest == 1  # the lower of 4 / sqrt(25 / 2) and 1


def test_ranges_are_of_what_the_quantizers_see(run: Run) -> None:
    none = Rotations(r1=False, r2=False, r3=False, r4=False)
    decoder = rotated_decoder(prepare(run.source(), rotations=none, one_table=run.architecture.tied_table))
    seen: list[torch.Tensor] = []
    down: FloatLinear = decoder.layers[1].mlp.down  # type: ignore[assignment, union-attr]
    handle = down.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    found = ranges(decoder, WINDOWS)
    handle.remove()
    assert found["down_input"][1].largest == torch.cat(seen).abs().max()
    assert set(found) == set(SITES)


def test_output_errors(run: Run) -> None:
    reference = rotated_decoder(prepare(run.source(), one_table=run.architecture.tied_table, seed=run.config.seed))
    assert set(output_errors(reference, reference, WINDOWS).values()) == {0.0}
    quantized = baked_decoder(run.architecture, run.quantization, run.tensor)
    found = output_errors(reference, quantized, WINDOWS)
    assert found.keys() == {*spec.linear_names(run.architecture), "layers.0", "layers.1"}
    assert all(0.05 < error < 2 for error in found.values())
    other = rotated_decoder(prepare(run.source(), one_table=run.architecture.tied_table, seed=run.config.seed))
    with torch.no_grad():
        other.layers[1].mlp.down.weight.mul_(1.25)  # type: ignore[union-attr, operator]
    assert output_errors(reference, other, WINDOWS)["layers.1.mlp.down"] == pytest.approx(0.25, rel=1e-4)


def test_any_text_can_stand_in_a_page() -> None:
    content = page("a < b", paragraph('<script>"x" & \x00\x1b\ud800\n</script>'))
    root = ElementTree.fromstring(content.partition("\n")[2])
    found = root.find("body/p")
    assert found is not None
    assert found.text == '<script>"x" & \N{REPLACEMENT CHARACTER}' + "\N{REPLACEMENT CHARACTER}" * 2 + "\n</script>"
    assert escape("\U0001f600é") == "\U0001f600é"
