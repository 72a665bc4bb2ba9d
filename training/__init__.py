"""This package trains, evaluates and exports CIFAR-100 classifiers. It never imports `app`."""
