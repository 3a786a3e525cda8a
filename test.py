"""Evaluate a run, or published weights: `python test.py --run runs/cuhk_pedes/20260101_120000_irra --on rstpreid`."""

from utils.signals import end_at_once, importing

if __name__ == "__main__":
    end_at_once()  # on a signal while the rest is imported

import argparse

from configs.arguments import Parser
from configs.schema import load_config
from utils.exit import exit_on_user_error
from utils.launcher import one_process
from utils.paths import expand, expanded


def main() -> None:
    with exit_on_user_error():
        arguments = parse_arguments()
        one_process("test.py")
        if arguments.config:  # mistakes are found before PyTorch is imported, which takes seconds
            load_config(arguments.config, arguments.set)
        with importing():
            from processor import testing
            from utils.logger import start_logging

        start_logging()
        testing.evaluate(arguments)


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


if __name__ == "__main__":
    main()
