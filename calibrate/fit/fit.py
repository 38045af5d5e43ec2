"""Fit the coefficients of the time model to bursts: bounded robust least squares on log time; pure, no hardware.

Every residual is log(measured / predicted) of a step's phases, or of the step where they were not timed, over NOISE; a
GPU's steps that wait for the device add the seconds of their kernels by class (torch's profiler). A soft L1 loss keeps
a disturbed burst from deciding. Priors are weak regularisation. Coefficients are searched as logarithms, inside their
physical bounds. Needs numpy and scipy (the `calibrate` extra).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any, NamedTuple

from calibrate.fit.measurements import Measurement, Run, merge
from calibrate.fit.points import Point, pooled, usable
from calibrate.fit.residuals import context, errors, memory_rows, memory_summary, summary
from planner.base.errors import InvalidInput, MissingDependency, one_line
from planner.device.hardware import Gpu
from planner.timing.coefficients import Calibration, Coefficient, Coefficients, priors
from planner.timing.formulas import fingerprint

NOISE = 0.03
"""Relative error of one burst's time that residuals are measured in."""
PRIOR_WEAKNESS = 2.0
"""Priors count with their standard errors times this."""
LEAST_SHARE = 0.01
"""A coefficient that moves no burst's time by this share of its own change is left at its prior."""
IMPORTANT_SHARE = 0.10
"""A coefficient that some burst depends on by this share must be determined by the grid."""
UNDETERMINED = 1.0
"""Relative standard error from the data alone above which the grid does not determine a coefficient."""
SOFT = 2.0
"""Residuals, in units of NOISE, from where on the loss grows linearly."""
REFITS = 3
"""Gauss-Newton steps of a fit without some bursts, from the fit with them."""
STRONG = 0.9
"""Correlations above this are reported."""
NINETY_PERCENT = 1.645
NOT_MEASURED = ("compiled_traffic", "host_link", "flash_hopper")
"""What no burst contains (torch.compile, offloading), and a factor that one card shows only in products with
flash_forward and flash_backward."""
FAMILIES = (
    (
        "launch_forward",
        "launch_recomputation",
        "launch_backward",
        "launch_quantized",
        "launch_optimizer",
        "kernel_latency",
    ),
    ("tile_reuse_half", "matmul_k_half"),
    ("flash_forward", "flash_backward", "flash_length_half"),
    ("cudnn_forward", "cudnn_backward", "flash_length_half"),
)
"""Coefficients whose sum decides: bursts that determine one of them with its family fixed are enough, the priors
tell how the family divides it."""

REMEDY: dict[str, str] = {
    "matmul": "16-bit bursts of many tokens", "matmul_fp32": "fp32 bursts of many tokens",
    "tile_reuse_half": "adapters of small and large rank, few and many tokens",
    "matmul_k_half": "small and large ranks",
    "bandwidth": "element-wise work beside products: several hidden sizes and lengths",
    "dequantize": "quantized and plain bases, few and many tokens", "flash_length_half": "several sequence lengths",
    "launch_forward": "bursts of few tokens and many layers", "launch_backward": "bursts of few tokens and many layers",
    "launch_recomputation": "bursts of few tokens with and without checkpointing",
    "launch_quantized": "quantized and plain bases at few tokens", "launch_optimizer": "several optimizers",
    "kernel_latency": "bursts of few tokens on small models",
}  # fmt: skip
"""What a grid needs to determine a coefficient; attention's need long sequences."""


# --- the problem ---------------------------------------------------------------------------------------------------


