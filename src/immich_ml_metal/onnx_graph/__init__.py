"""A network as nodes and constants: read from a file, rewritten alike for every engine, written."""
