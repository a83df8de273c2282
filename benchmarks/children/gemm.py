"""The peak of matrix multiplication: sgemm of torch, one thread in each of as many processes."""

from __future__ import annotations

import multiprocessing
import os
import time

from clock import argument, finish


def multiply(barrier: object, seconds: float, size: int, queue: object) -> None:
    """Multiply for a while; put GF/s of the best tenth of a second and of the whole."""
    import torch

    torch.set_num_threads(1)
    a, b, out = (torch.rand(size, size) for _ in range(3))
    torch.mm(a, b, out=out)
    barrier.wait()
    began = time.perf_counter()
    walls = []
    while time.perf_counter() - began < seconds:
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        walls.append(time.perf_counter() - started)
    queue.put(2e-9 * size**3 * len(walls) / sum(walls))


def main() -> None:
    asked, cores = argument(), os.cpu_count() or 1
    found = {}
    for count in sorted({1, cores}):
        context = multiprocessing.get_context("spawn")
        barrier, queue = context.Barrier(count), context.Queue()
        arguments = (barrier, asked["seconds"], asked["size"], queue)
        workers = [context.Process(target=multiply, args=arguments) for _ in range(count)]
        for worker in workers:
            worker.start()
        found[count] = sum(queue.get() for _ in workers)
        for worker in workers:
            worker.join()
    finish({"gflops": found[cores], "gflops_one_core": found[1], "processes": cores})


if __name__ == "__main__":
    main()
