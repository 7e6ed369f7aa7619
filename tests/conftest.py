"""What every test shares: hypothesis draws the same examples each day and asks no clock."""

from hypothesis import settings

settings.register_profile("same_each_day", deadline=None, derandomize=True)
settings.load_profile("same_each_day")
