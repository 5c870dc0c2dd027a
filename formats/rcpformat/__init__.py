"""The `.rcp` file format: specification, codec, reader and writer. Needs numpy (and safetensors to cross-check)."""
