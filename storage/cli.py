"""How every command presents itself: options under titles, an example, `-h` and `--version`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import click

Decorator = Callable[[Any], Any]


class Option(click.Option):
    """An option that the help lists under a title."""

    def __init__(self, *declarations: Any, title: str, **settings: Any) -> None:
        super().__init__(*declarations, **settings)
        self.title = title


class Command(click.Command):
    """A command whose help lists options by title, in the order in which titles first occur, untitled ones last."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx)
            if record is not None and not isinstance(option, click.Argument):
                title = option.title if isinstance(option, Option) else "Options"
                sections.setdefault(title, []).append(record)
        for title in sorted(sections, key=lambda title: title == "Options"):
            with formatter.section(title):
                formatter.write_dl(sections[title])


def under(title: str) -> Callable[..., Decorator]:
    """`click.option` for options under a title: ``targets = under("Targets"); @targets("--top-p", type=float)``."""
    return partial(click.option, cls=Option, title=title)


def command(example: str, cls: type[Command] = Command, **settings: Any) -> Decorator:
    """`click.command` with `-h`, `--version`, and at the end of the help an example: lines of a shell."""

    def decorate(function: Any) -> Any:
        epilog = "\b\nExample:\n" + "\n".join(f"  {line}" for line in example.splitlines())
        made = click.command(cls=cls, epilog=epilog, context_settings=HELP_NAMES, **settings)(function)
        return click.version_option(package_name="logit-cache")(made)

    return decorate


def applied(options: tuple[Decorator, ...]) -> Decorator:
    """A decorator that gives a command these options, in their order."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


HELP_NAMES = {"help_option_names": ["-h", "--help"]}
