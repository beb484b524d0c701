"""Life after training: choosing the experts a task needs. No Megatron import."""
