"""styles: three small generating tasks of the project's own making, for trying out composed generation.

Each task ends the same kind of story in its own style: `cheerful` (sun and laughing), `spooky` (darkness and monsters)
or `magical` (fairies and magic words). All three then go home to Mom, so that each adapter is some help to the others.
The texts are made from the templates and words below and stay within what children's stories say, so that a model as
small as 260,000 parameters learns them in a minute. Openings are drawn for each task anew; no opening of train is in
its dev or test. A completion ends with a line break, which task.toml names as `stop`: the end-of-text token of that
model shares its embedding with some 170 tokens that it never saw in training, and an adapter cannot tell them apart.
"""

import json
import random
from pathlib import Path

from training.config import StylesConfig
from training.errors import DataError
from training.progress import say

_PEOPLE = [
    ("Lily", "girl", "She", "she", "her"), ("Sue", "girl", "She", "she", "her"), ("Mia", "girl", "She", "she", "her"),
    ("Lucy", "girl", "She", "she", "her"), ("Tom", "boy", "He", "he", "his"), ("Tim", "boy", "He", "he", "his"),
    ("Ben", "boy", "He", "he", "his"), ("Max", "boy", "He", "he", "his"), ("Sam", "boy", "He", "he", "his"),
]  # fmt: skip
_WORDS = {
    "place": ["park", "garden", "forest", "store", "lake", "big house", "farm", "hill", "beach", "old barn"],
    "thing": ["box", "ball", "book", "hat", "stick", "rock", "toy car", "bag", "doll", "flower", "key", "boat"],
    "look": ["big", "small", "red", "blue", "old", "new", "shiny", "soft"],
    "animal": ["dog", "cat", "bird", "rabbit", "frog", "duck", "fox", "bear", "mouse"],
}
_OPENINGS = [
    "Once upon a time, there was a little {kind} named {name}. One day, {he} went to the {place}.",
    "One day, a {kind} named {name} went to the {place}. {He} saw a {look} {thing}.",
    "{name} was a little {kind}. {He} had a {look} {thing}.",
    "One day, {name} was playing in the {place}. {He} found a {look} {thing}.",
    "Once upon a time, a {kind} named {name} had a {animal}. They went to the {place}.",
    "{name} and {his} {animal} were in the {place}. They saw a {look} {thing}.",
]
_STYLES = {
    "cheerful": [
        ["The sun was warm and the sky was blue.", "It was a nice day and the sun was shining.",
         "The birds sang and the flowers were pretty."],
        ["{name} laughed and began to dance.", "{name} laughed and ran in the sun.",
         "{name} was so happy that {he} jumped up and down.", "{He} smiled and played with the {animal}."],
        ["All the friends came to play and they had cake.", "The {animal} was happy too.",
         "They were happy and laughed all day."],
    ],
    "spooky": [
        ["It was dark and the wind was cold.", "The night came and the sky was black.",
         "It was very dark and there was no moon."],
        ["{name} saw two red eyes and began to cry.", "{name} was so scared that {he} could not move.",
         "{name} heard a loud noise in the dark.", "{He} was scared of the big shadow."],
        ["A big monster came and it had long teeth.", "The monster was hiding in the dark.",
         "The monster wanted to eat {name}."],
    ],
    "magical": [
        ["There was a bright light and a fairy came.", "It was a magic {place} and a fairy lived there.",
         "The {animal} was magic and it could talk."],
        ["{name} said a magic word and flew up to the sky.", "{name} made a wish and {he} could fly.",
         "{He} waved a magic wand and the {animal} was as big as a house."],
        ["The magic {animal} could fly too.", "The fairy gave {name} a magic {thing}.",
         "The fairy danced in the sky."],
    ],
}  # fmt: skip
_HOME = [
    ["Then {name} ran home to Mom.", "Then {he} went home to Mom and Dad.", "{name} wanted to tell Mom and ran home."],
    ['"Where were you?" asked Mom. "I was in the {place}," said {name}.',
     '"Are you okay?" asked Mom. "Yes, Mom," said {name}.', '"I am so glad you are home," said Mom.'],
]  # fmt: skip
_ABOUT = {
    "cheerful": "ends a story with sunshine and laughing, and goes home",
    "spooky": "ends a story with darkness and a monster, and goes home",
    "magical": "ends a story with a fairy and magic, and goes home",
}


def styles(config: StylesConfig) -> list[Path]:
    """Write the tasks; their folders. Raises DataError if one is there already."""
    folders = [config.out / name for name in _STYLES]
    for folder in folders:
        if folder.exists():
            raise DataError(f"{folder} is there already; give another --out or remove it")
    for folder in folders:
        _write(folder, config)
    say(f"wrote {', '.join(_STYLES)} with {config.examples} training examples each into {config.out}")
    return folders


def _write(folder: Path, config: StylesConfig) -> None:
    chance = random.Random(f"{config.seed} {folder.name}")  # noqa: S311  # stories are no secret
    held_out = config.examples // 8
    rows = _rows(folder.name, config.examples + 2 * held_out, chance)
    folder.mkdir(parents=True)
    splits = {"train": rows[2 * held_out :], "dev": rows[:held_out], "test": rows[held_out : 2 * held_out]}
    for split, part in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "task.toml").write_text(f'description = "{_ABOUT[folder.name]}"\nfamily = "styles"\nstop = ["\\n"]\n')


def _rows(style: str, count: int, chance: random.Random) -> list[dict[str, str]]:
    """Pairs whose prompts all differ."""
    found: dict[str, str] = {}
    while len(found) < count:
        words = _draw(chance)
        prompt = chance.choice(_OPENINGS).format(**words)
        sentences = [chance.choice(choices).format(**words) for choices in _STYLES[style] + _HOME]
        found[prompt] = f" {' '.join(sentences)}\n"
    return [{"prompt": prompt, "completion": completion} for prompt, completion in found.items()]


def _draw(chance: random.Random) -> dict[str, str]:
    """A person and a word of each sort."""
    name, kind, He, he, his = chance.choice(_PEOPLE)
    words = {sort: chance.choice(choices) for sort, choices in _WORDS.items()}
    return words | {"name": name, "kind": kind, "He": He, "he": he, "his": his}