class Problem:
    """Points, the coefficients that are searched, and residuals as a function of their logarithms."""

    def __init__(self, points: Sequence[Point], start: Coefficients, names: Sequence[str]) -> None:
        self.points = list(points)
        self.start = start
        self.names = list(names)

    def coefficients(self, x: Sequence[float]) -> Coefficients:
        """The coefficients at a place of the search, with the others at their start."""
        items = dict(self.start)
        for name, value in zip(self.names, x, strict=True):
            c = items[name]
            items[name] = replace(c, value=min(max(math.exp(value), c.low), c.high))
        return Coefficients(items)

    def place(self, coefficients: Coefficients) -> list[float]:
        """Logarithms of the searched coefficients."""
        return [math.log(coefficients.value(name)) for name in self.names]

    def data_residuals(self, x: Sequence[float]) -> Any:
        """Weighted log(measured / predicted) over NOISE."""
        import numpy as np

        found = self.coefficients(x)
        rows: list[float] = []
        for item in self.points:
            for seen, expected, weight in zip(item.measured, item.predicted(found), item.weights, strict=True):
                ratio = math.log(max(seen, 1e-9) / max(expected, 1e-9))
                rows.append(weight * ratio / NOISE)
        return np.array(rows)

    def prior_residuals(self, x: Sequence[float]) -> Any:
        """Distance of each coefficient from its prior, in weakened standard errors."""
        import numpy as np

        return np.array(
            [
                (value - math.log(self.start.value(name)))
                / (PRIOR_WEAKNESS * max(self.start[name].relative_error, 0.01))
                for name, value in zip(self.names, x, strict=True)
            ]
        )

    def jacobian(self, x: Sequence[float], step: float = 1e-3) -> Any:
        """Derivatives of the data residuals."""
        import numpy as np

        here = self.data_residuals(x)
        columns = []
        for place, value in enumerate(x):
            moved = list(x)
            up = value + step <= math.log(self.start[self.names[place]].high)
            moved[place] += step if up else -step
            columns.append((self.data_residuals(moved) - here) / (step if up else -step))
        return np.array(columns).T

    def improved(self, x: Sequence[float]) -> list[float]:
        """One Gauss-Newton step of the same robust problem from `x`, inside the bounds."""
        import numpy as np

        residuals = np.concatenate([self.data_residuals(x), self.prior_residuals(x)])
        slopes = np.vstack([self.jacobian(x), np.diag(self._prior_slopes())])
        weights = (1 + (residuals / SOFT) ** 2) ** -0.25  # the root of soft L1's weight
        change, *_ = np.linalg.lstsq(slopes * weights[:, None], -residuals * weights, rcond=None)
        lower, upper = _bounds(self.start, self.names)
        return [float(v) for v in np.clip(np.array(x) + np.clip(change, -1.0, 1.0), lower + 1e-6, upper - 1e-6)]

    def solve(self, x: Sequence[float] | None = None) -> list[float]:
        """The logarithms of the best coefficients."""
        import numpy as np

        try:
            from scipy.optimize import least_squares
        except ImportError:
            raise MissingDependency("fitting needs scipy (pip install 'loraplan[calibrate]')") from None
        lower, upper = _bounds(self.start, self.names)
        first = np.clip(self.place(self.start) if x is None else x, lower + 1e-6, upper - 1e-6)
        found = least_squares(
            lambda y: np.concatenate([self.data_residuals(y), self.prior_residuals(y)]),
            first,
            jac=lambda y: np.vstack([self.jacobian(y), np.diag(self._prior_slopes())]),
            bounds=(lower, upper),
            loss="soft_l1",
            f_scale=SOFT,
            max_nfev=40,
            xtol=1e-4,
            ftol=1e-5,
        )
        return [float(value) for value in found.x]

    def _prior_slopes(self) -> list[float]:
        return [1 / (PRIOR_WEAKNESS * max(self.start[name].relative_error, 0.01)) for name in self.names]

    def covariance(self, x: Sequence[float]) -> tuple[Any, float]:
        """Covariance of the logarithms, and the residuals' scale in units of NOISE.

        Rows are weighted by importance, not by their variance, so it is the sandwich A^-1 (s^2 J'W^2J + P) A^-1 with
        A = J'J + P: J of the weighted data, W the weights, P the priors' information, s the scale of all rows.
        """
        import numpy as np

        jacobian, residuals = self.jacobian(x), self.data_residuals(x)
        weights = np.array([weight for item in self.points for weight in item.weights])
        robust = np.minimum(np.abs(residuals), 3 * SOFT)
        freedom = max(1 - len(self.names) / len(residuals), 0.1)
        scale = math.sqrt(float(np.sum(robust**2) / np.sum(weights**2)) / freedom)
        prior = np.diag(np.square(self._prior_slopes()))
        bread = np.linalg.pinv(jacobian.T @ jacobian + prior)
        meat = scale**2 * (jacobian * weights[:, None] ** 2).T @ jacobian + prior
        return bread @ meat @ bread, scale


