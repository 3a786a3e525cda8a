"""Identities and views of synthetic pedestrians, and the odds they are drawn from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

RGB = tuple[int, int, int]
Point = tuple[float, float]
T = TypeVar("T")
Rng = np.random.Generator
Weights = Mapping[str, float]

COLORS: dict[str, RGB] = {
    "black": (30, 30, 34), "white": (238, 238, 238), "grey": (132, 134, 138), "red": (205, 32, 40),
    "orange": (240, 128, 24), "yellow": (246, 214, 50), "green": (40, 142, 66), "blue": (42, 104, 222),
    "dark blue": (26, 40, 104), "purple": (124, 52, 166), "pink": (246, 138, 182), "brown": (112, 66, 34),
    "beige": (216, 190, 146),
}  # fmt: skip
HAIR_COLORS: dict[str, RGB] = {
    "black": (28, 24, 24), "brown": (96, 58, 32), "blond": (228, 190, 98), "grey": (168, 168, 172),
    "red": (172, 72, 28),
}  # fmt: skip
SKINS: tuple[RGB, ...] = ((246, 212, 186), (232, 186, 150), (204, 150, 108), (152, 102, 68), (102, 66, 46))

# Attributes of an identity: value -> weight.
HAIR_STYLES: dict[str, Weights] = {
    "man": {"short": 8, "long": 1, "bald": 1.5},
    "woman": {"long": 5, "ponytail": 2.5, "bun": 1.5, "short": 2},
}
HAIR: Weights = {"black": 4, "brown": 3, "blond": 2.5, "grey": 1, "red": 1}
CAPS: Weights = {"none": 8, "black": 0.7, "red": 0.5, "blue": 0.5, "white": 0.5, "green": 0.3}
UPPERS: dict[str, Weights] = {
    "man": {"t-shirt": 6, "shirt": 2.5, "sweater": 2, "hoodie": 2, "jacket": 3, "coat": 0.8, "tank top": 0.5},
    "woman": {"t-shirt": 5, "shirt": 2, "sweater": 2, "hoodie": 1, "jacket": 2.5, "coat": 1, "tank top": 1, "dress": 2},
}
UPPER_COLORS: Weights = {
    "black": 2, "white": 2, "grey": 1.5, "red": 1.5, "orange": 1, "yellow": 1.2, "green": 1.2, "blue": 1.5,
    "dark blue": 1, "purple": 1, "pink": 1, "brown": 0.8, "beige": 0.8,
}  # fmt: skip
PATTERNS: dict[str, Weights] = {
    "t-shirt": {"plain": 4, "striped": 2, "dotted": 0.7, "logo": 3},
    "shirt": {"plain": 4, "striped": 1, "checked": 3},
    "sweater": {"plain": 4, "striped": 2.5, "logo": 1},
    "hoodie": {"plain": 3, "logo": 2},
    "dress": {"plain": 4, "striped": 1, "dotted": 2, "checked": 1},
}
LOWERS: dict[str, Weights] = {
    "man": {"trousers": 4, "jeans": 5, "shorts": 2},
    "woman": {"trousers": 3, "jeans": 5, "shorts": 1.5, "skirt": 2.5},
}
LOWER_COLORS: dict[str, Weights] = {
    "jeans": {"blue": 3, "dark blue": 2, "black": 2, "grey": 1.5},
    "trousers": {
        "black": 3,
        "grey": 2,
        "beige": 2,
        "brown": 1.5,
        "dark blue": 1.5,
        "white": 1.5,
        "green": 1,
        "red": 0.7,
    },
    "shorts": {"black": 2, "white": 1.5, "beige": 2, "blue": 1.5, "grey": 1.5, "red": 1, "green": 1, "yellow": 0.5},
    "skirt": {"black": 2, "white": 1.5, "red": 1.5, "pink": 1.2, "blue": 1.2, "purple": 1, "green": 1, "yellow": 0.8},
    "none": {"none": 1},
}
SHOES: Weights = {"sneakers": 4, "boots": 1.5, "shoes": 2.5}
SHOE_COLORS: Weights = {"black": 5, "white": 4, "brown": 2, "grey": 1, "red": 1, "blue": 0.8}
BAGS: dict[str, Weights] = {
    "man": {"none": 4, "backpack": 4, "shoulder bag": 1.5, "briefcase": 1, "shopping bag": 0.8},
    "woman": {"none": 3, "backpack": 2.5, "shoulder bag": 2, "handbag": 2.5, "shopping bag": 0.8},
}
BAG_COLORS: Weights = {"black": 5, "brown": 1.5, "red": 1.3, "blue": 1.2, "grey": 1, "white": 0.8, "green": 0.8}


@dataclass(frozen=True)
class Identity:
    """One person. Colours are names in `COLORS` (hair: `HAIR_COLORS`); "none" marks absent items."""

    sex: str
    skin: int  # index into SKINS
    hair_style: str
    hair_color: str
    cap: str  # its colour, or "none"
    upper: str
    upper_color: str
    pattern: str
    accent: str  # colour of the pattern, or of the t-shirt under an open jacket
    lower: str  # "none" under a dress
    lower_color: str
    shoes: str
    shoe_color: str
    bag: str
    bag_color: str
    shade: float  # in [-1, 1], lightness among colours of the same name


@dataclass(frozen=True)
class View:
    """One sighting. `size` and `shift` are fractions of the image height; swings and `light` lie in [-1, 1]."""

    back: bool  # seen from behind
    flip: bool
    leg_swing: float
    arm_swing: float
    size: float
    shift: Point
    gain: float  # brightness of the image
    cast: tuple[float, float, float]  # gain per channel
    light: float  # side that the light comes from
    noise: float  # standard deviation of sensor noise, in grey levels
    blur: float  # radius in pixels, 0 = sharp


def pick(rng: Rng, options: Weights) -> str:
    """Draw a key with probability proportional to its value. Uses `random()`, numpy's most stable draw."""
    mark = rng.random() * sum(options.values())
    for option, weight in options.items():
        mark -= weight
        if mark < 0:
            return option
    return option  # rounding errors of the sum


