"""Tokenizer, base model, LoRA, the embedded default model, and merging."""
