"""Hugging Face checkpoints of EMO models: name maps, folders, tokenizers, model cards. No Megatron import."""
