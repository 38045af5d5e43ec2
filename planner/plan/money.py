"""The cost options of a command: how much is trained, the price of an hour, and the plan of the whole run."""

from __future__ import annotations

import datetime
import json
from typing import TYPE_CHECKING

from planner.base.bounded import read_bounded
from planner.base.errors import Contradiction, InvalidInput, one_line
from planner.base.units import MiB, parse_count
from planner.device.hardware import Gpu
from planner.facts import catalog
from planner.plan.predict import Prediction
from planner.plan.request import Cost
from planner.runs import cost

if TYPE_CHECKING:
    from planner.plan.datarun import DataRun

MAX_TABLE_BYTES = MiB


def amount_of(wanted: Cost) -> cost.Amount:
    """Return the amount of training that the options name.

    Raises:
        PlannerError: for values out of range, or options that need another one.
    """
    if wanted.epochs is not None and wanted.rows is None:
        raise Contradiction("--epochs counts passes over --rows; give both")
    for name in ("rows", "mean_tokens", "price", "dbu_rate"):
        value = getattr(wanted, name)
        if value is not None and not 0 < value < 1e18:
            raise InvalidInput(f"--{name.replace('_', '-')} is {value}; must be above 0")
    if wanted.tokens is None and wanted.rows is None:
        for name in ("mean_tokens", "dbu_table", "price"):
            if getattr(wanted, name) is not None:
                raise Contradiction(f"--{name.replace('_', '-')} is about a whole run; give --tokens or --rows too")
    return cost.Amount(
        tokens=parse_count(str(wanted.tokens)) if wanted.tokens is not None else 0.0,
        rows=wanted.rows or 0,
        epochs=1.0 if wanted.epochs is None else wanted.epochs,
        mean_tokens=wanted.mean_tokens or 0.0,
    )


def run_plan(prediction: Prediction, amount: cost.Amount, wanted: Cost) -> tuple[cost.RunPlan | None, tuple[str, ...]]:
    """Return the plan of the run and the warnings that belong to it; None where there is no time or no amount."""
    if not amount.given:
        return None, ()
    if prediction.gpu is None or prediction.time is None:
        return None, ("no hours and no cost: the card's rates are not known",)
    price = price_of(prediction.gpu, wanted)
    training = prediction.training
    if amount.mean_tokens > training.seq_len:
        raise InvalidInput(
            f"--mean-tokens is {amount.mean_tokens:g}, but a row has at most {training.seq_len} tokens (--seq-len)"
        )
    made = cost.plan(
        prediction.time, prediction.gpu, amount, micro_batch_size=training.micro_batch_size, seq_len=training.seq_len,
        price=price,
    )  # fmt: skip
    notes = price.warnings(datetime.date.today()) if price else ("no price is known for this card; give --price",)
    return made, notes


def amount_on_data(wanted: Cost) -> cost.Amount:
    """Return the passes over the data; the data says the rest.

    Raises:
        PlannerError: for an amount of training that the data already says.
    """
    for name in ("rows", "tokens", "mean_tokens"):
        if getattr(wanted, name) is not None:
            raise Contradiction(f"--{name.replace('_', '-')} and --data say the same thing twice; give one of them")
    return cost.Amount(epochs=1.0 if wanted.epochs is None else wanted.epochs)


ESTIMATED = "lengths are estimated: the longest row, which decides memory, may be 30 % longer; give --tokenizer"


def data_plan(
    prediction: Prediction, run: DataRun, wanted: Cost
) -> tuple[DataRun, cost.RunPlan | None, tuple[str, ...]]:
    """Return the run on its data with totals, its plan and the warnings that belong to it.

    Raises:
        PlannerError: for an amount of training that the data already says.
    """
    amount = amount_on_data(wanted)
    estimated = (ESTIMATED,) if run.found.token_error else ()
    if prediction.gpu is None or prediction.time is None:
        return run, None, (*estimated, "no hours and no cost: the card's rates are not known")
    from planner.plan.datarun import planned

    price = price_of(prediction.gpu, wanted)
    done, made = planned(run, prediction, epochs=amount.epochs, price=price)
    notes = price.warnings(datetime.date.today()) if price else ("no price is known for this card; give --price",)
    return done, made, (*estimated, *notes)


def price_of(gpu: Gpu, wanted: Cost) -> cost.Price | None:
    """The user's price, else the cheapest machine with this card.

    Raises:
        PlannerError: for a Databricks table without a rate, or one that cannot be read.
    """
    if (wanted.dbu_table is None) != (wanted.dbu_rate is None):
        raise Contradiction("--dbu-table and --dbu-rate belong together; give both")
    if wanted.price is not None:
        return cost.Price(usd_per_hour=wanted.price, source="given")
    table = read_dbu_table(wanted.dbu_table) if wanted.dbu_table is not None else None
    return cost.cheapest(gpu, catalog.instances(), dbu=table, dbu_rate=wanted.dbu_rate or 0.0)


def read_dbu_table(path: str) -> dict[str, float]:
    """Read {node type: Databricks units per hour} from a JSON file.

    Raises:
        InvalidInput: if it is not such an object.
    """
    data = read_bounded(path, MAX_TABLE_BYTES, "table of DBU per hour")
    problem = f"{one_line(path)!r} is not a JSON object of node types and DBU per hour"
    try:
        table = json.loads(data)
    except (ValueError, RecursionError):
        raise InvalidInput(f'{problem}; write for example {{"Standard_NC24ads_A100_v4": 10.5}}') from None
    if not isinstance(table, dict):
        raise InvalidInput(problem)
    for name, value in table.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e6:
            raise InvalidInput(f"{problem}: {one_line(str(name), 60)} has {one_line(str(value), 40)}")
    return {str(name): float(value) for name, value in table.items()}
