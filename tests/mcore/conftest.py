"""Answers of ranks that several cases of a test compare with."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def once(ranks):
    """Runs `function(**arguments)` on so many ranks; the same call gives the same answers, computed once a module."""
    answers = {}

    def run(world_size, function, **arguments):
        key = world_size, function, repr(arguments)
        if key not in answers:
            answers[key] = ranks(world_size).run(function, **arguments)
        return answers[key]

    return run
