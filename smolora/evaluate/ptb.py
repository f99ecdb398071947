"""Tokenise captions as the COCO caption evaluation does: lower-case Penn Treebank tokens without punctuation.

That evaluation runs Stanford's PTBTokenizer, a Java program. One regular expression reproduces it on captions: the two
give the same tokens on those of `tests/golden/ptb.json`. A known difference is a caption that ends with a single letter
and a full stop ("plan B."), for which the Java program looks at the first word of the next caption.
"""

from __future__ import annotations

import re

# Dropped after tokenising. Brackets stay, because they have lower-case names by then.
DROPPED = {"''", "'", "``", "`", '"', "‘", "“", "”", ".", "?", "!", ",", ":", "-", "--", "–", "—", "...", "…", ";"}
NAMES = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    "£": "#",
    "€": "$",
    "¢": "cents",
    "½": "1/2",
    "¼": "1/4",
    "¾": "3/4",
}

_KEEP_FULL_STOP = """
    jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri calif tex ariz pa md
    mr mrs ms messrs mme dr drs prof sr jr esq rev gen col sgt capt lt maj adm pvt gov sen rep
    st ave blvd rd mt ft rt ct sq bldg co corp inc ltd bros dept univ assn assoc est tel ext vs etc al cf seq ph[.]d ste
"""
_KEEP_BEFORE_NUMBER = "no|nos|fig|pp|art|ca"
_SPLIT = (
    "can(?=not)|gon(?=na)|got(?=ta)|wan(?=na)|lem(?=me)|gim(?=me)|'t(?=is|was)|y'(?=all)"  # split before the lookahead
)
_ENDING = r"(?:n't|'(?:s|m|d|ll|re|ve))\b"

TOKEN = re.compile(
    rf"""
      \(\d{{2,3}}\) [ ]? \d{{3,4}}[- ]\d{{4}}             # (555) 123-4567
    | (?:https?://|www\.) [^\s"<>()]* [\w/]             # an address
    | [\w.+-]+ @ [\w-]+ (?:\.[\w-]+)+                   # of mail
    | </?[a-z]\w*>                                      # a tag
    | \b (?:[a-z]\.)+                                   # u.s.
    | \b (?:{"|".join(_KEEP_FULL_STOP.split())}) \.                       # mr.
    | \b (?:{_KEEP_BEFORE_NUMBER}) \. (?=[ ]?\d)        # no. 7
    | [\#@][a-z_]\w*                                    # a hashtag, a handle
    | {_ENDING}
    | \b \d+ (?:[.,:/]\d+)+ | (?<![\w.]) [.+]\d+        # 1,000 3.5 10:30 1/2 .5 +2
    | (?<!\w) (?:{_SPLIT}) (?=\w+\b)                    # can not, 't is
    | '\d\ds?\b (?!') | 'n'(?!\w)                       # '95, rock 'n' roll
    | \b \w+? (?={_ENDING})                             # do n't, person 's
    | \b [odl]'\w+                                      # o'clock
    | \b [a-z]+\.[a-z]+\b                               # a.b, as in an address
    | \w+ (?:[-&/]\w+)*                                 # red-haired, at&t, and/or
    | [?!]{{2,}} | \.{{2,}} | -{{2,}} | \*+ | `` | ''
    | \S
    """,
    re.VERBOSE,
)


def tokenize(caption: str) -> list[str]:
    """The tokens of a caption."""
    tokens = []
    for token in TOKEN.findall(caption.lower().replace("’", "'")):
        if token.startswith("(") and len(token) > 1:
            tokens += token.replace("(", NAMES["("]).replace(")", NAMES[")"]).split()
        elif token not in DROPPED and token.strip(".-"):
            tokens.append(NAMES.get(token, token))
    return tokens
