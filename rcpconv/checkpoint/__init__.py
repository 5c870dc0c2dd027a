"""Reads a LLaMA-family checkpoint: Hugging Face's layout or Meta's, from a folder or the Hub."""

from rcpconv.checkpoint.source import SourceModel, load_source, outline_source
from rcpconv.checkpoint.tensors import TensorStore
from rcpconv.checkpoint.tokenizer import TokenizerFiles

__all__ = ["SourceModel", "TensorStore", "TokenizerFiles", "load_source", "outline_source"]
