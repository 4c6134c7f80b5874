"""Text that cannot steer a terminal."""

from __future__ import annotations

from torch_grood._text import plain


def test_what_steers_a_terminal_is_spelled_out() -> None:
    assert plain("a\x1b[31m\r\x9b\u202eb") == r"a\x1b[31m\r\x9b\u202eb"


def test_text_stays_in_its_line_and_as_it_is() -> None:
    assert plain("two\nlines\tand ± 0.5 °, 猫") == "two lines and ± 0.5 °, 猫"
    assert plain(7) == "7"
