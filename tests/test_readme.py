"""README keeps its word: its loss can be added as it stands, its files and configs exist, its commands parse."""

import importlib.util
import re
import sys
from pathlib import Path

import yaml

from configs.schema import load_config
from model.build import resolve
from model.objectives import OBJECTIVES
from tests.conftest import ROOT
from tests.test_task import tiny_batch, tiny_task

README = (ROOT / "README.md").read_text()


def test_the_example_loss_trains_as_printed(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(code.splitlines()) <= 45
    (tmp_path / "margin.py").write_text(code)
    spec = importlib.util.spec_from_file_location("margin_of_readme", tmp_path / "margin.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        task = tiny_task("losses.margin.margin=0.3")
        total, terms = task(tiny_batch(task))
        total.backward()
        assert total.isfinite() and float(terms["margin_loss"]) > 0
    finally:
        OBJECTIVES._parts.pop("margin", None)
        del sys.modules[spec.name]


def test_the_example_files_are_the_shipped_ones() -> None:
    (config,) = re.findall(r"```yaml\n# (configs/irra\.yaml)\n(.*?)```", README, re.S)
    assert yaml.safe_load(config[1]) == yaml.safe_load((ROOT / config[0]).read_text())
    (name,) = re.findall(r"`(benchmarks/\w+\.yaml)`, for instance:", README)
    assert f"```yaml\n{(ROOT / name).read_text()}```" in README


def test_named_files_exist_and_overrides_are_accepted() -> None:
    for name in re.findall(r"`((?:configs|datasets|model|processor|utils|tools|docs|benchmarks)/[\w/.]+)`", README):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\| `(\w+\.yaml)` \|", README):
        assert (ROOT / "configs" / name).exists() or name == "config.yaml", name
    for config, overrides in re.findall(r"train\.py --config (configs/\w+\.yaml) --set ([^\n`]+)", README):
        resolve(load_config(ROOT / config, overrides.split()))
    for override in re.findall(r"`--set (losses\.\S+=\S+)`", README):
        if "margin" not in override:
            resolve(load_config(ROOT / "configs/irra.yaml", [override]))


def test_the_listed_losses_are_all_there_are() -> None:
    (line,) = re.findall(r"^Losses: (.*?)\.", README, re.M)
    assert set(re.findall(r"`(\w+)`", line)) == set(OBJECTIVES)


def test_the_options_of_the_variants_page_are_accepted() -> None:
    checked = 0
    for section in (ROOT / "docs/variants.md").read_text().split("\n## ")[1:]:
        title = section.split("\n")[0].lower()
        config = {"ivt": "ivt", "rde": "rde", "lcr2s-style": "lcr2s"}.get(title, "fmfa")
        for overrides in re.findall(r"`([^`\n]*=[^`\n]*)`", section):
            resolve(load_config(ROOT / f"configs/{config}.yaml", overrides.split()))
            checked += 1
    assert checked > 40


def test_every_fault_of_the_page_has_its_test() -> None:
    rows = [line for line in (ROOT / "docs/faults.md").read_text().splitlines() if line.startswith("| ")]
    faults = [row for row in rows if not row.startswith("| fault |")]
    assert len(faults) > 25
    for row in faults:
        named = re.findall(r"`(tests/\w+\.py)::(\w+)`", row.split("|")[3])
        assert named, row
        for file, test in named:
            assert f"def {test}(" in (ROOT / file).read_text(), (file, test)
