"""Train a method: `python train.py --config configs/irra.yaml --set train.epochs=30 losses.mlm=null`."""

from utils.signals import end_at_once, importing

if __name__ == "__main__":
    end_at_once()  # on a signal while the rest is imported

import argparse

from configs.arguments import Parser
from configs.schema import load_config
from utils.errors import ConfigError
from utils.exit import exit_on_user_error, leave
from utils.launcher import adopt_launcher
from utils.paths import expand


def main() -> argparse.Namespace:
    with exit_on_user_error():
        arguments = parse_arguments()
        run(arguments)
    return arguments


def parse_arguments() -> argparse.Namespace:
    """The command line; `--help` and mistakes end the program before anything heavy is imported."""
    parser = Parser(description="Train a text-to-image person retrieval method from a YAML config.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--config", type=expand, help="YAML file, for instance configs/irra.yaml")
    action.add_argument("--resume", type=expand, metavar="RUN", help="resume the run in this folder")
    action.add_argument(
        "--help-config", nargs="?", const="", metavar="KEY", help="describe the config's options and stop"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override the config"
    )
    parser.add_argument(  # torchrun takes --run for itself
        *("--run", "--run-folder"),
        type=expand,
        help="run folder to create; default: <train.output>/<data set>/<time>_<name>",
    )
    parser.add_argument("--print-config", action="store_true", help="check the config, print all options and stop")
    parser.add_argument(
        "--preflight", action="store_true", help="say what the run will need in memory and time, and stop"
    )
    parser.add_argument(
        "--force", action="store_true", help="with --resume: allow changes that make another experiment"
    )
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line asks for. Misspelt keys are found before PyTorch is imported, which takes seconds."""
    adopt_launcher()
    if arguments.resume and (arguments.run or arguments.print_config or arguments.preflight):
        raise ConfigError("--resume: continues in the run's folder; drop --run, --print-config and --preflight")
    if arguments.force and not arguments.resume:
        raise ConfigError("--force: needs --resume")
    config = load_config(arguments.config, arguments.set) if arguments.config else None
    with importing():
        from processor import training
        from processor.help import config_help
        from processor.resolve import resolve
        from utils.config import to_yaml
        from utils.distributed import end_processes

    if config is None:
        if arguments.resume:
            training.resume(arguments.resume, arguments.set, force=arguments.force)
        else:
            print(config_help(arguments.help_config))
    elif arguments.print_config:
        config = resolve(config)
        training.check(config)
        print(to_yaml(config), end="")
    elif arguments.preflight:
        from processor.preflight import report

        print(report(resolve(config)))
    else:
        training.train(resolve(config), arguments.run)
    end_processes()


if __name__ == "__main__":
    done = main()
    if done.print_config or done.preflight or done.help_config is not None:
        leave()
