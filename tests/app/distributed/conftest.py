"""Import Ray before the tests of the cluster, without the deprecation warnings of its own code."""

import warnings
from contextlib import suppress

with warnings.catch_warnings(), suppress(ImportError):
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401
