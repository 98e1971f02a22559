"""The cleaning of the BabyLM text families, as Baby Llama and BabyLlama-2 did it, with its defects repaired.

A family is the text of one source, such as `open_subtitles`; `FAMILIES` names its rules. A rule is a function from a
block of whole lines to the cleaned block, and the result for a line never depends on the lines around it (the one
exception, runs of blank lines, keeps a flag). So the result does not depend on how a file was cut into pieces, and
memory is bounded by a piece and a line. Every family's cleaning is idempotent.

docs/cleaning.md describes each family and where it departs from the original, which is mrclean.py of
github.com/timinar/BabyLlama (Timiryasov and Tastet 2023, 2024).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from storage.errors import InputError

# Changes whenever the output of a rule changes: files finished under other rules are then refused.
RULES_VERSION = 1
PLAIN = "plain"
# A rule needs the whole line, so this bounds the memory. A paragraph on one line has some thousand characters.
MOST_LINE_CHARACTERS = 1 << 20

Rule = Callable[[str], str]

_MARK = "\ufeff"
_SPACES = re.compile(r"[ \t\u00a0]{2,}|[\t\u00a0]")
_INNER_SPACES = re.compile(r"(?<=\S)(?:[ \t\u00a0]{2,}|[\t\u00a0])")
_SPACE_BEFORE_PUNCTUATION = re.compile(r" (?=[.,;!?])")
_SPACE_BEFORE_CLITIC = re.compile(r"(?<=\w) (?=(?:['’](?:s|m|d|re|ve|ll)|n['’]t)\b)", re.IGNORECASE)
_BLANK_LINE = re.compile(r"^[ \t\u00a0]*\n", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n{3,}")
_IN_BRACKETS = re.compile(r"\([^)]*\)")
_SENTENCE_END = re.compile(r"([.!?])")
_WORD = re.compile(r"[^\W\d_]+")
_LETTER_OR_DIGIT = re.compile(r"[^\W_]")
_LONELY_I = re.compile(r"\bi\b")
_HEADING_START, _HEADING_END = "= = = ", " = = ="
# All of Unicode's white space lies below this code point.
_HEADING_MARKS = "=" + "".join(c for c in map(chr, range(0x3001)) if c.isspace())


def extra_spaces(block: str) -> str:
    """Runs of spaces, tabs and no-break spaces become one space; a space before . , ; ! ? is removed."""
    return _SPACE_BEFORE_PUNCTUATION.sub("", _SPACES.sub(" ", block))


def split_clitics(block: str) -> str:
    """The space that a tokenizer put before 's, 'm, 'd, 're, 've, 'll and n't is removed."""
    return _SPACE_BEFORE_CLITIC.sub("", block)


def no_blank_lines(block: str) -> str:
    """Empty lines and lines of spaces are removed: a paragraph's end is one line feed."""
    return _BLANK_LINE.sub("", block)


def stripped_lines(block: str) -> str:
    """Spaces at both ends of a line are removed; other characters that end a line in Unicode become line feeds."""
    return "".join(f"{line.strip()}\n" for line in block.splitlines())


def bare_headings(block: str) -> str:
    """A heading `= = = Title = = =` becomes a line with the title alone, whatever its level."""
    if _HEADING_START not in block:
        return block
    return "".join(f"{_without_marks(line)}\n" for line in block.split("\n")[:-1])


def no_credits(block: str) -> str:
    """Lines that contain "subtitle", in any case, are removed: nearly all of them are credits."""
    if "subtitle" not in block.lower():
        return block
    return "".join(f"{line}\n" for line in block.split("\n")[:-1] if "subtitle" not in line.lower())


def sentence_case(block: str) -> str:
    """Lines in capitals become sentences; an l among capitals becomes the I that it was before OCR misread it.

    In capitals: at least half of the characters are upper case, not counting . ! ? and text in brackets, and the line
    is not in sentence case already.
    """
    return "".join(f"{_sentence_case(line)}\n" for line in block.split("\n")[:-1])


def tidy_spaces(block: str) -> str:
    """Spaces at ends of lines are removed, and runs of them inside a line become one. Indentation stays."""
    return _INNER_SPACES.sub(" ", "\n".join(map(str.rstrip, block.split("\n"))))


def _without_marks(line: str) -> str:
    if line.startswith(_HEADING_START) and line.endswith(_HEADING_END):
        return line.strip(_HEADING_MARKS) or line
    return line


def _sentence_case(line: str) -> str:
    # Only up to the last ")": the rest has no closing bracket, and searching it from every "(" is quadratic.
    closed = line.rfind(")") + 1
    counted = _SENTENCE_END.sub("", _IN_BRACKETS.sub("", line[:closed]) + line[closed:])
    if not counted or 2 * sum(map(str.isupper, counted)) < len(counted) or line == _recased(line):
        return line
    return _recased(_WORD.sub(_with_capital_i, line))


