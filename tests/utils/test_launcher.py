"""Process layout from SLURM's variables, and the refusal of launchers that would train the same several times."""

import pytest

import test as test_program
import train as train_program
from tests.helpers.configs import ROOT
from tests.helpers.programs import run_program
from utils.errors import ConfigError
from utils.launcher import adopt_launcher, first_host, tasks_per_node

SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "4,2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


def test_the_layout_of_srun_becomes_that_of_torchrun() -> None:
    environment = dict(SRUN)
    adopt_launcher(environment)
    assert {name: value for name, value in environment.items() if name not in SRUN} == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "6",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "23456",
    }


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"},  # a batch script: python without srun
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun --pty bash
        SRUN | {"RANK": "0", "WORLD_SIZE": "2"},  # srun torchrun
        {"OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_other_starts_are_left_alone(environment: dict[str, str]) -> None:
    before = dict(environment)
    adopt_launcher(environment)
    assert environment == before


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, r"4 processes by mpirun.*torchrun --nproc_per_node=4"),
        ({"PMI_SIZE": "2"}, "2 processes by mpirun"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, r"srun: started 2 processes, but.*SLURM_NODEID"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "x"}, "srun: started 6 processes, but"),
    ],
)
def test_what_would_train_the_same_several_times_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adopt_launcher(dict(environment))


def test_the_programs_ask(monkeypatch, capsys) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    arguments = ["--config", ROOT / "configs/irra.yaml"]
    assert "by mpirun" in run_program(train_program.main, monkeypatch, capsys, *arguments)[2]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "test.py: runs in one process" in run_program(test_program.main, monkeypatch, capsys, *arguments)[2]


@pytest.mark.parametrize(
    "nodes, host",
    [("gpu07", "gpu07"), ("a1,b2", "a1"), ("gpu[07-09,12],x", "gpu07"), ("n[3]", "n3"), ("r[1-2]-ib,x", "r1-ib")],
)
def test_the_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_tasks_per_node() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
