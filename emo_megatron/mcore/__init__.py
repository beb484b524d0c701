"""EMO inside Megatron-Core. Only this package and emo_megatron.bridge import megatron."""
