PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo test lint

demo: $(VENV)/installed
	$(RUN) tools/run_demo.py

test: $(VENV)/installed
	$(RUN) -m pytest -q test_all.py tests
	$(RUN) tools/check_readme.py

lint: $(VENV)/installed
	$(RUN) -m pip install -q ruff
	$(RUN) -m ruff check .

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -r requirements.txt
	touch $@
