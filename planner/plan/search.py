"""What to change so that a run fits: single settings first, then combinations, then larger cards.

Candidates are tried on the program's peak alone, which is cheap; only what is proposed is predicted in full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from planner.base.errors import PlannerError
from planner.base.records import replace
from planner.device.hardware import Gpu
from planner.memory import walk
from planner.model.spec import ModelSpec
from planner.plan.intervals import Range, uncertainty
from planner.plan.predict import Prediction, predict
from planner.plan.verdict import FITS, verdict_of
from planner.step import program
from planner.step.architecture import architecture
from planner.training.choices import Method
from planner.training.losses import LEAST, LOSSES
from planner.training.optimizers import OPTIMIZERS, Optimizer
from planner.training.quantizations import QUANTIZATIONS, USUAL
from planner.training.spec import LoraSpec, QuantizationSpec, TrainingSpec

MAX_PREDICTIONS = 40
MAX_CARDS = 3
SHORTEST = 128
"""Tokens: shorter rows are not proposed."""
MOST_SHORTENED = 4
"""As the only change, rows are cut to this part of their length at most."""

Settings = tuple[tuple[str, object], ...]


class Change(NamedTuple):
    """Something that makes the run fit, and what it then takes."""

    text: str
    option: str
    """The same as options of the command line."""
    settings: Settings
    """Changed keys of `planner.training.stacks` with their new values."""
    gpu: Gpu | None
    """The larger card, when the card is what changes."""
    allocated: Range
    device: Range


class _Step(NamedTuple):
    """One change of the training settings, before it is known to help."""

    text: str
    option: str
    settings: Settings
    training: TrainingSpec


Lever = Callable[[TrainingSpec], "_Step | None"]
"""Returns the changed run, None where the change does not apply."""


class _Search:
    """The run that did not fit, its card, and how often the model was asked."""

    def __init__(self, model: ModelSpec, gpu: Gpu) -> None:
        self.model, self.gpu = model, gpu
        self.predictions = 0

    def likely(self, training: TrainingSpec, gpu: Gpu | None = None) -> bool:
        """Whether the peak of the program leaves room; the allocator is not replayed."""
        card = gpu or self.gpu
        try:
            peak = walk.peak_bytes(program.run(self.model, training, architecture(card, training)).record)
        except PlannerError:
            return False
        share = sum(part for _, part in uncertainty(self.model, training))
        live = Range(low=int(peak * (1 - share)), expected=peak, high=int(peak * (1 + share)))
        return verdict_of(live, card.rooms, cache_missing=False) == FITS

    def confirmed(self, training: TrainingSpec, gpu: Gpu | None = None) -> Prediction | None:
        """The full prediction, if it says that the run fits and the budget of predictions is not spent."""
        if self.predictions >= MAX_PREDICTIONS or not self.likely(training, gpu):
            return None
        self.predictions += 1
        try:
            found = predict(self.model, training, gpu or self.gpu)
        except PlannerError:
            return None
        return found if found.verdict == FITS else None

    def change(self, step: _Step) -> Change | None:
        """Turn a step into a proposal if it makes the run fit."""
        found = self.confirmed(step.training)
        return _change(step, found) if found else None


def nearest_changes(prediction: Prediction, cards: Sequence[Gpu] = ()) -> tuple[Change, ...]:
    """Return what would make a run fit that does not, least intrusive first; empty when nothing tried does.

    `cards` are the GPUs to choose a larger one from. Not for runs that fit: nothing needs to change there.
    """
    if prediction.gpu is None or prediction.verdict == FITS:
        return ()
    assert isinstance(prediction.model, ModelSpec)  # a trace's answer is not searched
    search = _Search(prediction.model, prediction.gpu)
    train = prediction.training
    found = [change for change in map(search.change, _single_steps(search, train)) if change is not None]
    if not found:
        combined = _combination(search, train)
        found += [combined] if combined else []
    shorter = _shorter_rows(search, train, train.seq_len // MOST_SHORTENED)
    change = search.change(shorter) if shorter else None
    found += [change] if change else []
    return (*found, *_larger_cards(search, train, cards))


def _change(step: _Step, found: Prediction, gpu: Gpu | None = None) -> Change:
    return Change(step.text, step.option, step.settings, gpu, found.allocated, found.device)


def _single_steps(search: _Search, train: TrainingSpec) -> Iterator[_Step]:
    """Every single change that applies, in the order of how little it asks for."""
    for lever in (_sdpa, _eight_bit, _paged, _checkpointing, _fused_loss, _no_kbit, _norms_only, _double_quant):
        step = lever(train)
        if step is not None:
            yield step
    batch = _smaller_batch(search, train)
    if batch is not None:
        yield batch
    for lever in (_quantize, _adapters):
        step = lever(train)
        if step is not None:
            yield step


def _combination(search: _Search, train: TrainingSpec) -> Change | None:
    """Pile changes up until the run fits, without those that turn out not to be needed."""
    taken: list[Lever] = []
    for lever in (_sdpa, _checkpointing, _single_row, _fused_loss, _no_kbit, _paged, _double_quant, _quantize):
        if lever(_applied(train, taken).training) is None:
            continue
        taken.append(lever)
        if search.likely(_applied(train, taken).training):
            fewer = _needed(search, train, taken)
            change = search.change(_largest_batch(search, train, fewer)) or search.change(_applied(train, taken))
            if change is not None:
                return change
    step = _applied(train, taken)
    shorter = _shorter_rows(search, step.training, SHORTEST)
    return search.change(_joined(step, shorter)) if shorter else None


def _needed(search: _Search, train: TrainingSpec, taken: list[Lever]) -> list[Lever]:
    """Drop the changes without which the run still fits, the most intrusive first."""
    for lever in reversed(taken):
        fewer = [other for other in taken if other is not lever]
        if search.likely(_applied(train, fewer).training):
            taken = fewer
    return taken


def _largest_batch(search: _Search, train: TrainingSpec, taken: list[Lever]) -> _Step:
    """Give rows back to a micro batch that was cut to one row."""
    if _single_row not in taken:
        return _applied(train, taken)
    step = _applied(train, [lever for lever in taken if lever is not _single_row])
    batch = _smaller_batch(search, step.training)
    return _joined(step, batch) if batch else _applied(train, taken)


def _applied(train: TrainingSpec, levers: Sequence[Lever]) -> _Step:
    step = _Step("", "", (), train)
    for lever in levers:
        more = lever(step.training)
        if more is not None:
            step = _joined(step, more)
    return step


def _joined(first: _Step, second: _Step) -> _Step:
    if not first.text:
        return second
    settings = {**dict(first.settings), **dict(second.settings)}
    option = " ".join(part for part in (first.option, second.option) if part)
    return _Step(f"{first.text}, {second.text}", option, tuple(settings.items()), second.training)


# --- levers: one change each --------------------------------------------------------------------------------------


def _sdpa(train: TrainingSpec) -> _Step | None:
    if train.attention != "eager":
        return None
    changed = replace(train, attention="sdpa")
    return _Step("attention sdpa instead of eager", "--attention sdpa", (("attention", "sdpa"),), changed)


def _checkpointing(train: TrainingSpec) -> _Step | None:
    if train.gradient_checkpointing != "none":
        return None
    changed = replace(train, gradient_checkpointing="full")
    settings: Settings = (("gradient_checkpointing", "full"),)
    return _Step("gradient checkpointing (a slower step)", "--checkpointing full", settings, changed)


def _fused_loss(train: TrainingSpec) -> _Step | None:
    if LOSSES[train.loss].logits == "never":
        return None
    least: Any = LEAST
    changed = replace(train, loss=least, keeps_outputs=False)
    settings: Settings = (("loss", least),)
    option = f"--loss {least}"
    if train.keeps_outputs:
        settings, option = (*settings, ("keeps_outputs", False)), f"{option} --no-keeps-outputs"
    return _Step("a fused loss that never holds all logits (Liger, cut cross entropy)", option, settings, changed)


def _eight_bit(train: TrainingSpec) -> _Step | None:
    name = OPTIMIZERS[train.optimizer].eight_bit
    return _with_optimizer(train, name, "8-bit optimizer states") if name else None


def _paged(train: TrainingSpec) -> _Step | None:
    name = OPTIMIZERS[train.optimizer].paged_eight_bit
    return _with_optimizer(train, name, "paged 8-bit optimizer states") if name else None


def _with_optimizer(train: TrainingSpec, name: Optimizer, text: str) -> _Step:
    changed = replace(train, optimizer=name)
    return _Step(text, f"--optimizer {name}", (("optimizer", name),), changed)


def _no_kbit(train: TrainingSpec) -> _Step | None:
    if not train.kbit_preparation:
        return None
    changed = replace(train, kbit_preparation=False)
    text = "no k-bit preparation (norms, embeddings and head stay 16-bit)"
    return _Step(text, "--no-kbit-prep", (("kbit_preparation", False),), changed)


def _norms_only(train: TrainingSpec) -> _Step | None:
    if not train.kbit_preparation:
        return None
    changed = replace(train, kbit_preparation=False, fp32_norms_only=True)
    settings: Settings = (("kbit_preparation", False), ("fp32_norms_only", True))
    return _Step("only the norms in fp32", "--no-kbit-prep --fp32-norms", settings, changed)


def _double_quant(train: TrainingSpec) -> _Step | None:
    if not QUANTIZATIONS[train.quantization.kind].packed_4bit or train.quantization.double_quant:
        return None
    changed = replace(train, quantization=replace(train.quantization, double_quant=True))
    return _Step("double quantization", "--double-quant", (("double_quant", True),), changed)


def _quantize(train: TrainingSpec) -> _Step | None:
    """A 4-bit base under the same adapter."""
    if train.lora is None or QUANTIZATIONS[train.quantization.kind].bits == 4:
        return None
    dtype = train.autocast if train.autocast != "none" else train.base_dtype
    old = train.quantization
    kind: Any = USUAL
    quantization = QuantizationSpec(
        kind=kind, double_quant=True, quantized_modules="linears", skip_modules=old.skip_modules, compute_dtype=dtype
    )
    method: Method = "dora" if train.method == "dora" else "qlora"
    changed = replace(train, method=method, quantization=quantization)
    settings: Settings = (("method", method), ("quantization", kind), ("double_quant", True))
    option = f"--method {method} --quantization {kind} --double-quant"
    return _Step(f"a 4-bit base ({kind}, double quantization)", option, settings, changed)


def _adapters(train: TrainingSpec) -> _Step | None:
    """Adapters on a 4-bit base instead of training every weight."""
    if train.method != "full":
        return None
    plain = replace(train, method="lora", lora=LoraSpec(), optimizer_in_backward=False)
    step = _quantize(plain)
    assert step is not None
    settings: Settings = (*step.settings, ("r", 8), ("target_modules", ("all-linear",)))
    option = f"{step.option} -r 8 --targets all-linear"
    return _Step("QLoRA r=8 instead of training every weight", option, settings, step.training)


def _with_batch(train: TrainingSpec, batch: int) -> _Step:
    """A smaller micro batch; accumulation keeps the rows of an optimizer step (rounded up)."""
    steps = math.ceil(train.micro_batch_size * train.gradient_accumulation_steps / batch)
    changed = replace(train, micro_batch_size=batch, gradient_accumulation_steps=steps, optimizer_in_backward=False)
    settings: Settings = (("micro_batch_size", batch), ("gradient_accumulation_steps", steps))
    text = f"micro batch {batch} instead of {train.micro_batch_size}, accumulated {steps} times"
    return _Step(text, f"--batch {batch} --grad-accum {steps}", settings, changed)


def _single_row(train: TrainingSpec) -> _Step | None:
    return _with_batch(train, 1) if train.micro_batch_size > 1 else None


def _smaller_batch(search: _Search, train: TrainingSpec) -> _Step | None:
    """The largest micro batch that fits."""
    low, high = 0, train.micro_batch_size
    while high - low > 1:
        middle = (low + high) // 2
        if search.likely(_with_batch(train, middle).training):
            low = middle
        else:
            high = middle
    while low and search.confirmed(_with_batch(train, low).training) is None:
        low = low - max(low // 16, 1)  # the allocator's cache needs some more room
    return _with_batch(train, low) if low else None


def _shorter_rows(search: _Search, train: TrainingSpec, shortest: int) -> _Step | None:
    """The longest rows that fit, in steps of powers of two and their three quarters."""
    length = 1 << max(train.seq_len - 1, 1).bit_length()
    lengths = [part for top in _halves(length) for part in (top, top * 3 // 4)]
    for shorter in (part for part in lengths if max(shortest, SHORTEST) <= part < train.seq_len):
        changed = replace(train, seq_len=shorter)
        if search.likely(changed) and search.confirmed(changed) is not None:
            text = f"rows of {shorter} tokens instead of {train.seq_len}"
            return _Step(text, f"--seq-len {shorter}", (("seq_len", shorter),), changed)
    return None


def _halves(length: int) -> Iterator[int]:
    while length >= SHORTEST:
        yield length
        length //= 2


# --- larger cards -------------------------------------------------------------------------------------------------


def _larger_cards(search: _Search, train: TrainingSpec, cards: Sequence[Gpu]) -> Iterator[Change]:
    """The smallest cards that hold the run unchanged, one of each size, the same generation or newer first."""
    old = search.gpu.compute_capability or (8, 0)  # as `architecture` takes a card that is not known

    def rank(card: Gpu) -> tuple[bool, int, tuple[int, int], float]:
        capability = card.compute_capability or (0, 0)
        return (capability < old, round(card.memory_bytes / 2**30), capability, -card.bandwidth_bytes_per_s)

    larger = [c for c in cards if c.vendor == "NVIDIA" and c.free_bytes > search.gpu.free_bytes]
    sizes: set[int] = set()
    for card in sorted(larger, key=rank):
        size = round(card.memory_bytes / 2**30 / 4)  # cards whose memory differs by little are one choice
        if len(sizes) >= MAX_CARDS or size in sizes:
            continue
        found = search.confirmed(train, card)
        if found is not None:
            sizes.add(size)
            text = f"{card.name} ({card.memory_bytes / 2**30:.2f} GiB)"
            yield _change(_Step(text, f"--gpu {card.gpu_id}", (), train), found, card)
