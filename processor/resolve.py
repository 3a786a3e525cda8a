"""A config with every option spelt out."""

import dataclasses

from configs.schema import Config
from datasets.transforms import augmentation_options
from model.build import resolve_model
from processor.trackers import tracker_options
from solver.schedule import check_rates, schedule_options
from utils.config import to_plain


def resolve(config: Config) -> Config:
    """Spell out and check the options of everything that the config chooses by name.

    Raises:
        ConfigError: unknown name or option, value of the wrong type or out of bounds, no loss.
    """
    config = resolve_model(config)
    solver = dataclasses.replace(config.solver, schedule=to_plain(schedule_options(config.solver.schedule)))
    check_rates(solver)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, image_aug=to_plain(augmentation_options(config.data.image_aug))),
        solver=solver,
        train=dataclasses.replace(config.train, trackers=to_plain(tracker_options(config.train.trackers))),
    )
