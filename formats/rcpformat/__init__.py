"""The `.rcp` file format: specification, codec, reader and writer. Needs numpy alone; formats/SPEC.md is normative."""

from rcpformat.architecture import Architecture, Quantization, TokenizerInfo
from rcpformat.codec import PackedLinear, decode_integers, pack_codes, unpack_codes
from rcpformat.errors import FormatError, NotAnRcpFile, OutputExists, OutputNotWritable, UnreadableFile
from rcpformat.metadata import RcpMetadata
from rcpformat.reader import RcpFile
from rcpformat.writer import WriteReport, write_rcp

__all__ = [
    "Architecture",
    "FormatError",
    "NotAnRcpFile",
    "OutputExists",
    "OutputNotWritable",
    "PackedLinear",
    "Quantization",
    "RcpFile",
    "RcpMetadata",
    "TokenizerInfo",
    "UnreadableFile",
    "WriteReport",
    "decode_integers",
    "pack_codes",
    "unpack_codes",
    "write_rcp",
]
