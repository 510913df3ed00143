"""Tokens: tokenizers, token files, generation."""
