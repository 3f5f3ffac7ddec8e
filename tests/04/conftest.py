"""Fixtures for the tests of 04_rabbitmq_messaging.py.

`broker` runs a test twice, by the same calls: on RabbitMQ, and on the broker in memory, whose clock
is moved by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
from brokers import UnderTest, app, in_memory


@pytest.fixture(scope="session")
def script() -> ModuleType:
    return app


@pytest.fixture
def rabbitmq(rabbitmq_url: str, rabbitmq_prefix: str) -> Iterator[UnderTest]:
    under_test = UnderTest(app.RabbitMQ(rabbitmq_url), rabbitmq_prefix)
    with under_test.at_end:
        yield under_test


@pytest.fixture(params=["memory", "rabbitmq"])
def broker(request: pytest.FixtureRequest) -> UnderTest:
    if request.param == "memory":
        return in_memory()
    rabbitmq: UnderTest = request.getfixturevalue("rabbitmq")
    return rabbitmq


@pytest.fixture
def both(rabbitmq: UnderTest) -> list[UnderTest]:
    """RabbitMQ first: it is the oracle."""
    return [rabbitmq, in_memory(rabbitmq.prefix)]
