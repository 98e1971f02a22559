"""How every command presents itself: options under titles, an example, `-h` and `--version`.

The packages of this program have generic names. Every command imports this file first, and ends with one clear line
where Python finds another distribution's `storage`, since nothing works then.
"""

from __future__ import annotations

import _thread
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import click

import storage
from student.lifeline import end_with_the_starter

if "LogitCache" not in getattr(storage, "__all__", ()):
    print(
        f"error: logit-cache needs its own package 'storage', but Python found another one "
        f"({', '.join(getattr(storage, '__path__', ['?']))}): install logit-cache in an environment of its own",
        file=sys.stderr,
    )
    raise SystemExit(2)

Decorator = Callable[[Any], Any]

HELP_NAMES = {"help_option_names": ["-h", "--help"]}


class Option(click.Option):
    """An option that the help lists under a title."""

    def __init__(self, *declarations: Any, title: str, **settings: Any) -> None:
        super().__init__(*declarations, **settings)
        self.title = title


class Command(click.Command):
    """A command whose help lists options by title, in the order in which titles first occur, untitled ones last.

    Its epilog, lines of a shell, is listed under "Example", unchanged. Ctrl-C ends it with one line and status 1.
    """

    resumes = False

    def invoke(self, ctx: click.Context) -> Any:
        started_by_a_command = end_with_the_starter()
        try:
            with _no_interrupt_is_lost():
                return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort):  # Abort: at a question
            # Nothing is in doubt any more: a second Ctrl-C does not wait for the end of threads and has no traceback.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if not started_by_a_command:
                print(interrupted(self.resumes), file=sys.stderr)
            raise SystemExit(1) from None

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

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.epilog:
            write_lines(formatter, "Example", self.epilog)


@contextlib.contextmanager
def _no_interrupt_is_lost() -> Iterator[None]:
    """Raise a KeyboardInterrupt again that Python ignores, since it came inside a `__del__` or a hook of `os.fork`.

    A DataLoader forks its worker processes: Ctrl-C at that moment would be printed and forgotten.
    """
    others = sys.unraisablehook
    coming: list[threading.Timer] = []

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            again = threading.Timer(0.1, _thread.interrupt_main)  # raised here it would be ignored once more
            again.daemon = True
            again.start()
            coming.append(again)
        else:
            others(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = others
        for again in coming:
            again.cancel()


def interrupted(resumes: bool) -> str:
    """The last line of a command that Ctrl-C has ended, below the ^C that a terminal shows."""
    line = "\n" if sys.stderr.isatty() else ""
    line += "error: interrupted"
    return f"{line}: what is finished is kept; run the same command again to resume" if resumes else line


def write_lines(formatter: click.HelpFormatter, title: str, text: str) -> None:
    """A section of a help whose lines are not filled."""
    with formatter.section(title):
        for line in text.splitlines():
            formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def under(title: str) -> Callable[..., Decorator]:
    """`click.option` for options under a title: ``targets = under("Targets"); @targets("--top-p", type=float)``."""
    return partial(click.option, cls=Option, title=title)


def command(example: str, cls: type[Command] = Command, *, resumes: bool = False, **settings: Any) -> Decorator:
    """`click.command` with `-h` and `--version`, whose help ends with `example`, one or more lines of a shell.

    resumes: the same command continues an interrupted one, which its last line then says.
    """

    def decorate(function: Any) -> Any:
        made = click.command(cls=cls, epilog=example, context_settings=HELP_NAMES, **settings)(function)
        made.resumes = resumes
        return click.version_option(package_name="logit-cache")(made)

    return decorate


def applied(options: tuple[Decorator, ...]) -> Decorator:
    """A decorator that gives a command these options, in their order."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def json_option(help: str = "Print JSON.") -> Decorator:
    """`--json`, as the parameter `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help=help)
