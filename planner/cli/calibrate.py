"""`loraplan calibrate`: measure real bursts on this machine, fit the time model to them, look at calibrations."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from planner.cli.asking import settings_of
from planner.cli.from_config import ShowKeys, config_options, files_of, show_keys, take_job
from planner.cli.options import format_option
from planner.cli.terminal import echo_notes

if TYPE_CHECKING:  # a command's help needs none of these
    from calibrate.fit.measurements import Run
    from calibrate.measure.grid import Burst
    from calibrate.measure.harness import Progress, Settings
    from planner.timing.coefficients import Calibration

EXIT_FAILED = 3
"""Bursts were run and none of them succeeded."""
JOB_BURSTS = 2
"""Bursts of one job by default: itself and a repeat, which says how much two runs differ."""
_PATH = click.Path(path_type=Path)

_SUFFIXES = {"s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}


def parse_duration(text: str) -> float:
    """Parse `8m`, `90s`, `1h` (a bare number: seconds).

    Raises:
        InvalidInput: not a time, or not between a second and a day.
    """
    from planner.base.errors import InvalidInput, one_line

    match = re.fullmatch(r"\s*(\d{1,6}(?:\.\d{1,6})?)\s*([smh]?)\s*", text)
    value = float(match[1]) * _SUFFIXES[match[2]] if match else 0.0
    if not 1 <= value <= 86400:
        raise InvalidInput(f"--budget is {one_line(text)!r}; write a time from 1s to 24h, for example 8m")
    return value


class Grouped(click.Group):
    """A group whose unknown commands name the known ones."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with the project's own error."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            from planner.base.errors import unknown

            raise unknown("calibrate command", args[0], self.commands)
        return super().resolve_command(ctx, args)


@click.group(cls=Grouped)
def calibrate() -> None:
    """Measure real training bursts on this machine and fit the time model to them.

    Predictions then use the newest calibration of their card by themselves. Nothing on the machine is changed: no
    clocks, no power limit, no MIG; files are written under --out or the user's data folder only.

    \b
    Example:
      loraplan calibrate doctor --device cpu
    """


@calibrate.command()
@click.option("--device", default="cuda:0", show_default=True, help="cuda:N or cpu.")
@format_option
def doctor(device: str, style: str) -> int:
    """Say what measuring needs, what of it is missing and how to get it.

    \b
    Example:
      loraplan calibrate doctor --device cpu

    \b
    Exit codes: 0 bursts can run, 1 something is missing, 2 could not answer.
    """
    from calibrate.measure.doctor import examine, ready
    from planner.report.calibration_report import findings

    found = examine(device)
    click.echo(findings([(f.what, f.value, f.ok, f.remedy) for f in found], style), nl=False)
    return 0 if ready(found) else 1


@calibrate.command()
@click.option("--device", default="cuda:0", show_default=True, help="cuda:N or cpu.")
@click.option("--budget", default="8m", show_default=True, help="Time for all bursts: 90s, 8m, 1h.")
@click.option("--out", type=_PATH, help="Folder of the results; by default a new one in the user's data folder.")
@click.option("--threads", type=click.IntRange(1, 1024), default=1, show_default=True, help="CPU threads per burst.")
@click.option("--check", is_flag=True, help="Run shapes that the fitting grid does not have (calibrate validate).")
@click.option("--share", is_flag=True, help="Go on although other processes use the GPU.")
@click.option("--bursts", type=click.IntRange(1), help="At most so many bursts; with --from 2 by default.")
@click.option("--seed", type=click.IntRange(0), help="Draw other mixed bursts than the usual ones.")
@config_options
def run(
    device: str, budget: str, out: Path | None, threads: int, check: bool, share: bool, bursts: int | None,
    seed: int | None, **given: Any,
) -> int:  # fmt: skip
    """Run bursts of real training steps, as many as the budget allows, each in a process of its own.

    The same command with the same --out goes on where it stopped. On a CPU a burst has one thread by default and its
    clock counts the time that the thread runs, so that other load on the machine does not count.

    With --from, exactly the job of a training config is measured, and once more, instead of the grid: its model with
    random weights, its settings, rows of full length. calibrate validate then compares it with the prediction.

    \b
    Examples:
      loraplan calibrate run --device cuda:0 --budget 8m --out ./h100
      loraplan calibrate run --device cpu --budget 6m --out ./cpu
      loraplan calibrate run --from qlora.yml --device cuda:0 --out ./mine

    \b
    Exit codes: 0 there are results, 2 could not run, 3 every burst failed.
    """
    from calibrate.fit.measurements import RunFolder
    from calibrate.measure import harness
    from calibrate.measure.device import open_device
    from calibrate.measure.job import one_job
    from planner.base.errors import require

    job = take_job(files_of(given), settings_of({}), given["show_keys"])
    if isinstance(job, ShowKeys):
        return show_keys(job.job, "table")
    require("a burst", "calibrate", "torch", "transformers", "peft")
    opened = open_device(device, threads)
    settings = harness.Settings(
        device=opened.name, budget_s=parse_duration(budget), threads=threads, check=check or job is not None,
        share=share, most=bursts or (JOB_BURSTS if job else 0), seed=seed,
    )  # fmt: skip
    source = None
    if job is not None:
        source, settings = one_job(job, opened, settings, echo_notes)
    folder = RunFolder(out if out is not None else harness.default_folder(opened))
    for note in opened.notes:
        click.echo(f"warning: {note}", err=True)
    found = _with_progress(folder, opened, settings, source)
    done = f"{found.done} bursts in {folder.path}"
    click.echo(f"{done}{f', {found.failed} failed' if found.failed else ''}")
    following = "validate" if settings.check else "fit"
    if found.done:
        click.echo(f"next: loraplan calibrate {following} {folder.path}")
    return 0 if found.done else EXIT_FAILED


