"""Inference on a Ray cluster. This package needs the extra `ray`, and is imported only if `CIFAR100_CLUSTER` is set."""
