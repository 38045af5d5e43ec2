.PHONY: test lint bench

test:  ## set up .venv and run every check, as .ci/run does
	python3 .ci/check.py

lint:
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

bench:  ## cold start-up of `loraplan fits` against `import click`
	.venv/bin/python benchmarks/startup.py
