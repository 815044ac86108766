"""How fast this machine does what `benchmarks.work` counts: measured, never looked up.

products  operations per second of torch's product of square matrices, by dtype
eigh      seconds of the float64 eigendecomposition of each size, by torch or by NumPy: per matrix,
          with one on every thread, or one after another on all threads, whichever is the least
pass      seconds of one forward and backward pass over the training examples in their batches, for
          inputs and output gradients of the layers, without the gradient of any parameter
"""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from benchmarks.problems import forward_backward

# Width of the products whose rate is taken, and how many of them.
WIDTH, PRODUCTS = 1536, 3


def product_rate(dtype, width=WIDTH):
    """Return operations per second of the fastest of a few products of square matrices."""
    a, b = torch.randn(2, width, width, dtype=getattr(torch, dtype))
    out = torch.empty_like(a)
    seconds = []
    for _ in range(PRODUCTS):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        seconds.append(time.perf_counter() - start)
    return 2 * width**3 / min(seconds)


def eigh_seconds(size):
    """Return the seconds that one of many eigendecompositions of a size takes."""
    matrix = torch.randn(size, size, dtype=torch.float64)
    matrix = matrix @ matrix.T / size
    return min(
        _eigh_seconds(torch.linalg.eigh, matrix), _eigh_seconds(np.linalg.eigh, matrix.numpy())
    )


def _eigh_seconds(eigh, matrix):
    """Return the seconds per matrix, on all threads each or one on every thread."""
    threads = torch.get_num_threads()
    start = time.perf_counter()
    with threadpool_limits(threads, "blas"):
        eigh(matrix)
    seconds = time.perf_counter() - start
    try:
        with (
            threadpool_limits(1, "blas"),
            ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            start = time.perf_counter()
            list(pool.map(eigh, [matrix] * threads))
            aside = (time.perf_counter() - start) / threads
    finally:
        torch.set_num_threads(threads)
    return min(seconds, aside)


def pass_seconds(problem):
    """Return the seconds of a forward and backward pass over all batches."""
    start = time.perf_counter()
    for x, y in problem.loader:
        forward_backward(problem, x, y)
    return time.perf_counter() - start


def parts(problem, works):
    """Measure the machine once for the work of some stages.

    Returns
    -------
    dict of str to dict
        By stage: seconds of "products", "eigh" and "pass".
    """
    rates = {dtype: product_rate(dtype) for work in works.values() for dtype in work.flops}
    sizes = {size for work in works.values() for size in work.eigh}
    eigh = {size: eigh_seconds(size) for size in sizes}
    one_pass = pass_seconds(problem) if any(work.passes for work in works.values()) else 0.0
    return {
        stage: {
            "products": sum(flops / rates[dtype] for dtype, flops in work.flops.items()),
            "eigh": sum(count * eigh[size] for size, count in work.eigh.items()),
            "pass": work.passes * one_pass,
        }
        for stage, work in works.items()
    }
