"""The demo: a corpus, a model and its modules from what one machine already has."""
