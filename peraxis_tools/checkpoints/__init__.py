"""Checkpoints on disk: their tensors and small files, their configuration and tokenizer, and names of tensors."""
