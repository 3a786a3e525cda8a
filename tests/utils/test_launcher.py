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
TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


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
        SRUN | TORCHRUN,  # srun torchrun
        {"WORLD_SIZE": "1", "RANK": "0", "MASTER_PORT": "tcp://10.0.0.1:80"},  # one process in a container
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


@pytest.mark.parametrize(
    "environment, message",
    [
        (
            {"WORLD_SIZE": "2"},
            "^RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: must be set .*got WORLD_SIZE=2 alone; start",
        ),
        ({"RANK": "1"}, "^WORLD_SIZE, LOCAL_RANK, .*got RANK=1 alone; start with torchrun, or unset"),
        *[
            ({key: value for key, value in TORCHRUN.items() if key != name}, f"^{name}: must be set")
            for name in TORCHRUN
        ],
        *[(TORCHRUN | {name: "x"}, f"^{name}: must be") for name in TORCHRUN if name != "MASTER_ADDR"],
        *[({"WORLD_SIZE": value}, "^WORLD_SIZE: must be a number") for value in ("", "-1", "2.0", "²", "9" * 5000)],
        (TORCHRUN | {"RANK": "2"}, "^RANK: must be below WORLD_SIZE .2., got 2"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "^MASTER_PORT: must be from 1 to 65535, got '70000'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "^LOCAL_RANK, MASTER_ADDR, MASTER_PORT: must be set"),
    ],
)
def test_an_incomplete_layout_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adopt_launcher(dict(environment))


@pytest.mark.parametrize("name, value", [("WORLD_SIZE", "2"), ("WORLD_SIZE", "x"), ("RANK", "x")])
def test_the_programs_refuse_an_incomplete_layout_in_one_line(name: str, value: str, monkeypatch, capsys) -> None:
    monkeypatch.setenv(name, value)
    for main in (train_program.main, test_program.main):
        status, _, message = run_program(main, monkeypatch, capsys, "--config", ROOT / "configs/irra.yaml")
        assert status == 1 and message.startswith("error: ") and len(message.splitlines()) == 1


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
