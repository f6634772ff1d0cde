# Every target sets up what it needs in .venv; once that is there, nothing is downloaded again.
#
# The tested set is installed: requirements.lock (to run) or requirements-test.lock (also to test), every file against its
# sha256, nothing beside what stands there. Where that set does not fit, as with another torch, `make clean` and then
# `make test LOCK=` takes the newest releases inside the ranges of requirements.txt and pyproject.toml, unhashed.
PYTHON ?= python3
LOCK ?= yes
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
NUMERIC := tests/parity tests/models tests/ffvt $(addprefix tests/test_,$(addsuffix .py,google_npz direct loop precision)) \
	$(addprefix tests/glsim/test_,$(addsuffix .py,glsim_model glsim_families timm_glsim transfg_official cal heatmap \
	glsim_training)) $(addprefix tests/contract/test_,$(addsuffix .py,processes answers))
LOCKED := --require-hashes --no-deps -r
COMPILE := $(BIN)/uv pip compile --quiet --no-config --default-index https://pypi.org/simple --universal \
	--python-version 3.10 --generate-hashes --upgrade --custom-compile-command 'make lock'

.PHONY: demo demos test faults processors against coverage lint lock audit bench performance clean

demo: .venv/.installed
	$(BIN)/python gft_food101.py --demo

demos: .venv/.installed
	for script in *_*.py; do $(BIN)/python $$script --demo || exit 1; done
	$(BIN)/python ffvt/train.py --name demo --dataset CUB --demo --feature_fusion
	$(BIN)/python glsim/tools/train.py --cfg_method glsim/configs/methods/glsim.yaml --demo

test: .venv/.tested
	$(BIN)/python -m pytest -n 2

# Every moment of tests/contract, of which `make test` runs some; docs/reliability.md is written where all held.
faults: .venv/.tested
	$(BIN)/python -m pytest -n 2 -m "" --timeout 1800 tests/contract --reliability docs/reliability.md

# Bounds on floats hold on every processor: the tests that have some, as older and other machines compute.
processors: .venv/.tested
	for setting in ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=SSE41 ONEDNN_MAX_CPU_ISA=AVX2 \
		OMP_NUM_THREADS=2; do \
		echo $$setting && env $$setting $(BIN)/python -m pytest -n 2 $(NUMERIC) || exit 1; done

# What the 23 programs compute otherwise here than at another commit, to the bit: some minutes on two cores.
against: .venv/.tested
	$(if $(REV),,$(error Which commit? For example: make against REV=HEAD))
	$(BIN)/python tests/against.py $(REV) $(if $(ONLY),--only $(ONLY))

# The tests again, counting lines and branches, those run by programs that the tests start too; each part must reach 90 %.
coverage: .venv/.tested
	$(BIN)/python -m pytest -n 2 --timeout 1200 --cov --cov-report= --cov-fail-under=0
	for part in common ffvt gft glsim/model_utils results; do $(BIN)/coverage report --include="$$part/*" || exit 1; done

lint: .venv/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Pins the newest releases, for every platform and Python from 3.10 on, with the hashes of all their files. Needs PyPI.
lock: .venv/.tested
	$(COMPILE) pyproject.toml --extra test --extra demo --extra export --extra maintain -o requirements-test.lock
	$(COMPILE) requirements.txt -c requirements-test.lock -o requirements.lock

# Needs PyPI's vulnerability data: a package that cannot be looked up there is a failure, not a pass.
audit: .venv/.tested
	$(BIN)/python -m pip check
	$(BIN)/pip-audit --strict --disable-pip --require-hashes -r requirements-test.lock

# What models, training loop and input cost beside plain PyTorch: a minute, and for the page docs/performance.md ten.
bench: .venv/.installed
	$(BIN)/python -m benchmarks --quick

performance: .venv/.installed
	$(BIN)/python -m benchmarks

# The stamps are made last: an installation that was interrupted is taken up again.
.venv/.installed: requirements.txt requirements.lock
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version) if sys.version_info < (3, 10) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) $(if $(LOCK),$(LOCKED) requirements.lock,-r requirements.txt)
	touch $@

.venv/.tested: .venv/.installed pyproject.toml requirements-test.lock
	$(INSTALL) $(if $(LOCK),$(LOCKED) requirements-test.lock,-e '.[test,demo,export,maintain]')
	$(BIN)/python -m pip check
	touch $@

clean:
	rm -rf .venv build *.egg-info .coverage*
