"""Several processes train one run together. Each computes its part of every batch, and they average their gradients.

    torchrun, or Ray Train -> processes of one group: rank 0 records, evaluates, saves and publishes; the others compute
                                 batch --share--> gradients --mean over the group--> the same step in every process

Input: the environment variables of torchrun, or a process group of `torch.distributed` that exists.
Output: a `ProcessGroup`. That of a process alone has size 1 and communicates with nobody.
"""

import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

Value = TypeVar("Value")

_SIOCGIFADDR = 0x8915  # the ioctl of Linux that reads the IPv4 address of a network interface

TIMEOUT = timedelta(hours=6)
"""Longest time that a process waits for the others, for example while the first one computes features."""


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that train a run, seen from one of them."""

    rank: int = 0
    """Number of this process in the group, counted from 0."""
    size: int = 1
    """Number of processes."""
    local_rank: int = 0
    """Number of this process among those on its machine, counted from 0."""

    @property
    def is_first(self) -> bool:
        """True for the process that records, evaluates, saves and publishes."""
        return self.rank == 0

    def take_share(self, batch: Tensor) -> Tensor:
        """Return the rows of a batch [B, ...] that this process computes. Shares differ by at most one row."""
        return batch.tensor_split(self.size)[self.rank] if self.size > 1 else batch

    def wrap(self, classifier: nn.Module, head: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return a function that computes what `head` does and averages the gradients over the group.

        Args:
            classifier: Module with all parameters and buffers of `head`. Its normalization layers take the running
                statistics of the first process.
            head: Function from inputs to logits.
        """
        if self.size == 1:
            return head
        module: Callable[[Tensor], Tensor] = DistributedDataParallel(_Head(classifier, head))
        return module

    def add_up(self, *values: Tensor) -> None:
        """Replace each value, in place, by its sum over the group."""
        if self.size > 1:
            for value in values:
                distributed.all_reduce(value)

    def broadcast(self, value: Value | None) -> Value:
        """Return the value of the first process in all of them."""
        values = [value]
        if self.size > 1:
            distributed.broadcast_object_list(values)
        return cast(Value, values[0])

    def wait(self) -> None:
        """Wait until every process of the group has called this method."""
        if self.size > 1:
            distributed.barrier()

    @contextmanager
    def first_on_machine(self) -> Iterator[None]:
        """Let the first process of each machine run a block alone, so that the others find the files that it wrote."""
        if self.local_rank:
            self.wait()
        yield
        if not self.local_rank:
            self.wait()


ALONE = ProcessGroup()
"""The group of a process that trains alone."""


class _Head(nn.Module):
    """A function as a module, because `DistributedDataParallel` takes a module with the parameters that it uses."""

    def __init__(self, classifier: nn.Module, head: Callable[[Tensor], Tensor]):
        super().__init__()
        self.classifier = classifier
        self.head = head if head is not classifier else None

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = (self.head or self.classifier)(inputs)
        return logits


def get_process_group() -> ProcessGroup:
    """Return the group that this process has joined, or that of a process alone."""
    if not distributed.is_initialized():
        return ALONE
    return ProcessGroup(distributed.get_rank(), distributed.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


@contextmanager
def join_torchrun() -> Iterator[ProcessGroup]:
    """Join the group of processes that `torchrun` has started. A process that it has not started stays alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))  # sends nothing
        use_interface(probe.getsockname()[0])
    uses_gpu = torch.cuda.is_available()
    if uses_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if uses_gpu else "gloo", timeout=TIMEOUT)
    try:
        yield get_process_group()
    finally:
        distributed.destroy_process_group()


def use_interface(address: str) -> None:
    """Let gloo use the network interface with an IPv4 address, unless GLOO_SOCKET_IFNAME names another one.

    By default, gloo uses the interface of the machine's name, which is often the loopback interface. Processes on other
    machines cannot reach that one.
    """
    for _, name in socket.if_nameindex():
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            request = struct.pack("256s", name.encode()[:15])
            if socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24]) == address:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
                return
