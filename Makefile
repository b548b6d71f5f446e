# What one does with this project: make setup | run | test | check | bench. Works as a user, as root and with sudo.

VENV := .venv
BIN := $(VENV)/bin
RIG := $(VENV)/rig
SETUP := $(VENV)/.setup-done
RIG_SETUP := $(RIG)/.setup-done
CACHES := .pytest_cache .mypy_cache .ruff_cache .hypothesis docs/bench.json docs/bench.png README.md

# Most of a test's time goes by waiting: the files of tests run side by side, each in one process from its first test to
# its last. JOBS=0 runs one after the other, without such processes. Before, all is compiled, also where the environment
# tells Python to keep nothing of that: it is started some thousand times.
JOBS := 4
PYTEST := $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

# The engine of the BSDs is tested on a stand-in for kqueue. The sandbox is that of Linux, and knows nothing of the calls
# that the stand-in makes.
KQUEUE_ENV := KORE_IO=kqueue KORE_SANDBOX=no PYTHONPATH=$(CURDIR)/tests/kqueue

# What runs once more with the workers of all servers in the sandbox, as outside development they are: about two minutes.
INSIDE := $(patsubst %,tests/%.py,test_reference test_reference_awaitables test_http_server_handlers test_http_bodies \
	test_http_files test_websocket_clients test_asgi_frameworks test_proc_odd test_curl_ends test_postgresql_served \
	test_libraries_clients test_examples_files test_tls_domains test_tls_conversations)

# With sudo, what root wrote goes back to who called it.
GIVE_BACK = @if [ -n "$$SUDO_UID" ]; then for f in $(CACHES) $$(find kore tests -name __pycache__); do \
	if [ -e "$$f" ]; then chown -R "$$SUDO_UID:$${SUDO_GID:-$$SUDO_UID}" "$$f"; fi; done; fi

.PHONY: help setup run test check bench rig clean

help:
	@echo "make run     set up, then serve examples/hello.py on http://127.0.0.1:8888/"
	@echo "make test    set up, then run the tests on io_uring, what depends on the engine on epoll and on a stand-in for kqueue"
	@echo "             as well, and a part once more with the sandbox around the workers"
	@echo "make check   ruff, mypy and the house rules"
	@echo "make bench   compare with other servers (SHORT=1: two minutes; UPDATE=1: all of it, written into docs/ and README.md;"
	@echo "             ARGS=\"--cases plain --peers nginx\" goes to the rig)"
	@echo "make setup   only what the others need: system packages, a virtual environment in $(VENV)"
	@echo "make clean   remove $(VENV) and the caches"

setup: $(SETUP)
	@echo "setup: ready"

$(SETUP): pyproject.toml scripts/setup.sh
	@sh scripts/setup.sh project

rig: $(SETUP) $(RIG_SETUP)

$(RIG_SETUP): tests/perf/requirements.txt scripts/setup.sh $(SETUP)
	@sh scripts/setup.sh rig

run: $(SETUP)
	@echo "kore: open http://127.0.0.1:8888/ (Ctrl-C stops it)"
	@exec $(BIN)/kore examples/hello.py

test: $(SETUP)
	@sh scripts/setup.sh browser
	@sh scripts/setup.sh services
	@$(BIN)/python -m compileall -q kore tests
	@status=0; engines=epoll; if reason=$$($(BIN)/python scripts/try_uring.py 2>&1); then \
		engines="uring epoll"; \
		echo "test: everything, on io_uring"; KORE_IO=uring $(PYTEST) || status=1; \
		echo "test: what depends on the engine, on epoll"; \
		KORE_TESTS=engine KORE_IO=epoll $(PYTEST) || status=1; \
	else \
		echo "test: no io_uring here ($$reason): the tests run on epoll only"; \
		KORE_IO=epoll $(PYTEST) || status=1; \
	fi; \
	if reason=$$($(BIN)/python scripts/try_sandbox.py 2>&1); then for engine in $$engines; do \
		echo "test: with the workers in the sandbox, on $$engine"; \
		KORE_SANDBOX=yes KORE_IO=$$engine $(PYTEST) $(INSIDE) || status=1; \
	done; else \
		echo "test: no sandbox here ($$reason): no test runs with the workers in it"; \
	fi; \
	echo "test: what depends on the engine, on kqueue's stand-in"; \
	KORE_TESTS=engine $(KQUEUE_ENV) $(PYTEST) || status=1; \
	exit $$status
	$(GIVE_BACK)
	@echo "test: all passed"

check: $(SETUP)
	@echo "check: ruff"; $(BIN)/ruff check kore tests examples scripts
	@echo "check: mypy"; $(BIN)/mypy
	@echo "check: house rules"; $(BIN)/python -m pytest -q tests/test_house.py
	$(GIVE_BACK)
	@echo "check: all passed"

bench: rig
	@$(BIN)/python -m tests.perf $(if $(SHORT),--short) $(if $(UPDATE),--update) $(ARGS)
	$(GIVE_BACK)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find kore tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
