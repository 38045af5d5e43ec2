.PHONY: test lint bench agreement readme

test:  ## set up .venv and run every check, as .ci/run does
	python3 .ci/check.py

lint:
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

bench:  ## cold start-up of `loraplan fits` against `import click`
	.venv/bin/python benchmarks/startup.py

agreement:  ## the program against the real libraries' trace, 200 drawn configurations (about 10 minutes on 2 cores)
	.venv/bin/python -m calibrate.agreement --cases 200

readme:  ## write what the commands print now into README.md
	.venv/bin/python tests/test_docs.py
