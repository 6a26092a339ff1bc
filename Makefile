# The layers of checks and tests. `make test` is ./scripts/test.sh, the whole of them.
VENV ?= .venv
PYTEST := ./scripts/test.sh

.PHONY: help
help: ## what there is
	@sed -n 's/^\([a-z0-9]*\):.*## /  \1\t/p' Makefile | expand -t 16

.PHONY: check
check: ## formatting, lint, types, generated files
	./scripts/check.sh

.PHONY: fast
fast: ## unit and integration tests: no server
	$(PYTEST) -m "unit or integration" -n 2 --dist loadfile

.PHONY: e2e
e2e: ## tests that start servers
	$(PYTEST) -m "e2e and not serial" -n 2 --dist loadfile --no-loadscope-reorder
	$(PYTEST) -m "e2e and serial"

.PHONY: kernels
kernels: export MOE_ROUTING_TEST_EXAMPLES = 100
kernels: ## kernels and calibration, with twice the random calls of `make test`
	$(PYTEST) -m "kernels or calibration" -n 2 --dist loadfile

.PHONY: gpu
gpu: ## what needs a GPU, with its report
	./scripts/gpu_check.sh

.PHONY: docs
docs: ## generate what documents and schemas are made from, then test them
	$(VENV)/bin/python scripts/make_schema.py
	$(VENV)/bin/python scripts/make_reference.py
	$(VENV)/bin/python scripts/make_api.py
	$(PYTEST) tests/unit/test_docs.py

.PHONY: figures
figures: ## static figures of the CUDA kernels; needs nvcc
	$(VENV)/bin/python scripts/kernel_figures.py

.PHONY: test
test: ## everything, as continuous integration runs it
	./scripts/test.sh

.PHONY: demo
demo: ## serve a small model on the CPU and check every policy
	./scripts/demo.sh
