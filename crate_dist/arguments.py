"""Command lines of all programs: a parser whose refusals say what would do, and types of options, for argparse."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from crate_dist.config.hints import NOT_NEEDED, OPTIONS, meant_keys


class Parser(argparse.ArgumentParser):
    """A parser that shows texts as they are written, takes no abbreviations, and says in a line what is wrong.

    An abbreviation would mean something else on the day that another option begins like it. The help begins with the
    description, which has the examples; that of a subcommand first shows those of its program that are its own.
    """

    settings: Mapping[str, str] = {}
    """Meanings of the keys that --set takes, where the program has it."""
    elsewhere: Callable[[str, str], str] = staticmethod(lambda option, value: "")
    """Says how an option of another program, with its value, is given here; empty: it is none of its options."""

    passes_on = False
    """Whether options that the program does not have may be another program's, for parse_known_args."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **options})
        self.given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Does as argparse does, and remembers what was given."""
        self.given = sys.argv[1:] if args is None else list(args)
        for parser in self._all():
            if parser is not self:
                parser.description = with_examples(parser.description, parser.prog, self.description)
        return super().parse_known_args(args, namespace)

    def format_help(self) -> str:
        """Returns the help, with the options behind all that explains them."""
        text, self.description = self.description, None
        try:
            options = super().format_help()
        finally:
            self.description = text
        return f"{text.strip(chr(10))}\n\n{options}" if text else options

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2: options that it does not have explain whatever else is missing."""
        known = {option for parser in self._all() for option in parser._option_string_actions}
        unknown = [
            (number, text)
            for number, text in enumerate(self.given)
            if text.startswith("-")
            and not text[1:2].isdecimal()
            and text.partition("=")[0] not in known
            and text.strip("-")
            and not self.passes_on
        ]
        lines = [self._explain(number, text, known) for number, text in unknown]
        message = re.sub(r"argument (\S+): not allowed with argument (\S+)", r"\1 and \2: give one of them", message)
        message = re.sub(
            "(one of .* --arch .*) is required", r"\1 is required, for instance --arch crate_tiny", message
        )
        message = re.sub(r"invalid float value: (.*)", r"\1: expected a number, for instance 0.5", message)
        if not lines:
            stray = message.removeprefix("unrecognized arguments: ")
            lines = [message if stray == message else f"{stray}: belongs to no option{self._example(stray.split())}"]
        self.exit(2, "".join(f"error: {line}\n" for line in lines) + f"{self.prog} --help lists all options\n")

    def _all(self) -> Iterator[argparse.ArgumentParser]:
        yield self
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from action.choices.values()

    def _example(self, stray: Sequence[str]) -> str:
        before = list(self.given[: self.given.index(stray[0])]) if stray[0] in self.given else []
        if before[-2:-1] == ["--grid"]:
            return f"; values stand with their key, as in --grid {before[-1]}={','.join(stray)}"
        return "; a value stands with its option, as in --set train.epochs=90" if self.settings else ""

    def _explain(self, number: int, text: str, known: set[str]) -> str:
        option, equals, value = text.partition("=")
        if not equals and number + 1 < len(self.given) and not self.given[number + 1].startswith("-"):
            value = self.given[number + 1]
        given, word = f"{option} {value}".strip(), option.strip("-").replace("-", "_")
        word = word.lower() if len(word) > 1 else word  # -N and -n are two
        if said := self.elsewhere(option, value):
            return f"{given}: no such option; {said}"
        if "--run-dir" in known and word in NOT_NEEDED and f"{option}s" not in known:
            return f"{given}: no such option, {NOT_NEEDED[word]}"
        for ours in OPTIONS.get(word, ()):
            if ours in known:
                return f"{given}: no such option; here it is {ours} {value}".rstrip()
        if keys := [key for key in meant_keys(word, self.settings) if key in self.settings]:
            ways = (f"--set {key}={value or 'VALUE'} ({self.settings[key]})" for key in keys)
            return f"{given}: no such option; {', or '.join(ways)}"
        begun = [ours for ours in sorted(known) if len(option) > 3 and ours.startswith(option)]
        for ours in begun or difflib.get_close_matches(option, sorted(known), n=1, cutoff=0.7):
            return f"{given}: no such option; did you mean {ours}?"
        return f"{given}: no such option"


def with_examples(description: str | None, program: str, whole: str | None) -> str:
    """Returns the description of a part of a program, behind the lines in that of the `whole` that call this part."""
    own = description or ""
    lines = [line for line in (whole or "").splitlines() if f" {program} " in f"{line} ".replace("/", " ")]
    return own if f"{program} " in own else "\n".join([*lines, "", own]).rstrip()


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """Gives the type of an option that is a whole number from `low` to `high`, both of them allowed."""
    expected = f"a whole number from {low} " + ("on" if high is None else f"to {high}")

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low or (high is not None and int(text) > high):
            raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")
        return int(text)

    return parse


positive = whole_number(1)
"""The type of an option that counts something: a whole number from 1 on."""
