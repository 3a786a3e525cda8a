"""Drawing of one synthetic pedestrian."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from datasets.synthetic.people import COLORS, HAIR_COLORS, RGB, SKINS, Identity, Point, View

WIDTH, HEIGHT, SCALE = 64, 128, 3  # pixels of the image, and factor of supersampling

Paint = RGB | Image.Image  # a colour, or a fabric of the size of the drawing

STONES: tuple[RGB, ...] = ((176, 168, 158), (150, 156, 164), (172, 140, 122), (196, 192, 184), (120, 124, 128))

# Lengths are in body units: 1 = the person's height.
UPPER_CUTS: dict[str, tuple[float, float, float]] = {  # fraction of the arm in the sleeve, height of the hem, flare
    "t-shirt": (0.42, 0.51, 0.0), "shirt": (1.0, 0.525, 0.0), "sweater": (1.0, 0.505, 0.0), "hoodie": (1.0, 0.52, 0.02),
    "jacket": (1.0, 0.52, 0.02), "coat": (1.0, 0.70, 0.045), "tank top": (0.0, 0.50, 0.0), "dress": (0.3, 0.71, 0.07),
}  # fmt: skip
LOWER_CUTS = {"trousers": (1.0, 0.088), "jeans": (1.0, 0.078), "shorts": (0.5, 0.098)}  # fraction of leg, hem width
BUILDS = {"man": (0.132, 0.096, 0.092), "woman": (0.112, 0.074, 0.098)}  # half widths of shoulders, waist, hips
HAND_BAGS = {"handbag": (0.062, 0.145), "briefcase": (0.078, 0.145), "shopping bag": (0.06, 0.20)}  # half width, height
GAPS = {"jacket": 0.05, "coat": 0.018, "shirt": 0.0}  # half width of the opening in front


def tint(color: RGB, factor: float) -> RGB:
    """Lighten (`factor` > 1) or darken a colour, clipped to 0..255."""
    red, green, blue = (max(0, min(255, round(channel * factor))) for channel in color)
    return red, green, blue


def dyed(who: Identity, color: str) -> RGB:
    """A named colour in this person's shade; "none" gives an arbitrary one, because nothing is painted with it."""
    return tint(COLORS.get(color, COLORS["grey"]), 1 + 0.08 * who.shade)


def mirrored(right: Sequence[Point]) -> list[Point]:
    """A polygon symmetric about the body's axis, from its right half, top to bottom."""
    return [*right, *((-x, y) for x, y in reversed(right))]


def smooth(points: Sequence[Point]) -> list[Point]:
    """Round the corners of a closed polygon (Chaikin's corner cutting, twice)."""
    path = list(points)
    for _ in range(2):
        sides = list(zip(path, path[1:] + path[:1], strict=True))
        path = [(p[0] + (q[0] - p[0]) * t, p[1] + (q[1] - p[1]) * t) for p, q in sides for t in (0.25, 0.75)]
    return path


def along(path: Sequence[Point], share: float) -> list[Point]:
    """The first fraction of a limb given by its three joints."""
    (x0, y0), (x1, y1), (x2, y2) = path
    if share <= 0.5:
        return [(x0, y0), (x0 + (x1 - x0) * 2 * share, y0 + (y1 - y0) * 2 * share)]
    return [(x0, y0), (x1, y1), (x1 + (x2 - x1) * (2 * share - 1), y1 + (y2 - y1) * (2 * share - 1))]


