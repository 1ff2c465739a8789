"""Prompts of a wanted length, without a tokenizer.

A completion's prompt may be token ids, which has exactly the wanted length on every model. Where
only text is taken (chat), it is made of short common words, each of which is one token with its
leading space in the vocabularies of today's models; what the server counted is in the report.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

DEFAULT_VOCAB_SIZE = 20_000
"""Few models have fewer token ids."""

MAX_SPECIAL_IDS = 1_000
"""The first ids of a vocabulary are special tokens and single bytes."""

_COMMON_WORDS = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from "
    "or had an they which one you were all her she there would their we him been has when who will "
    "no more if out so up said what its about than into them can only other time new some could "
    "these two may first then do any like my now over such our man me even most made after also "
    "did many before must through back years where much your way well down should because each "
    "just those people how too little state good very make world still see own men work long here "
    "get both between life being under never day same another know year while last might us great "
    "old off come since go against came right take three"
)


def token_id_prompts(
    length: int, *, seed: int, vocab_size: int = DEFAULT_VOCAB_SIZE
) -> Iterator[list[int]]:
    """Prompts of `length` random token ids below `vocab_size`, without end.

    Each is different from the first token on, so that no server finds one in a cache of prefixes.
    """
    choose = random.Random(seed)
    ids = range(min(MAX_SPECIAL_IDS, vocab_size // 10), vocab_size)
    while True:
        yield choose.choices(ids, k=length)


def text_prompts(length: int, *, seed: int) -> Iterator[str]:
    """Prompts of `length` random common words, without end."""
    choose, words = random.Random(seed), _COMMON_WORDS.split()
    while True:
        yield " ".join(choose.choices(words, k=length))
