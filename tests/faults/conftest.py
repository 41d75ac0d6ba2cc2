import pytest

from tests.faults.harness import References


@pytest.fixture(scope="session")
def references(tmp_path_factory):
    return References(tmp_path_factory.mktemp("unguarded"))
