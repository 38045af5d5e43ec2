"""Configs of other training frameworks, read: which options they set, what they leave out, where each value comes from.

`read_job` takes the files of one job (a trainer's file, an accelerate file, a DeepSpeed file) in order. Nothing in a
file is executed, files are bounded in size and depth, and a file that a config names is read only inside its folder.
"""

from __future__ import annotations

from planner.importers.job import Job, read_job

__all__ = ["Job", "read_job"]
