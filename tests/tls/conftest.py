"""One authority for all tests that only use it."""

import pytest

from tests.support.certificates import Pki


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("certificates") / "pki")