class Brush:
    """Paints on a transparent layer in body units (y: 0 = crown, 1 = soles; x: 0 = the body's axis)."""

    def __init__(self, view: View) -> None:
        self.layer = Image.new("RGBA", (WIDTH * SCALE, HEIGHT * SCALE))
        self.pen = ImageDraw.Draw(self.layer)
        self.unit = view.size * HEIGHT * SCALE
        self.x0 = (WIDTH / 2 + view.shift[0] * HEIGHT) * SCALE
        self.y0 = (0.97 + view.shift[1]) * HEIGHT * SCALE - self.unit

    def at(self, x: float, y: float) -> Point:
        """Convert body units to pixels of the layer."""
        return self.x0 + x * self.unit, self.y0 + y * self.unit

    def shape(self, points: Sequence[Point], paint: Paint, *, rounded: bool = True) -> None:
        """Fill a polygon."""
        path = [self.at(x, y) for x, y in (smooth(points) if rounded else points)]
        if isinstance(paint, Image.Image):
            mask = Image.new("L", self.layer.size)
            ImageDraw.Draw(mask).polygon(path, fill=255)
            self.layer.paste(paint, mask=mask)
        else:
            self.pen.polygon(path, fill=paint)

    def oval(self, x: float, y: float, rx: float, ry: float, color: RGB) -> None:
        """Fill an ellipse about (x, y)."""
        self.pen.ellipse([*self.at(x - rx, y - ry), *self.at(x + rx, y + ry)], fill=color)

    def line(self, points: Sequence[Point], width: float, color: RGB) -> None:
        """Draw an open path."""
        self.pen.line([self.at(x, y) for x, y in points], fill=color, width=max(1, round(width * self.unit)))

    def limb(self, path: Sequence[Point], start: float, end: float, paint: Paint, edge: RGB) -> None:
        """Draw a limb with a width from `start` to `end`, and a thin edge against the background."""
        for grow, fill in ((0.011, edge), (0.0, paint)):
            left, right = [(path[0][0], path[0][1] - (start + grow) * 0.4)], []  # the first point rounds the top
            for i, (x, y) in enumerate(path):
                (xa, ya), (xb, yb) = path[max(i - 1, 0)], path[min(i + 1, len(path) - 1)]
                half = (start + (end - start) * i / (len(path) - 1) + grow) / 2 / math.hypot(xb - xa, yb - ya)
                left.append((x - (yb - ya) * half, y + (xb - xa) * half))
                right.append((x + (yb - ya) * half, y - (xb - xa) * half))
            self.shape([*left, *reversed(right)], fill, rounded=False)