def _bounds(start: Coefficients, names: Sequence[str]) -> tuple[Any, Any]:
    import numpy as np

    lower = [math.log(max(start[n].low, 1e-4 * start.value(n), 1e-12)) for n in names]
    upper = [math.log(min(start[n].high, 1e4 * start.value(n))) for n in names]
    return np.array(lower), np.array(upper)


def sensitivity(points: Sequence[Point], start: Coefficients) -> dict[str, float]:
    """Largest share by which a burst's time follows each coefficient (1: in proportion)."""
    found: dict[str, float] = {}
    base = [p.step_s(start) for p in points]
    for name, c in start.items():
        if name in NOT_MEASURED or c.standard_error == 0 or c.value == 0:
            continue
        other = replace(c, value=min(c.value * 1.01, c.high) if c.value * 1.01 <= c.high else c.value / 1.01)
        moved = Coefficients({**start, name: other})
        ratio = abs(math.log(other.value / c.value))
        shares = [abs(math.log(p.step_s(moved) / b)) / ratio for p, b in zip(points, base, strict=True)]
        found[name] = max(shares)
    return found


def refuse_degenerate(problem: Problem, shares: Mapping[str, float]) -> list[str]:
    """Names that the grid leaves undetermined without importance; they stay at their priors.

    Raises:
        InvalidInput: naming what the bursts cannot tell apart and what a grid would need.
    """
    distinct = len({p.measurement.key for p in problem.points})
    if distinct < 2:
        raise InvalidInput(
            f"all bursts have one configuration: {', '.join(problem.names[:4])}, ... cannot be told apart; "
            "run a grid (loraplan calibrate run)"
        )
    jacobian = problem.jacobian(problem.place(problem.start))
    alone = _errors_of_data(jacobian)
    loose = [name for name, error in zip(problem.names, alone, strict=True) if error > UNDETERMINED]
    important = [name for name in loose if shares[name] >= IMPORTANT_SHARE]
    missing = []
    for name in important:
        family = next((f for f in FAMILIES if name in f), (name,))
        kept = [place for place, other in enumerate(problem.names) if other == name or other not in family]
        error = _errors_of_data(jacobian[:, kept])[[problem.names[place] for place in kept].index(name)]
        if error > UNDETERMINED:
            missing.append(name)
    if missing:
        needs = "; ".join(f"{name}: {REMEDY.get(name, 'long sequences')}" for name in missing)
        raise InvalidInput(
            f"the grid of {distinct} configurations does not determine {', '.join(missing)}; it needs {needs}"
        )
    return [name for name in loose if name not in important]


def _errors_of_data(jacobian: Any) -> Any:
    """Relative standard error of every coefficient from bursts with NOISE, without priors."""
    import numpy as np

    values, vectors = np.linalg.eigh(jacobian.T @ jacobian)
    floor = max(float(values[-1]), 1e-12) * 1e-12
    return np.sqrt(np.sum(vectors**2 / np.maximum(values, floor), axis=1))


# --- the fit -------------------------------------------------------------------------------------------------------


