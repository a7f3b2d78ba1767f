"""Encoders, tokenizers, positions, attention and decoders: torch and timm only."""
