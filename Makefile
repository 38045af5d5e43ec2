.PHONY: test lint bench readme

test:  ## set up .venv and run every check, as .ci/run does
	python3 .ci/check.py

lint:
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

bench:  ## cold start-up of `loraplan fits` against `import click`
	.venv/bin/python benchmarks/startup.py

readme:  ## write what the commands print now into README.md
	.venv/bin/python tests/test_docs.py
