# `make check` is everything a change must pass. `make format-fix` mends what a tool can mend.
PYTHON ?= python

.PHONY: check format format-fix lint types tests tests-oldest docs

check: format lint types tests docs

format:
	$(PYTHON) -m ruff format --check .

format-fix:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

lint:
	$(PYTHON) -m ruff check .

types:
	$(PYTHON) -m mypy

tests:
	$(PYTHON) -m pytest -n auto --dist worksteal --ignore=tests/test_docs.py --ignore=tests/test_site.py

# The oldest torch and timm that setup.cfg allows, in an environment of their own (some 6 GB).
tests-oldest:
	$(PYTHON) -m venv build/oldest
	build/oldest/bin/pip install -q -c constraints-oldest.txt -e '.[test]'
	build/oldest/bin/python -m pytest -n auto --dist worksteal

# The site is left in build/site.
docs:
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet
	$(PYTHON) -m pytest tests/test_docs.py tests/test_site.py
