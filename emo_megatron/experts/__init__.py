"""Choosing experts: pure data, no model."""
