"""Captions of synthetic pedestrians, consistent with the image."""

from collections.abc import Sequence
from dataclasses import dataclass

from datasets.synthetic.people import Identity, Rng, View, choose

# Value -> synonyms, the usual one repeated. A value without an entry stands for itself.
WORDS: dict[str, Sequence[str]] = {
    "man": ("man", "man", "guy", "male", "gentleman"), "woman": ("woman", "woman", "lady", "female"),
    "grey": ("grey", "gray"), "dark blue": ("dark blue", "dark blue", "navy blue"), "blond": ("blond", "blonde"),
    "t-shirt": ("t-shirt", "t-shirt", "tee", "short-sleeved t-shirt"), "hoodie": ("hoodie", "hooded sweatshirt"),
    "shirt": ("shirt", "long-sleeved shirt", "button-up shirt"), "sweater": ("sweater", "pullover", "jumper"),
    "coat": ("coat", "coat", "overcoat"), "tank top": ("tank top", "sleeveless top"), "dotted": ("dotted", "polka-dot"),
    "trousers": ("trousers", "pants", "slacks"), "jeans": ("jeans", "jeans", "denim jeans"),
    "checked": ("checked", "plaid", "checkered"), "sneakers": ("sneakers", "trainers", "sports shoes"),
    "shoes": ("leather shoes", "dress shoes"), "backpack": ("backpack", "backpack", "rucksack"),
    "handbag": ("handbag", "purse"), "shoulder bag": ("shoulder bag", "crossbody bag", "messenger bag"),
}  # fmt: skip
MARKS = {"striped": "stripes", "checked": "checks", "dotted": "dots"}
HAIR_PHRASES: dict[str, Sequence[str]] = {  # the first one also fits without a colour
    "short": ("short {}hair", "short {}hair", "{}hair cut short"), "long": ("long {}hair", "{}hair over the shoulders"),
    "ponytail": ("a {}ponytail", "{}hair tied in a ponytail"), "bun": ("a {}hair bun", "{}hair in a bun"),
    "bald": ("a bald head", "a shaved head"),
}  # fmt: skip
BAG_PHRASES: dict[str, Sequence[tuple[str, str]]] = {  # verb and object
    "backpack": (("carries", "{bag}"), ("has", "{bag} on {his} back"), ("carries", "{bag} on {his} back")),
    "shoulder bag": (("carries", "{bag}"), ("carries", "{bag} across {his} body"), ("has", "{bag} on {his} shoulder")),
    "hand": (("carries", "{bag}"), ("holds", "{bag} in {his} hand"), ("has", "{bag} in one hand")),
}
PRONOUNS = {"man": ("He", "his"), "woman": ("She", "her")}
FACING = {
    True: ("is seen from behind", "is walking away from the camera", "has {his} back to the camera"),
    False: ("is walking towards the camera", "faces the camera", "is seen from the front"),
}
MIN_WORDS, MAX_WORDS = 10, 40
PARTICIPLES = {"has": " with", "wears": " wearing", "carries": ", carrying", "holds": ", holding"}


@dataclass(frozen=True)
class Caption:
    """Text of a caption, and its facts: field of `Identity` -> value that the text states."""

    text: str
    facts: dict[str, str]


