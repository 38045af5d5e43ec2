"""From a request to an answer: predictions, intervals, verdicts, tables, searches."""
