"""What every test shares: hypothesis draws the same examples each day and asks no clock.

The files that take longest come first, so that two cores end together.
"""

import pytest
from hypothesis import settings

settings.register_profile("same_each_day", deadline=None, derandomize=True)
settings.load_profile("same_each_day")

LONGEST = (
    "test_train",
    "test_every_command",
    "test_bad_input",
    "test_pipeline",
    "test_projected",
    "test_examples",
    "test_discovery",
    "test_fuzz",
    "test_loop",
    "test_feature_reward",
    "test_public",
    "test_study",
    "test_sae_train",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
