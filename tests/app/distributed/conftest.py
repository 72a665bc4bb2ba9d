"""Import Ray before the tests of the cluster, without the deprecation warnings of its own code."""

import warnings
from contextlib import suppress

with warnings.catch_warnings(), suppress(ImportError):
    warnings.simplefilter("ignore")
    import app.distributed.cluster  # noqa: F401
