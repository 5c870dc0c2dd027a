"""What 4-bit activations and a 4-bit KV cache cost by themselves: perplexity with weights as they are, untrained.

    python examples/benchmarks/activation_cost.py MODEL TEXT [--last 600000] [--max-tokens 10000]

Rotations are on. Prints a line for neither, for the KV cache alone, for activations alone with different clips, and for
each place that activations are quantized at, so that a clip can be chosen and a hard place be seen.
"""

from __future__ import annotations

import lzma
from pathlib import Path

import click
import torch
from torch import Tensor, nn

from rcpconv.checkpoint import load_source
from rcpconv.evaluate import cut, tokenize, torch_perplexity
from rcpconv.layers import ActivationQuantizer, ComputeOptions, KVQuantizer, LearnedClip, QuantLinear
from rcpconv.model import Decoder
from rcpconv.plan import look_at_machine
from rcpconv.prepare import prepare, student_decoder
from rcpconv.quantize import EVALUATION_WINDOW
from rcpconv.scheme import UNQUANTIZED
from rcpformat.architecture import Quantization

CLIPS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)
KV_CLIPS = (1 - 1e-6, 0.95, 0.9)
PLACES = ("attn.input_quantizer", "attn.o_quantizer", "mlp.input_quantizer", "mlp.down_quantizer")


class _AsItIs(nn.Module):
    def forward(self, weight_NK: Tensor) -> tuple[Tensor, Tensor]:
        """The weight, in the place of integers and a row scale."""
        return weight_NK, torch.ones(len(weight_NK), device=weight_NK.device)


def _set(student: Decoder, kind: type[LearnedClip], bits: int, clip: float = 0.9, place: str = "") -> None:
    """Bits and clip of the quantizers of this kind whose names end so; the others quantize nothing."""
    for name, module in student.named_modules():
        if isinstance(module, kind):
            module.bits = bits if name.endswith(place) else UNQUANTIZED
            module.clip_logit.data.fill_(torch.logit(torch.tensor(clip)))


@click.command(help=__doc__.split("\n")[0])
@click.argument("model")
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--last", type=click.IntRange(1), default=600_000, show_default=True, help="Characters of the text.")
@click.option("--max-tokens", type=click.IntRange(2), default=10_000, show_default=True)
@click.option("--bits", type=click.IntRange(2, 8), default=4, show_default=True)
def main(model: str, text: Path, last: int, max_tokens: int, bits: int) -> None:
    """Measure and print."""
    source, machine = load_source(model), look_at_machine("auto")
    with lzma.open(text, "rt", encoding="utf-8") if text.suffix == ".xz" else text.open(encoding="utf-8") as file:
        windows = cut(tokenize(source.tokenizer.json, file.read()[-last:]), EVALUATION_WINDOW, max_tokens)
    prepared = prepare(source, one_table=source.tied_embeddings)
    student = student_decoder(prepared, Quantization(method="rtn"), ComputeOptions(), device=machine.device)
    for module in student.modules():
        if isinstance(module, QuantLinear):
            module.quantizer = _AsItIs()  # type: ignore[assignment]

    def measure(what: str) -> None:
        click.echo(f"{what:40} {torch_perplexity(student, windows, what):8.3f}")

    _set(student, ActivationQuantizer, UNQUANTIZED)
    _set(student, KVQuantizer, UNQUANTIZED)
    measure("neither (tables in 8 bits)")
    for clip in KV_CLIPS:
        _set(student, KVQuantizer, bits, clip)
        measure(f"KV cache, clip {clip:.2f}")
    _set(student, KVQuantizer, UNQUANTIZED)
    for clip in CLIPS:
        _set(student, ActivationQuantizer, bits, clip)
        measure(f"activations, clip {clip:.2f}")
    for place in PLACES:
        _set(student, ActivationQuantizer, bits, 0.8, place)
        measure(f"{place}, clip 0.80")


if __name__ == "__main__":
    main()
