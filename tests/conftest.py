"""Fixtures of tests of operations and models."""

import pytest
from laboratory import Lab


@pytest.fixture
def lab() -> Lab:
    return Lab()


@pytest.fixture
def make_lab():
    return Lab
