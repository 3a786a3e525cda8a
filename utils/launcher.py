"""Process layout from the launcher: torchrun's variables, or those that srun sets in their place."""

import os
import re
from collections.abc import Mapping, MutableMapping

from utils.errors import ConfigError

FIRST_PORT, NUM_PORTS = 20_000, 20_000  # of the rendezvous of a SLURM job, chosen by its number
NUMBER = re.compile("[0-9]{1,9}")
OF_TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
COUNTS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
OF_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def adopt_launcher(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set torchrun's variables from those of srun, if srun started several processes without torchrun.

    Raises:
        ConfigError: a launcher that is not supported started several processes, which would all train the same, or
            torchrun's variables are incomplete.
    """
    _adopt(environment)
    _check_torchrun(environment)


def _adopt(environment: MutableMapping[str, str]) -> None:
    if "RANK" in environment:
        return
    if (tasks := number_in(environment, "SLURM_STEP_NUM_TASKS")) > 1:
        try:
            environment.update(_of_slurm(environment, tasks))
        except (KeyError, ValueError, IndexError) as error:
            raise ConfigError(
                f"srun: started {tasks} processes, but SLURM's variables do not give their layout ({error!r}); use "
                "srun --ntasks-per-node=1 with torchrun"
            ) from None
        return
    for name in OF_MPI:
        if (tasks := number_in(environment, name)) > 1:
            raise ConfigError(
                f"{name}: started {tasks} processes by mpirun, which would all train the same; use torchrun "
                f"--nproc_per_node={tasks}, or srun"
            )


def one_process(program: str) -> None:
    """Raise `ConfigError` if a launcher started several processes of a program that runs in one."""
    _adopt(os.environ)
    if (processes := number_in(os.environ, "WORLD_SIZE")) > 1:
        raise ConfigError(f"{program}: runs in one process, got {processes}; start it without torchrun or srun")
    _check_torchrun(os.environ)


def _check_torchrun(environment: MutableMapping[str, str]) -> None:
    """Raise `ConfigError` if torchrun's variables are incomplete or contradict each other."""
    remedy = "start with torchrun, or unset WORLD_SIZE and RANK for one process"
    for name in COUNTS:
        if name in environment and not NUMBER.fullmatch(environment[name]):
            raise ConfigError(f"{name}: must be a number as torchrun sets it, got {environment[name][:80]!r}; {remedy}")
    processes, rank = (number_in(environment, name) for name in ("WORLD_SIZE", "RANK"))
    if processes <= 1 and rank == 0:
        return
    if missing := [name for name in OF_TORCHRUN if not environment.get(name)]:
        given = ", ".join(f"{name}={environment[name]}" for name in ("WORLD_SIZE", "RANK") if name in environment)
        raise ConfigError(f"{', '.join(missing)}: must be set for several processes, got {given} alone; {remedy}")
    if not 0 < number_in(environment, "MASTER_PORT") < 65_536:
        raise ConfigError(f"MASTER_PORT: must be from 1 to 65535, got {environment['MASTER_PORT'][:80]!r}; {remedy}")
    if rank >= processes:
        raise ConfigError(f"RANK: must be below WORLD_SIZE ({processes}), got {rank}; {remedy}")


def _of_slurm(environment: MutableMapping[str, str], tasks: int) -> dict[str, str]:
    node = int(environment["SLURM_NODEID"])
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_NODELIST"]
    port = FIRST_PORT + int(environment["SLURM_JOB_ID"]) % NUM_PORTS
    return {
        "RANK": str(int(environment["SLURM_PROCID"])),
        "LOCAL_RANK": str(int(environment["SLURM_LOCALID"])),
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[node]),
        "MASTER_ADDR": environment.get("MASTER_ADDR", first_host(nodes)),
        "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
    }


def tasks_per_node(text: str) -> list[int]:
    """Processes on each node from SLURM's notation, such as `2(x3),1` for 2, 2, 2, 1."""
    counts: list[int] = []
    for group in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", group)
        if match is None:
            raise ValueError(text)
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(nodes: str) -> str:
    """First host of SLURM's notation, such as `gpu07` of `gpu[07-09,12],login1`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,]*)", nodes)
    if match is None:
        raise ValueError(nodes)
    return "".join(group or "" for group in match.groups())


def number_in(environment: Mapping[str, str], name: str) -> int:
    """The number in an environment variable; 0 for one that is not set or no number."""
    value = environment.get(name, "")
    return int(value) if NUMBER.fullmatch(value) else 0


def env_rank() -> int:
    """Number of this process as the environment gives it, which is known before the processes have met."""
    return number_in(os.environ, "RANK")
