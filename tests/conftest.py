"""Hypothesis draws the same examples in every run, so that a test turns red for what was changed and not for the dice.

HYPOTHESIS_PROFILE=dice draws others each time, as one does to look for faults.
"""

import os

from hypothesis import settings

settings.register_profile("same", derandomize=True)
settings.register_profile("dice", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
