# What contributors do, by name. `make` says what there is.
.DEFAULT_GOAL := help
NB ?= nbs/*.ipynb

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile

setup:  ## install for development, with JupyterLab, a notebook-aware git and the checks before each commit
	pip install -e ".[dev,notebooks]"
	nbdime config-git --enable
	pre-commit install

export:  ## notebooks to library and README, clean, with the project's address
	nbdev_clean
	python docs/stamp.py
	nbdev_export
	python docs/readme.py

run:  ## run notebooks and keep their outputs: make run NB=nbs/04_recall.ipynb
	python docs/run_notebook.py $(NB)

test:  ## lint, types and all tests, notebooks among them
	ruff check
	pytest

site:  ## build the site and look at it on http://127.0.0.1:8000
	python docs/build.py
	python -m http.server --directory docs/site --bind 127.0.0.1 8000

.PHONY: help setup export run test site
