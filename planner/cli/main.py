"""The `loraplan` command: its subcommands, loaded when they are called, and the one place that reports errors."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

_COLLECTS = gc.isenabled()
gc.disable()  # importing leaves no garbage, and looking for it there takes 2 ms
import click  # noqa: E402

if _COLLECTS:
    gc.enable()

EXIT_NO_ANSWER = 2

_COMMANDS = {
    "fits": ("planner.cli.fits", "fits"),
    "trace": ("planner.cli.trace", "trace"),
    "table": ("planner.cli.table", "table"),
    "max": ("planner.cli.limits", "max_"),
    "pick": ("planner.cli.limits", "pick"),
    "compare": ("planner.cli.compare", "compare"),
    "report": ("planner.cli.report", "report"),
    "lint": ("planner.cli.lint", "lint"),
    "models": ("planner.cli.catalogue", "models"),
    "gpus": ("planner.cli.catalogue", "gpus"),
    "validate": ("planner.cli.validate", "validate"),
    "calibrate": ("planner.cli.calibrate", "calibrate"),
    "data": ("planner.cli.data", "data"),
    "lora": ("planner.cli.lora", "lora"),
    "simulate": ("planner.cli.simulate", "simulate"),
    "export": ("planner.cli.export", "export"),
}
"""Command -> module and attribute; a command's module is imported only when the command is used or listed."""


class Loraplan(click.Group):
    """The top group: loads subcommands lazily and turns every failure into one line and exit code 2."""

    _own_help: click.Option | None = None

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        """Return the option that prints the help, the same one every time."""
        if self._own_help is None:
            from planner.cli.options import help_option

            self._own_help = help_option(self, ctx)
        return self._own_help

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of the help."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, but an unknown command names the known ones."""
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            from planner.base.errors import unknown

            raise unknown("command", args[0], _COMMANDS)
        return super().resolve_command(ctx, args)

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        """Run, flush and exit: 0 yes, 1 no, 2 could not answer."""
        if "_LORAPLAN_COMPLETE" in os.environ:  # a shell asks for completions
            super().main(args, prog_name or "loraplan", **extra)
        arguments = list(sys.argv[1:] if args is None else args)
        _check_streams()
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a terminal of another encoding shows escapes instead of failing
                stream.reconfigure(errors="backslashreplace")
        try:
            code = self._run(arguments, prog_name or "loraplan")
            sys.stdout.flush()
        except BaseException as error:  # noqa: BLE001 - the only place where errors become a line of text
            code = _report(error, arguments)
        sys.exit(code)

    def _run(self, arguments: list[str], prog_name: str) -> int:
        """Call the command; click's own `main` would answer a broken pipe and an interruption in its own way."""
        if not arguments:
            click.echo(self.get_help(click.Context(self, info_name=prog_name, **self.context_settings)), err=True)
            return EXIT_NO_ANSWER
        try:
            with self.make_context(prog_name, list(arguments)) as ctx:
                code = self.invoke(ctx)
        except click.exceptions.Exit as stop:
            return stop.exit_code
        return code if isinstance(code, int) else 0


def _report(error: BaseException, arguments: list[str]) -> int:
    """Print what went wrong on one line (as a JSON document too, if JSON was asked for); return the exit code."""
    if isinstance(error, BrokenPipeError):
        _abandon_stdout()
        _complain("broken pipe: the reader of the output left before its end; write to a file to keep all of it")
        return EXIT_NO_ANSWER
    if os.environ.get("LORAPLAN_DEBUG"):
        import traceback

        traceback.print_exception(error)
    kind, message = _explain(error)
    try:
        if wants_json(arguments):
            import json

            document = {"schema_version": 1, "error": {"type": kind, "message": message}}
            click.echo(json.dumps(document, indent=2))
            sys.stdout.flush()
    except OSError:
        _abandon_stdout()
    _complain(message)
    return EXIT_NO_ANSWER


def _complain(message: str) -> None:
    with contextlib.suppress(OSError):  # stderr may have lost its reader too
        click.echo(f"error: {message}", err=True)


def _explain(error: BaseException) -> tuple[str, str]:
    """Return the kind of an error and its message on one line."""
    from planner.base.errors import PlannerError, one_line

    kind = type(error).__name__
    if isinstance(error, PlannerError):
        message = str(error)
    elif isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "loraplan"
        message = f"{error.format_message().rstrip('.')}; see {command} --help"
    elif isinstance(error, click.ClickException):
        message = error.format_message()
    elif isinstance(error, (KeyboardInterrupt, click.exceptions.Abort)):
        kind, message = "Interrupted", "interrupted"
    elif isinstance(error, OSError):
        if isinstance(getattr(error, "filename", None), str):
            message = f"{one_line(error.filename, 200)}: {error.strerror}; check the path and its permissions"
        else:
            _abandon_stdout()
            message = f"cannot read or write: {error.strerror or error}"
    elif isinstance(error, RecursionError):
        message = "the input is nested too deeply to be read; check the file"
    elif isinstance(error, MemoryError):
        message = "this machine has not enough memory to answer; shrink the input"
    else:
        message = f"internal error ({kind}: {error}); please report it, LORAPLAN_DEBUG=1 shows where"
    return kind, one_line(" ".join(message.split()), 1000)


def wants_json(arguments: Sequence[str]) -> bool:
    """Return whether the arguments ask for JSON; read here because a usage error comes before parsing is done."""
    chosen = ""
    for place, word in enumerate(arguments):
        if word == "--":
            break
        if word.startswith("--format="):
            chosen = word.partition("=")[2]
        elif word == "--format" and place + 1 < len(arguments):
            chosen = arguments[place + 1]
    return chosen.lower() == "json"


def _check_streams() -> None:
    """Python has no stream object for one that the caller closed (`>&-`): say so, or do without messages."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open until the process ends
    if sys.stdout is None:
        sys.stderr.write("error: standard output is closed; redirect it to a file or to /dev/null\n")
        sys.exit(EXIT_NO_ANSWER)


def _abandon_stdout() -> None:
    """Point stdout at nowhere, so that the interpreter's own flush at exit does not fail a second time."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):
        pass


def _version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from planner import __version__

        click.echo(f"loraplan {__version__}")
        ctx.exit()


@click.group(
    cls=Loraplan,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version.")
def cli() -> None:
    """Does a LoRA or QLoRA fine-tuning run fit on a GPU?

    \b
    Example:
      loraplan fits meta-llama/Llama-3.1-8B --gpu rtx-4090 --method qlora

    \b
    Exit codes: 0 it fits, 1 it does not fit or is too close to call, 2 could not answer.
    """


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit; the entry point of the installed command.

    Python looks for unreachable cycles after every 700 new objects, which finds nothing here while an answer is put
    together: reference counts end what the engine makes. A process of its own looks after every 100,000, so that a
    long table stays small, and at its end not at all.
    """
    if args is not None:
        cli.main(args)
    gc.set_threshold(100_000, 20, 20)
    try:
        cli.main()
    finally:
        gc.freeze()


if __name__ == "__main__":
    main()
