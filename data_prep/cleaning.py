"""Which documents a corpus keeps."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class CleanOptions:
    """Which documents are kept. Lengths in characters, shares of characters."""

    deduplicate: bool = False  # the first of several equal texts stays
    min_characters: int = 1
    max_characters: int | None = None
    min_letters: float = 0.0  # share of letters, digits and blanks
    must_match: str | None = None  # regular expressions, searched anywhere in the text
    must_not_match: str | None = None
    skip_bad_records: bool = False  # records that cannot be read: count them instead of stopping

    def __post_init__(self):
        """Raises ValueError if a regular expression is none."""
        for name in ("must_match", "must_not_match"):
            try:
                re.compile(getattr(self, name) or "")
            except re.error as error:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option} {getattr(self, name)!r} is no regular expression: {error}") from None

    def reason_to_drop(self, text: str) -> str | None:
        if len(text) < self.min_characters or not text:
            return "too_short"
        if self.max_characters is not None and len(text) > self.max_characters:
            return "too_long"
        if self.min_letters and sum(c.isalnum() or c.isspace() for c in text) < self.min_letters * len(text):
            return "few_letters"
        if self.must_match and not re.search(self.must_match, text):
            return "no_match"
        if self.must_not_match and re.search(self.must_not_match, text):
            return "match"
        return None
