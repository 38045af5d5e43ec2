"""Published runs as requests: what turns a row of a table of measurements into a prediction."""

from __future__ import annotations

from collections.abc import Mapping

from planner.base.errors import UnknownName
from planner.device.hardware import Gpu
from planner.facts import catalog
from planner.plan.given import Settings
from planner.plan.predict import Prediction
from planner.plan.published_rows import RowLengths
from planner.plan.request import Known, Request, resolve
from planner.runs.dataset.batches import Batching
from planner.runs.dataset.orders import Orders, drawn, orders
from planner.training.spec import TrainingSpec


def _orders(lengths: RowLengths | None, training: TrainingSpec) -> Orders | None:
    """Orders in which rows of a source's lengths may come, cut to the run's."""
    if lengths is None:
        return None
    how = Batching(batch=training.micro_batch_size, limit=training.seq_len, padding="longest")
    rows = drawn(lengths.mean, lengths.deviation, lengths.shortest).clipped(how.limit)
    return orders(rows, how)


class PublishedRuns:
    """What turns a row's options into a prediction; models and cards are read once."""

    def __init__(self, calibration: str | None = None) -> None:
        self.calibration = calibration
        self.known = Known(offline=True)
        self.cards: dict[str, Gpu | None] = {}

    def predict(self, options: Mapping[str, object], model_id: str, gpu_id: str | None) -> Prediction:
        """Predict one row.

        Raises:
            PlannerError: the row's model, card or settings are not known.
        """
        lengths = options.get("row_lengths")
        assert lengths is None or isinstance(lengths, RowLengths)
        said = Settings({name: value for name, value in options.items() if name != "row_lengths"})
        card = self._card(gpu_id) if gpu_id else None
        request = Request(model=model_id, settings=said, gpu=card, calibration=self.calibration, lenient=True)
        plan = resolve(request, self.known)
        return plan.predict(_orders(lengths, plan.training))

    def _card(self, gpu_id: str) -> Gpu | None:
        """Return the card; None when the catalogue lacks it (its rows are still scored for memory)."""
        if gpu_id not in self.cards:
            try:
                self.cards[gpu_id] = catalog.gpu(gpu_id)
            except UnknownName:
                self.cards[gpu_id] = None
        return self.cards[gpu_id]
