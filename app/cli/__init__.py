"""The console command `cifar100`. `main` collects the commands of the other modules, one module per group.

No module here imports PyTorch at its top, so that help, wrong options and calls to a service are fast.
"""
