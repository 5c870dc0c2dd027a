"""How much of the GPU's memory a backend will ask for, before it asks for any."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from rcpformat import spec
from rcpformat.architecture import Architecture
from rcpformat.reader import RcpFile
from rcprun.backends.cuda import attention, gemm, linear
from rcprun.backends.cuda.buffers import Buffers
from rcprun.backends.cuda.kvcache import KVCache
from rcprun.backends.cuda.kvcache import bytes_needed as cache_bytes
from rcprun.backends.cuda.memory import MemoryPlan
from rcprun.backends.cuda.network import PREFILL_TOKENS

RING = 4096
"""Generated tokens that the GPU remembers of each sequence."""
CUDA_BYTES = 96 << 20
"""For modules, graphs, cuBLAS's workspace and the memory pool's rounding."""
_HISTOGRAM_BYTES = 1 << 17
"""Of a row's sampling, beside what grows with the vocabulary."""


def plan_memory(file: RcpFile, context: int, streams: int) -> MemoryPlan:
    """What a CudaBackend will ask for."""
    a, q = file.architecture, file.quantization
    host_only = (spec.INV_FREQ, spec.TOKENIZER)
    sizes = {"bits": q.kv_bits, "kv_heads": a.num_kv_heads, "head_dim": a.head_dim, "capacity": context}
    cache = cast(KVCache, SimpleNamespace(**sizes))
    workspace = attention.decode_workspace_bytes(cache, a.num_heads, linear.MAX_TOKENS)
    sampling = streams * (4 * RING + _HISTOGRAM_BYTES + (4 + 3 * 8) * a.vocab_size)
    return MemoryPlan(
        weights=sum(entry.nbytes for name, entry in file.header_tensors.items() if name not in host_only),
        kv_cache=cache_bytes(a, q.kv_bits, streams, context),
        tables=2 * context * a.head_dim // 2 * 4,
        buffers=Buffers.bytes_needed(a, linear.MAX_TOKENS)
        + workspace
        + sampling
        + _prefill_bytes(a, min(PREFILL_TOKENS, context))
        + CUDA_BYTES,
        context=context,
        streams=streams,
    )


def _prefill_bytes(a: Architecture, tokens: int) -> int:
    """Of what passes of many tokens need: buffers, and the largest layer as int8 with its integer sums."""
    heads, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    shapes = (
        (heads + 2 * kv, a.hidden_size),
        (a.hidden_size, heads),
        (2 * a.intermediate_size, a.hidden_size),
        (a.hidden_size, a.intermediate_size),
    )
    tiled = [(spec.ceil_div(n, linear.TILE_ROWS) * linear.TILE_ROWS, linear.padded(k)) for n, k in shapes]
    return Buffers.bytes_needed(a, tokens) + gemm.bytes_needed(tiled, tokens)
