"""This worker's place among the learner workers, and everything in which it meets the others.

Gradients are summed, clipped and measured here and nowhere else, because a sharded model changes just that. Under
FSDP2 a parameter and its gradient are DTensors, of which each rank holds a part:

- The backward pass itself sums gradients over ranks, so `sum_gradients` has nothing left to do. FSDP2 must be told not
  to divide by the number of ranks, since losses here are divided by the tokens of all ranks already. On gloo that takes
  `set_gradient_divide_factor(1.0)` and `set_force_sum_reduction_for_comms(True)`.
- `clip_grad_norm_` returns a DTensor, and `float` of it is this rank's part: it needs `norm.full_tensor()`.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


class Ranks:
    """This worker's number among the learner workers, and what they do together.

    Every method but `first` is called by all ranks, equally often and in the same order; otherwise they would wait for
    each other forever. A process without a process group is a world of one rank.
    """

    def __init__(self, threads: int, gpu: bool = False) -> None:
        """Find the process group, if there is one, and choose this rank's device.

        Args:
            threads: of torch, on a CPU.
            gpu: puts this rank on the GPU that its worker was given.
        """
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        if gpu:
            self.device = torch.device("cuda", torch.cuda.current_device())  # Ray Train has set it
        else:
            self.device = torch.device("cpu")
            torch.set_num_threads(threads)

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and speaks to the coordinator."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over all ranks, for scalars and short vectors. The argument is left as it is."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def max(self, value: float) -> float:
        """The largest of all ranks' values."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return float(tensor)

    def peak_memory_mib(self) -> float:
        """Peak memory in MiB, the largest of all ranks.

        On a GPU it is what torch has allocated since the last call, on a CPU the resident set of the whole process
        since its start.
        """
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**20
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            # Linux counts in KiB, macOS in bytes.
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        return self.max(peak)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its sum over all ranks; once for each optimiser step."""
        if self.world == 1:
            return
        parameters = list(parameters)
        for parameter in parameters:
            if parameter.grad is None:  # this rank had no rows, or none that reach the parameter
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        # One collective for all: hundreds of small ones would each pay the latency of the network.
        flat = torch.nn.utils.parameters_to_vector(gradients)
        dist.all_reduce(flat)
        torch.nn.utils.vector_to_parameters(flat, gradients)

    def clip_gradients(self, parameters: Iterable[nn.Parameter], max_norm: float) -> float:
        """Add every rank's gradients, then scale them to a norm of at most `max_norm`.

        Returns:
            Their norm before scaling, the same on every rank; NaN or infinite if one of them is.
        """
        parameters = list(parameters)
        self.sum_gradients(parameters)
        return float(nn.utils.clip_grad_norm_(parameters, max_norm))

    def gather(self, value: T) -> list[T]:
        """Every rank's value (any picklable object), on every rank, in the order of the ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value (any picklable object) on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]
