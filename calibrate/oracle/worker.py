"""Worker: one request on stdin, one JSON line on stdout. `loraplan trace` starts it as a process of its own.

A wrong device aborts the interpreter and a strange config may run for ever, so the caller only trusts that line.

    request   {"config": {...}, "training": {...}, "layers": "auto" | "full" | N, "arch": {...}, "events": false}
    answer    {"model": {...}, "summary": {...}, "events": [[storage, bytes], ...]}
              or {"error": {"type": "...", "message": "..."}}

`config` is a Hugging Face config, `training` what TrainingSpec.describe() prints, `arch` fields of
planner.device.cuda_rules.Architecture. Lines that start with "progress: " go to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from planner.base.errors import PlannerError, one_line
from planner.device.cuda_rules import Architecture

ADDRESS_SPACE = 32 * 2**30
"""Limit of the process: a full trace of a 70B model maps a fifth of it, a hostile config stops here."""


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run the trace that was asked for."""
    _say("loading torch, transformers, peft and bitsandbytes")
    from calibrate.oracle import summary
    from calibrate.oracle.trace import quiet, trace
    from planner.training.spec import training_from_dict

    config, training = request["config"], training_from_dict(request["training"])
    facts: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in request["arch"].items()}
    arch = Architecture(**facts)
    layers = request["layers"]
    with quiet():
        if layers == "auto" and not request["events"]:
            _say("tracing a few layers")
            return {"model": _facts(config), "summary": summary.summarise(config, training, arch=arch).describe()}
        _say("tracing every layer" if not isinstance(layers, int) else f"tracing {layers} layers")
        result = trace(config, training, layers=layers if isinstance(layers, int) else None, arch=arch)
        found: dict[str, Any] = {"model": _facts(config), "summary": summary.of_trace(result).describe()}
        if request["events"]:
            found["events"] = [[e.id, e.nbytes] for e in result.events]
        return found


def _facts(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes as the model's own config class names them."""
    from calibrate.model.fake_model import model_config

    cfg = model_config(config).get_text_config()
    sizes = {name: getattr(cfg, name, 0) for name in ("hidden_size", "vocab_size", "max_position_embeddings")}
    return {"model_type": cfg.model_type, **{k: v if isinstance(v, int) else 0 for k, v in sizes.items()}}


def failure(error: BaseException) -> dict[str, Any]:
    """What went wrong, in one line."""
    if isinstance(error, PlannerError):
        return {"type": type(error).__name__, "message": str(error)}
    text = " ".join(str(error).split()) or "no message"
    return {"type": "TraceFailed", "message": f"the libraries refuse this run: {type(error).__name__}: {text}"}


def main() -> int:
    """Answer one request; exit 0 with an answer, 2 with an error."""
    line = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not the answer
    _limit()
    try:
        document = answer(json.load(sys.stdin))
    except Exception as error:  # noqa: BLE001 - the line says what happened, whatever it was
        if os.environ.get("LORAPLAN_DEBUG"):
            import traceback

            traceback.print_exc()
        document = {"error": failure(error)}
    with line:
        json.dump(document, line)
        line.write("\n")
    return 2 if "error" in document else 0


def _limit() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    except (ImportError, ValueError, OSError):
        pass  # not on this system, or a tighter limit holds already


def _say(text: str) -> None:
    print(f"progress: {one_line(text)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
