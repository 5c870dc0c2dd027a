"""Shapes of known models, as architectures. No weights."""

import dataclasses

from rcpformat import Architecture

LLAMA_2_7B = Architecture(
    model_type="llama",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    rms_norm_eps=1e-5,
    max_position_embeddings=4096,
)
TINYLLAMA = dataclasses.replace(
    LLAMA_2_7B,
    hidden_size=2048,
    intermediate_size=5632,
    num_layers=22,
    num_kv_heads=4,
    head_dim=64,
    max_position_embeddings=2048,
)
LLAMA_2_13B = dataclasses.replace(
    LLAMA_2_7B, hidden_size=5120, intermediate_size=13824, num_layers=40, num_heads=40, num_kv_heads=40
)
LLAMA_2_70B = dataclasses.replace(
    LLAMA_2_7B, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64, num_kv_heads=8
)
LLAMA_3_8B = dataclasses.replace(
    LLAMA_2_7B, vocab_size=128256, intermediate_size=14336, num_kv_heads=8, max_position_embeddings=8192
)
LLAMA_31_405B = dataclasses.replace(
    LLAMA_3_8B, hidden_size=16384, intermediate_size=53248, num_layers=126, num_heads=128, num_kv_heads=8
)
LLAMA_32_1B = dataclasses.replace(
    LLAMA_3_8B,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=16,
    head_dim=64,
    max_position_embeddings=131072,
)
LLAMA_32_3B = dataclasses.replace(LLAMA_32_1B, hidden_size=3072, num_layers=28, num_heads=24, head_dim=128)
DEMO = dataclasses.replace(
    LLAMA_2_7B,
    vocab_size=2048,
    hidden_size=192,
    intermediate_size=480,
    num_layers=4,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    max_position_embeddings=1024,
)
"""The bundled model's, but for its one table."""
WIKI_22M = dataclasses.replace(
    DEMO,
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1408,
    num_layers=6,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    max_position_embeddings=2048,
)
"""22 million parameters; the real one, on which recipes are measured, has one table, too."""
