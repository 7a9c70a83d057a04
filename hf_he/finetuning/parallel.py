"""Data parallel training: server processes that share the micro-batches of a step and add their encrypted gradients.

`torchrun --nproc_per_node 2 -m hf_he serve --finetune ...` (or `accelerate launch`) starts one worker per rank; gloo carries the bytes on a CPU, nccl where
every rank has a GPU. Ciphertexts travel as the serialised bytes that also cross the wire to a client.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from torch import distributed

from hf_he.backends import Ciphertext, HEBackend
from hf_he.errors import CheckpointError, HEError, TrainingError

TIMEOUT_SECONDS = 1800.0


class Workers:
    """The ranks of one training server; a single process is a group of one, in which nothing is sent."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def from_environment(cls, timeout: float = TIMEOUT_SECONDS) -> Workers:
        """The group that torchrun or `accelerate launch` describes in the environment; a group of one outside of them."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if not distributed.is_initialized():
            local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
            with_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= local and distributed.is_nccl_available()
            if with_gpus:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            try:
                distributed.init_process_group("nccl" if with_gpus else "gloo", timeout=timedelta(seconds=timeout))
            except (RuntimeError, ValueError) as error:
                raise HEError(f"the server processes could not find each other ({error}): start them with torchrun or accelerate launch") from None
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def first(self) -> bool:
        return self.rank == 0

    def all_gather(self, data: bytes) -> list[bytes]:
        """The bytes of every rank, in rank order. Raises CheckpointError when a rank does not answer in time."""
        if self.size == 1:
            return [data]
        device = torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else torch.device("cpu")
        try:
            sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(self.size)]
            distributed.all_gather(sizes, torch.tensor([len(data)], dtype=torch.int64, device=device))
            longest = max(int(size) for size in sizes)
            own = torch.zeros(longest, dtype=torch.uint8, device=device)
            own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device) if data else 0
            parts = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in range(self.size)]
            distributed.all_gather(parts, own)
        except RuntimeError as error:
            reason = str(error).splitlines()[0][:200]
            raise CheckpointError(f"rank {self.rank} lost the other server processes ({reason}): start them again and resume") from None
        return [part[: int(size)].cpu().numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]

    def broadcast(self, data: bytes) -> bytes:
        """The first rank's bytes, on every rank."""
        return self.all_gather(data if self.first else b"")[0]

    def all_reduce(self, backend: HEBackend, part: Ciphertext | None) -> Ciphertext:
        """The sum of every rank's ciphertexts, added in rank order, so that all ranks hold the same bits.

        A rank that failed passes None, which raises TrainingError on the others instead of letting them wait.
        """
        if self.size == 1 and part is not None:
            return part
        gathered = self.all_gather(b"" if part is None else backend.serialize(part))
        if not all(gathered):
            raise TrainingError(f"rank {gathered.index(b'')} could not compute its share of this step: see its error, then resume")
        total = None
        for data in gathered:
            term = backend.deserialize(data, "ciphertext")
            total = term if total is None else backend.add(total, term)
        return total


def share(items: int, rank: int, size: int) -> range:
    """The consecutive part of `items` micro-batches that rank `rank` of `size` computes; parts differ by at most one."""
    return range(items * rank // size, items * (rank + 1) // size)