def _with_progress(folder: Any, opened: Any, settings: Settings, bursts: Iterator[Burst] | None = None) -> Progress:
    """Run with a progress line on stderr; an interruption says that nothing is lost."""
    from calibrate.measure import harness
    from planner.base.errors import PlannerError

    shown = _ProgressLine()
    try:
        return harness.run(folder, opened, settings, report=shown.show, bursts=bursts)
    except KeyboardInterrupt:
        raise PlannerError(
            f"interrupted; finished bursts are kept in {folder.path}: run the same command with "
            f"--out {folder.path} to go on"
        ) from None
    finally:
        shown.close()


class _ProgressLine:
    """A bar with the time left on a terminal, a line per burst elsewhere."""

    def __init__(self) -> None:
        from planner.cli.terminal import is_live

        self.live = is_live()
        self.dirty = False

    def show(self, at: Progress) -> None:
        """Print where the run stands."""
        left = max(at.budget_s - at.spent_s, 0.0)
        share = min(at.spent_s / at.budget_s, 1.0)
        if not self.live:
            click.echo(f"{at.done + at.failed:4d} {at.last}, {left:.0f} s left", err=True)
            return
        bar = "#" * int(30 * share)
        failed = f", {at.failed} failed" if at.failed else ""
        click.echo(f"\r[{bar:<30}] {at.done} bursts{failed}, {left:4.0f} s left, {at.last:<28.28}", err=True, nl=False)
        self.dirty = True

    def close(self) -> None:
        """End the bar's line."""
        if self.dirty:
            click.echo(err=True)


@calibrate.command()
@click.argument("runs", nargs=-1, required=True, type=_PATH)
@click.option("--out", type=_PATH, help="The calibration file; by default a new one in the user's data folder.")
@click.option("--rows", is_flag=True, help="Print every burst too.")
@format_option
def fit(runs: tuple[Path, ...], out: Path | None, rows: bool, style: str) -> int:
    """Fit the time model to RUNS (folders of calibrate run, exported files) and write a calibration.

    Needs no GPU: runs of another machine can be fitted. A grid that does not determine what matters is refused with
    the reason. An existing file is never overwritten.

    \b
    Examples:
      loraplan calibrate fit ./h100
      loraplan calibrate fit ./cpu --out ./cpu.json --rows

    \b
    Exit codes: 0 fitted, 2 could not fit.
    """
    from calibrate.fit.fit import fit as fit_runs
    from planner.facts import calibration_files
    from planner.report.calibration_report import fit_report

    if out is not None:
        calibration_files.refuse_existing(out)  # before the minutes of a fit, too
    found = fit_runs(_read(runs), tell=lambda text: click.echo(text, err=True))
    path = calibration_files.write(found, out)
    click.echo(f"wrote {path}", err=True)
    click.echo(fit_report(calibration_files.read(path), style, rows), nl=False)
    return 0


def _read(paths: tuple[Path, ...]) -> list[Run]:
    from calibrate.fit.measurements import read_runs

    return read_runs(paths)