def choose(rng: Rng, options: Sequence[T]) -> T:
    """Draw an element uniformly."""
    return options[int(rng.random() * len(options))]


def random_identity(rng: Rng) -> Identity:
    """Draw a person. Adjacent colours contrast, and nobody wears shorts under a long coat."""
    sex = choose(rng, ("man", "woman"))
    upper, color = pick(rng, UPPERS[sex]), pick(rng, UPPER_COLORS)
    pattern = pick(rng, PATTERNS.get(upper, {"plain": 1}))
    distance = {name: sum(abs(a - b) for a, b in zip(rgb, COLORS[color], strict=True)) for name, rgb in COLORS.items()}
    accent = pick(rng, {name: weight for name, weight in UPPER_COLORS.items() if distance[name] > 200})
    lowers = {name: weight for name, weight in LOWERS[sex].items() if upper != "coat" or name in ("trousers", "jeans")}
    lower = "none" if upper == "dress" else pick(rng, lowers)
    bag = pick(rng, BAGS[sex])
    bag_color = pick(rng, {name: weight for name, weight in BAG_COLORS.items() if distance[name] > 120})
    return Identity(
        sex=sex, skin=int(rng.random() * 5), hair_style=pick(rng, HAIR_STYLES[sex]), hair_color=pick(rng, HAIR),
        cap=pick(rng, CAPS), upper=upper, upper_color=color, pattern=pattern,
        accent=accent if pattern != "plain" or upper == "jacket" else "none", lower=lower,
        lower_color=pick(rng, LOWER_COLORS[lower]), shoes=pick(rng, SHOES), shoe_color=pick(rng, SHOE_COLORS),
        bag=bag, bag_color="none" if bag == "none" else bag_color, shade=2 * rng.random() - 1,
    )  # fmt: skip


def random_view(rng: Rng) -> View:
    """Draw a view, independently of the person."""

    def between(low: float, high: float) -> float:
        return low + (high - low) * rng.random()

    return View(
        back=rng.random() < 0.4, flip=rng.random() < 0.5, leg_swing=between(-1, 1), arm_swing=between(-1, 1),
        size=between(0.80, 0.93), shift=(between(-0.035, 0.035), between(-0.02, 0.02)), gain=between(0.78, 1.15),
        cast=(between(0.94, 1.06), between(0.96, 1.04), between(0.92, 1.08)), light=between(-1, 1),
        noise=between(1, 6), blur=between(0.4, 0.8) if rng.random() < 0.15 else 0.0,
    )  # fmt: skip
