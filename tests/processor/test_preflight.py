"""processor/preflight.py: needs of a run, without data or weights."""

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train as train_program
from processor import preflight
from processor.preflight import largest_sizes, report, with_checkpointing
from tests.helpers.configs import CONFIGS, config_of
from tests.helpers.programs import run_program


@pytest.fixture(autouse=True)
def one_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "MOST_PAIRS", 1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 1000),
    st.lists(st.tuples(st.integers(-500, 500), st.integers(1, 50)), min_size=1, max_size=3),
    st.lists(st.integers(1, 20_000), min_size=1, max_size=4),
)
def test_the_largest_size_is_within_the_budget_and_not_far_below(
    constant: int, lines: list[tuple[int, int]], budgets: list[int]
) -> None:
    def peak(size: int) -> int:
        return max(constant, *(start + slope * size for start, slope in lines))

    most = 300
    found = largest_sizes(peak, sorted(budgets), most)
    for size, budget in zip(found, sorted(budgets), strict=True):
        best = max((size for size in range(1, most + 1) if peak(size) <= budget), default=0)
        assert size <= best and (size > 0) == (best > 0)
        if len(lines) == 1 and constant == 0 and lines[0][0] >= 0:
            assert size >= best - 1


def test_the_report_says_parameters_memory_batches_epochs_and_captions(root: Path) -> None:
    text = report(config_of("irra", root, "data.text_length=8"))
    assert re.search(r"parameters: 0\.\d+ M, trained: 0\.\d+ M", text)
    assert "a step of 8 pairs: 0.0" in text and "TFLOP, peak memory in GiB:" in text
    for way in ("one pass", "checkpointing", *(f"train.accumulate={number}" for number in (2, 4, 8))):
        assert re.search(rf"\| +{way} +\| +\d+", text), way
    assert "epoch: 4 steps" in text and "40% of the peak" in text and re.search(r"A100 +\| +20 ", text)  # fp32: 19.5
    assert re.search(r"data.text_length: \d+ of 32 training captions are longer than 8 tokens and are cut", text)


def test_without_data_the_published_sizes_count(root: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(preflight, "_largest_batches", lambda *_: "")
    config = config_of("baseline", root, "data.dataset=icfg_pedes", f"data.root={tmp_path}", "data.batch_size=64")
    text = report(config)
    assert "epoch: 507 steps (size of icfg_pedes as published); " in text  # 200 identities are held out
    assert "no such data set folder" in text and not list(tmp_path.iterdir())
    assert "(size of synthetic as published)" in report(config_of("baseline", root, f"data.root={tmp_path}"))


def test_all_towers_that_can_recompute(root: Path) -> None:
    model = with_checkpointing(config_of("irra", root)).model
    assert model["image"]["checkpointing"] and model["text"]["checkpointing"]
    assert "checkpointing" not in with_checkpointing(config_of("ivt", root)).model["text"]


@pytest.mark.parametrize(
    "mistake",
    ["model.embed_dim=96", "losses.mlm.depth=-1", "model.image.stride=40", "solver.rules=[{match: '('}]"],
)
def test_a_config_that_cannot_be_built_is_the_error_of_training(
    mistake: str, tiny: list[str], monkeypatch, capsys
) -> None:
    errors = []
    for more in ([], ["--preflight"]):
        arguments = ["--config", CONFIGS / "irra.yaml", *more, "--set", *tiny, mistake]
        status, _, error = run_program(train_program.main, monkeypatch, capsys, *arguments)
        assert status == 1
        errors.append(error.splitlines()[-1])
    assert errors[0] == errors[1] and errors[0].startswith("error: ")


def test_the_command_line_prints_the_report(tiny: list[str], monkeypatch, capsys) -> None:
    monkeypatch.setattr(preflight, "_largest_batches", lambda *_: "")
    arguments = ["--config", CONFIGS / "baseline.yaml", "--preflight", "--set", *tiny]
    status, out, error = run_program(train_program.main, monkeypatch, capsys, *arguments)
    assert status == 0 and "largest batch" in out and not error