class Writer:
    """Writes one caption. Each method returns a phrase and records its facts."""

    def __init__(self, who: Identity, view: View, rng: Rng) -> None:
        self.who, self.view, self.rng = who, view, rng
        self.facts: dict[str, str] = {}

    def maybe(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def say(self, field: str) -> str:
        """A word for the value of a field."""
        value: str = getattr(self.who, field)
        self.facts[field] = value
        return choose(self.rng, WORDS.get(value, (value,)))

    def hair(self) -> str:
        bald, phrases = self.who.hair_style == "bald", HAIR_PHRASES[self.who.hair_style]
        color = f"{self.say('hair_color')} " if not bald and self.maybe(0.8) else ""
        if color and self.maybe(0.15):
            return f"{color}hair"
        self.facts["hair_style"] = self.who.hair_style
        return choose(self.rng, phrases if color else phrases[:1]).format(color)

    def upper(self) -> str:
        who, words, tail = self.who, [], ""
        if self.maybe(0.9):
            words.append(self.say("upper_color"))
        if who.pattern == "logo" and not self.view.back and self.maybe(0.7):
            self.facts["pattern"] = "logo"
            tail = f" with {article(self.say('accent'))} logo on the {choose(self.rng, ('chest', 'front'))}"
        elif who.pattern in MARKS and self.maybe(0.6):
            if self.maybe(0.3):
                self.facts["pattern"] = who.pattern
                tail = f" with {self.say('accent')} {MARKS[who.pattern]}"
            else:
                words += ["and", self.say("accent")] if words and self.maybe(0.5) else []
                words.append(self.say("pattern"))
        elif who.upper == "jacket" and not self.view.back and self.maybe(0.6):
            tail = f" over {article(self.say('accent'))} t-shirt"
        vague = who.upper not in ("jacket", "coat", "dress") and self.maybe(0.35)
        return article(" ".join([*words, "top" if vague else self.say("upper")])) + tail

    def lower(self) -> str:
        color = f"{self.say('lower_color')} " if self.maybe(0.9) else ""
        text = color + self.say("lower")
        if self.who.lower == "skirt":
            return article(text)
        return f"a pair of {text}" if self.maybe(0.12) else text

    def shoes(self) -> str:
        return f"{self.say('shoe_color')} {self.say('shoes') if self.maybe(0.6) else 'shoes'}"

    def cap(self) -> str:
        return f"{article(self.say('cap'))} {choose(self.rng, ('cap', 'cap', 'baseball cap'))}"

    def bag(self) -> tuple[str, str]:
        color = f"{self.say('bag_color')} " if self.maybe(0.88) else ""
        verb, rest = choose(self.rng, BAG_PHRASES.get(self.who.bag, BAG_PHRASES["hand"]))
        noun = self.say("bag") if self.who.bag == "backpack" or self.maybe(0.8) else "bag"
        return verb, rest.format(bag=article(color + noun), his=PRONOUNS[self.who.sex][1])

    def clauses(self) -> tuple[list[tuple[str, str]], str]:
        """Clauses (verb, object) in the order hair, clothes, bag, and clothes for a last sentence."""
        who, said = self.who, []
        hair_seen = who.cap == "none" or who.hair_style in ("long", "ponytail")
        if hair_seen and self.maybe(0.3):
            said.append(("has", self.hair()))
        worn = [self.upper()] if self.maybe(0.95) else []
        worn += [self.lower()] if who.lower != "none" and self.maybe(0.85) else []
        worn = worn[::-1] if self.maybe(0.12) else worn
        more = [self.shoes()] if self.maybe(0.26) else []
        more += [self.cap()] if who.cap != "none" and self.maybe(0.6) else []
        apart = bool(worn and more) and self.maybe(0.5)
        items = worn if apart else worn + more
        if items:
            plain_pair = len(items) == 2 and " with " not in items[0]
            said.append(("wears", listing(items, "with" if plain_pair and self.maybe(0.3) else "and")))
        bag_seen = who.bag != "none" and (who.bag != "backpack" or self.view.back)
        straps_seen = who.bag == "backpack" and not self.view.back
        if (bag_seen and self.maybe(0.5)) or (straps_seen and self.maybe(0.35)):
            said.append(self.bag())
        return said, listing(more, "and") if apart else ""

    def write(self) -> str:
        """Write the text and complete `facts`."""
        noun, (he, his) = self.say("sex"), PRONOUNS[self.who.sex]
        said, apart = self.clauses()
        head = 1 + int(self.rng.random() * min(3, len(said)))
        first, rest = said[:head], said[head:]
        form = choose(self.rng, ("finite", "finite", "fragment", "wearing"))
        others = [clause for clause in first if clause[0] != "wears"]
        if form == "wearing" and 0 < len(others) < len(first):
            worn = next(rest for verb, rest in first if verb == "wears")
            text = f"Wearing {worn}, {choose(self.rng, ('the', 'this'))} {noun} {finite(others)}."
        elif form == "fragment":
            text = f"{choose(self.rng, ('A', 'A', 'This'))} {noun}{''.join(map(participle, first))}."
        else:
            text = f"{choose(self.rng, ('The', 'The', 'This', 'A'))} {noun} {finite(first)}."
        text += f" {he} {finite(rest)}." if rest else ""
        text += f" {he} {choose(self.rng, ('also wears', 'has on', 'is wearing'))} {apart}." if apart else ""
        if self.maybe(0.08) or len(text.split()) < MIN_WORDS:
            text += f" {he} {choose(self.rng, FACING[self.view.back]).format(his=his)}."
        return text


def describe(who: Identity, view: View, rng: Rng) -> Caption:
    """Write a caption of `MIN_WORDS` to `MAX_WORDS` words that states the sex and at least three other facts."""
    while True:
        writer = Writer(who, view, rng)
        text = writer.write()
        if len(writer.facts) > 3 and MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            return Caption(text, writer.facts)


def article(text: str) -> str:
    """`text` with its indefinite article."""
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def listing(items: Sequence[str], last: str = "and") -> str:
    """Enumerate items, with `last` before the last one: a, b and c."""
    return f"{', '.join(items[:-1])} {last} {items[-1]}" if len(items) > 1 else "".join(items)


def finite(clauses: Sequence[tuple[str, str]]) -> str:
    """Join clauses to the predicate of a sentence."""
    return listing([f"{verb} {rest}" for verb, rest in clauses])


def participle(clause: tuple[str, str]) -> str:
    """Turn a clause into an attribute of a noun."""
    return f"{PARTICIPLES[clause[0]]} {clause[1]}"
