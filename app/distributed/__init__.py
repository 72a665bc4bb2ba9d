"""Compute predictions on a Ray cluster.

This package needs the extra `ray`. It is imported only if `CIFAR100_CLUSTER` is set.
"""
