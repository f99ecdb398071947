"""Penn Treebank tokens of captions, beside those of the Java program."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from smolora.evaluate import ptb
from support.scoring import GOLDEN


def test_tokens_are_those_of_the_java_tokenizer():
    pairs = json.loads((GOLDEN.parent / "ptb.json").read_text())
    wrong = [caption for caption, tokens in pairs if ptb.tokenize(caption) != tokens.split()]
    assert len(pairs) > 400 and not wrong


def test_the_java_tokenizer_itself_where_it_is():
    tokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer()
    if shutil.which("java") is None:
        pytest.skip("there is no java")
    pairs = json.loads((GOLDEN.parent / "ptb.json").read_text())
    # after a lone letter with a full stop the next caption's first word decides, and here other captions follow
    pairs = [pair for pair in pairs if not re.search(r"\b[A-Za-z]\.$", pair[0])]
    theirs = tokenizer.tokenize({i: [{"caption": caption}] for i, (caption, _) in enumerate(pairs)})
    assert [theirs[i][0].split() for i in range(len(pairs))] == [ptb.tokenize(caption) for caption, _ in pairs]
