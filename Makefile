# Every target sets up what it needs in .venv; once that is there, nothing is downloaded again.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demos test lint bench clean

demo: .venv/.installed
	$(BIN)/python gft_food101.py --demo

demos: .venv/.installed
	for script in *_*.py; do $(BIN)/python $$script --demo || exit 1; done
	$(BIN)/python ffvt/train.py --name demo --dataset CUB --demo --feature_fusion
	$(BIN)/python glsim/tools/train.py --cfg_method glsim/configs/methods/glsim.yaml --demo

test: .venv/.tested
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.installed
	$(BIN)/python -m benchmarks.models
	$(BIN)/python -m benchmarks.psm

# The stamps are made last: an installation that was interrupted is taken up again.
.venv/.installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version) if sys.version_info < (3, 10) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/.tested: .venv/.installed pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,demo]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
