"""Run a model and measure what its experts do."""
