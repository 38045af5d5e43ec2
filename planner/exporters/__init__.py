"""From a planned run to files that other programs launch: scripts, framework configs, Databricks jobs and clusters."""
