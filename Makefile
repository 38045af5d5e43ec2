.PHONY: test core lint bench agreement readme gpu

PYTHON ?= .venv/bin/python

test:  ## set up .venv and run every check, as .ci/run does
	python3 .ci/check.py

core:  ## an installation with nothing but click and yaml, in a virtual environment that is thrown away
	$(PYTHON) .ci/core.py

lint:
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

bench:  ## cold start-up of `loraplan fits` against `import click`: at most twice its CPU time
	.venv/bin/python benchmarks/startup.py --limit 2.0

agreement:  ## the program against the real libraries' trace, 200 drawn configurations (about 10 minutes on 2 cores)
	.venv/bin/python -m calibrate.oracle.agreement --cases 200

readme:  ## write what the commands print now into README.md and docs/; BECAUSE="..." where figures change by over 0.5 %
	.venv/bin/python .ci/readme.py $(if $(BECAUSE),--because "$(BECAUSE)")

gpu:  ## all that a lent GPU should measure, in gpu/ (9 minutes): grid, its check on other models, the allocator
	$(PYTHON) -m planner.cli.main calibrate run --device cuda:0 --budget 5m --out gpu/fit
	$(PYTHON) -m planner.cli.main calibrate run --device cuda:0 --budget 2m --check --seed 31 --out gpu/check
	$(PYTHON) -m calibrate.measure.history record --out gpu/history.json.gz
	$(PYTHON) -m calibrate.measure.history compare gpu/history.json.gz
	$(PYTHON) -m planner.cli.main calibrate fit gpu/fit --out gpu/calibration.json
	$(PYTHON) -m planner.cli.main calibrate validate gpu/check --calibration gpu/calibration.json
