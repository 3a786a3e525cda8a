"""benchmarks/steps.py: a row for the authors' code and for each precision, on the same batch."""

from pathlib import Path

import pytest

from benchmarks import steps
from benchmarks.common.authors import imported_from
from tests.helpers.configs import tiny_config
from utils.config import to_yaml
from utils.errors import ConfigError

MODEL = """
import torch
from model.head import Head

def build_model(options, num_classes):
    assert options.loss_names == "sdm+mlm+id"
    return Head()
"""
HEAD = """
import torch
class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1024, 1)
    def forward(self, batch):
        total = self.layer(batch["images"].flatten(1)[:, :1024]).half().mean()  # half: must not reach a CPU
        return {"sdm_loss": total, "mlm_acc": total}
"""
SOLVER = """
import torch
def build_optimizer(options, model):
    return torch.optim.SGD(model.parameters(), lr=options.lr)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> str:
    """Code with the entry points of IRRA's repository, whose packages lack `__init__.py`, like there."""
    for name, text in (
        ("model/build", MODEL),
        ("model/head", HEAD),
        ("model/clip_model", ""),
        ("solver/build", SOLVER),
    ):
        (tmp_path / f"irra/{name}.py").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"irra/{name}.py").write_text(text)
    return str(tmp_path / "irra")


def test_a_table_has_a_row_for_the_authors_and_for_each_precision(
    root: Path, tmp_path: Path, checkout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "PRODUCT", (8, 8, 8))
    (tmp_path / "irra.yaml").write_text(to_yaml(tiny_config("irra", root)))
    ways = [["train.precision=fp32"], ["train.precision=bf16"]]
    lines = steps.table(str(tmp_path / "irra.yaml"), ways, 4, 1, checkout).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:7]]
    assert [row[0] for row in rows] == ["authors", "train.precision=fp32", "train.precision=bf16"]
    assert rows[0][3] == "1.00" and float(rows[1][4]) >= 0 and "machine:" in lines[-1]


def test_our_modules_are_back_after_an_import_of_theirs(checkout: str) -> None:
    import model.build as ours

    with imported_from(checkout) as load:
        assert load("model.build").__file__.startswith(checkout)
    import model.build as again

    assert again is ours


def test_a_checkout_that_lacks_a_module_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match=r"--authors: .* cannot be imported"), imported_from(str(tmp_path)) as load:
        load("model.build")
