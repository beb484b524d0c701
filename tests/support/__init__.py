"""What tests share: live ranks, tiny models, routing written as loops."""
