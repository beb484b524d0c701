"""Run a model and watch its experts."""
