"""README.md and docs/: examples run as printed, commands parse, options, files, tests and links exist."""

import argparse
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

import test as test_program
import train as train_program
from configs.schema import load_config
from datasets.annotations import ADAPTERS, load_annotations
from datasets.images import read_image
from datasets.transforms import AUGMENTATIONS, build_transform
from model.encoders import ENCODERS
from model.objectives import OBJECTIVES
from processor.help import config_help, configuration_page
from processor.resolve import resolve
from processor.trackers import TRACKERS, build_trackers
from solver.schedule import SCHEDULES, lr_at
from tests.helpers.configs import ROOT, TINY
from tests.helpers.tasks import tiny_batch, tiny_task
from tools import ablate, check_dataset, sample_sheet, teacher_readout, trim_runs
from utils.registry import Registry
from utils.version import VERSION

README = (ROOT / "README.md").read_text()
EXTENDING = (ROOT / "docs/extending.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
REGISTRIES: list[Registry[Any]] = [ADAPTERS, AUGMENTATIONS, ENCODERS, OBJECTIVES, SCHEDULES, TRACKERS]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- examples ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def examples(tmp_path: Path) -> Iterator[dict[str, ModuleType]]:
    """The modules that docs/extending.md prints, imported as they stand, and forgotten afterwards.

    A fork may have the same files, so their names are free meanwhile.
    """
    modules: dict[str, ModuleType] = {}
    before = [dict(registry._loaded()) for registry in REGISTRIES]
    names = re.findall(r'^@\w+\.register\("(\w+)"\)', EXTENDING, re.M)
    for registry, components in zip(REGISTRIES, before, strict=True):
        registry._components = {name: one for name, one in components.items() if name not in names}
    for code in re.findall(r"```python\n(.*?)```", EXTENDING, re.S):
        stem = re.match(r"# [\w/]*?(\w+)\.py\n", code)[1]  # type: ignore[index]
        (tmp_path / f"{stem}.py").write_text(code)
        spec = importlib.util.spec_from_file_location(f"example_{stem}", tmp_path / f"{stem}.py")
        assert spec is not None and spec.loader is not None
        modules[stem] = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = modules[stem]
        spec.loader.exec_module(modules[stem])
    yield modules
    for registry, components in zip(REGISTRIES, before, strict=True):
        registry._components = components
    for stem in modules:
        del sys.modules[f"example_{stem}"]


def test_the_example_loss_trains(examples: dict[str, ModuleType]) -> None:
    task = tiny_task("losses.margin.margin=0.3")
    total, terms = task(tiny_batch(task))
    total.backward()
    assert total.isfinite() and float(terms["margin_loss"]) > 0


def test_the_example_encoder_trains(examples: dict[str, ModuleType]) -> None:
    task = tiny_task("model.name=pooled", "model.patch_weight=0.25")
    total, _ = task(tiny_batch(task))
    total.backward()
    assert total.isfinite() and type(task.encoder).__name__ == "PooledEncoder"


def test_the_example_data_set_is_read(examples: dict[str, ModuleType], root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "MyCrops"
    folder.mkdir()
    (folder / "annotations.json").write_bytes((root / "SyntheticPEDES/reid_raw.json").read_bytes())
    found, expected = load_annotations("my_crops", tmp_path), load_annotations("synthetic", root)
    assert [record.captions for record in found.train] == [record.captions for record in expected.train]


def test_the_example_schedule_falls(examples: dict[str, ModuleType]) -> None:
    config = load_config(ROOT / "configs/irra.yaml", ["solver.schedule={name: sqrt, scale: 5}"])
    schedule = resolve(config).solver.schedule
    assert schedule["scale"] == 5 and schedule["warmup_epochs"] == 5
    rates = [lr_at(epoch, 1.0, epochs=60, **schedule) for epoch in (1, 6, 7, 60)]
    assert rates[0] == pytest.approx(0.1) and rates[1] == 1.0 and rates[1] > rates[2] > rates[3] > 0.2


def test_the_example_augmentation_changes_images(examples: dict[str, ModuleType], root: Path) -> None:
    config = load_config(
        ROOT / "configs/irra.yaml", [*TINY, "data.image_aug=[{flip: {probability: 0}}, {color: {strength: 0.4}}]"]
    )
    image = read_image(load_annotations("synthetic", root).train[0].image_path)
    plain, augmented = (build_transform(config.data, train=train)(image) for train in (False, True))
    assert plain.shape == augmented.shape and not torch.equal(plain, augmented)


def test_the_example_tracker_writes(examples: dict[str, ModuleType], tmp_path: Path) -> None:
    (tracker,) = build_trackers([{"csv": {"file": "numbers.csv"}}], tmp_path, 1)
    tracker.log({"epoch": 3, "lr": 0.5, "val": {"R1": 7.0}})
    tracker.close()
    assert (tmp_path / "numbers.csv").read_text() == "3,epoch,3\n3,lr,0.5\n3,val/R1,7.0\n"


def test_the_example_files_are_the_shipped_ones() -> None:
    (config,) = re.findall(r"```yaml\n# (configs/irra\.yaml)\n(.*?)```", README, re.S)
    assert yaml.safe_load(config[1]) == yaml.safe_load((ROOT / config[0]).read_text())
    training = (ROOT / "docs/training.md").read_text()
    (name,) = re.findall(r"`(configs/ablations/\w+\.yaml)`, for instance:", training)
    assert f"```yaml\n{(ROOT / name).read_text()}```" in training


# --- commands, options, files, links ----------------------------------------------------------------------------------


def commands(page: Path) -> Iterator[list[str]]:
    """Words of every command of ours in the page's code blocks and in backticks."""
    text = page.read_text()
    found = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).splitlines()
    found += re.findall(r"`((?:python|torchrun|train\.py|test\.py) [^`]*)`", text)
    for line in found:
        words = shlex.split(line, comments=True)
        if any(word.endswith(("train.py", "test.py")) or word.startswith(("tools.", "benchmarks.")) for word in words):
            yield words


class Parsed(Exception):  # noqa: N818
    """Command line that a parser accepted."""


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Function that parses words with the program that they call, and returns the arguments."""
    original = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *arguments: Any) -> Any:
        raise Parsed(original(self, *arguments))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    programs = {
        "train.py": train_program.main,
        "test.py": test_program.main,
        "tools.ablate": ablate.main,
        "tools.check_dataset": check_dataset.main,
        "tools.sample_sheet": sample_sheet.main,
        "tools.teacher_readout": teacher_readout.main,
        "tools.trim_runs": trim_runs.main,
    }

    def parsed(words: list[str]) -> argparse.Namespace | None:
        place = next(i for i, word in enumerate(words) if word in programs or re.match(r"(tools|benchmarks)\.", word))
        if words[place] not in programs:  # without options in the docs
            assert importlib.util.find_spec(words[place]) and place == len(words) - 1
            return None
        monkeypatch.setattr(sys, "argv", words[place:])
        with pytest.raises(Parsed) as caught:
            programs[words[place]]()  # type: ignore[operator]
        arguments: argparse.Namespace = caught.value.args[0]
        return arguments

    return parsed


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_parse_and_their_options_exist(page: Path, parse: Any) -> None:
    for words in commands(page):
        arguments = parse(words)
        if arguments is None or not hasattr(arguments, "set"):
            continue
        config = getattr(arguments, "config", None)
        if config and Path(config).name != "X":
            chosen = [text for text in arguments.set if not text.startswith("train.trackers")]  # wandb is not installed
            resolve(load_config(ROOT / config, chosen))
        if getattr(arguments, "help_config", None) not in (None, "KEY"):
            assert config_help(arguments.help_config)
        if getattr(arguments, "ablation", None):
            assert (ROOT / arguments.ablation).is_file()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_exist(page: Path) -> None:
    """Files of other repositories are written owner/repo@commit:file."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    folders = "configs|datasets|model|solver|processor|utils|tools|docs|benchmarks|tests"
    for name in re.findall(rf"(?<![\w@/:.-])((?:{folders})/[\w/.-]*\w)", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\| `(\w+\.yaml)` \|", text):
        assert (ROOT / "configs" / name).exists() or name == "config.yaml", name


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


def test_pages_that_the_code_cites_have_the_section() -> None:
    sources = [path for path in ROOT.rglob("*.py") if not {".venv", "tests"} & set(path.relative_to(ROOT).parts)]
    sources += (ROOT / "configs").rglob("*.yaml")
    cited = [
        (path, page, anchor)
        for path in sources
        for page, anchor in re.findall(r"(docs/[\w/]+\.md)(?:#([\w-]+))?", path.read_text())
    ]
    assert len(cited) > 20
    for path, page, anchor in cited:
        assert (ROOT / page).is_file(), f"{path}: {page}"
        assert not anchor or anchor in anchors(ROOT / page), f"{path}: {page}#{anchor}"


# --- single pages -----------------------------------------------------------------------------------------------------


def test_readme_is_short() -> None:
    assert README.count("\n") <= 150


def test_the_listed_losses_exist() -> None:
    (line,) = re.findall(r"^Losses: (.*?)\.", README, re.M)
    assert set(re.findall(r"`(\w+)`", line)) <= set(OBJECTIVES)


def test_the_configuration_page_is_up_to_date() -> None:
    current = (ROOT / "docs/configuration.md").read_text() == configuration_page()
    assert current, "options have changed; run: python -m tools.write_configuration_page"


@pytest.mark.parametrize("method", ["irra", "fmfa", "ivt", "rde", "lcr2s"])
def test_the_options_of_the_method_pages_are_accepted(method: str) -> None:
    text = (ROOT / f"docs/methods/{method}.md").read_text()
    section = text.split("\n## Paper and code\n")[1].split("\n## ")[0]
    found = re.findall(r"`([^`\n]*=[^`\n]*)`", section)
    for overrides in found:
        resolve(load_config(ROOT / f"configs/{method}.yaml", overrides.split()))
    assert len(found) > 5


def test_every_fault_of_the_page_has_its_test() -> None:
    rows = [line for line in (ROOT / "docs/troubleshooting.md").read_text().splitlines() if line.startswith("| ")]
    faults = [row for row in rows if not row.startswith("| fault |")]
    assert len(faults) > 25
    for row in faults:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row.split("|")[3])
        assert named, row
        for file, test in named:
            assert f"def {test}(" in (ROOT / file).read_text(), (file, test)


def test_the_citation_has_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == VERSION and f"## {VERSION}" in (ROOT / "CHANGELOG.md").read_text()
