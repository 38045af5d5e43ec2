"""A whole run: training data, schedule, cost."""