def fit(runs: Sequence[Run], *, tell: Callable[[str], None] = lambda text: None) -> Calibration:
    """Fit one calibration to the runs of one kind of device.

    Raises:
        PlannerError: no usable burst, runs of different devices, a grid that determines too little.
    """
    if not runs:
        raise InvalidInput("no run to fit")
    notes = merge(runs)
    gpu = runs[-1].gpu
    points, skipped = usable(runs, gpu)
    repeated, timed = repeats(p.measurement for p in points), len(points)
    points = pooled(points)
    if not points:
        reasons = "; ".join(sorted(set(skipped))[:3]) or "none was run"
        raise InvalidInput(f"no burst can be used ({one_line(reasons, 300)}); run loraplan calibrate run")
    start = priors(gpu)
    shares = sensitivity(points, start)
    names = [name for name, share in shares.items() if share >= LEAST_SHARE]
    unreached = sorted(set(shares) - set(names))
    tell(f"{len(points)} bursts, {len(names)} coefficients")
    loose = refuse_degenerate(Problem(points, start, names), shares)
    names = [name for name in names if name not in loose]
    problem = Problem(points, start, names)
    x = problem.solve()
    tell("held-out bursts")
    held_out = {
        "model": left_out(problem, x, lambda p: p.measurement.model),
        "length": left_out(problem, x, lambda p: str(p.training.seq_len)),
    }
    return _calibration(
        runs, gpu, problem, x, held_out, _Notes(notes, skipped, unreached, loose, repeated, timed)
    )  # fmt: skip


class _Notes(NamedTuple):
    """What the report tells beside the numbers."""

    hosts: list[str]
    skipped: list[str]
    unreached: list[str]
    loose: list[str]
    repeated: list[float]
    """|log ratio| of every repeat."""
    timed: int
    """Bursts, repeats included."""


def left_out(problem: Problem, x: Sequence[float], group: Callable[[Point], str]) -> list[dict[str, Any]]:
    """Fit without each group in turn and predict its bursts: measured and predicted seconds of a step."""
    rows = []
    groups = sorted({group(p) for p in problem.points})
    for name in groups if len(groups) > 1 else []:
        kept = [p for p in problem.points if group(p) != name]
        without = Problem(kept, problem.start, problem.names)
        place = list(x)
        for _ in range(REFITS):
            place = without.improved(place)
        found = without.coefficients(place)
        for item in problem.points:
            if group(item) == name:
                rows.append(_row(item, found) | {"left_out": name})
    return rows


def _row(item: Point, coefficients: Coefficients) -> dict[str, Any]:
    t = item.training
    what = f"{t.method} {t.quantization.kind} {t.micro_batch_size}x{t.seq_len} r{t.lora.r if t.lora else 0}"
    extra: list[str] = [t.autocast if t.autocast != "none" else t.base_dtype, t.attention, t.optimizer]
    extra += ["checkpointing"] if t.gradient_checkpointing != "none" else []
    return {
        "key": item.measurement.key, "model": item.measurement.model, "what": " ".join([what, *extra]),
        "measured_s": item.measurement.step_s, "predicted_s": item.step_s(coefficients),
    }  # fmt: skip


def repeats(points: Iterable[Measurement]) -> list[float]:
    """|log ratio| of every repeated burst to the first of its kind."""
    first: dict[str, float] = {}
    found = []
    for item in points:
        if item.key in first:
            found.append(abs(math.log(item.step_s / first[item.key])))
        else:
            first[item.key] = item.step_s
    return found


def repeat_interval(differences: Sequence[float]) -> float:
    """Ratio - 1 within which two runs of a burst lie in 9 of 10 cases, from the log ratios of repeated ones.

    Their root mean square times Student's t for their number (few repeats know the spread badly), or the one of them
    that a next would stay below in 9 of 10 cases whatever the distribution is (conformal quantile), if that is larger.
    """
    if not differences:
        return 0.0
    from scipy.stats import t

    deviation = math.sqrt(sum(d * d for d in differences) / len(differences))
    bound = float(t.ppf(0.95, len(differences))) * deviation
    place = math.ceil(0.9 * (len(differences) + 1))
    if place <= len(differences):
        bound = max(bound, sorted(differences)[place - 1])
    return math.expm1(bound)


