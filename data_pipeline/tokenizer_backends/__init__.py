"""One tokenizer library or vocabulary per module."""