@calibrate.command()
@click.argument("runs", nargs=-1, required=True, type=_PATH)
@click.option("--calibration", metavar="FILE", help="A file or an id of calibrate list; by default the newest.")
@click.option("--rows", is_flag=True, help="Print every burst too.")
@format_option
def validate(runs: tuple[Path, ...], calibration: str | None, rows: bool, style: str) -> int:
    """Predict the bursts of RUNS with a calibration and print how far off it is.

    \b
    Example:
      loraplan calibrate validate ./cpu-check --calibration ./cpu.json

    \b
    Exit codes: 0 bursts were compared, 1 none could be, 2 could not answer.
    """
    from calibrate.fit.fit import check
    from planner.base.errors import InvalidInput
    from planner.facts import calibration_files
    from planner.report.calibration_report import check_report

    read = _read(runs)
    chosen = calibration_files.select(read[-1].gpu, calibration).calibration
    if chosen is None:
        raise InvalidInput("there is no calibration of this device; fit one (loraplan calibrate fit)")
    found = check(read, chosen)
    click.echo(check_report(found, chosen, style, rows), nl=False)
    return 0 if found["rows"] else 1


@calibrate.command("list")
@format_option
def list_(style: str) -> int:
    """List the calibrations that predictions choose from.

    \b
    Example:
      loraplan calibrate list
    """
    from planner.facts import calibration_files
    from planner.report.calibration_report import listing

    found, notes = calibration_files.known()
    click.echo(listing(found, notes, style), nl=False)
    return 0


@calibrate.command()
@click.argument("calibration")
@click.option("--rows", is_flag=True, help="Print every burst too.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Write the residuals as .png or .svg.")
@format_option
def show(calibration: str, rows: bool, plot: Path | None, style: str) -> int:
    """Show a fit: coefficients, held-out errors, what to be careful with. CALIBRATION is a file or an id of the list.

    \b
    Examples:
      loraplan calibrate show ./cpu.json
      loraplan calibrate show ./cpu.json --plot residuals.svg
    """
    from planner.report.calibration_report import fit_report

    found = _find(calibration)
    if plot is not None:
        _draw(found, plot)
    click.echo(fit_report(found, style, rows), nl=False)
    return 0


def _find(name: str) -> Calibration:
    from planner.facts import calibration_files

    return calibration_files.find(name)


def _draw(found: Calibration, target: Path) -> None:
    from planner.base.errors import InvalidInput, MissingDependency
    from planner.base.outputs import whole_file
    from planner.report.calibration_plot import draw

    style = target.suffix.lower().removeprefix(".")
    if style not in ("png", "svg"):
        raise InvalidInput(f"--plot writes .png or .svg, not {target.name}")
    try:
        picture = draw(found, style)
    except ImportError:
        raise MissingDependency("--plot needs matplotlib (pip install 'loraplan[plots]')") from None
    with whole_file(target, "wb") as file:
        file.write(picture)
    click.echo(f"wrote {target}", err=True)


@calibrate.command()
@click.argument("first")
@click.argument("second")
@format_option
def compare(first: str, second: str, style: str) -> int:
    """Put two calibrations side by side, with their differences in standard errors.

    \b
    Example:
      loraplan calibrate compare ./before.json ./after.json
    """
    from planner.report.calibration_report import comparison

    click.echo(comparison(_find(first), _find(second), style), nl=False)
    return 0


@calibrate.command()
@click.argument("run", type=_PATH)
@click.option("-o", "--out", type=_PATH, required=True, help="The measurement file to write.")
def export(run: Path, out: Path) -> int:
    """Write a run's raw results as one file, to fit or merge them elsewhere.

    \b
    Example:
      loraplan calibrate export ./h100 --out ./h100-measurements.json
    """
    return _export(_read((run,)), out)


@calibrate.command()
@click.argument("runs", nargs=-1, required=True, type=_PATH)
@click.option("-o", "--out", type=_PATH, required=True, help="The measurement file to write.")
def merge(runs: tuple[Path, ...], out: Path) -> int:
    """Put runs of several machines with one type of device into one file; hosts that differ by more than 5 % are told.

    \b
    Example:
      loraplan calibrate merge ./host-a.json ./host-b.json --out ./both.json
    """
    return _export(_read(runs), out)


def _export(runs: list[Run], out: Path) -> int:
    from calibrate.fit.measurements import merge as check_hosts
    from calibrate.fit.measurements import to_document, write_json
    from planner.base.errors import InvalidInput

    for note in check_hosts(runs):
        click.echo(f"warning: {note}", err=True)
    if out.exists():
        raise InvalidInput(f"{out} exists and is not overwritten; name another file")
    write_json(out, to_document(runs))
    click.echo(f"{sum(len(run.measurements) for run in runs)} bursts of {len(runs)} runs in {out}")
    return 0
