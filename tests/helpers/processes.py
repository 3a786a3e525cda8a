"""Functions run in several processes that train together."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from utils.distributed import start_processes

# The fork server imports these modules once; its children start with them loaded.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.helpers.processes", "tests.helpers.steps", "tests.helpers.runs"])


def _enter(function: Callable[..., Any], number: int, world: int, port: int, queue: Any, arguments: tuple) -> None:
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(world), "LOCAL_RANK": str(number)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        start_processes()
        result = function(*arguments)
        queue.put((number, True, result))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        queue.put((number, False, traceback.format_exc()))
        queue.close()
        queue.join_thread()  # wait until the queue is flushed
        os._exit(1)


def together(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run `function` in `world` processes and return its results by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=_enter, args=(function, number, world, port, queue, arguments))
        for number in range(world)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in processes:
            number, fine, result = queue.get(timeout=120)
            assert fine, f"process {number}: {result}"
            results[number] = result
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    return [results[number] for number in range(world)]
