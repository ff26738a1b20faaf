"""Text of about a given number of tokens, the same for the same name and seed.

Made of common English words, nearly all of them one token in every tokenizer in use; a full stop after twelve words is
one more. Two texts of different names differ from the first words on, so they share no block.
"""

from __future__ import annotations

import random

SENTENCE_WORDS = 12

_LIST = """
time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work government number night point home water room mother
area money story fact month lot right study book eye job word business issue side kind head house service friend
father power hour game line end member law car city community name president team minute idea kid body information
back parent face level office door health person art war history party result change morning reason research girl
guy moment air teacher force education foot boy age policy music process market sense nation plan college interest
death experience effect use class control care field development role effort rate heart drug show leader light
voice wife police mind price report decision son view relationship town road arm difference value building action
season society tax director position player record paper space ground form event official matter center couple site
project activity star table need court oil situation cost industry figure street image phone data picture practice
piece land product doctor wall patient worker news test movie north love support technology step baby computer type
attention film tree source hair window culture chance brother energy period course summer plant opportunity term
letter condition choice rule daughter south husband floor campaign material population call economy hospital church
risk fire future bank
"""
WORDS = tuple(_LIST.split())


def make_text(seed: int, name: str, num_tokens: int) -> str:
    """Text of about `num_tokens` tokens (usage in the answers says how many exactly); "" for none."""
    chosen = random.Random(f"{seed}/{name}")
    text = ""
    for token in range(num_tokens):
        if token % (SENTENCE_WORDS + 1) == SENTENCE_WORDS:
            text += "."
        else:
            text += f" {chosen.choice(WORDS)}"
    return text.lstrip()