def _with_capital_i(word: re.Match[str]) -> str:
    """An l among capitals, or alone, was an I; in a word with other small letters, and in "we'll", it is an l."""
    text = word[0]
    return text.replace("l", "I") if text == "l" or text.replace("l", "").isupper() else text


def _recased(line: str) -> str:
    return _LONELY_I.sub("I", "".join(map(_capitalised, _SENTENCE_END.split(line.lower()))))


def _capitalised(sentence: str) -> str:
    first = _LETTER_OR_DIGIT.search(sentence)
    # A letter such as ß has no capital of one character; capitals of two would not be stable.
    if first is None or len(first[0].upper()) != 1:
        return sentence
    return sentence[: first.start()] + first[0].upper() + sentence[first.end() :]


@dataclass(frozen=True, slots=True)
class Family:
    """How one source is cleaned: its rules in their order, and whether runs of blank lines become one blank line."""

    rules: tuple[Rule, ...]
    one_blank_line: bool = False


_CHILDES = Family((extra_spaces,))
_SIMPLE_WIKI = Family((no_blank_lines,))
_AS_IT_IS = Family(())

FAMILIES: dict[str, Family] = {
    "aochildes": _CHILDES,
    "bnc_spoken": Family((extra_spaces, no_blank_lines)),
    "cbt": Family((extra_spaces, split_clitics)),
    "childes": _CHILDES,
    "children_stories": _AS_IT_IS,
    "gutenberg": _AS_IT_IS,
    "open_subtitles": Family((no_credits,)),
    "qed": Family((stripped_lines, sentence_case)),
    "simple_wiki": _SIMPLE_WIKI,
    "simple_wikipedia": _SIMPLE_WIKI,
    "switchboard": _AS_IT_IS,
    "wikipedia": Family((stripped_lines, bare_headings, no_blank_lines)),
    PLAIN: Family((tidy_spaces,), one_blank_line=True),
}


def family_of(name: str) -> str:
    """The family of a file by its base name: the longest family name that it contains, else `plain`."""
    found = [family for family in FAMILIES if family in name.lower() and family != PLAIN]
    return max(found, key=len, default=PLAIN)


def clean_text(text: str, family: str) -> str:
    """A whole text, cleaned as a file of that family."""
    cleaner = Cleaner(family)
    return cleaner.feed(text) + cleaner.close()


class Cleaner:
    """Cleans one text that comes in pieces, cut anywhere: `feed` and `close` return the text finished by then.

    Before the rules, for every family: byte-order marks are removed, a carriage return with or without a line feed
    becomes a line feed, and the last line gets one if it has none. Raises InputError for a line of more than
    `MOST_LINE_CHARACTERS`; `where` names the text in it.
    """

    def __init__(self, family: str, where: str = "text") -> None:
        if family not in FAMILIES:
            raise InputError(f"there is no family {family!r}; there are {', '.join(FAMILIES)}")
        self._rules = FAMILIES[family].rules
        if FAMILIES[family].one_blank_line:
            self._rules = (*self._rules, _OneBlankLine())
        self._where = where
        self._rest, self._return = "", ""
        self.lines_in = self.lines_out = 0

    def feed(self, text: str) -> str:
        text = self._return + text.replace(_MARK, "")
        # A line feed may follow it in the next piece, and belong to it.
        self._return = "\r" if text.endswith("\r") else ""
        text = self._rest + text.removesuffix("\r").replace("\r\n", "\n").replace("\r", "\n")
        end = text.rfind("\n") + 1
        self._rest = text[end:]
        self._check(text)
        return self._clean(text[:end])

    def close(self) -> str:
        last = self._rest + "\n" if self._rest or self._return else ""
        self._rest = self._return = ""
        return self._clean(last)

    def _check(self, text: str) -> None:
        if len(text) <= MOST_LINE_CHARACTERS:
            return
        for number, line in enumerate(text.split("\n"), self.lines_in + 1):
            if len(line) > MOST_LINE_CHARACTERS:
                raise InputError(
                    f"{self._where}: line {number:,} has more than {MOST_LINE_CHARACTERS:,} characters, and text is "
                    f"cleaned line by line: break it into lines first"
                )

    def _clean(self, block: str) -> str:
        self.lines_in += block.count("\n")
        if block:
            for rule in self._rules:
                block = rule(block)
        self.lines_out += block.count("\n")
        return block


class _OneBlankLine:
    """Runs of blank lines become one; those before the first line of text and after the last are removed.

    A blank line is written when text follows it, which may be in a later block.
    """

    def __init__(self) -> None:
        self._started = self._blank = False

    def __call__(self, block: str) -> str:
        text = block.strip("\n")
        if not text:
            self._blank |= self._started and bool(block)
            return ""
        before = "\n" if self._started and (self._blank or block.startswith("\n")) else ""
        self._started, self._blank = True, block.endswith("\n\n")
        return before + _BLANK_LINES.sub("\n\n", text) + "\n"
