"""Writes `train.csv` and `test.csv` beside this file: invented tickets to a shop, the team each is for, and why.

Every sentence was written for this file. A ticket has one problem, which decides its team, and mostly also a remark
about what another team did well. A third of the problems in test are worded as nowhere in train.

python configs/tickets/make_tickets.py
"""

import csv
import random
from pathlib import Path

FOLDER = Path(__file__).parent

ROWS = {"train": 220, "test": 80}

EXPLAINED = 0.7
"""The part of the training rows that somebody has explained."""

PRODUCTS = ("lamp", "kettle", "desk", "backpack", "headset", "bicycle", "mixer", "heater", "camera", "chair")

# team -> why, and ways to say it
PROBLEMS: dict[str, dict[str, tuple[str, ...]]] = {
    "billing": {
        "The customer paid twice for the {product}.": (
            "You took the money for the {product} two times.",
            "My card shows two payments for one {product}.",
            "I see the price of the {product} twice on my bank statement.",
        ),
        "The customer waits for a refund of the {product}.": (
            "I sent the {product} back weeks ago and my money is not here.",
            "Where is the refund for the {product}?",
            "You promised to pay me back for the {product}, but nothing has come.",
        ),
        "The price of the {product} is not the one that was offered.": (
            "The {product} was on sale, yet I had to pay the full price.",
            "The voucher for the {product} was not taken off the total.",
            "The bill for the {product} is higher than the offer.",
        ),
    },
    "shipping": {
        "The {product} has not arrived.": (
            "My {product} should have been here on Monday.",
            "I am still waiting for the {product}.",
            "The tracking page has not moved for a week and there is no {product}.",
        ),
        "The {product} went to another address.": (
            "The driver left the {product} at a house that is not mine.",
            "You sent the {product} to my old street.",
            "A neighbour three streets away has my {product}.",
        ),
        "Another thing than the {product} was in the box.": (
            "I opened the box and there was no {product} but a carpet.",
            "The box holds somebody else's order and not my {product}.",
            "I got a box of toys in place of the {product}.",
        ),
    },
    "account": {
        "The customer cannot log in.": (
            "Your page says that my password is wrong.",
            "I cannot log in since this morning.",
            "The site asks for a code that never reaches my phone.",
        ),
        "The customer wants other details in the profile.": (
            "Please change the e-mail in my profile.",
            "I have a new name and the profile shows the old one.",
            "How do I put my new phone number into the profile?",
        ),
        "The customer wants the profile to be deleted.": (
            "Please delete all that you know about me.",
            "Close my profile and stop your letters.",
            "I want to leave, so please remove my data.",
        ),
    },
    "repairs": {
        "The {product} came broken.": (
            "The {product} has a crack on one side.",
            "A part of the {product} is bent.",
            "I unpacked the {product} and a piece fell off.",
        ),
        "The {product} stopped working.": (
            "The {product} worked for two days and now it is dead.",
            "Since yesterday the {product} does nothing at all.",
            "The {product} makes a loud noise and then stops.",
        ),
        "A part of the {product} is missing.": (
            "There are no screws for the {product}.",
            "The manual of the {product} lists a part that I do not have.",
            "One piece of the {product} is not in the bag.",
        ),
    },
}

# team -> what it did well, and ways to say it
PRAISE: dict[str, dict[str, tuple[str, ...]]] = {
    "billing": {
        "The payment went well.": ("The payment was easy.", "The bill is correct.", "Thank you for the quick refund."),
    },
    "shipping": {
        "The parcel came in time.": ("The box came on Monday as promised.", "The driver was early and friendly."),
    },
    "account": {
        "The profile works.": ("I could log in without trouble.", "My new password works."),
    },
    "repairs": {
        "The {other} works.": ("The {other} from last year still works.", "No part of the {other} was missing."),
    },
}

OPENINGS = ("Hello.", "Good morning.", "Dear team.", "Hi there.")
CLOSINGS = ("Please help.", "Thank you.", "I wait for your answer.", "Best wishes.")
SUBJECTS = ("question", "problem", "my order", "please help", "urgent")


def ticket(draw: random.Random, split: str) -> dict[str, str]:
    """One ticket without an id; the last way to say each problem is kept for test."""
    team = draw.choice(sorted(PROBLEMS))
    product, other = draw.sample(PRODUCTS, 2)
    why, ways = draw.choice(sorted(PROBLEMS[team].items()))
    sentences = [draw.choice(ways if split == "test" else ways[:-1])]
    if draw.random() < 0.8:
        good = draw.choice(sorted(set(PRAISE) - {team}))
        fine, ways = draw.choice(sorted(PRAISE[good].items()))
        sentences.insert(draw.randrange(2), draw.choice(ways))
        why = f"{why} {fine}"
    text = " ".join([draw.choice(OPENINGS), *sentences, draw.choice(CLOSINGS)])
    filled = {name: value.format(product=product, other=other) for name, value in (("message", text), ("why", why))}
    return {"subject": draw.choice(SUBJECTS), **filled, "team": team}


def main() -> None:
    """Write both files; no message is in both, or twice in one."""
    draw = random.Random(0)  # noqa: S311 - invented rows, not a secret
    seen: set[str] = set()
    for split, count in ROWS.items():
        rows: list[dict[str, str]] = []
        while len(rows) < count:
            row = ticket(draw, split)
            if row["message"] not in seen:
                seen.add(row["message"])
                if split == "test" or draw.random() > EXPLAINED:
                    row["why"] = ""
                rows.append({"id": f"{split}-{len(rows) + 1:03}", **row})
        with (FOLDER / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["id", "subject", "message", "team", "why"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
