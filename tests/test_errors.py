"""common.errors: a sentence can be shown, whatever it quotes."""

import pickle

from common.errors import UserError


def test_a_sentence_is_kept_as_it_is() -> None:
    sentence = "data/Käfer\u202f1\u3000.jpg: expected an image; replace it."  # blanks that are no ASCII
    assert str(UserError(sentence)) == sentence


def test_what_could_rule_a_terminal_is_escaped() -> None:
    assert str(UserError("a\x1b[2J\nb\u202e\ud800")) == "a\\x1b[2J\\nb\\u202e\\ud800"


def test_very_long_ones_lose_their_middle() -> None:
    shown = str(UserError(f"begin {'x' * 9999} end"))
    assert len(shown) < 2010
    assert shown.startswith("begin xxx")
    assert shown.endswith("xxx end")


def test_it_survives_its_way_between_processes() -> None:
    error = UserError("a\tb" + "c" * 5000)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
