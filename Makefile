PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo test lint

demo: $(VENV)/installed
	$(RUN) train_stage1.py --resume
	$(RUN) pretokenize.py
	$(RUN) train_ar.py --resume
	$(RUN) sample.py --pair out --out out --num_samples 2000
	$(RUN) sample.py --pair out --out out/no_cfg --num_samples 2000 --no_cfg
	$(RUN) fid.py --tokenizer out/tokenizer.safetensors
	$(RUN) fid.py out/no_cfg/samples.npz
	$(RUN) fid.py out/samples.npz

test: $(VENV)/installed
	$(RUN) -m pytest -q test_all.py tests

lint: $(VENV)/installed
	$(RUN) -m pip install -q ruff
	$(RUN) -m ruff check .

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -r requirements.txt
	touch $@
