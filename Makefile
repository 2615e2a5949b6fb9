# make demo    fetch a model, ask it about a long text, fine-tune it: the main job, in some minutes on a laptop
# make test    the whole suite, once per backend
# make lint    ruff
# Each sets up .venv by itself.

PYTHON ?= python3
PY := .venv/bin/python
MAC := $(filter Darwin-arm64,$(shell uname -s)-$(shell uname -m))
# the release that the suite is run with
TORCH := torch==2.13.0
MLX := $(if $(MAC),mlx,mlx[cpu])

.PHONY: demo test lint clean

demo: .venv/demo
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash runs/demo.sh

test: .venv/test
	PATH="$(CURDIR)/.venv/bin:$$PATH" bash tests/run.sh

lint: .venv/lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

.venv/base: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "nanolong needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V): try make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q numpy tokenizers sentencepiece safetensors tqdm jinja2 gguf huggingface_hub matplotlib
	touch $@

.venv/demo: .venv/base
	$(PY) -m pip install -q $(if $(MAC),mlx,$(TORCH))
	touch $@

.venv/test: .venv/base
	$(PY) -m pip install -q $(TORCH)
	$(PY) -m pip install -q "$(MLX)" transformers accelerate mlx-lm pytest $(if $(MAC),,triton)
	touch $@

.venv/lint: .venv/base
	$(PY) -m pip install -q ruff
	touch $@

clean:
	rm -rf .venv