def _calibration(
    runs: Sequence[Run], gpu: Gpu, problem: Problem, x: Sequence[float], held_out: dict[str, list[dict[str, Any]]],
    notes: _Notes,
) -> Calibration:  # fmt: skip
    import numpy as np

    covariance, scale = problem.covariance(x)
    found = problem.coefficients(x)
    deviations = np.sqrt(np.diag(covariance))
    items = dict(found)
    for name, deviation in zip(problem.names, deviations, strict=True):
        c = items[name]
        items[name] = replace(
            c, standard_error=float(deviation * c.value), origin="fitted", source=f"{notes.timed} bursts"
        )
    held = [e for rows in held_out.values() for e in errors(rows)]
    fitted_rows = [_row(p, found) for p in problem.points]
    formula_error = _rms(held or errors(fitted_rows))
    ratio = math.exp(NINETY_PERCENT * formula_error)
    inside = [1 / ratio <= 1 + e <= ratio for e in held]
    report = {
        "fitted": summary(fitted_rows),
        "held_out": {name: summary(rows) for name, rows in held_out.items()},
        "held_out_rows": held_out,
        "rows": fitted_rows,
        "coverage": sum(inside) / len(inside) if inside else None,
        "residual_scale": scale * NOISE,
        "correlations": _strong(problem.names, covariance),
        "at_bound": [n for n in problem.names if _at_bound(items[n])],
        "not_reached": notes.unreached,
        "not_determined": notes.loose,
        "hosts": notes.hosts,
        "skipped": sorted(set(notes.skipped)),
    }
    memory = memory_rows(problem.points)
    report["memory"] = memory_summary(memory)
    last = runs[-1]
    return Calibration(
        gpu_id=gpu.gpu_id,
        device={k: v for k, v in last.device.items() if k != "host"} | {"hosts": sorted({run.host for run in runs})},
        formula_version=fingerprint(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions=last.versions,
        coefficients=Coefficients(items, formula_error),
        repeatability=repeat_interval(notes.repeated),
        context_bytes=context([p.measurement for p in problem.points]),
        bursts=notes.timed,
        report=report | {"repeats": len(notes.repeated)},
    )


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(math.log1p(max(v, -0.99)) ** 2 for v in values) / len(values)) if values else 0.0


def _at_bound(c: Coefficient) -> bool:
    return c.value <= max(c.low * 1.001, 1e-11) or c.value >= c.high * 0.999


def _strong(names: Sequence[str], covariance: Any) -> list[list[Any]]:
    """Pairs whose estimates move together."""
    found: list[list[Any]] = []
    for i, first in enumerate(names):
        for j in range(i + 1, len(names)):
            value = float(covariance[i, j] / math.sqrt(covariance[i, i] * covariance[j, j]))
            if abs(value) >= STRONG:
                found.append([first, names[j], round(value, 3)])
    return found


# --- checking ------------------------------------------------------------------------------------------------------


def check(runs: Sequence[Run], calibration: Calibration) -> dict[str, Any]:
    """Predict every burst of the runs with a calibration: errors, share inside the interval, repeats.

    Raises:
        PlannerError: runs of another device.
    """
    merge(runs)
    gpu = runs[-1].gpu
    points, skipped = usable(runs, gpu)
    differences = repeats(p.measurement for p in points)
    points = pooled(points)
    rows = [_row(p, calibration.coefficients) for p in points]
    fitted = {row["key"] for row in calibration.report.get("rows", ())}
    ratio = math.exp(NINETY_PERCENT * (calibration.coefficients.formula_error or 0.0))
    inside = [1 / ratio <= row["predicted_s"] / row["measured_s"] <= ratio for row in rows]
    within = [math.exp(d) - 1 <= calibration.repeatability for d in differences]
    return {
        "summary": summary(rows), "unseen": sum(row["key"] not in fitted for row in rows),
        "memory": memory_summary(memory_rows(points)), "rows": rows,
        "skipped": sorted(set(skipped)),
        "interval_pct": 100 * (ratio - 1), "inside": sum(inside), "repeats": len(within),
        "repeats_within": sum(within), "repeat_interval_pct": 100 * calibration.repeatability,
    }  # fmt: skip
