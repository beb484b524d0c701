"""Megatron checkpoints as files."""
