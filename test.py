"""Evaluate a run, or published weights: `python test.py --run runs/cuhk_pedes/20260101_120000_irra --on rstpreid`."""

from utils.signals import end_at_once, importing

if __name__ == "__main__":
    end_at_once()  # on a signal while the rest is imported

import argparse
import json

from configs.arguments import Parser
from configs.schema import Config, load_config
from utils.errors import ConfigError
from utils.exit import exit_on_user_error
from utils.launcher import one_process
from utils.paths import expand, expanded


def main() -> None:
    with exit_on_user_error():
        arguments = parse_arguments()
        one_process("test.py")
        config = given_config(arguments)  # before PyTorch is imported, which takes seconds
        with importing():
            from processor import testing
            from utils.logger import start_logging

        start_logging()
        testing.evaluate(arguments, config)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description="Evaluate a run folder of train.py, or weights from elsewhere.")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--run", type=expand, help="run folder")
    model.add_argument("--config", type=expand, help="YAML file; without --weights, evaluates the initial weights")
    parser.add_argument(
        "--checkpoint", type=expanded, help="with --run: best, last, best_ema, or a path; default: best"
    )
    parser.add_argument("--weights", type=expand, metavar="PATH", help="with --config: a checkpoint, ours or published")
    parser.add_argument("--format", help="format of --weights, for instance irra; default: recognised")
    parser.add_argument("--on", nargs="+", metavar="DATASET", help="data sets to evaluate on; default: the config's")
    parser.add_argument("--split", default="test", choices=["val", "test"], help="default: test")
    parser.add_argument("--i2t", action="store_true", help="also rank captions for each image")
    parser.add_argument(
        "--dump", type=expand, metavar="FILE", help="write one JSON line per caption: its rank, AP, INP"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override the config"
    )
    return parser.parse_args()


def given_config(arguments: argparse.Namespace) -> Config | None:
    """The config of --config, with the weights of --weights; None for --run.

    Raises:
        ConfigError: the config is wrong, or arguments contradict each other.
    """
    if arguments.run:
        if arguments.weights or arguments.format:
            raise ConfigError("--weights, --format: need --config; name a checkpoint of --run with --checkpoint")
        return None
    if arguments.checkpoint:
        raise ConfigError("--checkpoint: needs --run; name a checkpoint for --config with --weights")
    if arguments.format and not arguments.weights:
        raise ConfigError("--format: needs --weights")
    return load_config(arguments.config, [*init_overrides(arguments), *arguments.set])


def init_overrides(arguments: argparse.Namespace) -> list[str]:
    """Overrides that put --weights and --format in the place of the config's initial checkpoint."""
    if arguments.weights is None:
        return []
    init = {"path": str(arguments.weights), "format": arguments.format, "image_size": None, "skip": []}
    return [f"init.{key}={json.dumps(value, ensure_ascii=False)}" for key, value in init.items()]


if __name__ == "__main__":
    main()
