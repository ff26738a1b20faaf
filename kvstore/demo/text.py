"""The demo's prompts: the staff handbook of a ferry company that does not exist, and questions about it.

A long system prompt shared by many requests is what a prefix cache is for. `handbook` gives one of the wanted length,
`forked_handbook` another that begins with the same half and goes on differently, as two departments' handbooks would.
All of it is written for this demo.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

CountTokens = Callable[[str], int]

INTRODUCTION = "This is the handbook of Gullhaven Ferries."
INSTRUCTION = "Answer questions from this handbook, in one short sentence."

CHAPTERS = (
    "1. The company. Gullhaven Ferries carries people, post and freight between eleven islands and the mainland "
    "town of Gullhaven. The fleet is four ships: the Petrel, which takes cars; the Sandpiper and the Dunlin, which "
    "take foot passengers and bicycles; and the Old Heron, a freight barge that takes no passengers at all. The "
    "head office is the yellow house at the end of the long quay. It opens at seven in the morning and closes when "
    "the last ship is tied up.",
    "2. Tickets. A single ticket is valid on the day it is bought and on the following day. A return ticket is "
    "valid for thirty days. Children under six travel free, children under fifteen pay half, and nobody is asked "
    "to prove an age by more than a word. Islanders hold a green card and pay the islanders' price. A lost ticket "
    "is replaced once a year without a fee; after that the replacement costs two crowns. Tickets are sold at the "
    "quay, on board and by telephone.",
    "3. Boarding. Foot passengers board ten minutes before departure, cars twenty-five minutes before. The gangway "
    "is closed three minutes before departure and is not opened again, whoever is running along the quay. "
    "Wheelchairs, prams and people on crutches board first, over the stern ramp, and a member of the crew goes "
    "with them. Passengers who are late may use the same ticket on the next ship of the same line.",
    "4. Animals. Dogs travel free and stay on the open deck or in the aft saloon, on a lead. Cats and birds travel "
    "in a basket. Up to six sheep may travel on the Petrel if the mate is told the day before; more than six go "
    "with the Old Heron on Thursdays. Bees are welcome in a closed hive, at night only. A guide dog may go "
    "wherever its owner goes.",
    "5. Luggage. Each passenger may bring two pieces that can be carried by hand and one thing that is awkward: a "
    "ladder, a cello, a small boat. Anything heavier than forty kilograms is freight and goes to the freight shed, "
    "not up the gangway. Found things are kept at the head office for ninety days, in the blue cupboard, with a "
    "note of the ship and the date. Food that was found is not kept.",
    "6. Weather. When the wind at the outer light is above eighteen metres per second the Sandpiper and the Dunlin "
    "stay in port; the Petrel stays in port above twenty-four. The decision is the captain's alone and is never "
    "discussed at the counter. When a sailing is cancelled for weather, tickets stay valid until the passenger has "
    "travelled, and people who cannot get home sleep in the net loft, where there are blankets for forty.",
    "7. Delays. A delay of more than twenty minutes is announced on the quay and by telephone to the harbour "
    "masters of all islands ahead. After one hour, hot drinks are free on board. After three hours the fare is "
    "paid back in full, in coins if the passenger wishes, and the purser writes the reason in the red book. Ships "
    "wait for the mail, for the doctor and for brides; they do not wait for anybody else.",
    "8. Food. The galley of the Petrel serves soup, bread and fried herring from the first sailing until eight in "
    "the evening. The soup is pea soup on Thursdays. The smaller ships have a kettle, and the crew sells coffee "
    "and oat biscuits. Passengers may eat what they bring. Alcohol is not sold on board; what is brought on board "
    "stays closed.",
    "9. Safety. Life jackets are under every second bench and in the lockers marked with a white ring; there are "
    "as many for children as the ship may carry children. The crew shows how they are tied before the first "
    "sailing of each day. One long and seven short blasts mean that everyone walks, without luggage, to the deck "
    "with the green lamps. Smoking is allowed abaft the funnel only. Nobody sits on the rail.",
    "10. Freight. Goods are handed in at the freight shed before four in the afternoon and leave the next morning. "
    "Every piece has a label with the island, the name and the word fragile if it is. Fish, milk and medicine go "
    "first. Dynamite, gas bottles and paint in open tins are refused. Furniture is wrapped by the sender. The shed "
    "weighs everything, and its scale, not the one at home, is right.",
    "11. Bicycles and cars. A bicycle costs one crown and is tied to the starboard rail by its owner. Cars are "
    "driven on board by their drivers and parked by the hand signals of the deck crew, in first gear, with the "
    "brake on and the windows closed. Nobody stays in a car during the crossing. Electric cars may be charged on "
    "the Petrel at the two posts amidships; charging is free, and whoever comes first has the post.",
    "12. The night boat. On Fridays and Saturdays the Dunlin sails at half past eleven at night to Skarholm, "
    "Little Ansel and the Teeth, and is back at Gullhaven at five. The lights in the saloon are low and people "
    "speak quietly. Dogs sleep in the aft saloon. There is no galley, but the kettle is on. Tickets for the night "
    "boat are not half price for anybody.",
)

FIRST_ANNEX = 100  # pages the fork goes on with; far from those a long handbook uses

_ISLANDS = ("Skarholm", "Little Ansel", "the Teeth", "Marrow", "Eider Rock", "Long Tarn", "Quill", "Saint Oda", "Wick")
_BERTHS = ("stone quay", "wooden jetty", "floating stage", "old slip", "ferry ramp")
_GOODS = (
    "post and bread",
    "milk churns",
    "lamp oil",
    "school books",
    "seed potatoes",
    "herring barrels",
    "roof slates",
)
_KEEPERS = (
    "Mrs Aldous",
    "Old Tove",
    "the Brennan twins",
    "Captain Ruud",
    "Miss Okafor",
    "the schoolmaster",
    "Ines Dahl",
)
_WARNINGS = (
    "the current sets north on the ebb and the ship comes in slowly",
    "the upper step is under water at spring tide",
    "there is no lamp in winter, so the crew brings one",
    "the crane must not lift more than half a ton",
    "seals sleep on the ramp and are asked politely to leave",
)

FIRST_QUESTION = "How long is a return ticket valid?"
FOLLOW_UPS = (
    "And what does a bicycle cost?",
    "At what wind speed does the Petrel stay in port?",
    "Where are found things kept?",
)
FORK_QUESTION = "Who has the key of the shed at Skarholm?"


def handbook(num_tokens: int, count: CountTokens) -> str:
    """A system prompt of at least `num_tokens` tokens, ended after a whole paragraph."""
    return _closed(_until(num_tokens, count, [INTRODUCTION], _all_paragraphs()))


def forked_handbook(num_tokens: int, count: CountTokens) -> str:
    """A system prompt of about the same length that shares the first half of `handbook(num_tokens, count)`."""
    first_half = _until(num_tokens // 2, count, [INTRODUCTION], _all_paragraphs())
    return _closed(_until(num_tokens, count, [first_half], _pages(FIRST_ANNEX)))


def _closed(text: str) -> str:
    return f"{text}\n\n{INSTRUCTION}"


def _until(num_tokens: int, count: CountTokens, parts: list[str], more: Iterator[str]) -> str:
    while count("\n\n".join(parts)) < num_tokens:
        parts.append(next(more))
    return "\n\n".join(parts)


def _all_paragraphs() -> Iterator[str]:
    yield from CHAPTERS
    yield from _pages(1)


def _pages(first: int) -> Iterator[str]:
    """Register pages without end. Steps that share no factor with the lists' lengths keep neighbours different."""
    number = first
    while True:
        island = _ISLANDS[number % len(_ISLANDS)]
        yield (
            f"Register of landings, page {number}. At {island} the ship lies at the {_BERTHS[number % len(_BERTHS)]}, "
            f"in {2 + number % 7} metres of water, and stays {5 + number * 3 % 11} minutes. The key of the shed is "
            f"with {_KEEPERS[number * 2 % len(_KEEPERS)]}. The usual freight is {_GOODS[number * 3 % len(_GOODS)]}. "
            f"Note that {_WARNINGS[number * 2 % len(_WARNINGS)]}. The landing was last inspected in week "
            f"{1 + number * 5 % 52}."
        )
        number += 1
