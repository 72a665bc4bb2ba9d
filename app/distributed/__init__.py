"""Compute predictions on a Ray cluster.

This package needs the extra `ray`. It is imported only if `CIFAR100_CLUSTER` is set.
"""

from training import ray_cluster  # noqa: F401  sets the variables that Ray reads when it is imported
