from collections.abc import Iterator
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """megatron-core's datasets; tests that compare with them are skipped where it is not installed."""
    pytest.importorskip("megatron.core")
    from tests.data import megatron_oracle
    return megatron_oracle


@pytest.fixture
def bert_oracle() -> Iterator[ModuleType]:
    """megatron-core's BERT dataset, likewise."""
    pytest.importorskip("megatron.core")
    from tests.data import bert_oracle
    with bert_oracle.Alone():
        yield bert_oracle