def fabric(who: Identity, brush: Brush) -> Paint:
    """The fabric of the upper garment: one colour, or an image of stripes, checks or dots."""
    base, accent = dyed(who, who.upper_color), dyed(who, who.accent)
    if who.pattern not in ("striped", "checked", "dotted"):
        return base
    cloth = Image.new("RGB", brush.layer.size, base)
    pen, step, (width, height) = ImageDraw.Draw(cloth), round(0.062 * brush.unit), cloth.size
    for row, y in enumerate(range(round(brush.y0) % step, height, step)):
        if who.pattern != "dotted":
            pen.rectangle([0, y, width, y + step * (0.5 if who.pattern == "striped" else 0.3)], fill=accent)
        for x in range(row % 2 * step // 2, width, step) if who.pattern == "dotted" else ():
            pen.ellipse([x, y, x + step * 0.52, y + step * 0.52], fill=accent)
    for x in range(0, width, step) if who.pattern == "checked" else ():
        pen.rectangle([x, 0, x + step * 0.3, height], fill=accent)
    return cloth


def draw_legs(who: Identity, view: View, brush: Brush) -> None:
    """Draw legs and shoes, with trousers, shorts or a skirt; one leg is darker, as if further from the camera."""
    skin, cloth, shoe = SKINS[who.skin], dyed(who, who.lower_color), dyed(who, who.shoe_color)
    for side, dim in ((-1, 0.84), (1, 1.0)):
        swing = side * view.leg_swing
        x, y = side * 0.05 + swing * 0.085, 0.93 if side * view.leg_swing < -0.3 else 0.945  # one heel lifted
        path = [(side * 0.047, 0.49), (side * 0.05 + swing * 0.035, 0.72), (x, y)]
        brush.limb(path, 0.09, 0.05, tint(skin, dim), tint(skin, 0.7))
        share, hem = LOWER_CUTS.get(who.lower, (0.0, 0.0))
        if share:
            brush.limb(along(path, share), 0.108, hem, tint(cloth, dim), tint(cloth, 0.66))
        if who.shoes == "boots":
            boot = [(x - 0.043, y - 0.11), (x + 0.043, y - 0.11), (x + 0.034, y + 0.04), (x - 0.034, y + 0.04)]
            brush.shape(boot, tint(shoe, dim), rounded=False)
        heel, toe = x - 0.036 + min(0.03 * swing, 0), x + 0.036 + max(0.03 * swing, 0)
        brush.shape([(x - 0.03, y - 0.015), (x + 0.03, y - 0.015), (toe, y + 0.05), (heel, y + 0.05)], tint(shoe, dim))
        if who.shoes == "sneakers":
            sole = COLORS["grey" if who.shoe_color == "white" else "white"]
            brush.line([(heel + 0.004, y + 0.042), (toe - 0.004, y + 0.042)], 0.013, sole)
    if who.lower == "skirt":
        brush.shape(mirrored([(0.07, 0.44), (0.105, 0.50), (0.135, 0.665), (0.06, 0.685)]), cloth)
        brush.line([(0.04, 0.52), (0.055, 0.67)], 0.006, tint(cloth, 0.75))


def arm(who: Identity, view: View, side: int) -> list[Point]:
    """Positions of shoulder, elbow and hand of one arm."""
    x, swing = BUILDS[who.sex][0] - 0.024, 0.04 * view.arm_swing
    return [(side * x, 0.212), (side * (x + 0.034), 0.35), (side * (x + 0.03 + swing), 0.485 - abs(swing) / 2)]


def draw_arms(who: Identity, view: View, brush: Brush, cloth: Paint) -> None:
    """Draw both arms with sleeves and hands."""
    skin, edge, share = SKINS[who.skin], tint(dyed(who, who.upper_color), 0.66), UPPER_CUTS[who.upper][0]
    for side in (-1, 1):
        path = arm(who, view, side)
        brush.limb(path, 0.052, 0.036, skin, tint(skin, 0.72))
        brush.oval(*path[2], 0.024, 0.028, skin)
        if share:
            brush.limb(along(path, share), 0.07, 0.07 - 0.014 * share, cloth, edge)


def draw_trunk(who: Identity, view: View, brush: Brush, cloth: Paint) -> None:
    """Draw the upper garment without sleeves, and the details of its front."""
    (shoulder, waist, hip), (_, hem, flare) = BUILDS[who.sex], UPPER_CUTS[who.upper]
    skin, base, accent = SKINS[who.skin], dyed(who, who.upper_color), dyed(who, who.accent)
    seam = tint(base, 0.62) if sum(base) > 150 else (88, 88, 94)  # seams must show on black too
    side = [(0.03, 0.165), (shoulder, 0.185), (shoulder - 0.012, 0.30), (waist + flare / 2, 0.40)]
    brush.shape(mirrored([*side, (hip + flare, hem - 0.02), (hip + flare - 0.01, hem)]), cloth)
    if who.upper == "tank top":
        brush.shape(mirrored([(0.07, 0.16), (0.045, 0.225 if not view.back else 0.2)]), skin)
    if who.upper in ("hoodie", "sweater"):
        brush.line([(-hip, hem - 0.025), (hip, hem - 0.025)], 0.01, seam)
    if who.upper in ("dress", "coat"):
        brush.line([(-waist, 0.41), (waist, 0.41)], 0.016, seam)
    if who.upper == "hoodie":
        brush.shape(mirrored([(0.02, 0.15), (0.075, 0.165), (0.06, 0.25 if view.back else 0.2), (0, 0.28)]), seam)
    if view.back:
        return
    if who.upper in ("t-shirt", "sweater", "dress"):
        brush.oval(0, 0.168, 0.045, 0.03, skin)
    if who.upper == "jacket":
        brush.shape(mirrored([(0.04, 0.165), (0.05, 0.30), (0.062, hem + 0.005)]), accent, rounded=False)
    for sign in (-1, 1) if who.upper in GAPS else ():
        gap = GAPS[who.upper] * sign
        brush.shape([(sign * 0.02, 0.15), (sign * 0.062, 0.175), (gap + sign * 0.02, 0.24)], seam)
        brush.line([(gap, 0.21), (gap, hem)], 0.008, seam)
    if who.pattern == "logo":
        brush.shape(mirrored([(0.058, 0.245), (0.058, 0.335)]), accent)
        brush.oval(0, 0.29, 0.022, 0.022, base)


def draw_head(who: Identity, view: View, brush: Brush) -> None:
    """Draw neck, head, face, hair and cap."""
    skin, hair, style = SKINS[who.skin], HAIR_COLORS[who.hair_color], who.hair_style
    rx, ry, y = 0.054, 0.069, 0.088
    brush.shape(mirrored([(0.03, 0.12), (0.036, 0.19)]), tint(skin, 0.86))
    if style == "long" and not view.back:
        locks = [(0.03, 0.005), (0.078, 0.05), (0.084, 0.16), (0.09, 0.28), (0.05, 0.275), (0.034, 0.17), (0.0, 0.1)]
        brush.shape(mirrored(locks), hair)
    if style == "ponytail" and not view.back:
        brush.limb([(0.04, 0.04), (0.082, 0.10), (0.088, 0.22)], 0.045, 0.03, hair, tint(hair, 0.7))
    for x in (-rx, rx):
        brush.oval(x, y + 0.005, 0.012, 0.018, tint(skin, 0.86))
    brush.oval(0, y, rx, ry, skin)
    if style == "bun":
        brush.oval(0, 0.0, 0.034, 0.03, tint(hair, 0.85))
    if view.back and style != "bald":
        brush.oval(0, y - 0.008, rx * 1.1, ry, hair)
    if view.back and style == "long":
        brush.shape(mirrored([(0.045, 0.03), (0.07, 0.09), (0.082, 0.24), (0.06, 0.31), (0, 0.325)]), hair)
    if view.back and style == "ponytail":
        brush.limb([(0, 0.07), (0.006, 0.17), (0.012, 0.27)], 0.05, 0.03, tint(hair, 0.92), tint(hair, 0.6))
    if not view.back:
        for x in (-0.021, 0.021):
            brush.oval(x, y + 0.002, 0.0085, 0.0095, (34, 28, 28))
            brush.line([(x - 0.011, y - 0.019), (x + 0.011, y - 0.019)], 0.007, tint(hair, 0.7))
        lips = (172, 62, 66) if who.sex == "woman" else tint(skin, 0.6)
        brush.line([(-0.016, y + 0.037), (0.016, y + 0.037)], 0.008, lips)
    if not view.back and style != "bald":
        fringe = [(-0.062, 0.10), (-0.062, 0.043), (-0.04, 0.006), (0.04, 0.006), (0.062, 0.043), (0.062, 0.10)]
        fringe += [(0.046, 0.058), (-0.015, 0.043), (-0.046, 0.068)]
        brush.shape(fringe, hair)
    if who.cap != "none":
        brush.shape(mirrored([(0.03, 0.0), (0.064, 0.014), (0.066, 0.064)]), dyed(who, who.cap))
    if who.cap != "none" and not view.back:
        brush.shape(mirrored([(0.055, 0.048), (0.07, 0.066), (0.04, 0.076)]), tint(dyed(who, who.cap), 0.7))


def draw_bag(who: Identity, view: View, brush: Brush) -> None:
    """Draw the bag: on the back (from the front, its straps), across the trunk, or in a hand."""
    color = dyed(who, who.bag_color)
    dark = tint(color, 0.62)
    if who.bag == "backpack" and view.back:
        brush.shape(mirrored([(0.05, 0.19), (0.102, 0.205), (0.112, 0.43), (0.06, 0.455)]), dark)
        brush.shape(mirrored([(0.05, 0.198), (0.092, 0.21), (0.1, 0.42), (0.05, 0.443)]), color)
        brush.shape(mirrored([(0.066, 0.33), (0.072, 0.42)]), tint(color, 1.18), rounded=False)
    for sign in (-1, 1) if who.bag == "backpack" and not view.back else ():
        brush.line([(sign * 0.06, 0.178), (sign * 0.078, 0.28), (sign * 0.096, 0.37)], 0.03, color)
    if who.bag == "shoulder bag":
        brush.line([(-0.085, 0.185), (0.10, 0.44)], 0.02, dark)
        brush.shape([(0.065, 0.42), (0.175, 0.42), (0.18, 0.54), (0.06, 0.54)], color)
        brush.shape([(0.062, 0.42), (0.178, 0.42), (0.172, 0.475), (0.068, 0.475)], dark)
    if who.bag in HAND_BAGS:
        (x, y), (w, h) = arm(who, view, -1)[2], HAND_BAGS[who.bag]
        brush.line([(x - w / 2, y + 0.05), (x, y), (x + w / 2, y + 0.05)], 0.014, dark)
        corners = [(x - w, y + 0.05), (x + w, y + 0.05), (x + w * 1.1, y + h), (x - w * 1.1, y + h)]
        brush.shape(corners, color, rounded=who.bag == "handbag")
        if who.bag != "shopping bag":
            brush.line([(x - w, y + 0.085), (x + w, y + 0.085)], 0.014, dark)


def background(view: View, rng: np.random.Generator) -> Image.Image:
    """Draw bricks, windows or bushes above a pavement, with the person's shadow."""
    width, height = WIDTH * SCALE, HEIGHT * SCALE
    ground, scene, grain = int(height * (0.52 + 0.3 * rng.random())), int(rng.random() * 3), 10 + int(rng.random() * 30)
    stone, paving = (tint(STONES[int(rng.random() * 5)], 0.7 + 0.4 * rng.random()) for _ in range(2))
    picture = Image.new("RGB", (width, height), paving)
    pen, spots = ImageDraw.Draw(picture), rng.random((9, 3))
    pen.rectangle([0, 0, width, ground], fill=stone if scene < 2 else tint((186, 204, 214), 0.85 + 0.25 * spots[0, 0]))
    for row, y in enumerate(range(0, ground, grain) if scene == 0 else ()):
        pen.line([0, y, width, y], fill=tint(stone, 0.88), width=2)
        for x in range(row % 2 * grain, width, 2 * grain):
            pen.line([x, y, x, y + grain], fill=tint(stone, 0.88), width=2)
    for i, (u, v, glow) in enumerate(spots.tolist() if scene == 1 else ()):
        left, glass = i * (34 + grain) - 40 * u, tint((128, 146, 160), 0.6 + 0.7 * glow)
        pen.rectangle([left, v * ground / 2, left + 34, ground * (0.6 + 0.4 * u)], glass, tint(stone, 0.7), 4)
    for u, v, glow in spots.tolist() if scene == 2 else ():
        left, top, r = u * width - 25 - 45 * glow, ground * (0.3 + 0.65 * v) - 25 - 45 * glow, 50 + 90 * glow
        pen.ellipse([left, top, left + r, top + r], fill=tint((112, 136, 98), 0.65 + 0.5 * glow))
    if scene == 2 or spots[1, 0] < 0.35:  # the trunk of a tree, or a lamp post
        pen.rectangle([spots[2, 0] * width, 0, spots[2, 0] * width + grain / 2, ground + 8], fill=tint(stone, 0.55))
    pen.rectangle([0, ground, width, height], fill=paving, outline=tint(paving, 0.75), width=3)
    for x in range(-width, 2 * width, 60 + grain):
        pen.line([width / 2 + (x - width / 2) * 0.5, ground + 3, x, height], fill=tint(paving, 0.9), width=2)
    feet = Brush(view)
    pen.ellipse([*feet.at(-0.14, 0.955), *feet.at(0.14 + 0.1 * view.light, 1.01)], fill=tint(paving, 0.62))
    return picture


def draw(who: Identity, view: View, rng: np.random.Generator) -> Image.Image:
    """Draw the RGB image, `WIDTH` x `HEIGHT`. `rng` decides only the background and the sensor noise."""
    brush = Brush(view)
    cloth = fabric(who, brush)
    draw_legs(who, view, brush)
    draw_trunk(who, view, brush, cloth)
    draw_arms(who, view, brush, cloth)
    draw_head(who, view, brush)
    draw_bag(who, view, brush)
    picture = background(view, rng)
    picture.paste(brush.layer, mask=brush.layer)
    if view.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = picture.reduce(SCALE).filter(ImageFilter.GaussianBlur(view.blur))
    side = np.linspace(-1, 1, WIDTH, dtype=np.float32)[None, :, None]
    gain = view.gain * np.asarray(view.cast, dtype=np.float32) * (1 + 0.12 * view.light * side)
    noise = rng.standard_normal((HEIGHT, WIDTH, 3), dtype=np.float32) * np.float32(view.noise)
    return Image.fromarray(np.clip(np.asarray(picture, dtype=np.float32) * gain + noise, 0, 255).astype(np.uint8))
