from collections.abc import AsyncIterator

import pytest
from doubles.gateway import Service, running_gateway


@pytest.fixture(scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    """One gateway with the default settings for the tests of a module."""
    async with running_gateway(tmp_path_factory.mktemp("gateway")) as service:
        await service.ready()
        yield service
