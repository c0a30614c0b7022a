from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """megatron-core's datasets; tests that compare with them are skipped where it is not installed."""
    pytest.importorskip("megatron.core")
    from tests.data import megatron_oracle
    return megatron_oracle
